"""`sparsefx::norm` by the CPU engine, one call for a norm and the addition before it.

Where the engine is missing, or tensors are not all of one data type that it has, the op's meaning
serves.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from sparsefx.codegen import native
from sparsefx.codegen.native import TYPES
from sparsefx.ir import norm as meaning
from sparsefx.ir.errors import WeightError
from sparsefx.ir.fused import use

CALL = struct.Struct("PPPPqqiiifPPPP").pack
"""`sfx_norm_call` of runtime/native/sparsefx.h."""


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    centred: bool, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """`sparsefx::norm` on CPUs."""
    engine, dtype, shape = native.engine(), x.dtype, x.shape
    kind, k = TYPES.get(dtype), shape[-1]
    fits = engine is not None and kind is not None and (residual is not None or not keep)
    vectors = [0, 0]
    for i, vector in enumerate((weight, bias)):
        if vector is not None:
            fits = fits and vector.dtype is dtype and vector.numel() == k and vector.is_contiguous()
            vectors[i] = vector.data_ptr()
    if residual is not None:
        fits = fits and residual.dtype is dtype and residual.shape == shape
    if not fits:
        return meaning.norm(x, residual, weight, bias, eps, centred, keep)
    assert engine is not None
    rows, other = x.contiguous(), None if residual is None else residual.contiguous()
    y = torch.empty_like(rows)
    rounds = other is not None and dtype is not torch.float32  # before the norm is taken
    s = torch.empty_like(rows) if keep or rounds else None
    call = CALL(
        rows.data_ptr(), 0 if other is None else other.data_ptr(), 0 if s is None else s.data_ptr(),
        y.data_ptr(), rows.numel() // k if k else 0, k, kind, centred, torch.get_num_threads(),
        eps, *vectors, 0, 0,
    )  # fmt: skip
    if engine.run_norm(call, engine.error):
        raise WeightError(f"the CPU engine refuses: {engine.error.value.decode()}")
    return [y, s] if keep and s is not None else [y]


use(meaning.NORM, norm)
