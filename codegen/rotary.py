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
    engine, angles = native.engine(), cos.shape
    if engine is None or sin.shape != angles or not all(_fits(t, angles) for t in (cos, sin, *x)):
        return meaning.rotary(x, cos, sin)
    a, b, c, width = angles
    ones = a == 1, b == 1, c == 1
    steps = _steps(cos, ones) + _steps(sin, ones)
    tail = (width // 2, torch.get_num_threads(), 0, 0)
    cos_at, sin_at, error, out = cos.data_ptr(), sin.data_ptr(), engine.error, []
    for t in x:
        out.append(y := torch.empty_like(t))
        call = CALL(
            t.data_ptr(), cos_at, sin_at, y.data_ptr(), *t.shape[:3], *t.stride()[:3],
            *y.stride()[:3], *steps, *tail,
        )  # fmt: skip
        if engine.run_rotary(call, error):
            raise WeightError(f"the CPU engine refuses: {error.value.decode()}")
    return out


def _fits(t: Tensor, angles: torch.Size) -> bool:
    """Whether angles are broadcast to t, float32 of four axes whose last has two halves.

    Written out: it runs three times at every call.
    """
    shape = t.shape
    if t.dtype is not torch.float32 or len(shape) != 4 or len(angles) != 4:
        return False
    a, b, c, width = angles
    return (
        width == shape[3] and not width % 2 and t.stride(3) == 1
        and (a == 1 or a == shape[0]) and (b == 1 or b == shape[1]) and (c == 1 or c == shape[2])
    )  # fmt: skip


def _steps(t: Tensor, ones: tuple[bool, bool, bool]) -> tuple[int, ...]:
    """Strides of the first three axes, 0 where one entry serves all."""
    a, b, c, _ = t.stride()
    return (0 if ones[0] else a, 0 if ones[1] else b, 0 if ones[2] else c)


use(meaning.ROTARY, rotary)
