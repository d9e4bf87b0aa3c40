"""Products on GPUs become Triton launches that Inductor sees, where they were opaque ops.

`sparsefx::linear`, `linears` and `fused` launch kernels from Python; in their place `triton_ops`
puts one `sparsefx::triton_linear` per product, whose launches `torch.compile` traces. Weights are
brought into their kernels' order beforehand, from their real values, and belong to the graph: as
for other packed weights, editing them later raises StaleWeightError.

Nothing is asked of an open number of rows M, so one graph serves all of them: configurations are
chosen, and tuned, for the M that is compiled for, at least `FEWEST`. Work is not split over tasks
then, whose partial sums take memory that grows with M. K is the weight's, and guarded. What stays
opaque is told in `traced.notes`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparsefx.codegen import triton
from sparsefx.codegen.kernels import Problem, choose
from sparsefx.codegen.triton_fused import KERNELS
from sparsefx.codegen.triton_launch import Config, Product, plan
from sparsefx.ir.fused import FUSED, LINEARS, Part, parts_of
from sparsefx.ir.op import LINEAR, stored
from sparsefx.ir.products import value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.merge_siblings import part

OPS = (LINEAR, LINEARS, FUSED)
FEWEST = 16
"""Rows, at least, that an open number of rows is taken for: what tensor cores multiply at once."""


@dataclass(frozen=True)
class Ready:
    """One part of an op: its weight in a kernel's order and the configuration for its rows."""

    part: Part
    product: Product
    config: Config


@graph_pass()
def triton_ops(traced: Traced) -> bool:
    """Show Inductor the Triton launches of products on GPUs; notes say what stays opaque."""
    return show(traced, "cuda")


def show(traced: Traced, device: str) -> bool:
    """`triton_ops` for weights on `device`."""
    left: dict[str, list[str]] = {}
    nodes = [node for node in traced.graph.nodes if node.target in OPS]
    trained = _wants_gradient(traced.graph)
    for node in nodes:
        parts = _parts(node)
        served = "gradients are asked for" if trained else _ready(traced, node, parts, device)
        if isinstance(served, str):
            left.setdefault(served, []).append(node.name)
            continue
        _freeze(traced, [n for p in parts for n in p.weight])
        _replace(node, served)
    for why, names in left.items():
        traced.notes.append(f"triton_ops: {', '.join(names)} stay opaque to Inductor: {why}")
    _drop_unread(traced.graph)
    return len(nodes) > sum(map(len, left.values()))


def _parts(node: Node) -> list[Part]:
    return [part(node)] if node.target is LINEAR else parts_of(*node.args[1:6])  # type: ignore[arg-type]


def _wants_gradient(graph: Graph) -> bool:
    """AOTAutograd's own rule: gradients are on and an input takes one."""
    values = (value(node) for node in graph.nodes if node.op in ("placeholder", "get_attr"))
    taken = any(isinstance(t, Tensor) and t.requires_grad for t in values)
    return taken and torch.is_grad_enabled()


def _ready(traced: Traced, node: Node, parts: list[Part], device: str) -> list[Ready] | str:
    """How every part is multiplied, or why the op has to stay as it is."""
    x, y = value(node.args[0]), value(node)
    first = y[0] if isinstance(y, (list, tuple)) else y
    if not isinstance(x, Tensor) or not isinstance(first, Tensor):
        return "the shape of x is not recorded"
    if first.dtype != x.dtype:
        return f"autocast makes {first.dtype} of {x.dtype}"
    if not all(isinstance(one.n, int) for one in parts):
        return "the number of results is an input of the graph"
    for operand in node.args[7:]:
        if operand is not None and not _alike(value(operand), x, parts[0].n):
            return "an operand is of another type or shape than the result"
    out = []
    for one in parts:
        buffers = _buffers(traced, one.weight, device)
        served = buffers if isinstance(buffers, str) else _serve(x, one, buffers)
        if isinstance(served, str):
            return served
        out.append(served)
    return out


def _alike(operand: Any, x: Tensor, n: int) -> bool:
    """Whether an operand is (…, N) in x's type, whatever open numbers of rows turn out to be."""
    if not isinstance(operand, Tensor) or operand.dtype != x.dtype or operand.dim() != x.dim():
        return False
    rows = zip(operand.shape[:-1], x.shape[:-1], strict=True)
    return all(statically_known_true(a == b) for a, b in rows) and int(operand.shape[-1]) == n


def _buffers(traced: Traced, nodes: Sequence[Node], device: str) -> list[Tensor] | str:
    """What a weight is stored in, or why it cannot be brought into another order here."""
    out = []
    for node in nodes:
        tensor = _tensor(traced, node)
        if tensor is None:
            return "what is stored is not known when it is compiled"
        if tensor.device.type != device:
            return f"weights are on {tensor.device.type}, not {device}"
        if node.op == "placeholder" and tensor.is_inference():
            return "torch does not count edits of inference tensors"
        out.append(tensor)
    return out


def _tensor(traced: Traced, node: Node) -> Tensor | None:
    """The tensor itself that an input or attribute of the graph stands for."""
    found: Any = traced.weights.get(node)
    if node.op == "get_attr":
        found = operator.attrgetter(str(node.target))(node.graph.owning_module)
    elif node.op == "placeholder" and found is None:
        found = getattr(node.meta.get("grapharg"), "example", None)
    return found if isinstance(found, Tensor) and not isinstance(found, FakeTensor) else None


def _serve(x: Tensor, one: Part, buffers: Sequence[Tensor]) -> Ready | str:
    """The part by the kernel that the table names, or why that is none of Triton's."""
    m, is_open = _rows(x)
    packed = stored(torch.empty(0, int(x.shape[-1])), buffers, one.format, one.n)
    choice = choose(packed.format, Problem(m, one.n, packed.k, x.dtype, "cuda"))
    if not m:
        return "x has no rows"
    if choice.kernel.name not in KERNELS:
        why = "; ".join(choice.refused)
        return f"{choice.kernel.name} multiplies by '{one.format}' in {x.dtype}: {why}"
    product = triton.prepared(KERNELS[choice.kernel.name], packed)
    config = triton.configuration(product, packed, m, x.dtype)
    if config is None:
        return f"unpacked, densely: measured faster for {m} rows"
    return Ready(one, product, replace(config, tasks=0) if is_open else config)


def _rows(x: Tensor) -> tuple[int, bool]:
    """Rows of x, and whether they are open; then those it was traced with, at least `FEWEST`."""
    m: Any = prod(x.shape[:-1])
    if isinstance(m, int):
        return m, False
    return max(m.node.hint if m.node.has_hint() else 0, FEWEST), True


def _freeze(traced: Traced, nodes: Sequence[Node]) -> None:
    """Their values are the graph's own from now on."""
    for node in nodes:
        if node.op == "placeholder" and (tensor := _tensor(traced, node)) is not None:
            traced.weights[node] = traced.frozen[node] = tensor


def _replace(node: Node, parts: list[Ready]) -> None:
    """Put launches in the place of an op. A gate multiplies by the first result as it writes."""
    graph, x = node.graph, node.args[0]
    with graph.inserting_before(node):
        if node.target is FUSED:
            activation, multiply, residual = node.args[6:]
            first, *gate = parts
            new = _launch(node, x, first, activation, multiply, None if gate else residual)
            for second in gate:
                new = _launch(node, x, second, "none", new, residual)
            results = {node: new}
        elif node.target is LINEAR:
            results = {node: _launch(node, x, parts[0])}
        else:
            results = {item: _launch(item, x, parts[item.args[1]]) for item in node.users}  # type: ignore[index]
    for old, new in results.items():
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    if node not in results:
        graph.erase_node(node)


def _launch(
    result: Node, x: Any, ready: Ready, activation: Any = "none", multiply: Any = None,
    residual: Any = None,
) -> Node:  # fmt: skip
    """A node of the op that stands for `result`."""
    from sparsefx.codegen.triton_op import TRITON_LINEAR, spelled

    graph, part, plans = result.graph, ready.part, ready.product.plans
    if ready.config not in plans:
        plans[ready.config] = plan(ready.product.weight, ready.config)
    tensors, how = spelled(ready.product.weight, ready.config, plans[ready.config])
    weight = [None if t is None else _attribute(graph, t) for t in tensors]
    args = (x, weight, how, part.bias, part.branch, activation, multiply, residual)
    new = graph.call_function(TRITON_LINEAR, args)
    new.meta = dict(result.meta)
    return new


def _attribute(graph: Graph, tensor: Tensor) -> Node:
    """A get_attr node of `tensor`, which becomes a buffer of the graph's module if it is none."""
    owner = graph.owning_module
    assert isinstance(owner, GraphModule)
    names = (name for name, buffer in owner.named_buffers(recurse=False) if buffer is tensor)
    name = next(names, "")
    if not name:
        name = f"triton_{len(owner._buffers)}"
        owner.register_buffer(name, tensor, persistent=False)
    return graph.get_attr(name)


def _drop_unread(graph: Graph) -> None:
    """Packed buffers that were attributes of the graph go: kernels read their own order of them."""
    owner = graph.owning_module
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
        others = (n for n in graph.nodes if n.op == "get_attr" and n.target == node.target)
        if owner is not None and node.target in owner._buffers and not any(others):
            delattr(owner, str(node.target))
