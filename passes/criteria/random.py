"""Random scores: the baseline of every report (Liu et al., arXiv 2202.02643)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sparsefx.passes.gradients import Gradients
from sparsefx.passes.statistics import Statistics


def random(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """Uniform in [0, 1), a function of `seed` and the shape alone; see `site_seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def site_seed(seed: int, name: str) -> int:
    """A seed of its own for the Site called `name`, the same in every process."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
