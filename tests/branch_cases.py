"""What tests of low-rank branches share: adapted modules, a backend that shows its graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.capture import placeholder_weights
from sparsefx.ir.op import LINEAR
from sparsefx.ir.products import op_name
from sparsefx.ir.sites import Traced
from sparsefx.ir.text import text
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.dead_ranks import dead_ranks
from sparsefx.passes.fuse_branches import fuse_branches
from sparsefx.passes.fuse_unpack import fuse_unpack
from sparsefx.passes.manager import run_passes
from sparsefx.passes.normalise import normalise
from sparsefx.passes.pack import pack

peft: Any = pytest.importorskip("peft")
OURS = (normalise, pack, fuse_unpack, fuse_branches, dead_ranks, clean_up)
K, N, RANK = 32, 16, 4
AS_IT_IS: Any = {"inner": "eager", "spec": {"format": "int8", "ignore": ["re:.*"]}}
"""Pack nothing at compile time."""


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x)
        return y.relu()


def adapted(model: nn.Module, targets: list[str], *names: str, **options: Any) -> nn.Module:
    """`model` with PEFT's LoRA layers of random weights around packed ones, in eval mode."""
    for i, name in enumerate(names):
        config = peft.LoraConfig(
            r=RANK - i, lora_alpha=8, target_modules=targets, lora_dropout=0.1,
            init_lora_weights=False, **options,
        )  # fmt: skip
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter(list(names))
            base = nn.Sequential(module.base_layer)
            module.base_layer = sparsefx.sparsify(base, "int8")[0]
    return model.eval()


class Seen:
    """A dynamo backend that runs passes and keeps graphs as text, before and after."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.after: list[str] = []
        self.notes: list[str] = []
        self.graphs: list[Any] = []

    def __call__(self, gm: Any, inputs: Any) -> Any:
        traced = Traced(gm.graph, placeholder_weights(gm, inputs))
        self.before.append(text(gm.graph))
        run_passes(traced, OURS)
        self.after.append(text(gm.graph))
        self.notes += traced.notes
        self.graphs.append(gm.graph)
        gm.recompile()
        return gm.forward


def through(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, Seen]:
    seen = Seen()
    with torch.no_grad():
        out = torch.compile(model, backend=seen, fullgraph=True)(*inputs)
    return out, seen


def products(seen: Seen) -> Counter[str]:
    """Products of both kinds in all graphs after the passes."""
    found: Counter[str] = Counter()
    for graph in seen.graphs:
        for node in graph.nodes:
            if op_name(node) in ("linear", "matmul", "mm"):
                found["packed" if node.target is LINEAR else "dense"] += 1
    return found


def close(got: Tensor, want: Tensor, x: Tensor, slack: float = 1.0) -> None:
    """The same products summed in another order: K + r terms of the size of the result at most."""
    unit = torch.finfo(want.dtype).eps
    reach = (K + RANK) * unit * float(want.abs().max() + x.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=slack * reach)


class Pair(nn.Module):
    """A packed linear and two matrices, to be joined by a test."""

    def __init__(self, join: Callable[[Pair, Tensor], Tensor], spec: str = "int8") -> None:
        super().__init__()
        self.base = sparsefx.sparsify(nn.Sequential(nn.Linear(K, N)), spec)[0]
        self.a, self.b = nn.Linear(K, RANK, bias=False), nn.Linear(RANK, N, bias=False)
        self.gate = nn.Parameter(torch.tensor([1.0, 0.0, -0.5, 0.0]), requires_grad=False)
        self.strength = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.register_buffer("magnitude", torch.rand(1, N) + 0.5)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)
