"""Damaged and hostile folders: every one is refused, and the model stays as it was."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import (
    PATTERN,
    Net,
    assert_equal,
    dense,
    edit,
    entry,
    put,
    refused,
    retensor,
    rewrite,
    saved_into,
    sparse,
    weights,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsefx.ir.errors import ArtifactError
from sparsefx.runtime.artifact import load, save
from sparsefx.runtime.install import packed_modules

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_into(tmp_path)


Change = Callable[[dict[str, Any]], object]
MANIFESTS: list[tuple[str, Change]] = [
    ("format_version is 1", lambda f: f.update(format_version=1)),
    ("format_version is True", lambda f: f.update(format_version=True)),
    ("format_version is None", lambda f: f.pop("format_version")),
    ("'extra'", lambda f: f.update(extra=1)),
    ("'aliases'", lambda f: f.pop("aliases")),
    ("'bytes'", lambda f: f.update(bytes=-1)),
    ("'bytes'", lambda f: f.update(bytes=1 << 70)),
    ("'bytes'", lambda f: f.update(bytes=float(f["bytes"]))),
    ("bytes", lambda f: f.update(bytes=f["bytes"] - 1)),
    ("'sha256'", lambda f: f.update(sha256=f["sha256"][:-1] + "x")),
    ("SHA-256", lambda f: f.update(sha256=f["sha256"][:16] + "0" * 48)),
    ("not named by its SHA-256", lambda f: f.update(sha256="0" * 64)),
    ("'weights'", lambda f: f.update(weights="../" + f["weights"])),
    ("'weights'", lambda f: f.update(weights="/etc/passwd")),
    ("'weights'", lambda f: f.update(weights=f["weights"] + "\n")),
    ("'weights'", lambda f: f.update(weights="model.pt")),
    ("packed.0", lambda f: f["packed"][0].update(n=-32)),
    ("packed.0", lambda f: f["packed"][0].update(k=1 << 40)),
    ("packed.0", lambda f: f["packed"][0].update(n=32.0)),
    ("packed.0", lambda f: f["packed"][0].update(k=True)),
    ("packed.0", lambda f: f["packed"][0].update(kind="lambda")),
    ("packed.0", lambda f: f["packed"][0].update(dtype="float64")),
    ("packed.0", lambda f: f["packed"][0].update(names=[])),
    ("packed.0", lambda f: f["packed"][0].update(code="print()")),
    ("stride", lambda f: entry(f, "conv.weight").update(stride=[0])),
    ("shape", lambda f: entry(f, "attn.in_proj_weight").update(shape=[-96, -32])),
    ("unknown token 'tile16'", lambda f: entry(f).update(format="tile16+int4")),
    ("does not fit", lambda f: entry(f).update(format="3:5+int4g32")),
    ("does not fit", lambda f: entry(f).update(format=" tile16x1@50%+int4g32")),
    ("more than min", lambda f: entry(f).update(format="int4g32+r64")),
    ("no such parameter", lambda f: entry(f).update(names=["absent.weight"])),
    ("no such parameter", lambda f: entry(f).update(names=["norm.running_mean"])),
    ("no such parameter", lambda f: entry(f).update(names=["a"])),
    ("no plain linear", lambda f: entry(f).update(names=["attn.in_proj_weight"])),
    ("BatchNorm1d", lambda f: entry(f).update(names=["norm.weight"])),
    ("Embedding", lambda f: entry(f).update(names=["embed.weight"], n=10)),
    ("32×33", lambda f: entry(f).update(k=33)),
    ("Conv1d", lambda f: entry(f, "conv.weight").update(stride=[1])),
    ("Linear", lambda f: entry(f).update(kind="conv1x1", stride=[1])),
    ("96, 32 in the model", lambda f: entry(f, "attn.in_proj_weight").update(shape=[32, 96])),
    ("in the model", lambda f: entry(f, "attn.in_proj_weight").update(transposed=True)),
    ("missing .*a.bias|has a bias", lambda f: entry(f).update(bias=False)),
    ("left over a.branch_scale, a.down, a.up", lambda f: entry(f).update(rank=0)),
    ("branch of rank 4", lambda f: entry(f).update(rank=4)),
    ("left over .*conv.scales.*conv.values", lambda f: f["packed"].remove(entry(f, "conv.weight"))),
    ("packed twice", lambda f: f["packed"].append(entry(f))),
    ("float16 in the file", lambda f: entry(f).update(dtype="float16")),
    ("take", lambda f: entry(f).update(format="tile16x1@50%+int8g32")),
    ("take", lambda f: entry(f).update(format="bitmap@50%+int4g32")),
    ("left over .*a.scales", lambda f: entry(f).update(format="tile16x1@50%+bf16")),
    ("missing .*b.values", lambda f: f["aliases"].pop("b.values")),
    ("names no stored tensor", lambda f: f["aliases"].update({"b.values": "gone"})),
    ("names no stored tensor", lambda f: f["aliases"].update({"a.bias": "a.bias"})),
    ("left over zz", lambda f: f["aliases"].update(zz="a.bias")),
    ("'b.weight'.*its buffers are", lambda f: f["aliases"].update({"b.values": "a.bias"})),
]  # fmt: skip


@pytest.mark.parametrize(("words", "change"), MANIFESTS)
def test_manifest_is_not_trusted(words: str, change: Change, folder: Path) -> None:
    edit(folder, change)
    message = refused(folder)
    assert re.search(words, message.replace("(", "").replace(")", ""))
    assert str(folder) in message
    assert len(message) < 1500


NAMES = (
    "__class__", "a.__dict__", "a..b", ".a", "a.", "a b", "a-b", "a\n", "é", "1a", "", "a" * 2000,
    "a/b",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["names", "alias", "home", "transient"])
def test_names_are_identifiers(name: str, place: str, folder: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        if place == "names":
            entry(fields)["names"] = [name]
        elif place == "transient":
            fields["transient"] = [name]
        else:
            fields["aliases"] |= {name: "a.bias"} if place == "alias" else {"x": name}

    edit(folder, change)
    assert "identifiers" in refused(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply|sound JSON"),
        ('{"a":' * 100_000, "nested too deeply|sound JSON"),
        ("[]", "format_version is None"),
        ("", "sound JSON"),
        ('{"format_version": 2, "format_version": 2}', "stands twice"),
        ('{"format_version": 2, "bytes": NaN}', "no number"),
        ('{"format_version": 2, "bytes": ' + "9" * 5000 + "}", "."),
        ('{"format_version": "' + "1" * 5000 + '"}', "format_version"),
        ("\ud800", "sound JSON"),
        ("\x80\x04}q\x00.", "sound JSON"),
    ],
)
def test_hostile_json(text: str, words: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    message = refused(folder)
    assert re.search(words, message)
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"tile16x1@50%+int4g32"', '"tile16x1@40%+int4g32"'),  # fits the buffers as well
        ('"model": "Net"', '"model": "Met"'),
    ],
)
def test_a_manifest_that_was_altered_is_refused(old: str, new: str, folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert "was altered since it was saved" in refused(folder)


def test_an_oversized_manifest_is_not_parsed(folder: Path) -> None:
    with (folder / "manifest.json").open("ab") as file:
        file.truncate((64 << 20) + 1)
    assert "no manifest is" in refused(folder)


def flip(name: str, value: float, index: int = 0) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[index] = value

    return change


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name].flatten()[:-1].clone()})


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("not finite", flip("a.scales", torch.nan)),
        ("not finite", flip("a.scales", torch.inf, -1)),
        ("for 448 kept", flip("a.index", 0)),
        ("take", cut("a.values")),
        ("take", cut("a.scales")),
        ("its index", cut("a.index")),
        ("its buffers are", cast("a.values", torch.int8)),
        ("its buffers are", cast("a.scales", torch.float32)),
        ("not of bytes", cast("a.index", torch.float32)),
        ("not as int4g32 writes", lambda t: t.update({"a.scales": t["a.scales"].view(-1)})),
        ("'a.bias'", cut("a.bias")),
        ("'norm.weight'", cast("norm.weight", torch.float16)),
        ("'norm.weight'", cut("norm.weight")),
        ("branch of rank 3", cut("a.down")),
        ("missing conv.bias", lambda t: t.pop("conv.bias")),
        ("left over zz", lambda t: t.update(zz=torch.zeros(1))),
    ],
)
def test_tensors_are_not_trusted(
    words: str, change: Callable[[dict[str, Tensor]], object], folder: Path
) -> None:
    retensor(folder, change)
    assert re.search(words, refused(folder))
    assert re.search(words, refused(folder, dense(device="meta")))


@pytest.mark.parametrize(
    ("text", "byte"),
    [
        ("2:4", 0b0111_0011),
        ("2:4", 0b0001_0011),
        ("1:3", 0b11),
        ("2:8", 0b00_001_001),
        ("5:8", 0xFF),
    ],
)
def test_an_index_that_breaks_its_layout(text: str, byte: int, tmp_path: Path) -> None:
    want = nn.Sequential(nn.Linear(24, 8))
    put(want, ["0.weight"], f"{text}+int8")
    save(want, tmp_path)
    retensor(tmp_path, flip("0.index", byte))
    assert f"layout {text}" in refused(tmp_path, nn.Sequential(nn.Linear(24, 8)))


def test_padding_bits_must_be_zero(tmp_path: Path) -> None:
    want = nn.Sequential(nn.Linear(3, 3))
    put(want, ["0.weight"], "bitmap@50%+int4")
    save(want, tmp_path)
    retensor(
        tmp_path, lambda t: t["0.index"].bitwise_or_(torch.tensor([0, 128], dtype=torch.uint8))
    )
    assert "layout bitmap" in refused(tmp_path, nn.Sequential(nn.Linear(3, 3)))


def header(text: str, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def one(
    dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", name: str = "a.bias"
) -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        header("{}", b"", 1 << 62),
        header("{}", b"", 200 << 20),
        header("{" + one() + "}", b"\0" * 7),
        header("{" + one() + "}", b"\0" * 9),
        header("{" + one(offsets="[8,0]") + "}"),
        header("{" + one(offsets="[0,99]") + "}"),
        header("{" + one(offsets="[-8,0]") + "}"),
        header("{" + one(shape="[-2]") + "}"),
        header("{" + one(shape="[4611686018427387904,4]", offsets="[0,0]") + "}", b""),
        header("{" + one(shape="[2.0]") + "}"),
        header("{" + one(dtype="OBJ") + "}"),
        header("{" + one() + "," + one(name="b") + "}"),
        header("{" + one() + "," + one() + "}"),
        header("{" + one(name="b", offsets="[4,12]") + "," + one() + "}", b"\0" * 12),
        header('{"a":' * 50_000),
        header("not json"),
        b"\x80\x04\x95cposix\nsystem\n(S'false'\ntR.",
    ],
)
def test_unsound_safetensors(content: bytes, folder: Path) -> None:
    rewrite(folder, content)
    refused(folder)


def test_altered_short_and_missing_weights(folder: Path) -> None:
    path = weights(folder)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "SHA-256" in refused(folder)
    path.write_bytes(good[:-1])
    assert "SHA-256" in refused(folder)
    path.unlink()
    assert "is missing" in refused(folder)


@pytest.mark.parametrize("which", ["manifest.json", PATTERN])
@pytest.mark.parametrize("link", ["symlink", "hard link", "pipe", "folder"])
def test_linked_files_are_refused(which: str, link: str, folder: Path) -> None:
    path = next(folder.glob(which))
    aside = path.rename(folder / "aside")
    if link == "symlink":
        path.symlink_to(aside)
    elif link == "hard link":
        path.hardlink_to(aside)
    elif link == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert str(path) in refused(folder)


class Bomb:
    """A pickle of this would create the file `armed` names."""

    armed = "exploded"

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.armed,))


def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), tmp_path / "model.pt")
    assert "pickle" in refused(tmp_path)
    assert "pickle" in refused(tmp_path / "model.pt")
    (tmp_path / "model.pt").rename(tmp_path / "manifest.json")
    assert "sound JSON" in refused(tmp_path)
    assert "not a folder" in refused(tmp_path / "nowhere")
    assert not (tmp_path / "exploded").exists()


def test_load_refuses_other_models(folder: Path) -> None:
    other = dense()
    other.head = nn.Linear(32, 10, bias=True)
    assert "missing head.bias" in refused(folder, other)
    assert "no such parameter" in refused(folder, nn.Sequential(nn.Linear(2, 2)))
    hooked = dense()
    hooked.a.register_forward_hook(lambda *args: None)
    assert "hooks" in refused(folder, hooked)
    assert "packed already" in refused(folder, sparse())


# --- random damage -------------------------------------------------------------------------------


def attempt(folder: Path, good: Net) -> None:
    """Loading either raises ArtifactError or gives exactly the saved model."""
    model = dense()
    try:
        load(folder, model)
    except ArtifactError:
        return
    assert_equal(model, good)


QUIET = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUIET
@given(data=st.data(), which=st.sampled_from(["manifest.json", PATTERN]))
def test_damaged_bytes_are_never_a_silent_success(
    data: st.DataObject, which: str, folder: Path
) -> None:
    path = next(folder.glob(which))
    content = bytearray(good := path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path.write_bytes(content)
    try:
        attempt(folder, sparse())
    finally:
        path.write_bytes(good)


@QUIET
@given(data=st.data())
def test_damage_that_the_manifest_vouches_for(data: st.DataObject, folder: Path) -> None:
    """With the hash made right, a load may succeed, never with buffers kernels trust wrongly."""
    path = weights(folder)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    rewrite(folder, bytes(content))
    model = dense()
    try:
        load(folder, model)
    except ArtifactError:
        pass
    else:
        for module in packed_modules(model).values():
            assert module.packed.unpack().isfinite().all()
