"""What a real model needs to be compressed and judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Bundle:
    """A model in eval mode with inputs, calibration data and a metric that needs no download."""

    name: str
    model: nn.Module
    example_inputs: dict[str, Tensor]
    calibration: Callable[[int], list[dict[str, Tensor]]]
    """The first argument is how many inputs to return; none of them is seen by `metric`."""
    metric: Callable[[nn.Module], dict[str, float]]
    """Deterministic; takes any module with the signature and outputs of `model`."""
    headline: str
    """The key of `metric`'s answer to show first."""
    better: Literal["lower", "higher"]
    dynamic_shapes: dict[str, dict[int, str]]
    """Input name to {axis: name}, for `torch.export`."""


def on_device_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs on the device of the model's first parameter or buffer."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return inputs if first is None else {k: v.to(first.device) for k, v in inputs.items()}
