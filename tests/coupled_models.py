"""Small random models for tests of coupled dimensions, and what their tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from sparsefx.models.zoo import ZOO
from sparsefx.passes.coupled import Couplings, couple

Made = tuple[nn.Module, Any]
"""A model in float64 and eval mode, with example inputs."""


class Gated(nn.Module):
    """A GLU whose gate and values are halves of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * value)
        return out


class Residual(nn.Module):
    """Convolution, batch norm, ReLU and an addition, between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.first_bn = nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.second, self.second_bn = nn.Conv2d(10, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        y = self.second_bn(self.second(self.first_bn(self.first(x)).relu()))
        out: Tensor = self.head((x + y).relu().mean((2, 3)))
        return out


class Inverted(nn.Module):
    """MobileNet's block: expand, depthwise, squeeze and excite, project; then groups of two."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn = nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12)
        self.reduce, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 8, 1)
        self.grouped, self.last = nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.expand(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        x = x * self.excite(self.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        out: Tensor = self.last(self.grouped(self.project(x)).relu())
        return out


class Dense(nn.Module):
    """DenseNet's block: every layer reads all channels so far, after a batch norm over them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (6, 10))
        self.convolutions = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (6, 10))
        self.head = nn.Linear(14 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = torch.cat([x, convolution(norm(x).relu())], 1)
        out: Tensor = self.head(F.max_pool2d(x, 3).flatten(1))
        return out


class FixedHeads(nn.Module):
    """Attention whose code spells the number of heads out: only the graph can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) / 3).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).reshape(2, 5, 16))
        return out


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)
    )


OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (3, 8)),
    "gated": (Gated, (3, 8)),
    "residual": (Residual, (2, 3, 6, 6)),
    "inverted": (Inverted, (2, 4, 6, 6)),
    "dense": (Dense, (2, 3, 6, 6)),
    "fixed_heads": (FixedHeads, (2, 5, 16)),
}
FROM_ZOO = ("gpt2", "llama", "bert", "vit", "resnet", "phi3")
TIMM = pytest.param("timm_vit", marks=pytest.mark.zoo)
"""Needs timm, which only `make check-zoo` installs."""


def make(name: str) -> Made:
    """The model of that name with random weights, norms and running statistics."""
    inputs: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in OWN:
            factory, shape = OWN[name]
            model, inputs = factory(), torch.randn(shape)
        else:
            example = ZOO[name]()
            model, inputs = example.model, dict(example.kwargs) or example.args
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                positive = "running_var" in key
                noise = torch.rand_like(tensor) + 0.5 if positive else torch.randn_like(tensor) / 5
                tensor.copy_(noise if positive else tensor + noise)
    inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return model.double().eval(), inputs


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Floating-point outputs."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def assert_equal(got: list[Tensor], want: list[Tensor], eps: float = 2.0**-52) -> None:
    """Equal up to rounding.

    Models here are at most 40 products deep with sums of at most 512 terms: 40 · 512 roundings of
    relative size eps, each against the greatest value in sight, taken 16 times for norms' gain.
    (transformers' RMS norms round to float32: give its eps.)
    """
    assert [t.shape for t in got] == [t.shape for t in want]
    for x, y in zip(got, want, strict=True):
        assert float((x - y).abs().max()) <= 16 * 40 * 512 * eps * float(y.abs().max())


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


@cache
def couplings_of(name: str) -> Couplings:
    """Solved once per model: they hold names and positions only, which every copy shares."""
    return couple(*make(name))
