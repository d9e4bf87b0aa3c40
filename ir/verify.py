"""What a legal graph is, as data: one rule per op, re-checked after every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format
from sparsefx.ir.products import op_name, value


def _linear(node: Node) -> str | None:
    weight, branch, text, n = node.args[1], node.args[3], node.args[4], node.args[5]
    try:
        fmt = Format.parse(str(text))
    except SpecError as error:
        return str(error)
    if not isinstance(weight, (list, tuple)) or len(weight) != len(fmt.buffers):
        return f"format '{fmt}' has the buffers {fmt.buffers}, the node has {weight}"
    if len(branch) not in (0, 3):  # type: ignore[arg-type]
        return f"a branch is (down, up, scale), the node has {branch}"
    out = value(node)
    if isinstance(out, Tensor) and isinstance(n, int) and out.shape[-1] != n:
        return f"n is {n}, the recorded output is {tuple(out.shape)}"
    return None


def _plain_linear(node: Node) -> str | None:
    x, weight = value(node.args[0]), value(node.args[1])
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return None
    if weight.dim() == 2 and x.shape[-1] != weight.shape[1]:
        return f"x {tuple(x.shape)} does not fit W {tuple(weight.shape)}"
    return None


SPEC: Mapping[str, Callable[[Node], str | None]] = {
    "sparsefx::linear": _linear,
    "aten::linear": _plain_linear,
}


def verify(graph: Graph) -> str | None:
    """Why the graph is not legal, or None."""
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        rule = SPEC.get(schema.name) if schema is not None else None
        if rule is not None and (why := rule(node)) is not None:
            return f"{node.name} ({op_name(node)}): {why}"
    return None
