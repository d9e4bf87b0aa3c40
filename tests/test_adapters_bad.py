"""Adapters that do not fit: a typed error that lists the keys, and nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import NAMES, OUT, WIDTH, Parallel, delta_file, lora_file, sparse_and_twin
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsefx.ir.errors import AdapterError, SparsefxError
from sparsefx.runtime.adapter_extract import extract_lora
from sparsefx.runtime.adapters import adapters

X = torch.randn(2, WIDTH)
State = dict[str, Tensor]


def nan(state: State) -> None:
    state["fc1.lora_A.weight"][0, 0] = torch.nan


def half(state: State) -> None:
    del state["fc1.lora_B.weight"]


def rank(state: State) -> None:
    state["fc1.lora_B.weight"] = torch.zeros(OUT, 3)


def shape(state: State) -> None:
    state["fc1.lora_A.weight"] = torch.zeros(4, WIDTH + 1)


def unknown(state: State) -> None:
    for part in "AB":
        state[f"fc9.lora_{part}.weight"] = state.pop(f"fc1.lora_{part}.weight")


def trained_whole(state: State) -> None:
    state["fc1.bias"] = torch.zeros(OUT)


def dora(state: State) -> None:
    state["fc1.lora_magnitude_vector"] = torch.zeros(OUT)


def empty(state: State) -> None:
    state.clear()


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
TENSORS: list[tuple[Callable[[State], None], str]] = [
    (nan, r"NaN or infinity in 'fc1\.lora_A\.weight'"),
    (half, r"'fc1' needs lora_A \(r, K\) and lora_B"),
    (rank, "'fc1' needs lora_A and lora_B of one rank"),
    (shape, r"do not fit: 'fc1: A \(4, 97\), B \(64, 4\) for 64×96'"),
    (unknown, "no slot for 'fc9'; did you mean 'fc"),
    (trained_whole, r"'fc1\.bias' is no matrix of a LoRA; parts trained whole"),
    (dora, r"lora_magnitude_vector' is no matrix of a LoRA; DoRA rescales"),
    (empty, "holds no LoRA"),
]
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": None}, "no lora_alpha for 'fc1', 'fc2', 'last'"),
    ({"lora_alpha": "much"}, "no lora_alpha for"),
    ({"peft_type": "IA3"}, "is a IA3; only LORA"),
    ({"use_dora": True}, "DoRA rescales the base's columns.*merge it in PEFT"),
    ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changes the base"),
    ({"r": 8}, "has rank 8 for 'fc1', 'fc2', 'last', the file 4"),
]


def peft_folder(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    folder.mkdir()
    state = {}
    for name in names:
        state[f"{name}.lora_A.weight"] = torch.randn(4, WIDTH)
        state[f"{name}.lora_B.weight"] = torch.randn(OUT, 4)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


class Watched:
    """A model with one adapter on, which a failed call must leave as it is."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.model, _ = sparse_and_twin("int4g32")
        self.manager = adapters(self.model, **({"max_rank": 9, "max_density": 0.02} | options))
        self.manager.load(lora_file(folder / "on.safetensors", NAMES, 4, 1), "on")
        self.manager.set("on")
        self.before = self.now()

    def now(self) -> tuple[str, list[Tensor]]:
        state = [t.clone() for t in [*self.model.buffers(), *self.model.parameters()]]
        return repr(self.manager), state

    def unchanged(self) -> bool:
        text, state = self.now()
        pairs = zip(state, self.before[1], strict=True)
        return text == self.before[0] and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("spoil", "why"), TENSORS, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_tensors(spoil: Callable[[State], None], why: str, tmp_path: Path) -> None:
    watched, folder = Watched(tmp_path), peft_folder(tmp_path / "a")
    state = load_file(folder / "adapter_model.safetensors")
    spoil(state)
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=why):
        watched.manager.load(folder, "a")
    assert watched.unchanged()


@pytest.mark.parametrize(("config", "why"), CONFIGS, ids=[next(iter(c)) for c, _ in CONFIGS])
def test_bad_configurations(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    watched, folder = Watched(tmp_path), peft_folder(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(AdapterError, match=why):
        watched.manager.load(folder, "a")
    assert watched.unchanged()


def test_files_that_are_not_read(tmp_path: Path) -> None:
    watched, folder = Watched(tmp_path), peft_folder(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    for content in (weights.read_bytes()[:-9], b"", b"\x80\x04}"):
        weights.write_bytes(content)
        with pytest.raises(AdapterError, match="no PEFT LoRA folder"):
            watched.manager.load(folder, "a")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError):
        watched.manager.load(folder, "a")
    weights.unlink()
    torch.save({}, folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin"):
        with pytest.raises(AdapterError, match=r"adapter_model.bin' is not read: a pickle"):
            watched.manager.load(path, "a")
    with pytest.raises(AdapterError, match=r"no \.safetensors file and no folder"):
        watched.manager.load(tmp_path / "missing", "a")
    save_file({"fc1.lora_down.weight": torch.zeros(1, WIDTH),
               "fc1.lora_up.weight": torch.zeros(OUT, 1)}, tmp_path / "b.safetensors")  # fmt: skip
    with pytest.raises(AdapterError, match=r"no lora_alpha for 'fc1'; give it: load\(…, alpha=…\)"):
        watched.manager.load(tmp_path / "b.safetensors", "b")
    assert watched.unchanged()


def test_ranks_and_names(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    manager = watched.manager
    big = lora_file(tmp_path / "big.safetensors", NAMES, 6, 1)
    for name, why in (
        ("big", r"'big' has rank 6 in \['fc1', 'fc2', 'last'\], 5 of max_rank=9 are free"),
        ("on", "'on' is empty or taken"), ("", "empty or taken"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=why):
            manager.load(big, name)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: manager.set("onn"), "no adapter 'onn' is loaded; did you mean 'on'"),
        (lambda: manager.set({"on": float("nan")}), "strength of 'on' is nan"),
        (lambda: manager.rows(["on", "of"]), "no adapter 'of'"),
        (lambda: manager.rows([]), "one name for each row"),
        (lambda: manager.compose("on", {"on": 1}), "taken"),
        (lambda: manager.compose("two", {"x": 1}), "no adapter 'x'"),
        (lambda: manager.remove("x"), "no adapter 'x'"),
        (lambda: manager.merge("x"), "no adapter 'x'"),
        (lambda: adapters(watched.model, 10), "declared as"),
        (lambda: adapters(Parallel(), 0), "max_rank"),
        (lambda: adapters(Parallel(), 4, modules=["fc7"]), "'fc7' names no linear; did you mean"),
    ]
    for call, why in calls:
        with pytest.raises(AdapterError, match=why):
            call()
    assert watched.unchanged()
    manager.compose("two", {"on": 2})
    with pytest.raises(AdapterError, match=r"'on' is part of \['two'\]"):
        manager.remove("on")


def test_values_too_large_for_halves(tmp_path: Path) -> None:
    watched = Watched(tmp_path, dtype=torch.float16)
    save_file({"fc1.lora_A.weight": torch.full((1, WIDTH), 1e6),
               "fc1.lora_B.weight": torch.zeros(OUT, 1)}, tmp_path / "b.safetensors")  # fmt: skip
    with pytest.raises(AdapterError, match=r"fc1: not finite in torch.float16"):
        watched.manager.load(tmp_path / "b.safetensors", "b", alpha=1)
    assert watched.unchanged()


POSITIONS: list[tuple[State, str]] = [
    ({"fc1.weight.indices": torch.tensor([OUT * WIDTH])}, "fc1: position 6144 of 6144"),
    ({"fc1.weight.indices": torch.tensor([-1])}, "'fc1' has a negative or repeated position"),
    ({"fc1.weight.indices": torch.tensor([1, 1]), "fc1.weight.values": torch.ones(2)}, "repeated"),
    ({"fc1.weight.indices": torch.tensor([1, 2])}, r"indices torch.int64 \(2,\) and values \(1,\)"),
    ({"fc1.weight.indices": torch.tensor([1], dtype=torch.int32)}, "indices torch.int32"),
    ({"fc1.weight.values": torch.tensor([torch.inf])}, "NaN or infinity in 'fc1.weight.values'"),
    ({"fc1.weight.values": torch.tensor([1])}, "the values of 'fc1' are torch.int64"),
    ({"fc2.weight.values": torch.ones(1)}, "'fc2' needs <weight>.indices and <weight>.values"),
    ({"fc1.bias": torch.ones(1)}, "'fc1.bias' needs <weight>.indices"),
]


@pytest.mark.parametrize(("state", "why"), POSITIONS, ids=[why[:20] for _, why in POSITIONS])
def test_bad_deltas(state: State, why: str, tmp_path: Path) -> None:
    watched, file = Watched(tmp_path), tmp_path / "a.safetensors"
    good = {"fc1.weight.indices": torch.tensor([5]), "fc1.weight.values": torch.ones(1)}
    save_file(good | state, file)
    with pytest.raises(AdapterError, match=why):
        watched.manager.load(file, "a")
    assert watched.unchanged()


def test_deltas_without_room(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    with pytest.raises(
        AdapterError, match=r"fc1: is packed and has room for 122 positions, not 200"
    ):
        watched.manager.load(delta_file(tmp_path / "a.safetensors", ["fc1"], 200, 1), "a")
    assert watched.unchanged()
    for i, name in enumerate("bc"):
        watched.manager.load(delta_file(tmp_path / f"{name}.safetensors", ["fc1"], 100, i), name)
    watched.before = watched.now()
    with pytest.raises(AdapterError, match="together the deltas do not fit: 'fc1'"):
        watched.manager.set({"b": 1, "c": 1, "on": 2})
    assert watched.unchanged()
    with pytest.raises(AdapterError, match=r"rows\(\) takes LoRA, \['b'\] are sparse deltas"):
        watched.manager.rows(["b"])
    assert watched.unchanged()


def test_bad_checkpoints(tmp_path: Path) -> None:
    watched, whole = Watched(tmp_path), tmp_path / "whole.safetensors"
    state = dict(Parallel().state_dict())
    save_file(state, whole)
    other = tmp_path / "other.safetensors"
    save_file({"x.weight": torch.zeros(2, 2)}, other)
    wrong = tmp_path / "wrong.safetensors"
    save_file(state | {"fc1.weight": torch.zeros(OUT, 2)}, wrong)
    bad = tmp_path / "bad.safetensors"
    save_file(state | {"fc1.weight": torch.full((OUT, WIDTH), torch.nan)}, bad)
    load = watched.manager.load
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: load(whole, "a"), r"a whole checkpoint: say load\(…, rank=16\)"),
        (lambda: load(other, "a", rank=2), "none of 'x.weight' is the weight of a slot"),
        (lambda: load(wrong, "a", rank=2), r"'fc1.weight' is \(64, 2\), needed is \(64, 96\)"),
        (lambda: load(bad, "a", rank=2), "'fc1.weight' holds NaN"),
        (lambda: load(whole, "a", rank=0), "rank is 0"),
        (lambda: load(whole, "a", rank=2, base=other), "has no 'fc1.weight'"),
        (lambda: extract_lora(whole, other, 2, tmp_path / "o"), "has 'x.weight', which"),
        (lambda: extract_lora(whole, wrong, 2, tmp_path / "o"), r"is \(64, 2\), in the base"),
        (lambda: extract_lora(whole, whole, 2, tmp_path / "o"), "differs from .* in no matrix"),
        (lambda: extract_lora(whole, bad, 2, tmp_path / "o"), "NaN"),
        (lambda: extract_lora(whole, whole, 2, tmp_path), "exists; name a new folder"),
    ]
    for call, why in calls:
        with pytest.raises(SparsefxError, match=why):
            call()
    assert watched.unchanged()
    assert not (tmp_path / "o").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
