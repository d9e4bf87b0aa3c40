"""`sparsefx::rotary`: rotary position embedding of several tensors by one set of angles.

`rotary([x, …], cos, sin)` is x ⊙ cos + (-x₁, x₀) ⊙ sin of each x (…, D), D even, with x₀ and x₁ the
halves of its last axis; cos and sin (…, D) are broadcast. What is defined here is the meaning;
`codegen.rotary` registers a faster way on CPUs, bit for bit the same.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv
2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.ir.fused import LIBRARY, register
from sparsefx.ir.op import TAGS


def rotary(x: list[Tensor], cos: Tensor, sin: Tensor) -> list[Tensor]:
    """What `sparsefx::rotary` means."""
    return [t * cos + _turned(t) * sin for t in x]


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


LIBRARY.define("rotary(Tensor[] x, Tensor cos, Tensor sin) -> Tensor[]", tags=TAGS)
ROTARY = torch.ops.sparsefx.rotary.default
register(ROTARY, rotary, None)
