"""The Triton kernels decode every number that `fp8` stores exactly, without the card's help."""

from __future__ import annotations

import pytest
import torch
from triton_cases import BF16, FP16, ROW, VECTOR, WIDE, Case, assert_exact

from sparsefx.ir.codecs import Grid
from sparsefx.ir.format import Format

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["columns", "masked"])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_every_finite_e4m3_number(family: str, dtype: torch.dtype) -> None:
    """Decoded exactly by each kernel: subnormal numbers, both signs, the largest."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
    layout = "bitmap@50%+" if family == "masked" else ""
    fmt = Format.parse(f"{layout}fp8g32")
    weight = values.view(8, 32)
    packed = fmt.pack(weight, torch.ones(8, 32, dtype=torch.bool), Grid(torch.ones(8, 1)))
    assert torch.equal(packed.unpack(), weight)
    for config, rows in ((ROW, 32), (WIDE, 32), (VECTOR, 2)):
        if family == "columns" or not config.vector:
            assert_exact(Case(packed, family, torch.eye(32)[-rows:].to(dtype)), config)
