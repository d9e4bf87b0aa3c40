"""The real language model, end to end: minutes, so behind `make test-slow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparsefx
from sparsefx.models.smollm2 import load


@pytest.mark.slow
def test_generates_alike_and_exports_with_dynamic_shapes(tmp_path: Path) -> None:
    bundle = load()
    model: Any = sparsefx.sparsify(bundle.model, "int4g64", example_inputs=bundle.example_inputs)
    report = sparsefx.export_onnx(
        model, tmp_path / "model.onnx", bundle.example_inputs, bundle.dynamic_shapes
    )
    assert len(report.layers) == 210
    assert {row.sizes for row in report.differences} >= {"batch=2, length=32", "batch=3, length=33"}
    prompt = bundle.example_inputs["input_ids"][:1, :12]
    want = model.generate(prompt, max_new_tokens=12, do_sample=False)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="sparsefx", options={"inner": "eager"})
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), want)
