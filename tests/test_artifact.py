"""Saved folders: byte-exact round trips, hostile folders refused, crashes that lose nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import resource
import signal
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sparsefx.ir.errors import ArtifactError
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import LAYOUTS
from sparsefx.runtime import artifact
from sparsefx.runtime.artifact import load, save
from sparsefx.runtime.install import install, packed_modules, set_module
from sparsefx.runtime.modules import SparseLinear
from torch import Tensor, nn

torch.set_num_threads(1)
CODECS = ["", "bf16", "fp16", "int8", "int4g32", "int3g16", "uint4g16", "uint2", "int5"]
FORMATS = [f"{layout.example}+{codec}".rstrip("+") for layout in LAYOUTS for codec in CODECS]
PATTERN = "weights-*.safetensors"


class Net(nn.Module):
    """Every kind of weight: linears (two tied), 1×1 convolution, attention, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.b.weight = self.a.weight
        self.conv = nn.Conv1d(32, 16, 1, stride=2)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head, self.embed = nn.Linear(32, 10, bias=False), nn.Embedding(10, 32)
        self.head.weight = self.embed.weight
        self.mask: Tensor
        self.shift: Tensor
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x))) + self.shift.sum() + self.mask.exp().sum()
        x = x + self.attn(x, x, x, need_weights=False)[0]
        y = self.norm(self.conv(x.transpose(1, 2)))
        out: Tensor = self.head(x).mean() + y
        return out


def dense(seed: int = 0, device: str = "cpu") -> Net:
    torch.manual_seed(seed)
    with torch.device(device):
        return Net().eval()


def put(model: nn.Module, names: list[str], text: str, rank: int = 0) -> None:
    """Pack the parameter `names` of `model` as `text`, with a random branch."""
    weight = model.get_parameter(names[0]).detach()
    matrix = weight.flatten(1) if weight.dim() > 2 else weight
    n, k = matrix.shape
    branch = (torch.randn(rank, k), torch.randn(n, rank), torch.rand(rank)) if rank else ()
    install(model, names, Format.parse(text).pack(matrix), branch)


def sparse(text: str = "tile16x1@50%+int4g32", seed: int = 1) -> Net:
    model = dense(seed)
    put(model, ["a.weight", "b.weight"], text, rank=3)
    put(model, ["conv.weight"], text)
    put(model, ["attn.in_proj_weight"], text)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def assert_equal(got: nn.Module, want: nn.Module) -> None:
    """Same names, dtypes, bytes, ties and outputs."""
    a, b = state(got), state(want)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        one, two = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name]))
        assert torch.equal(one, two), name
    assert ties(a) == ties(b)
    assert {n: m.format for n, m in packed_modules(got).items()} == {
        n: m.format for n, m in packed_modules(want).items()
    }
    x = torch.randn(2, 5, 32)
    assert torch.equal(got(x), want(x))


def ties(tensors: dict[str, Tensor]) -> set[tuple[str, ...]]:
    groups: dict[int, tuple[str, ...]] = {}
    for name, tensor in sorted(tensors.items()):
        groups[tensor.data_ptr()] = (*groups.get(tensor.data_ptr(), ()), name)
    return {names for names in groups.values() if len(names) > 1}


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_round_trip_is_byte_equal(text: str, tmp_path: Path) -> None:
    want = sparse(text)
    save(want, tmp_path / "m")
    model = dense()
    assert load(tmp_path / "m", model) is model
    assert_equal(model, want)


def test_meta_model_is_filled_completely(tmp_path: Path) -> None:
    want = sparse()
    save(want, tmp_path)
    got = load(tmp_path, dense(device="meta"))
    assert_equal(got, want)
    assert [p.requires_grad for p in got.parameters()] == [p.requires_grad for p in want.parameters()]


def test_a_second_save_of_a_loaded_model_is_the_same_file(tmp_path: Path) -> None:
    save(sparse(), tmp_path / "a")
    save(load(tmp_path / "a", dense()), tmp_path / "b")
    names = [next((tmp_path / side).glob(PATTERN)).name for side in "ab"]
    assert names[0] == names[1]


def test_a_real_model_keeps_its_parameters_and_own_transient_buffers(tmp_path: Path) -> None:
    save(sparse(), tmp_path)
    model = dense()
    model.shift += 1
    norm = model.norm.weight
    load(tmp_path, model)
    assert model.norm.weight is norm
    assert model.shift.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models(dtype: torch.dtype, tmp_path: Path) -> None:
    want = sparse().to(dtype)
    save(want, tmp_path)
    got = load(tmp_path, dense().to(dtype))
    assert isinstance(got.a, SparseLinear)
    assert got.a.dtype == dtype
    assert torch.equal(got.a.weight, want.a.weight)
    with pytest.raises(ArtifactError, match=r"float32 in the model.*\.to\(\)"):
        load(tmp_path, dense())


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    save(sparse(), tmp_path)
    stored = load_file(next(tmp_path.glob(PATTERN)))
    assert "embed.weight" not in stored or "head.weight" not in stored
    assert not {"a.values", "b.values"} <= stored.keys()


@pytest.mark.parametrize("tied_in_file", [True, False])
def test_ties_are_those_of_the_file(tied_in_file: bool, tmp_path: Path) -> None:
    want, got = dense(1), dense(0)
    other = got if tied_in_file else want
    other.embed.weight = nn.Parameter(torch.randn(10, 32))
    save(want, tmp_path)
    assert_equal(load(tmp_path, got), want)
    assert (got.embed.weight is got.head.weight) == tied_in_file


def test_crossed_ties_do_not_overwrite_each_other(tmp_path: Path) -> None:
    def model(pairs: list[int]) -> nn.Module:
        made = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
        for i, j in enumerate(pairs):
            made[i].weight = made[j].weight
        return made

    want, got = model([0, 1, 0, 1]), model([0, 0, 2, 2])
    save(want, tmp_path)
    load(tmp_path, got)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(got, want, strict=True))
    assert got[0].weight is got[2].weight is not got[1].weight


def test_one_module_under_two_names(tmp_path: Path) -> None:
    layer = nn.Linear(8, 8)
    want, other = nn.Sequential(layer, layer), nn.Linear(8, 8)
    packed = SparseLinear(Format.parse("int8").pack(layer.weight.detach()), layer.bias)
    for name in "01":
        set_module(want, name, packed)
    save(want, tmp_path)
    got = load(tmp_path, nn.Sequential(other, other))
    assert got[0] is got[1]
    assert torch.equal(got[0].weight, want[0].weight)


def test_views_of_one_storage_and_odd_tensors(tmp_path: Path) -> None:
    def model(fill: float) -> nn.Module:
        made = nn.Module()
        both = torch.full((6, 4), fill)
        made.q, made.k = nn.Parameter(both[:3]), nn.Parameter(both[2:5])
        made.register_buffer("t", torch.arange(6.0).view(2, 3).T * fill)
        made.register_buffer("empty", torch.zeros(0, 5))
        made.register_buffer("scalar", torch.tensor(fill, dtype=torch.float64))
        made.register_buffer("count", torch.tensor(int(fill)))
        made.items = nn.ParameterList([torch.full((16, 16), fill)])
        return made

    want = model(3.0)
    put(want, ["items.0"], "2:4+int4")
    save(want, tmp_path)
    got = load(tmp_path, model(0.0))
    assert all(torch.equal(a, state(want)[n]) for n, a in state(got).items())
    assert torch.equal(got.items[0], want.items[0])


def test_compiled_wrappers_use_plain_names(tmp_path: Path) -> None:
    want = sparse()
    save(torch.compile(want), tmp_path)  # type: ignore[arg-type]
    compiled = torch.compile(dense())
    load(tmp_path, compiled)  # type: ignore[arg-type]
    assert_equal(compiled._orig_mod, want)


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (0, 0), (1, 1), (7, 13), (17, 33)])
@pytest.mark.parametrize("text", ["int4g8", "bitmap@50%+uint3", "tile16x1@50%+bf16"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_boundary_shapes(n: int, k: int, text: str, tmp_path: Path) -> None:
    want = nn.Sequential(nn.Linear(k, n))
    put(want, ["0.weight"], text)
    save(want, tmp_path)
    got = load(tmp_path, nn.Sequential(nn.Linear(k, n, device="meta")))
    x = torch.randn(3, k)
    assert torch.equal(got(x), want(x))


def test_a_dense_model_and_a_model_without_tensors(tmp_path: Path) -> None:
    want = dense(1)
    save(want, tmp_path / "dense")
    assert_equal(load(tmp_path / "dense", dense()), want)
    save(nn.ReLU(), tmp_path / "none")
    load(tmp_path / "none", nn.ReLU())


def test_saving_again_replaces_and_leaves_no_litter(tmp_path: Path) -> None:
    for seed in range(3):
        save(sparse(seed=seed), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".sparsefx-dead").mkdir()
    save(sparse(seed=3), tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".txt"]
    assert_equal(load(tmp_path, dense()), sparse(seed=3))


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    save(dense(), tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert len({stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}) == 1


# --- what save refuses ---------------------------------------------------------------------------


class Extra(nn.Module):
    def get_extra_state(self) -> Any:
        return object()

    def set_extra_state(self, state: Any) -> None:
        return None


def hyphened() -> nn.Module:
    return nn.ModuleDict({"q-proj": nn.Linear(2, 2)})


def bare() -> nn.Module:
    return SparseLinear(Format.parse("int8").pack(torch.randn(4, 4)))


def complex128() -> nn.Module:
    model = nn.Module()
    model.register_buffer("z", torch.zeros(2, dtype=torch.complex128))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Extra, "extra state"),
        (hyphened, "q-proj"),
        (bare, "Sequential"),
        (complex128, "'z'.*complex128"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight'.*meta"),
    ],
)
def test_save_refuses_models_it_could_not_restore(
    make: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=words):
        save(make(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def as_link(target: Path) -> None:
    (target.parent / "real").mkdir()
    target.symlink_to("real")


def inside(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def run(target: Path) -> None:
        target.mkdir()
        make(target / name)

    return run


W = f"weights-{0:016}.safetensors"


@pytest.mark.parametrize(
    "spoil",
    [
        as_link,
        lambda target: target.write_text("x"),
        os.mkfifo,
        inside("manifest.json", lambda p: p.symlink_to("elsewhere")),
        inside("manifest.json", os.mkfifo),
        inside("manifest.json", Path.mkdir),
        inside("manifest.json", lambda p: p.write_text('{"name": "somebody else\'s"}')),
        inside(W, lambda p: p.symlink_to("elsewhere")),
        inside(W, os.mkfifo),
    ],
)
def test_save_refuses_odd_targets_before_writing(
    spoil: Callable[[Path], object], tmp_path: Path
) -> None:
    spoil(tmp_path / "m")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match="m"):
        save(dense(), tmp_path / "m")
    assert sorted(tmp_path.rglob("*")) == before


def test_save_does_not_write_through_a_device() -> None:
    with pytest.raises(ArtifactError, match="no folder"):
        save(dense(), "/dev/null")


# --- what load refuses ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(sparse(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A private copy of a sound artifact."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def weights(folder: Path) -> Path:
    return next(folder.glob(PATTERN))


def refused(folder: Path, model: nn.Module | None = None) -> str:
    """The message of the ArtifactError that `load` raises; the model is checked to be untouched."""
    model = dense() if model is None else model
    before, modules = copy.deepcopy(state(model)), list(model.modules())
    with pytest.raises(ArtifactError) as error:
        load(folder, model)
    assert list(model.modules()) == modules
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) for n in after if after[n].device.type != "meta")
    return str(error.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def rewrite(folder: Path, content: bytes) -> None:
    """Give the folder other weights that its manifest vouches for."""
    sha = hashlib.sha256(content).hexdigest()
    weights(folder).unlink()
    (folder / f"weights-{sha[:16]}.safetensors").write_bytes(content)
    edit(folder, lambda f: f.update(
        weights=f"weights-{sha[:16]}.safetensors", bytes=len(content), sha256=sha))  # fmt: skip


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change stored tensors and keep size and hash right: what a hostile writer would do."""
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, folder / "new")
    content = (folder / "new").read_bytes()
    (folder / "new").unlink()
    rewrite(folder, content)


def entry(fields: dict[str, Any], name: str = "a.weight") -> dict[str, Any]:
    found: dict[str, Any] = next(e for e in fields["packed"] if name in e["names"])
    return found


Change = Callable[[dict[str, Any]], object]
MANIFESTS: list[tuple[str, Change]] = [
    ("format_version is 2", lambda f: f.update(format_version=2)),
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


@pytest.mark.parametrize(
    "name",
    ["__class__", "a.__dict__", "a..b", ".a", "a.", "a b", "a-b", "a\n", "é", "1a", "", "a" * 2000, "a/b"],
)
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
        ('{"format_version": 1, "format_version": 1}', "stands twice"),
        ('{"format_version": 1, "bytes": NaN}', "no number"),
        ('{"format_version": 1, "bytes": ' + "9" * 5000 + "}", "."),
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
    [("2:4", 0b0111_0011), ("2:4", 0b0001_0011), ("1:3", 0b11), ("2:8", 0b00_001_001), ("5:8", 0xFF)],
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
    retensor(tmp_path, lambda t: t["0.index"].bitwise_or_(torch.tensor([0, 128], dtype=torch.uint8)))
    assert "layout bitmap" in refused(tmp_path, nn.Sequential(nn.Linear(3, 3)))


def header(text: str, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


def one(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", name: str = "a.bias") -> str:
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
def test_damaged_bytes_are_never_a_silent_success(data: st.DataObject, which: str, folder: Path) -> None:
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
    """With the hash made right again, a load may succeed, but never with buffers kernels trust wrongly."""
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


# --- crashes and company -------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """Exit code of a child that does `work`: 0, 1 after ArtifactError, negative for a signal.

    The child only writes files: torch's threads do not survive a fork.
    """
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            work()
            code = 0
        except ArtifactError as error:
            code = 1 if "unchanged" in str(error) else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("short", [1, 5000, None])
def test_a_full_disk_leaves_the_old_artifact(short: int | None, folder: Path) -> None:
    limit = weights(folder).stat().st_size - short if short else 0
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = sparse(seed=7)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(model, folder)

    assert forked(work) == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_sigkill_at_every_step_leaves_one_complete_artifact(folder: Path) -> None:
    models = {seed: sparse(seed=seed) for seed in (1, 7)}
    steps = ["write", "sync", "replace", "sync", "sync", "replace", "sync"]
    for step in range(1, len(steps) + 1):

        def work(step: int = step) -> None:
            seen = 0

            def killed(real: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **kwargs: Any) -> Any:
                    nonlocal seen
                    seen += 1
                    if seen == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return run

            for owner, name in ((artifact, "save_file"), (artifact, "_sync"), (os, "replace")):
                setattr(owner, name, killed(getattr(owner, name)))
            save(models[7], folder)

        assert forked(work) == -signal.SIGKILL
        assert_equal(load(folder, dense()), models[7 if step == len(steps) else 1])
    save(models[1], folder)
    assert len(list(folder.iterdir())) == 2


def test_concurrent_writers_and_readers(tmp_path: Path) -> None:
    models = [sparse(seed=s) for s in range(3)]
    save(models[0], tmp_path)
    wanted = [m.a.values for m in models]
    failures: list[BaseException] = []

    def guard(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                for _ in range(8):
                    work()
            except BaseException as error:
                failures.append(error)

        return run

    def read() -> None:
        model = load(tmp_path, dense())
        assert any(torch.equal(model.a.values, v) for v in wanted)

    work = [guard(lambda m=m: save(m, tmp_path)) for m in models] + [guard(read)]
    threads = [threading.Thread(target=w) for w in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    read()
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    save(model, tmp_path)
    assert peak() - before < 32 << 20


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

