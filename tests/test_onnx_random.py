"""Random small models in random formats: what is exported agrees with eager, by the gate."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import Graph, draw, random_format
from torch import nn

import sparsefx
from sparsefx.ir.codecs import CODECS
from sparsefx.ir.errors import ExportError, SparsefxError
from sparsefx.ir.layouts import LAYOUTS

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

REASONS = ("is zero for example_inputs", "leaves the range of fp16", "overflows")
"""Refusals that are the model's or the format's own doing; any other error is a fault."""
MOST_REFUSED = 0.02


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and one table of operators: torch.onnx makes a new one for every export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    table = cache(ONNXRegistry.from_torchlib)
    monkeypatch.setattr(
        ONNXRegistry, "from_torchlib", staticmethod(lambda opset_version=18: table(opset_version))
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refusal(seed: int, path: Path) -> str:
    """Compress and export the model of this seed: why it was refused, "" when it was exported.

    Raises AssertionError for a mismatch and for any other error.
    """
    drawn = draw(seed)
    told = str(drawn)
    try:
        sparsefx.sparsify(drawn.model, drawn.spec, example_inputs=drawn.inputs, progress=False)
        report = sparsefx.export_onnx(drawn.model, path, drawn.inputs, drawn.dynamic_shapes)
    except SparsefxError as error:
        if any(reason in str(error) for reason in REASONS):
            return f"{type(error).__name__}: {error}"
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{told}: untyped {type(error).__name__}: {error}") from error
    assert report.layers, told
    assert all(row.difference <= row.tolerance for row in report.differences), told
    path.unlink()
    return ""


def check(seeds: Sequence[int], folder: Path) -> None:
    """All are tried before the faults are listed."""
    refused: list[str] = []
    faults: list[str] = []
    for seed in seeds:
        try:
            why = refusal(seed, folder / "m.onnx")
        except AssertionError as error:
            faults.append(str(error))
            continue
        refused += [why] * bool(why)
    print(f"{len(seeds)} models: {len(refused)} refused, {len(faults)} faults")
    assert not faults, "\n".join(faults)
    assert len(refused) <= MOST_REFUSED * len(seeds), refused


def test_random_models_are_exported_right(tmp_path: Path) -> None:
    check(range(8), tmp_path)


@pytest.mark.slow
def test_500_random_models_are_exported_right(tmp_path: Path) -> None:
    check(range(500), tmp_path)


def test_models_with_equal_masks_keep_their_weights_apart(tmp_path: Path) -> None:
    """Equal index buffers are one initializer; names and weights must not be mixed up by that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    x = torch.randn(3, 16)
    sparsefx.sparsify(model, "tile16x16@10%+int4g16", example_inputs=x, progress=False)
    report = sparsefx.export_onnx(model, tmp_path / "m.onnx", x)
    assert [row.name for row in report.layers] == ["0", "2"]


def test_codes_of_seven_bits(tmp_path: Path) -> None:
    """Eight are 56 bits: more than a float64 holds, in which ONNX Runtime adds integers."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    sparsefx.sparsify(model, "int7g32", example_inputs=x, progress=False)
    sparsefx.export_onnx(model, tmp_path / "m.onnx", x)


# --- the drawing ---------------------------------------------------------------------------------


def test_a_seed_stands_for_one_model() -> None:
    for seed in range(20):
        one, two = draw(seed), draw(seed)
        assert str(one) == str(two)
        states: list[dict[str, Any]] = [d.model.state_dict() for d in (one, two)]
        assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())


def test_everything_is_drawn() -> None:
    rng = random.Random(0)
    formats = [random_format(rng) for _ in range(300)]
    assert {type(f.layout) for f in formats} == set(LAYOUTS)
    assert {type(f.codec) for f in formats} == set(CODECS)
    assert {(bool(f.rank), f.a8, bool(f.a8_group)) for f in formats} >= {
        (False, False, False), (True, False, False), (True, True, True), (False, True, False)
    }  # fmt: skip
    models: list[Graph] = [draw(seed).model for seed in range(150)]
    kinds = {type(layer).__name__ for model in models for layer in model.layers}
    assert kinds >= {
        "Attention", "Concat", "Conv1D", "Embedding", "Flat", "Gated", "LayerNorm", "Linear", "Mix",
        "Plus", "Pointwise", "RMSNorm", "SiLU", "Split", "Times",
    }  # fmt: skip
    assert {model.form for model in models} == {"tensor", "tuple", "dict"}


def test_a_mismatch_would_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def mismatch(*args: Any) -> Any:
        raise ExportError("output 0 differs between eager and onnxruntime")

    monkeypatch.setattr(sparsefx, "export_onnx", mismatch)
    with pytest.raises(AssertionError, match="output 0 differs"):
        check(range(1), tmp_path)
