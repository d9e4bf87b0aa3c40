"""Block-wise recovery: train what a block keeps until its outputs are the dense block's again.

Two stages as in GQSA (arXiv 2412.17560): first the values behind the codes, pattern fixed; then
the scales, codes fixed. Norms and biases train along. The inputs are what the compressed blocks
before it give, the targets what the dense model has there, so a block also mends what earlier ones
lost. The error is relative per token, because that is what the next norm passes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsefx.passes.calibration import Part
from sparsefx.passes.compress_site import Result, Step
from sparsefx.passes.latent import Latent
from sparsefx.passes.spec import Recovery

Trained = list[tuple[nn.Parameter, float]]


def recover(
    model: nn.Module, part: Part, results: Sequence[Result], recovery: Recovery, seed: int = 0
) -> list[Result]:
    """`results` of a block, trained; as they were where that did not lower the block's error.

    The block's norms and biases are edited in place. Same inputs and seed give the same bits.
    """
    module = part.module
    assert module is not None
    block = _Block(model, part, results)
    before = block.error()
    small = [p for p in module.parameters() if p.dim() == 1]
    saved = [p.detach().clone() for p in small]
    order = torch.Generator().manual_seed(seed)
    for stage, epochs in (("values", recovery.epochs), ("scales", recovery.scale_epochs)):
        trained = [pair for latent in block.latents for pair in latent.train(stage)]
        trained += [(p, size_of(p)) for p in small]
        if epochs:
            _train(block, trained, epochs, recovery.learning_rate, order)
    done = [latent.done(()) for latent in block.latents]
    after = _Block(model, part, done).error()
    step = (Step("block output", before), Step("recovery", after, kept=after < before))
    if after < before:
        return [result.after(*step) for result in done]
    for parameter, old in zip(small, saved, strict=True):
        parameter.data.copy_(old)
    return [result.after(*step) for result in results]


def size_of(parameter: Tensor) -> float:
    """What steps of a norm or bias go by: its root mean square, but never next to nothing."""
    return max(float(parameter.detach().square().mean().sqrt()), 1e-3)


class _Block:
    """A block whose compressed weights come from latents."""

    def __init__(self, model: nn.Module, part: Part, results: Sequence[Result]) -> None:
        assert part.module is not None
        self.part, self.module = part, part.module
        self.latents = [Latent(result) for result in results]
        inside = {id(p): name for name, p in part.module.named_parameters()}
        self.names = [inside[id(model.get_parameter(r.site.name))] for r in results]

    def forward(self, index: int) -> Tensor:
        """The relative error of one batch's outputs, as a mean over its tokens."""
        weights = {
            name: latent.result.site.parameter_shape(latent.weight())
            for name, latent in zip(self.names, self.latents, strict=True)
        }
        call, hidden = self.part.calls[index], self.part.hidden[index]
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=fast_bf16(hidden)):
            out = functional_call(self.module, weights, (hidden, *call.args), call.kwargs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        target = self.part.targets[index].float()
        power = target.square().sum(-1).clamp(min=1e-12)
        error: Tensor = ((out.float() - target).square().sum(-1) / power).mean()
        return error

    def error(self) -> float:
        """Root of the mean relative error over all batches."""
        with torch.no_grad():
            losses = [float(self.forward(i)) for i in range(len(self.part.hidden))]
        return math.sqrt(sum(losses) / max(len(losses), 1))


def fast_bf16(x: Tensor) -> bool:
    """Whether float32 products are worth rounding to bfloat16: it has units of its own there."""
    if x.dtype is not torch.float32:
        return False
    return x.is_cuda or torch.cpu._is_amx_tile_supported()


def _train(
    block: _Block, trained: Trained, epochs: int, rate: float, order: torch.Generator
) -> None:
    """Adam over shuffled batches; each tensor's steps are `rate` of its own size."""
    for tensor, _ in trained:
        tensor.requires_grad_(True)
    groups = [{"params": [tensor], "lr": rate * size} for tensor, size in trained]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    total = epochs * len(block.part.hidden)
    with torch.enable_grad():
        for step, index in enumerate(indices(len(block.part.hidden), epochs, order)):
            for group, (_, size) in zip(optimiser.param_groups, trained, strict=True):
                group["lr"] = rate * size * schedule(step / total)
            optimiser.zero_grad()
            block.forward(index).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for tensor, _ in trained:
        tensor.requires_grad_(False)


def schedule(progress: float) -> float:
    """Warm-up over the first twentieth, then a cosine to a tenth."""
    return min(progress / 0.05, 1.0) * (0.55 + 0.45 * math.cos(math.pi * progress))


def indices(count: int, epochs: int, order: torch.Generator) -> Iterator[int]:
    for _ in range(epochs):
        yield from torch.randperm(count, generator=order).tolist()
