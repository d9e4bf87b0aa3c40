"""What a peer is: a function that builds one linear layer with weights of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Call = Callable[[], Tensor]
SPREAD = 0.02
"""Standard deviation of random weights."""


@dataclass(frozen=True)
class Layer:
    """One linear layer, (N, K) weight inside."""

    bytes: int
    """Bytes of weight (codes, scales, index) that a product reads, as handed to the engine."""
    bind: Callable[[Tensor], Call]
    """From x (M, K) fp32 to a call that computes y (M, N); whatever can be prepared is."""
    weight: Callable[[], Tensor] | None
    """The dense (N, K) matrix that the stored form stands for; None: nothing to check."""
    products: float = 1.0
    """Share of the N · K products that the stored form needs."""
    unit: str = "bf16"
    """The peak that bounds it: products of "int8" or of floats ("bf16")."""
    packs: bool = False
    """The first call rearranges the weight, and may run in several threads at once."""
    kernel: Callable[[int], str] = lambda m: ""
    """Name of the kernel that serves M rows, where the engine tells."""


@dataclass(frozen=True)
class Peer:
    """An engine of the comparison; `layer(n, k, seed)` builds it, or raises with the reason."""

    name: str
    layer: Callable[[int, int, int], Layer]
    ours: bool = False
    per_threads: bool = False
    """A layer keeps the number of threads that it was built with."""


def random_bytes(count: int, seed: int) -> Tensor:
    """uint8 (count,), different for every seed."""
    raw = np.random.Generator(np.random.SFC64(seed)).bytes(count)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def random_scales(shape: tuple[int, ...], seed: int) -> Tensor:
    """fp32 scales around 0.003."""
    return 0.002 + 0.002 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=1)
def _normal(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * SPREAD


def random_weight(n: int, k: int, seed: int) -> Tensor:
    """fp32 (n, k), its rows in another order and scale for every seed."""
    return _normal(n, k).roll(seed * 37 % n, 0) * (1 + seed / 1024)


def grouped(codes: Tensor, scales: Tensor) -> Tensor:
    """codes (N, K) × scales (N, K / group) → values (N, K)."""
    n, k = codes.shape
    groups = math.prod(scales.shape) // n
    return (codes.view(n, groups, -1) * scales.reshape(n, groups, 1)).view(n, k)
