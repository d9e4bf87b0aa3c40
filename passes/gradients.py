"""Gradients of a loss with respect to weights, sample by sample, a few Sites at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.errors import SparsefxError
from sparsefx.ir.sites import Site

BUDGET = 256 << 20
"""Bytes of gradients held at once."""

Loss = Callable[[Any, Any], Tensor]
"""(what the model returned, the sample it was called with) → scalar."""


class GradientError(SparsefxError, ValueError):
    """No gradient can be formed: there is no loss, it is not finite, or memory does not suffice."""


class Gradients:
    """What per-sample gradients of one weight (N, K) add up to, in float32.

    With `samples` the first so many gradients are kept themselves, else only their sums are.
    """

    def __init__(self, n: int, k: int, device: torch.device, samples: int = 0) -> None:
        self.count = 0
        """Gradients seen."""
        self.kept = torch.zeros(samples, n, k, device=device) if samples else None
        self._sums = None if samples else torch.zeros(2, n, k, device=device)

    def add(self, gradient: Tensor | None) -> None:
        """Count one gradient (N, K); None is all zeros: the loss did not depend on the weight."""
        if gradient is not None and self._sums is not None:
            self._sums[0] += gradient
            self._sums[1].addcmul_(gradient, gradient)
        if gradient is not None and self.kept is not None:
            self.kept[self.count] = gradient
        self.count += 1

    @property
    def samples(self) -> Tensor:
        """The gradients (count, N, K). Raises GradientError when only their sums were kept."""
        if self.kept is None:
            raise GradientError("only sums of gradients were kept; collect them with samples=32")
        return self.kept[: self.count]

    @property
    def mean(self) -> Tensor:
        """Mean gradient (N, K)."""
        return self.samples.mean(0) if self._sums is None else self._sums[0] / max(self.count, 1)

    @property
    def square(self) -> Tensor:
        """Mean squared gradient (N, K): the diagonal of the empirical Fisher matrix."""
        if self._sums is None:
            return self.samples.square().mean(0)
        return self._sums[1] / max(self.count, 1)


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    loss: Loss | None = None,
    samples: int = 0,
    budget: int = BUDGET,
) -> Iterator[tuple[Site, Gradients]]:
    """Yield every Site with its Gradients over the samples of `batches`, in the order of `sites`.

    Sites are taken together as far as `budget` bytes hold, and the data is run once for each such
    group. Between yields the model is as it was found: modes, `requires_grad`, every `.grad`.
    Without `loss`, `model_loss` forms one. With `samples` only so many samples are run.
    Raises GradientError.
    """
    data = take_samples(batches)[: samples or None]
    copies = len(data) + 1 if samples else 3
    for group in groups(sites, copies, budget):
        found = [Gradients(s.n, s.k, _device(model, s), len(data) * bool(samples)) for s in group]
        for sample in data:
            with only_these(model, [site.name for site in group]) as weights:
                value = evaluate(model, sample, loss)
                got = torch.autograd.grad(value, weights, allow_unused=True)
            for site, gradients, gradient in zip(group, found, got, strict=True):
                gradients.add(None if gradient is None else site.matrix(gradient).float())
        yield from zip(group, found, strict=True)


def groups(sites: Sequence[Site], copies: int, budget: int) -> Iterator[list[Site]]:
    """Runs of Sites of which `copies` float32 copies fit in `budget` bytes together."""
    part: list[Site] = []
    size = 0
    for site in sites:
        need = 4 * copies * site.n * site.k
        if need > budget:
            raise GradientError(
                f"{site.name}: {copies} copies of its gradient need {need >> 20} MiB, the budget "
                f"is {budget >> 20} MiB; pass a larger budget=, fewer samples, or use 'wanda'"
            )
        if part and size + need > budget:
            yield part
            part, size = [], 0
        part.append(site)
        size += need
    if part:
        yield part


@contextmanager
def only_these(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """The named parameters, alone in needing gradients while the model is in eval mode."""
    training = [module for module in model.modules() if module.training]
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen: list[Tensor] = [model.get_parameter(name) for name in names]
    try:
        model.eval().requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield chosen
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
        for module in training:
            module.training = True


def evaluate(
    model: nn.Module, sample: Any, loss: Loss | None, instead: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Loss of one sample, with parameters replaced by `instead`. Raises GradientError.

    Arguments and keys that `forward` does not take (targets) are left to `loss`.
    """
    args, kwargs = split_inputs(sample)
    takes = inspect.signature(model.forward).parameters.values()
    if not any(p.kind == p.VAR_POSITIONAL for p in takes):
        args = args[: sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes)]
    if not any(p.kind == p.VAR_KEYWORD for p in takes):
        kwargs = {name: kwargs[name] for name in kwargs if name in {p.name for p in takes}}
    output = functional_call(model, dict(instead or {}), args, kwargs)
    value = (loss or model_loss)(output, sample)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise GradientError("the loss is no scalar that depends on the weights; check loss=")
    if not bool(torch.isfinite(value).all()):
        raise GradientError(
            f"the loss of a sample is {float(value.detach())}; check the batches and loss="
        )
    return value.reshape(())


def model_loss(output: Any, sample: Any) -> Tensor:
    """`output.loss`, else next-token cross-entropy of `output.logits` where `input_ids` are given.

    A masked language model needs `labels` in its batches. Raises GradientError.
    """
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(value, Tensor):
        return value
    logits = output.get("logits") if isinstance(output, Mapping) else output
    logits = getattr(output, "logits", logits)
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    if not isinstance(logits, Tensor) or ids is None or logits.shape[:-1] != ids.shape:
        raise GradientError(
            f"no loss can be formed of {type(output).__name__}: it has no .loss and no next-token "
            ".logits for 'input_ids'; put 'labels' in the batches or pass loss=lambda output, "
            "batch: … (a scalar)"
        )
    targets = ids[:, 1:]
    if (mask := sample.get("attention_mask")) is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())


def take_samples(batches: Iterable[Any]) -> list[Any]:
    """Batches taken apart along their first axis where all their tensors share its length."""
    return [sample for batch in batches for sample in _take_apart(batch)]


def _take_apart(batch: Any) -> list[Any]:
    args, kwargs = split_inputs(batch)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    sizes = {len(t) if t.ndim else 1 for t in tensors}
    if len(sizes) != 1 or sizes <= {0, 1}:
        return [batch]

    def one(value: Any, i: int) -> Any:
        return value[i : i + 1] if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return [{k: one(v, i) for k, v in kwargs.items()} for i in range(*sizes)]
    if isinstance(batch, (tuple, list)):
        return [tuple(one(v, i) for v in args) for i in range(*sizes)]
    return [one(batch, i) for i in range(*sizes)]


def _device(model: nn.Module, site: Site) -> torch.device:
    return model.get_parameter(site.name).device
