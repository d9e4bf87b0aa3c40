"""The one training loop of recovery: Adam with steps relative to each tensor's own size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Trained = Sequence[tuple[nn.Parameter, float]]
"""What trains, each with the size that its steps go by."""


def train(
    trained: Trained,
    samples: Sequence[int],
    epochs: int,
    rate: float,
    order: torch.Generator,
    loss: Callable[[int], Tensor],
) -> None:
    """Minimise `loss(sample)` over shuffled `samples`, one at each step.

    A tensor's steps are at most `rate` of its size. What it had of `requires_grad` and `.grad` is
    as before afterwards.
    """
    before = [(tensor, tensor.requires_grad, tensor.grad) for tensor, _ in trained]
    for tensor, _ in trained:
        tensor.requires_grad_(True)
    groups = [{"params": [tensor]} for tensor, _ in trained]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    total, done = epochs * len(samples), 0
    with torch.enable_grad():
        for _ in range(epochs):
            for i in torch.randperm(len(samples), generator=order).tolist():
                for group, (_, size) in zip(optimiser.param_groups, trained, strict=True):
                    group["lr"] = rate * size * schedule(done / total)
                optimiser.zero_grad()
                loss(samples[i]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                done += 1
    for tensor, wanted, grad in before:
        tensor.requires_grad_(wanted)
        tensor.grad = grad


def schedule(progress: float) -> float:
    """Warm-up over the first twentieth, then a cosine to a tenth."""
    return min(progress / 0.05, 1.0) * (0.55 + 0.45 * math.cos(math.pi * progress))


def size_of(parameter: Tensor) -> float:
    """What steps of a norm or bias go by: its root mean square, but never next to nothing."""
    return max(float(parameter.detach().square().mean().sqrt()), 1e-3)


def fast_bf16(x: Tensor) -> bool:
    """Whether float32 products are worth rounding to bfloat16: it has units of its own there."""
    if x.dtype is not torch.float32:
        return False
    return x.is_cuda or torch.cpu._is_amx_tile_supported()
