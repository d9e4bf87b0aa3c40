"""How far a model's outputs are from those of the dense model: what `auto` calls loss.

Logits are judged by the Kullback-Leibler divergence from the dense model's distribution, in nats
per row (to first order the rise of the log perplexity); any other output by ‖y − y₀‖² / ‖y₀‖².
Both are 0 and flat at the dense model, so compressing costs ½ δᵀGδ, where the curvature G is the
mean of ggᵀ over gradients g of `probe` (Fisher for logits: labels drawn from the model itself;
Gauss-Newton with random signs, Hutchinson 1990, for the others).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.errors import WeightError
from sparsefx.passes.gradients import Loss
from sparsefx.passes.padding import kept_tokens, without_padding


@dataclass
class Distance:
    """Sums over calls; `loss` replaces both forms by its rise over the dense model's."""

    loss: Loss | None = None

    def probe(self, outputs: Any, batch: Any, random: torch.Generator) -> tuple[Tensor, float]:
        """(scalar, units): its gradients g at any place have Σ ggᵀ / units = G there.

        0 units: the scalar is a loss, a mean over rows.
        """
        if self.loss is not None:
            return self.loss(outputs, batch), 0.0
        y, logits = judged(outputs, batch)
        if not logits:
            signs = torch.randint(0, 2, y.shape, generator=random).to(y) * 2 - 1
            return (signs * y).sum() * (2**0.5 / y.detach().norm().clamp(min=1e-30)), 1.0
        log = F.log_softmax(y, -1)
        labels = torch.multinomial(log.detach().exp().cpu(), 1, generator=random).to(y.device)
        return log.gather(-1, labels).sum(), float(len(y))

    def between(self, outputs: Any, dense: Any, batch: Any) -> tuple[float, float]:
        """(distance · weight, weight) of one call; means are Σ of the first / Σ of the second."""
        if self.loss is not None:
            new, old = (float(self.loss(o, batch)) for o in (outputs, dense))
            return new - old, 1.0
        (y, logits), (want, _) = judged(outputs, batch), judged(dense, batch)
        if not logits:
            return float((y - want).square().sum()), float(want.square().sum())
        total = 0.0
        for a, b in zip(torch.split(y, 256), torch.split(want, 256), strict=True):
            p = F.log_softmax(b, -1)
            total += float((p.exp() * (p - F.log_softmax(a, -1))).sum())
        return total, float(len(y))


def judged(outputs: Any, batch: Any) -> tuple[Tensor, bool]:
    """The output that counts as float32 rows (T, V), and whether these are logits.

    Rows that the batch's `attention_mask` (B, L) masks are left out. Raises WeightError.
    """
    y, logits = counted(outputs)
    if y.dim() == 3:
        y = without_padding(y, kept_tokens(split_inputs(batch)[1]))
    return y.reshape(-1, y.shape[-1]).float(), logits


def counted(outputs: Any) -> tuple[Tensor, bool]:
    """The output that a model is judged by, and whether it is logits over at least two classes.

    It is the one called `logits`, else the first of floats. Raises WeightError where there is none.
    """
    named = outputs.get("logits") if isinstance(outputs, Mapping) else None
    named = getattr(outputs, "logits", None) if named is None else named
    floats = (t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point())
    named = named if isinstance(named, Tensor) else None
    y = next(floats, None) if named is None else named
    if y is None or y.dim() == 0:
        raise WeightError(
            f"the model's output, a {type(outputs).__name__}, holds no float rows to compare with "
            "the dense model's: return a tensor, or with 'auto' give loss=…"
        )
    return y, named is not None and y.shape[-1] > 1


def narrow(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Batches cut along the first axis, where all their tensors share it, to about `rows` token
    numbers or float rows: bounds what a backward pass keeps."""
    for batch in batches:
        tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
        heads = {t.shape[0] for t in tensors}
        if len(heads) != 1 or 0 in heads:
            yield batch
            continue
        per = max(_rows(t) for t in tensors) / next(iter(heads))
        keep = max(1, int(rows / max(per, 1)))
        yield tree_map(lambda t, n=keep: t[:n] if isinstance(t, Tensor) and t.dim() else t, batch)


def _rows(t: Tensor) -> int:
    return t.numel() // (t.shape[-1] if t.is_floating_point() and t.dim() > 1 else 1)


def hold_out(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Batches to calibrate with, and the last fourth (at least one) to check with. WeightError."""
    if len(batches) < 2:
        raise WeightError(
            f"'auto' needs calibration=… of at least 2 batches, not {len(batches)}: the last "
            "fourth is held out to check the plan"
        )
    held = max(1, len(batches) // 4)
    return list(batches[:-held]), list(batches[-held:])
