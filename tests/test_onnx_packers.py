"""ONNX Runtime's own packers as oracles: our function bodies must decode to their very bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

onnxruntime = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from onnxruntime.capi import _pybind_state as native
from test_onnx import single

from sparsefx.codegen.onnx_read import _evaluate, inlined
from sparsefx.ir.codecs import Grid
from sparsefx.ir.format import Format

PACKERS = {
    2: native.quantize_matmul_2bits, 4: native.quantize_matmul_4bits,
    8: native.quantize_matmul_8bits,
}  # fmt: skip
N, K, SIZE = 24, 256, 64


def codes_and_scales(bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) that reach both ends in every block, and scales that are powers of two.

    With these any quantiser that spans a block's range finds this grid and no other.
    """
    random = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, (N, K), generator=random)
    codes[:, ::SIZE] = low
    if not symmetric:
        codes[:, 1::SIZE] = high
    return codes, 2.0 ** torch.randint(-6, 3, (N, K // SIZE), generator=random)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", PACKERS)
def test_bodies_decode_to_what_onnx_runtime_packs(bits: int, symmetric: bool) -> None:
    codes, scales = codes_and_scales(bits, symmetric)
    zero = torch.full_like(scales, 1 << (bits - 1))
    weight = codes * scales.repeat_interleave(SIZE, 1)
    text = f"{'' if symmetric else 'u'}int{bits}g{SIZE}+a8"
    packed = Format.parse(text).pack(weight, grid=Grid(scales, None if symmetric else zero))
    assert torch.equal(packed.unpack(), weight)

    blocks = K // SIZE
    want = np.zeros((N, blocks, SIZE * bits // 8), np.uint8)
    want_scales = np.zeros((N, blocks), np.float32)
    zeros = np.zeros((N, -(-blocks * bits // 8)), np.uint8)
    PACKERS[bits](want, weight.T.contiguous().numpy(), want_scales, zeros, SIZE, N, K, symmetric)

    model, row = single(packed)
    assert row.op == "MatMulNBits"
    values = inlined(ir.from_proto(ir.to_proto(model)))
    nodes = [v.producer() for v in values.values()]
    node = next(n for n in nodes if n is not None and n.op_type == "MatMulNBits")
    found = [_evaluate(value) for value in node.inputs[1:] if value is not None]
    np.testing.assert_array_equal(found[0].reshape(want.shape), want)
    np.testing.assert_array_equal(found[1].reshape(want_scales.shape), want_scales)
    if not symmetric:
        np.testing.assert_array_equal(found[2].reshape(zeros.shape), zeros)
