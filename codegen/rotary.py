"""`sparsefx::rotary` by the CPU engine: one call per tensor in place of six.

Where the engine is missing, or tensors are not float32 of four axes, the op's meaning serves.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from sparsefx.codegen import native
from sparsefx.ir import rotary as meaning
from sparsefx.ir.errors import WeightError
from sparsefx.ir.fused import use

CALL = struct.Struct("PPPP15qqqPP").pack
"""`sfx_rotary_call` of runtime/native/sparsefx.h."""


def rotary(x: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """`sparsefx::rotary` on CPUs."""
    engine = native.engine()
    fits = engine is not None and cos.shape == sin.shape and cos.dim() == 4
    for t in (*x, cos, sin):
        fits = fits and t.dtype is torch.float32 and t.stride(-1) == 1
    angles = cos.shape
    for t in x:
        fits = fits and _fits(t.shape, angles)
    if not fits:
        return meaning.rotary(x, cos, sin)
    assert engine is not None
    threads, error = torch.get_num_threads(), engine.error
    a, b, c, _ = angles
    steps = [
        s if side > 1 else 0
        for t in (cos, sin)
        for s, side in zip(t.stride(), (a, b, c), strict=False)
    ]
    tail = (cos.shape[-1] // 2, threads, 0, 0)
    cos_at, sin_at, out = cos.data_ptr(), sin.data_ptr(), []
    for t in x:
        out.append(y := torch.empty_like(t))
        call = CALL(
            t.data_ptr(), cos_at, sin_at, y.data_ptr(), *t.shape[:3], *t.stride()[:3],
            *y.stride()[:3], *steps, *tail,
        )  # fmt: skip
        if engine.run_rotary(call, error):
            raise WeightError(f"the CPU engine refuses: {error.value.decode()}")
    return out


def _fits(shape: torch.Size, angles: torch.Size) -> bool:
    """Whether angles are broadcast to this shape, whose last axis has two halves."""
    pairs = zip(shape, angles, strict=False)
    alike = len(shape) == 4 and shape[-1] == angles[-1] and shape[-1] % 2 == 0
    return alike and all(own in (side, 1) for side, own in pairs)


use(meaning.ROTARY, rotary)
