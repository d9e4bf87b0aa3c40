"""`sparsefx::norm`: RMS norm or LayerNorm over the last axis, and the addition before it.

`norm(x, residual, weight, bias, eps, centred, keep)` is [y], with s = x + residual and

    y = (s - mean) / √(mean((s - mean)²) + eps) ⊙ weight + bias

where mean is 0 unless `centred`; with `keep` it is [y, s]. All have one shape but weight and bias,
(K,). What is defined here is the meaning; `codegen.norm` registers a faster way on CPUs.
Sources: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467; Ba, Kiros &
Hinton, "Layer Normalization", arXiv 1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.ir.fused import LIBRARY, register
from sparsefx.ir.op import TAGS


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    centred: bool, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """What `sparsefx::norm` means."""
    s = x if residual is None else x + residual
    size = [s.shape[-1]]
    if centred:
        y = F.layer_norm(s, size, weight, bias, eps)
    else:
        y = F.rms_norm(s, size, weight, eps)
        y = y if bias is None else y + bias
    return [y, s] if keep else [y]


LIBRARY.define(
    "norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centred, "
    "bool keep) -> Tensor[]",
    tags=TAGS,
)
NORM = torch.ops.sparsefx.norm.default
register(NORM, norm, None)
