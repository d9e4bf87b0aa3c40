"""What a legal graph is, as data: one rule per op, re-checked after every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format
from sparsefx.ir.fused import ACTIVATIONS
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


def _several(node: Node) -> str | None:
    """`linears` and `fused`: as many of everything as there are formats; each part as alone."""
    args: tuple[Any, ...] = node.args
    _, weight, bias, branch, text, n, *epilogue = args
    try:
        formats = [Format.parse(part) for part in str(text).split("|")]
    except SpecError as error:
        return str(error)
    count = len(formats)
    wanted = sum(len(fmt.buffers) for fmt in formats), count, 3 * count, count
    given = tuple(len(part) for part in (weight, bias, branch, n))
    may_be_empty = (False, True, True, False)
    sizes = zip(given, wanted, may_be_empty, strict=True)
    if not all(have == want or (may and not have) for have, want, may in sizes):
        names = "buffers, biases, branch tensors, sizes"
        return f"{len(formats)} formats need {wanted} {names}; the node has {given}"
    if not epilogue:
        return None
    if epilogue[0] not in ACTIVATIONS:
        return f"no activation {epilogue[0]!r}; there are {', '.join(ACTIVATIONS)}"
    gate = n[1:]
    if len(gate) > 1 or any(size != n[0] for size in gate):
        return f"an epilogue is of one product, or of two of one n; the node has {n}"
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
    "sparsefx::linears": _several,
    "sparsefx::fused": _several,
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
