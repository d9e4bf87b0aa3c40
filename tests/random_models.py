"""Small random models for tests: graphs of layers that multiply by weights, with random Formats.

`draw(seed)` is a pure function of the seed. Every registered layout and codec is drawn from; one
without a rule of its own here is drawn as its `example`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.codecs import CODECS, Codec, Float, Int
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import LAYOUTS, NM, Bitmap, Layout, Tile

WIDTHS = (8, 16, 24, 32, 33, 40, 48, 64, 72, 100)
WIDEST = 160
TOKENS = 50


# --- layers --------------------------------------------------------------------------------------


class Plus(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Concat(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], -1)


class Split(nn.Module):
    """Two parts of the last axis: by chunk, by split or by slices."""

    def __init__(self, width: int, at: int, how: int) -> None:
        super().__init__()
        self.sizes, self.how = [at, width - at], how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == 0 and self.sizes[0] == self.sizes[1]:
            a, b = x.chunk(2, -1)
        elif self.how == 1:
            a, b = torch.split(x, self.sizes, -1)
        else:
            a, b = x[..., : self.sizes[0]], x[..., self.sizes[0] :]
        return a, b


class Pointwise(nn.Module):
    """One 1×1 convolution over the channels of (batch, length, width)."""

    def __init__(self, k: int, n: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(k, n, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.transpose(1, 2).unsqueeze(-1))
        return y.squeeze(-1).permute(0, 2, 1).contiguous()  # Conv1D takes views


class Times(nn.Module):
    """x @ parameter, stored (K, N) or (N, K)."""

    def __init__(self, k: int, n: int, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*((n, k) if transposed else (k, n))) / k**0.5)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.T if self.transposed else self.weight)


class Mix(nn.Module):
    """A Linear along the second axis, of a fixed length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.fc = nn.Linear(length, length)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.transpose(1, 2))
        return y.transpose(1, 2).contiguous()


class Flat(nn.Module):
    """A Linear over rows (-1, K) that become (…, N) again."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.fc = nn.Linear(k, n)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.reshape(-1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], -1)


class Gated(nn.Module):
    def __init__(self, k: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(k, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, width))
        return out


class Graph(nn.Module):
    """Layers over a list of values: the inputs, then what each layer returns."""

    def __init__(
        self, layers: list[nn.Module], sources: list[tuple[int, ...]], outputs: dict[str, int],
        form: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sources, self.outputs, self.form = sources, outputs, form

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Any:
        values = [x for x in (a, b, c) if x is not None]
        for layer, sources in zip(self.layers, self.sources, strict=True):
            y = layer(*(values[i] for i in sources))
            values += [y] if isinstance(y, Tensor) else y
        out = {name: values[i] for name, i in self.outputs.items()}
        if self.form == "dict":
            return out
        return tuple(out.values()) if self.form == "tuple" else out["y"]


# --- drawing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A model with what `sparsify` and `export_onnx` are to be given."""

    seed: int
    model: Graph
    spec: Mapping[str, Any]
    inputs: dict[str, Tensor]
    dynamic_shapes: dict[str, dict[int, str]] | None

    def __str__(self) -> str:
        kinds = [type(layer).__name__ for layer in self.model.layers]
        wired = [f"{k}{s}" for k, s in zip(kinds, self.model.sources, strict=True)]
        shapes = {name: tuple(x.shape) for name, x in self.inputs.items()}
        return f"draw({self.seed}): {shapes} dynamic {self.dynamic_shapes}; {wired}; {self.spec}"


def draw(seed: int) -> Drawn:
    """The model of this seed, in eval mode, float32."""
    torch.manual_seed(seed)
    drawing = _Drawing(random.Random(seed))
    for _ in range(drawing.random.randint(1, 7)):
        drawing.random.choice(drawing.choices())()
    drawing.linear()
    return drawing.finish(seed)


class _Drawing:
    """The graph so far: values by index, with the width of each; 0 for token ids."""

    def __init__(self, rng: random.Random) -> None:
        self.random = rng
        self.lead = rng.choice([(), (3,), (2, 5), (3, 6), (4, 3)])
        self.layers: list[nn.Module] = []
        self.sources: list[tuple[int, ...]] = []
        self.fixed_length = False
        self.inputs = {"a": torch.randn(*self.lead, rng.choice(WIDTHS))}
        for name in ("b", "c")[: rng.choice([0, 0, 1, 2])]:
            floats = torch.randn(*self.lead, rng.choice(WIDTHS))
            tokens = torch.randint(0, TOKENS, self.lead)
            self.inputs[name] = rng.choice([floats, tokens])
        self.widths = [x.shape[-1] if x.is_floating_point() else 0 for x in self.inputs.values()]

    def choices(self) -> list[Callable[[], None]]:
        found = [
            self.linear, self.linear, self.product, self.again, self.pointwise, self.norm,
            self.residual, self.concat, self.split, self.gated,
        ]  # fmt: skip
        found += [self.embedding] * (0 in self.widths)
        found += [self.attention, self.convolution, self.mix] * (len(self.lead) == 2)
        return found

    def pick(self, width: int | None = None) -> int:
        """The index of a float value, recent ones more often."""
        fits = [i for i, w in enumerate(self.widths) if w and width in (None, w)]
        return self.random.choice(fits[-3:] if self.random.random() < 0.8 else fits)

    def put(self, layer: nn.Module, sources: tuple[int, ...], *widths: int) -> None:
        self.layers.append(layer)
        self.sources.append(sources)
        self.widths += widths

    def linear(self) -> None:
        i, n = self.pick(), self.random.choice(WIDTHS)
        self.put(nn.Linear(self.widths[i], n, bias=self.random.random() < 0.6), (i,), n)

    def product(self) -> None:
        from transformers.pytorch_utils import Conv1D

        i, n = self.pick(), self.random.choice(WIDTHS)
        k = self.widths[i]
        makers: list[Callable[[], nn.Module]] = [
            lambda: Conv1D(n, k), lambda: Times(k, n, False), lambda: Times(k, n, True),
            lambda: Flat(k, n),
        ]  # fmt: skip
        self.put(self.random.choice(makers)(), (i,), n)

    def again(self) -> None:
        """A weight that is there already: the same module, or another over the same parameter."""
        linears = [m for m in self.layers if isinstance(m, nn.Linear)]
        if not linears:
            return self.linear()
        old = self.random.choice(linears)
        if self.random.random() < 0.5:
            new = nn.Linear(old.in_features, old.out_features)
            new.weight, old = old.weight, new
        self.put(old, (self.pick(old.in_features),), old.out_features)
        return None

    def pointwise(self) -> None:
        i = self.pick()
        kinds = [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU(), nn.Tanh(), nn.Sigmoid()]
        self.put(self.random.choice(kinds), (i,), self.widths[i])

    def norm(self) -> None:
        i = self.pick()
        kind = self.random.choice([nn.LayerNorm, nn.RMSNorm])
        self.put(kind(self.widths[i]), (i,), self.widths[i])

    def residual(self) -> None:
        i = self.pick()
        self.put(Plus(), (i, self.pick(self.widths[i])), self.widths[i])

    def concat(self) -> None:
        i, j = self.pick(), self.pick()
        if self.widths[i] + self.widths[j] <= WIDEST:
            self.put(Concat(), (i, j), self.widths[i] + self.widths[j])

    def split(self) -> None:
        i = self.pick()
        width = self.widths[i]
        if width < 8:
            return
        at = self.random.choice([width // 2, self.random.randint(1, width - 1)])
        self.put(Split(width, at, self.random.randrange(3)), (i,), at, width - at)

    def gated(self) -> None:
        i = self.pick()
        self.put(Gated(self.widths[i], self.random.choice(WIDTHS)), (i,), self.widths[i])

    def embedding(self) -> None:
        n = self.random.choice(WIDTHS)
        self.put(nn.Embedding(TOKENS, n), (self.widths.index(0),), n)

    def attention(self) -> None:
        i = self.pick()
        heads = self.random.choice([h for h in (1, 2, 4) if self.widths[i] % h == 0])
        self.put(Attention(self.widths[i], heads, self.random.random() < 0.5), (i,), self.widths[i])

    def convolution(self) -> None:
        i, n = self.pick(), self.random.choice(WIDTHS)
        self.put(Pointwise(self.widths[i], n, self.random.random() < 0.5), (i,), n)

    def mix(self) -> None:
        i = self.pick()
        self.fixed_length = True
        self.put(Mix(self.lead[1]), (i,), self.widths[i])

    def finish(self, seed: int) -> Drawn:
        last = len(self.widths) - 1
        others = self.random.sample(range(len(self.inputs), last), min(2, last - len(self.inputs)))
        form = self.random.choice(["tensor", "tuple", "dict"])
        outputs = {"y": last, **{f"also{i}": i for i in others if form != "tensor"}}
        model = Graph(self.layers, self.sources, outputs, form).eval().requires_grad_(False)
        axes = {0: "batch", 1: "length"} if not self.fixed_length else {0: "batch"}
        axes = {axis: axes[axis] for axis in range(len(self.lead)) if axis in axes}
        axes = self.random.choice([axes, axes, {0: "batch"} if axes else {}, {}])
        shapes = dict.fromkeys(self.inputs, axes) if axes else None
        return Drawn(seed, model, spec_for(model, self.random), self.inputs, shapes)


def spec_for(model: nn.Module, rng: random.Random) -> dict[str, Any]:
    """A spec for `sparsify`: one Format for most weights, others where it does not fit."""
    main = random_format(rng)
    spec: dict[str, Any] = {"format": str(main), "overrides": {}}
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        n, k = weight.shape[:2]
        if isinstance(owner, nn.Embedding):
            continue
        if type(owner).__name__ == "Conv1D" or (isinstance(owner, Times) and not owner.transposed):
            n, k = k, n
        fmt = main if rng.random() < 0.7 else random_format(rng)
        while fmt.rejects(n, k):
            fmt = random_format(rng)
        if fmt != main:
            spec["overrides"][name] = str(fmt)
    return spec


def random_format(rng: random.Random) -> Format:
    """Any layout by any codec, with or without a branch and int8 activations; never dense."""
    while True:
        rank = rng.choice([0, 0, 0, 1, 4, 8])
        a8 = rng.random() < 0.25
        group = rng.choice([0, 8, 16, 32, 50]) if a8 else 0
        fmt = Format(_layout(rng), _codec(rng), rank, a8, group)
        if not fmt.float_activations.is_dense:
            return fmt


def _layout(rng: random.Random) -> Layout:
    kind = rng.choice(LAYOUTS)
    if kind is NM:
        m = rng.choice([2, 4, 8])
        return NM(rng.randint(1, m - 1), m)
    if kind is Bitmap:
        return Bitmap(share=rng.randint(5, 95) / 100)
    if kind is Tile:
        rows, cols = rng.choice([(16, 1), (1, 16), (8, 8), (3, 5), (4, 1)])
        return Tile(rows, cols, share=rng.randint(1, 15) / 16)
    found = kind.parse(kind.example)
    assert found is not None
    return found


def _codec(rng: random.Random) -> Codec:
    kind = rng.choice(CODECS)
    found: Codec | None
    if kind is Int:
        group = rng.choice([0, 8, 16, 24, 32, 64, 128])
        return Int(rng.randint(2, 8), group, rng.random() < 0.6)
    if kind is Float:
        found = Float.parse(rng.choice(["fp32", "fp16", "bf16"]))
    else:
        found = kind.parse(kind.example)
    assert found is not None
    return found
