"""What `calibration=` may be, as a list of model inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from sparsefx.ir.errors import SpecError

WINDOW, MOST = 512, 128
"""Tokens per window of a text, and windows at most."""

Calibration = Iterable[Any] | Callable[[], Iterable[Any]] | tuple[Any, str]


def batches_of(calibration: Calibration | None) -> list[Any] | None:
    """A list of model inputs from batches, a function that returns them, or (tokenizer, text).

    A text is cut into at most 128 windows of 512 tokens, spread evenly over it. Raises SpecError.
    """
    if calibration is None:
        return None
    if _is_text(calibration):
        return _windows(*calibration)  # type: ignore[misc]
    found = calibration() if callable(calibration) else calibration
    if isinstance(found, (str, bytes)) or not isinstance(found, Iterable):
        raise SpecError(
            f"calibration is a {type(found).__name__}; give batches of inputs, a function that "
            "returns them, or (tokenizer, text)"
        )
    batches = list(found)
    if not batches:
        raise SpecError("calibration holds no batch; leave it out or give some")
    return batches


def _is_text(calibration: Any) -> bool:
    pair = isinstance(calibration, tuple) and len(calibration) == 2
    return pair and callable(calibration[0]) and isinstance(calibration[1], str)


def _windows(tokenizer: Any, text: str) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    length = min(WINDOW, len(ids))
    if length < 2:
        raise SpecError(f"the calibration text holds {len(ids)} tokens; give at least some hundred")
    count = min(len(ids) // length, MOST)
    starts = [(len(ids) - length) * i // max(count - 1, 1) for i in range(count)]
    return [{"input_ids": ids[start : start + length][None]} for start in starts]
