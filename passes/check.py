"""`SPARSEFX_CHECK=1`: a graph's outputs before and after every pass, on random inputs.

How far outputs may differ is measured on the graph before the pass, by Monte Carlo arithmetic
(Parker 1997): every element of a float input or weight is moved by 2u and of a product's result by
2·√K·u, relatively and with random sign (u the dtype's unit roundoff, K the last side), and the
largest change of an output over 4 such runs, 4 times, is what another order of sums may cost. A
graph that amplifies rounding thus gets a wide bound, one that does not a narrow one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from sparsefx.ir.errors import PassError
from sparsefx.ir.products import PRODUCTS, op_name, value
from sparsefx.ir.sites import Traced

RUNS, FACTOR = 4, 4.0


class Compared:
    """A tool of the pass manager. Gives a note where nothing could be compared."""

    def __init__(self, traced: Traced) -> None:
        self.seen = len(traced.results)
        self._keep(traced)

    def __call__(self, name: str, changed: bool, traced: Traced) -> str | None:
        """Raises PassError naming the pass and the first output that differs."""
        if not changed:
            return None
        try:
            note = self._compare(name, traced)
        finally:
            self._keep(traced)
            self.seen = len(traced.results)
        return note and f"SPARSEFX_CHECK compared nothing: {note}"

    def _keep(self, traced: Traced) -> None:
        """Copy the graph: passes edit it in place."""
        self.before = _copy(traced.graph)

    def _compare(self, name: str, traced: Traced) -> str | None:
        packed, why = _packed(traced, self.seen)
        if why:
            return why
        weights = {node.name: tensor for node, tensor in traced.weights.items()}
        try:
            inputs = _inputs(self.before, weights)
            moved = [_outputs(self.before, inputs, packed, seed) for seed in range(RUNS + 1)]
        except Exception as error:  # whatever an op says of inputs it was not made for
            return f"the graph before {name} does not run on random inputs: {error}"[:300]
        after = _outputs(traced.graph, inputs | weights, {}, 0)
        if len(after) != len(moved[0]):
            raise PassError(f"after {name}: {len(moved[0])} outputs became {len(after)}")
        for i, (old, new) in enumerate(zip(moved[0], after, strict=True)):
            if fault := _differs(old, new, [run[i] for run in moved[1:]]):
                raise PassError(f"after {name}: output {i} is not what it was: {fault}")
        return None


def _differs(old: Any, new: Any, moved: list[Any]) -> str | None:
    """Why a value after a pass is not the value before it, within what rounding explains."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None if type(old) is type(new) else f"{type(old).__name__} → {type(new).__name__}"
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{old.dtype}{list(old.shape)} → {new.dtype}{list(new.shape)}"
    if not old.numel():
        return None
    if not old.is_floating_point():
        stable = all(torch.equal(old, other) for other in moved)
        return "other integers" if stable and not torch.equal(old, new) else None
    bound = FACTOR * max(_distance(old, other) for other in moved)
    bound += float(old.abs().nan_to_num(0.0).max()) * torch.finfo(old.dtype).eps
    error = _distance(old, new)
    return None if error <= bound else f"error {error:.3g}, bound {bound:.3g}"


def _distance(a: Tensor, b: Tensor) -> float:
    """max |a − b| where both are finite; infinite where only one is NaN or infinite."""
    x, y = a.double(), b.double()
    if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
        return math.inf
    return float((x - y).nan_to_num(0.0, 0.0, 0.0).abs().max())


def _packed(traced: Traced, seen: int) -> tuple[dict[str, Tensor], str]:
    """Weights that the pass compressed, as they are now: what the graph before it is to use."""
    out: dict[str, Tensor] = {}
    for node, result in list(traced.results.items())[seen:]:
        if result.packed.format.a8:
            return {}, "the pass rounds activations ('+a8')"
        matrix = result.packed.unpack()
        if result.branch:
            down, up, scale = (t.float() for t in result.branch)
            matrix = matrix + (up * scale) @ down
        tensor = traced.weights[node]
        out[node.name] = result.site.parameter_shape(matrix).reshape(tensor.shape).to(tensor.dtype)
    return out, ""


def _copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph(graph.owning_module)
    nodes: dict[Node, Node] = {}
    result = new.graph_copy(graph, nodes)
    for old, made in nodes.items():
        made.name, made.meta = old.name, dict(old.meta)
    new.output(result)
    return new


def _inputs(graph: fx.Graph, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What to run the graph on, by name; the same at every pass."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {n.name: _input(n, weights) for n in graph.nodes if n.op == "placeholder"}


def _input(node: Node, weights: Mapping[str, Tensor]) -> Any:
    """The weight, or the tensor that dynamo is compiling for, or noise of the recorded shape."""
    if node.name in weights:
        return weights[node.name]
    lifted = getattr(node.meta.get("grapharg"), "example", None)
    seen = value(node)
    if isinstance(lifted, Tensor) and not isinstance(lifted, FakeTensor):
        return lifted
    if isinstance(seen, torch.SymInt):
        return seen.node.hint
    if not isinstance(seen, Tensor):
        if seen is None:
            raise ValueError(f"no shape is recorded of {node.name}")
        return seen
    shape = [s if isinstance(s, int) else s.node.hint for s in seen.shape]
    device = "cpu" if seen.device.type == "meta" else seen.device
    if seen.is_floating_point() or seen.is_complex():
        return torch.randn(shape, device=device).to(seen.dtype)
    # 0 and 1 are rows of every table that is worth a look-up.
    return torch.randint(0, 2, shape, device=device).to(seen.dtype)


class _Runner(fx.Interpreter):
    """Runs a graph over copies of its inputs; a seed above 0 moves floats by rounding errors."""

    def __init__(self, module: nn.Module, graph: fx.Graph, packed: Any, seed: int) -> None:
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.packed, self.seed = packed, seed
        self.generator = torch.Generator().manual_seed(seed)

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)  # also where it is replaced: a placeholder takes its argument
        out = self.packed.get(n.name, out)
        if not isinstance(out, Tensor):
            return out
        if n.op in ("placeholder", "get_attr"):
            return self._moved(out.detach().clone(), 1.0)
        if op_name(n) in PRODUCTS and out.dim():
            return self._moved(out, math.sqrt(out.shape[-1]))
        return out

    def _moved(self, out: Tensor, steps: float) -> Tensor:
        """`out` with every element one or other way by 2 · `steps` unit roundoffs."""
        if not self.seed or not out.is_floating_point():
            return out
        sign = torch.randint(0, 2, out.shape, generator=self.generator).mul_(2).sub_(1)
        step = sign.to(out.device) * (steps * torch.finfo(out.dtype).eps)
        return (out.double() * (1 + step)).to(out.dtype)


def _outputs(
    graph: fx.Graph, inputs: Mapping[str, Any], packed: Mapping[str, Tensor], seed: int
) -> list[Any]:
    """Flat outputs, with torch's random state as it was afterwards."""
    module = graph.owning_module or nn.Module()
    args = [inputs[n.name] for n in graph.nodes if n.op == "placeholder"]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return tree_leaves(_Runner(module, graph, packed, seed).run(*args))
