"""What `explain` says of a model on a GPU: the Triton kernel, or why none serves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparsefx
from sparsefx.runtime.explain import Line


def on_a_gpu(spec: str, dtype: torch.dtype = torch.bfloat16) -> Line:
    """The line of a 64×64 layer whose buffers say that they are on a GPU."""
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(64, 64)).to(dtype), spec)
    with FakeTensorMode():
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    fake = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
                    module._buffers[key] = fake
    return sparsefx.explain(model).lines[0]


@pytest.mark.parametrize(
    ("spec", "kernel"),
    [
        ("int4g32", "triton_columns"), ("int8+a8", "triton_columns"),
        ("tile16x1@50%+int4g32+r4", "triton_columns"), ("tile1x16@50%+int4g32", "triton_lanes"),
        ("tile1x16@50%+int8+a8", "triton_masked"), ("2:4+bf16", "triton_masked"),
        ("bitmap@50%+uint3g32", "triton_masked"),
    ],
)  # fmt: skip
def test_the_kernel_is_named(spec: str, kernel: str) -> None:
    assert on_a_gpu(spec).kernel == f"{kernel} (configured at the first product)"


@pytest.mark.parametrize(
    ("spec", "dtype", "why"),
    [
        ("int4g32", torch.float32, "computes in float16 and bfloat16, not torch.float32"),
        ("int4g32+a8g16", torch.bfloat16, "one activation scale per row, not one per 16 columns"),
        ("uint8+a8", torch.bfloat16, "uint8 codes minus zero points are no int8"),
        ("int4g24", torch.bfloat16, "scale groups of 24 columns are no whole slices of 16"),
    ],
)
def test_refusals_have_reasons(spec: str, dtype: torch.dtype, why: str) -> None:
    line = on_a_gpu(spec, dtype)
    assert line.kernel == "unpack_then_dense"
    assert why in line.refused[0]
