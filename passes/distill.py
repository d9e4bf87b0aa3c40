"""Recovery of the whole model: train what is kept until the outputs are the dense model's again.

The dense model's outputs are recorded before it is compressed, so no second model is held: of
`logits` the likeliest tokens' log-probabilities (Hinton et al., arXiv 1503.02531), of others the
first output tensor. The model's own parameters are what trains, in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sparsefx.ir.capture import split_inputs
from sparsefx.passes.compress_site import Result, Step
from sparsefx.passes.distance import counted
from sparsefx.passes.latent import Latent
from sparsefx.passes.padding import Kept, kept_tokens, mean_over_tokens
from sparsefx.passes.spec import Recovery
from sparsefx.passes.training import fast_bf16, size_of, train

LIKELIEST = 64
"""Tokens or classes per position whose probabilities are kept; the rest count as one."""
HELD_BACK = 16
"""One batch of so many is not trained on: what decides whether training is kept."""


@dataclass(frozen=True)
class Output:
    """The dense model's answer to one batch."""

    values: Tensor
    """float16 log-probabilities (…, at most LIKELIEST), or the output itself."""
    tokens: Tensor | None
    """int32 ids that go with log-probabilities."""
    kept: Kept

    def distance(self, output: Any) -> Tensor:
        """KL divergence per token, or the squared error relative to the output's power."""
        found = counted(output)[0].float()
        if self.tokens is None:
            power = self.values.float().square().sum(-1).clamp(min=1e-12)
            error = (found - self.values.float()).square().sum(-1) / power
            return mean_over_tokens(error, self.kept)
        want = self.values.float()
        got = F.log_softmax(found, -1).gather(-1, self.tokens.long())
        rest = (1 - want.exp().sum(-1)).clamp(min=1e-6), (1 - got.exp().sum(-1)).clamp(min=1e-6)
        inside = (want.exp() * (want - got)).sum(-1)
        return mean_over_tokens(inside + rest[0] * (rest[0] / rest[1]).log(), self.kept)


def record(model: nn.Module, batches: Sequence[Any]) -> list[Output]:
    """The dense model's Output of every batch."""
    return [_record(model, batch) for batch in batches]


@torch.no_grad()
def _record(model: nn.Module, batch: Any) -> Output:
    args, kwargs = split_inputs(batch)
    (found, logits), kept = counted(model(*args, **kwargs)), kept_tokens(kwargs)
    if logits:
        best = found.float().log_softmax(-1).topk(min(LIKELIEST, found.shape[-1]))
        return Output(best.values.half(), best.indices.int(), kept)
    return Output(found.clone(), None, kept)


def distill(
    model: nn.Module,
    results: Sequence[Result],
    batches: Sequence[Any],
    outputs: Sequence[Output],
    recovery: Recovery,
    seed: int = 0,
) -> list[Result]:
    """`results` trained together; as they were where that moved the outputs away from the dense.

    Judged by batches that are not trained on (one of HELD_BACK, if there are so many). The model
    must still have its dense parameters; they and its norms are edited in place.
    """
    whole = _Whole(model, results, batches, outputs)
    judged = list(range(0, len(batches), HELD_BACK)) if len(batches) >= HELD_BACK else []
    trained_on = [i for i in range(len(batches)) if i not in judged] or judged
    before = whole.error(judged or trained_on)
    small = [p for p in model.parameters() if p.dim() == 1]
    saved = [p.detach().clone() for p in small]
    whole.train(small, trained_on, recovery, seed)
    done = [latent.done(()) for latent in whole.latents]
    after = _Whole(model, done, batches, outputs).error(judged or trained_on)
    steps = (Step("model output", before), Step("recovery of all", after, kept=after < before))
    if after >= before:
        for parameter, old in zip(small, saved, strict=True):
            parameter.data.copy_(old)
    best = done if after < before else results
    return [result.after(*steps) for result in best]


class _Whole:
    """The model with the weights of latents."""

    def __init__(
        self,
        model: nn.Module,
        results: Sequence[Result],
        batches: Sequence[Any],
        outputs: Sequence[Output],
    ) -> None:
        self.model, self.outputs = model, outputs
        self.latents = [Latent(result) for result in results]
        self.data = [split_inputs(batch) for batch in batches]

    def distance(self, index: int) -> Tensor:
        args, kwargs = self.data[index]
        weights = {
            latent.result.site.name: latent.result.site.parameter_shape(latent.weight())
            for latent in self.latents
        }
        first = next(iter(weights.values()))
        with torch.autocast(first.device.type, torch.bfloat16, enabled=fast_bf16(first)):
            output = functional_call(self.model, weights, args, kwargs)
        return self.outputs[index].distance(output)

    def error(self, chosen: Sequence[int]) -> float:
        with torch.no_grad():
            return sum(float(self.distance(i)) for i in chosen) / max(len(chosen), 1)

    def train(
        self, small: Sequence[nn.Parameter], chosen: Sequence[int], recovery: Recovery, seed: int
    ) -> None:
        """Values behind the codes, branches and norms, by Adam."""
        trained = [pair for latent in self.latents for pair in latent.train("values")]
        trained += [(p, size_of(p)) for p in small]
        order = torch.Generator().manual_seed(seed)
        rate = recovery.whole_learning_rate
        train(trained, chosen, recovery.whole_epochs, rate, order, self.distance)
