"""LoRA adapters on a compressed base: swapped by ONNX Runtime itself, the base's file untouched."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsefx
from sparsefx.codegen import native
from sparsefx.ir.errors import ArtifactError, SpecError

ort: Any = pytest.importorskip("onnxruntime")
LIBRARY = [False, *([True] if native.engine() is not None else [])]


class Block(nn.Module):
    """Two projections, one of which is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(64, 48), nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o_proj(torch.tanh(self.q_proj(x)))
        out: Tensor = self.o_proj(torch.relu(self.q_proj(y)))
        return out


def base(path: Path, adapters: tuple[str, ...] = ("*.q_proj", "1.o_proj")) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    x = torch.randn(5, 64)
    sparsefx.sparsify(model, "bitmap@50%+int4g16", example_inputs=x, progress=False)
    sparsefx.export_onnx(model, path, x, {"input": {0: "rows"}}, adapters=adapters)
    return model


def peft(folder: Path, seed: int, rank: int, names: list[str], **config: Any) -> dict[str, Tensor]:
    """A PEFT folder trained for a few steps to move the base's output; {module: ΔW}."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    state, deltas = {}, {}
    for name in names:
        n, k = (48, 64) if name.endswith("q_proj") else (64, 48)
        a = torch.randn(rank, k, generator=generator) / k**0.5
        b = torch.randn(n, rank, generator=generator) / 4
        state[f"base_model.model.{name}.lora_A.weight"] = a
        state[f"base_model.model.{name}.lora_B.weight"] = b
        scale = 8 / (rank**0.5 if config.get("use_rslora") else rank)
        deltas[name] = b @ a * scale
    save_file(state, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return deltas


def with_deltas(model: nn.Module, deltas: dict[str, Tensor], x: Tensor) -> Tensor:
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, delta=delta: y + args[0] @ delta.T
        )
        for name, delta in deltas.items()
    ]
    with torch.no_grad():
        out: Tensor = model(x)
    for handle in handles:
        handle.remove()
    return out


def run(session: Any, x: Tensor, adapter: Path | None = None) -> Tensor:
    options = ort.RunOptions()
    if adapter is not None:
        held = ort.LoraAdapter()
        held.Load(str(adapter))
        options.add_active_adapter(held)
    return torch.from_numpy(session.run(None, {"input": x.numpy()}, options)[0])


@pytest.mark.parametrize("library", LIBRARY)
def test_two_adapters_take_turns_on_one_base(library: bool, tmp_path: Path) -> None:
    model = base(tmp_path / "base.onnx")
    digest = hashlib.sha256((tmp_path / "base.onnx").read_bytes()).hexdigest()
    wanted = {
        "a": peft(tmp_path / "a", 1, 4, ["0.q_proj", "1.q_proj"]),
        "b": peft(tmp_path / "b", 2, 7, ["1.o_proj"], use_rslora=True),
        "": {},
    }
    for name in ("a", "b"):
        written = sparsefx.export_adapter(
            tmp_path / name, tmp_path / "base.onnx", tmp_path / f"{name}.onnx_adapter"
        )
        assert len(written) == 2 * len(wanted[name])
    options = ort.SessionOptions()
    if library:
        options.register_custom_ops_library(sparsefx.ort_library())
    session = ort.InferenceSession(str(tmp_path / "base.onnx"), options)
    x = torch.randn(7, 64)
    for name in ("a", "", "b", "a", ""):
        got = run(session, x, tmp_path / f"{name}.onnx_adapter" if name else None)
        torch.testing.assert_close(got, with_deltas(model, wanted[name], x), atol=1e-5, rtol=1e-4)
    assert hashlib.sha256((tmp_path / "base.onnx").read_bytes()).hexdigest() == digest


def test_slots_hold_nothing_until_filled(tmp_path: Path) -> None:
    base(tmp_path / "slots.onnx")
    base(tmp_path / "plain.onnx", ())
    sizes = [os.path.getsize(tmp_path / f"{name}.onnx") for name in ("slots", "plain")]
    assert sizes[0] - sizes[1] < 4096
    sessions = [ort.InferenceSession(str(tmp_path / f"{n}.onnx")) for n in ("slots", "plain")]
    x = torch.randn(3, 64)
    slots, plain = (run(session, x) for session in sessions)
    assert torch.equal(slots, plain)
    names = [v.name for v in sessions[0].get_overridable_initializers()]
    assert sorted(names) == sorted(
        f"{m}.lora_{p}.weight" for m in ("0.q_proj", "1.q_proj", "1.o_proj") for p in "AB"
    )


def test_a_name_without_a_product_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"adapters: '0\.q_porj' is no packed product"):
        base(tmp_path / "m.onnx", ("0.q_porj",))
    assert not list(tmp_path.iterdir())


def broken(folder: Path, how: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if how == "alpha":
        config.write_text('{"r": 4}')
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif how == "key":
        save_file({"base_model.model.0.q_proj.bias": torch.zeros(3)}, weights)
    elif how == "half":
        save_file({"base_model.model.0.q_proj.lora_A.weight": torch.zeros(2, 64)}, weights)
    elif how == "shape":
        parts = {"A": torch.zeros(4, 65), "B": torch.zeros(48, 4)}
        save_file(
            {f"base_model.model.0.q_proj.lora_{p}.weight": t for p, t in parts.items()}, weights
        )
    else:
        parts = {"A": torch.zeros(4, 64), "B": torch.zeros(48, 4)}
        save_file(
            {f"base_model.model.9.q_proj.lora_{p}.weight": t for p, t in parts.items()}, weights
        )


@pytest.mark.parametrize(
    ("how", "why"),
    [("alpha", "no lora_alpha"), ("truncated", "no PEFT LoRA folder"),
     ("key", "no matrix of a LoRA"), ("half", "needs lora_A"),
     ("shape", "needs .'0.q_proj.rank', 64."), ("unknown", "no slots for .'9.q_proj")],
)  # fmt: skip
def test_bad_adapters(how: str, why: str, tmp_path: Path) -> None:
    base(tmp_path / "base.onnx")
    peft(tmp_path / "a", 1, 4, ["0.q_proj"])
    broken(tmp_path / "a", how)
    with pytest.raises(ArtifactError, match=why):
        sparsefx.export_adapter(tmp_path / "a", tmp_path / "base.onnx", tmp_path / "a.onnx_adapter")
    assert not (tmp_path / "a.onnx_adapter").exists()
