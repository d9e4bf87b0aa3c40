"""Block-wise recovery: train what a block keeps until its outputs are the dense block's again.

Two stages as in GQSA (arXiv 2412.17560): first the values behind the codes, pattern fixed; then
the scales, codes fixed. Norms and biases train along. The inputs are what the compressed blocks
before it give, the targets what the dense model has there, so a block also mends what earlier ones
lost. The error is relative per token, because that is what the next norm passes on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsefx.passes.calibration import Part
from sparsefx.passes.compress_site import Result, Step
from sparsefx.passes.latent import Latent
from sparsefx.passes.padding import mean_over_tokens
from sparsefx.passes.spec import Recovery
from sparsefx.passes.training import fast_bf16, size_of, train


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
            samples = range(len(part.hidden))
            train(trained, samples, epochs, recovery.learning_rate, order, block.forward)
    done = [latent.done(()) for latent in block.latents]
    after = _Block(model, part, done).error()
    step = (Step("block output", before), Step("recovery", after, kept=after < before))
    if after < before:
        return [result.after(*step) for result in done]
    for parameter, old in zip(small, saved, strict=True):
        parameter.data.copy_(old)
    return [result.after(*step) for result in results]


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
        error = (out.float() - target).square().sum(-1) / power
        return mean_over_tokens(error, self.part.kept[index] if self.part.kept else None)

    def error(self) -> float:
        """Root of the mean relative error over all batches."""
        with torch.no_grad():
            losses = [float(self.forward(i)) for i in range(len(self.part.hidden))]
        return math.sqrt(sum(losses) / max(len(losses), 1))
