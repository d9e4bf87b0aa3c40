"""A small model with inputs, and the seed that makes both the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Example:
    """A model in eval mode and arguments it accepts: `model(*args, **kwargs)`."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Factory = Callable[[], Example]


def seeded(make: Factory) -> Factory:
    """Return `make` under a fixed seed, in eval mode, the caller's random state untouched."""

    def example() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = make()
        made.model.eval()
        return made

    return example


def tokens(*shape: int) -> Tensor:
    """Return random token numbers of the 128-word vocabulary all examples use, none special."""
    return torch.randint(6, 100, shape)
