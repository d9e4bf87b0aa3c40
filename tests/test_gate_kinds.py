"""Which layers the gate's complaint may name, where passes changed what a product is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_onnx_passes import K, block

import sparsefx
from sparsefx.codegen import onnx_lower
from sparsefx.ir.errors import ExportError


def test_a_product_that_eager_computes_in_parts_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention's weights are unpacked in eager, branches added apart: none has a like result."""
    row = onnx_lower.LOWERINGS[0]

    def product(writer: Any, x: Any, weight: Any) -> Any:
        return writer.op("Add", row.product(writer, x, weight), writer.number(0.5))

    broken = onnx_lower.Lowering(row.op, row.rejects, row.store, product)
    monkeypatch.setattr(onnx_lower, "LOWERINGS", (broken, *onnx_lower.LOWERINGS[1:]))
    with pytest.raises(ExportError, match="could not be told apart"):
        sparsefx.export_onnx(block(), tmp_path / "m.onnx", torch.randn(2, 5, K))
