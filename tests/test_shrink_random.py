"""Random small networks with additions, products, concatenations and splits, cut at random."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from coupled_models import assert_equal, run, twin
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.errors import PassError
from sparsefx.passes.coupled import Couplings, couple
from sparsefx.passes.permute import permute
from sparsefx.passes.shrink import shrink

COUNTS = {"graphs": 0, "cut": 0, "module refused": 0, "moved": 0}
STEPS = ("layer", "layer", "norm", "relu", "gelu", "add", "mul", "cat", "halves", "thirds",
         "depthwise", "grouped", "again", "scale", "gate")  # fmt: skip


@dataclass
class Program:
    """Steps over a pool of tensors: (what, positions in the pool, layer or None)."""

    steps: list[tuple[str, tuple[int, ...], int | None]] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)


class Net(nn.Module):
    """Runs a Program; the last tensors of the pool are read by one output layer each."""

    def __init__(self, program: Program, image: bool) -> None:
        super().__init__()
        self.layers, self.steps = nn.ModuleList(program.layers), program.steps
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        pool = [x]
        for what, at, layer in self.steps:
            args = [pool[i] for i in at]
            dim = 1 if self.image else -1
            if layer is not None:
                pool.append(self.layers[layer](*args))
            elif what in ("halves", "thirds"):
                pool.extend(args[0].chunk(2 if what == "halves" else 3, dim))
            else:
                pool.append(SIMPLE[what](args, dim))
        return sum(t.flatten(1).sum(1) if t.dim() > 2 else t.sum(1) for t in pool[-2:])  # type: ignore[return-value]


SIMPLE: dict[str, Any] = {
    "relu": lambda a, d: a[0].relu(), "gelu": lambda a, d: F.gelu(a[0]),
    "add": lambda a, d: a[0] + a[1], "mul": lambda a, d: a[0] * a[1],
    "cat": lambda a, d: torch.cat(a, d), "gate": lambda a, d: F.glu(a[0], d),
    "scale": lambda a, d: a[0] * 1.5 - 0.25,
}  # fmt: skip


class Builder:
    """Appends steps to a Program; `draw` chooses what a step reads."""

    def __init__(self, draw: st.DrawFn, image: bool) -> None:
        self.draw, self.image, self.program = draw, image, Program(widths=[4])

    def put(self, what: str, at: tuple[int, ...], widths: list[int], layer: Any = None) -> None:
        p = self.program
        p.steps.append((what, at, None if layer is None else len(p.layers)))
        p.layers.extend([layer] if layer is not None else [])
        p.widths.extend(widths)

    def product(self, i: int, out: int, groups: int = 1) -> None:
        inside = self.program.widths[i]
        layer = nn.Conv2d(inside, out, 3, padding=1, groups=groups)
        self.put("layer", (i,), [out], layer if self.image else nn.Linear(inside, out))

    def step(self, what: str) -> None:
        widths = self.program.widths
        i = self.draw(st.integers(max(0, len(widths) - 4), len(widths) - 1))
        width = widths[i]
        alike = [j for j, w in enumerate(widths) if w == width and j != i]
        if what == "layer":
            self.product(i, self.draw(st.sampled_from([3, 4, 6, 8])))
        elif what == "again":
            self.again(i)
        elif what == "norm":
            norm = nn.BatchNorm2d(width) if self.image else nn.BatchNorm1d(width)
            self.put(what, (i,), [width], norm)
        elif what in ("depthwise", "grouped") and self.image and width % 2 == 0:
            self.product(i, 2 * width, width if what == "depthwise" else 2)
        elif what in ("add", "mul") and alike:
            self.put(what, (i, self.draw(st.sampled_from(alike))), [width])
        elif what == "cat" and width < 24:
            other = self.draw(st.integers(0, len(widths) - 1))
            self.put(what, (i, other), [width + widths[other]])
        elif what in PIECES and width % PIECES[what] == 0:
            pieces = PIECES[what]
            self.put(what, (i,), [width // pieces] * (1 if what == "gate" else pieces))
        elif what in ("relu", "gelu", "scale"):
            self.put(what, (i,), [width])

    def again(self, i: int) -> None:
        """Call a layer that takes this width a second time."""
        for k, layer in enumerate(self.program.layers):
            inside = getattr(layer, "in_channels", getattr(layer, "in_features", 0))
            if inside == self.program.widths[i]:
                found: Any = layer
                self.program.steps.append(("again", (i,), k))
                self.program.widths.append(int(found.weight.shape[0]))
                return


PIECES = {"halves": 2, "thirds": 3, "gate": 2}


@st.composite
def networks(draw: st.DrawFn) -> tuple[Net, Tensor]:
    image = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    builder = Builder(draw, image)
    for _ in range(draw(st.integers(4, 12))):
        builder.step(draw(st.sampled_from(STEPS)))
    last = len(builder.program.widths) - 1
    for i in (last, max(0, last - 1)):
        builder.product(i, 3)
    net = Net(builder.program, image).double().eval()
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            positive = "running_var" in name
            tensor.copy_(
                torch.rand_like(tensor) + 0.5 if positive else torch.randn_like(tensor) / 2
            )
    return net, torch.randn((2, 4, 3, 3) if image else (3, 4), dtype=torch.float64)


def masked(net: Net, couplings: Couplings, keep: dict[str, list[int]]) -> Net:
    """The dense net, columns that read what goes at zero."""
    out: Any = twin(net)
    with torch.no_grad():
        for group in couplings.groups:
            for m in group.of_role("in") if group.name in keep else ():
                gone = [i for i in range(group.size) if i not in keep[group.name]]
                at = torch.from_numpy(m.index[gone].reshape(-1))
                out.get_parameter(m.name).index_fill_(m.axis, at, 0)
    return out  # type: ignore[no-any-return]


@given(networks(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))  # fmt: skip
def check(made: tuple[Net, Tensor], random: Any) -> None:
    net, x = made
    couplings = couple(net, x)
    want = run(net, x)
    COUNTS["graphs"] += 1
    moved = twin(net)
    for group in couplings.groups:
        if not group.fixed:
            permute(moved, couplings, group, random.sample(range(group.size), group.size))
            COUNTS["moved"] += 1
    assert_equal(run(moved, x), want)
    free = [g for g in couplings.groups if not g.reason]
    keep = {g.name: sorted(random.sample(range(g.size), random.randint(1, g.size))) for g in free}
    if not keep:
        return
    COUNTS["cut"] += 1
    want = run(masked(net, couplings, keep), x)
    assert_equal(run(shrink(net, x, keep=keep, form="graph").model, x), want)
    before = twin(net).state_dict()
    try:
        shrink(net, x, keep=keep)
        assert_equal(run(net, x), want)
    except PassError:  # chunk takes equal pieces: only the graph can be cut unevenly
        COUNTS["module refused"] += 1
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_random_networks(record_property: Any) -> None:
    check()
    record_property("counts", str(COUNTS))
    assert COUNTS["cut"] > COUNTS["graphs"] // 3 > 10, COUNTS
    assert COUNTS["module refused"] < COUNTS["cut"] // 2, COUNTS
