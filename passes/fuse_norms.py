"""Norms that are written out become one node, which on CPUs takes the addition before it along.

x·rsqrt(mean(x²) + ε)·w is how most language models' code spells root mean square norms: six
launches, or eight with casts around them. In float32 and float64 the weight goes along; in half
types only what lies between the casts is replaced, so that results round where they rounded.

They become `aten.rms_norm`, which is one kernel on GPUs and several loops on CPUs: there it is
`sparsefx::norm`, as is x + y before a norm where that saves more than a call of our own takes.
Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.norm import NORM
from sparsefx.ir.products import argument, op_name, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.mutation import changed_between, written

CASTS = {"to", "float", "half", "bfloat16", "_to_copy", "type_as"}
WIDE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
RMS_NORM = torch.ops.aten.rms_norm.default
FEW = 1 << 15
"""Numbers up to which torch's addition and LayerNorm take no longer than a call of ours: 1, 16 and
64 rows of 384 took 6, 16 and 31 µs against 13, 27 and 32, 128 rows of 576 took 77 against 57.
"""


@dataclass(frozen=True)
class Norm:
    """x / √(mean(x²) + eps), and times `weight`."""

    x: Node
    eps: float
    weight: Node | None
    first: Node
    """The first node that reads x."""
    last: Node
    """The node with the result."""


@graph_pass(never_slower=True)
def fuse_norms(traced: Traced) -> bool:
    """One node for every norm over the last axis whose inner nodes nothing else reads; on CPUs
    `sparsefx::norm` for RMS norms, and for a norm of a sum whose addends and all are of one shape.
    """
    changed = False
    for node in [n for n in traced.graph.nodes if op_name(n) == "rsqrt"]:
        found = _norm(node)
        if found is not None:
            _replace(traced.graph, found)
            changed = True
    for node in [n for n in traced.graph.nodes if op_name(n) in ("rms_norm", "layer_norm")]:
        changed |= _by_engine(traced.graph, node)
    return changed


def _norm(rsqrt: Node) -> Norm | None:
    """The norm that this node is part of."""
    shifted = _only(rsqrt.args[0] if rsqrt.args else None, "add")
    mean = _only(shifted.args[0], "mean") if shifted is not None else None
    square = _only(mean.args[0], "pow", "mul", "square") if mean is not None else None
    scaled = _user(rsqrt, "mul")
    if shifted is None or mean is None or square is None or scaled is None:
        return None
    x, eps = square.args[0], shifted.args[1] if len(shifted.args) > 1 else None
    if not isinstance(x, Node) or not isinstance(eps, float) or shifted.kwargs:
        return None
    if not (_squares(square, x) and _over_last(mean, x)) or {*scaled.args} != {x, rsqrt}:
        return None
    if any(map(written, (square, mean, shifted, rsqrt, scaled))) or _dtype(x) not in WIDE:
        return None
    found = _widened(x, scaled, eps) or _weighted(x, scaled, eps, square)
    reads = [n for n in (found.x, found.weight) if n is not None]
    return None if changed_between(reads, found.first, found.last) is not None else found


def _widened(x: Node, scaled: Node, eps: float) -> Norm | None:
    """Where x was cast from a half type, and the result is cast back to it."""
    source = x.args[0] if op_name(x) in CASTS and x.args else None
    cast = next(iter(scaled.users), None) if len(scaled.users) == 1 else None
    if not isinstance(source, Node) or cast is None or op_name(cast) not in CASTS:
        return None
    narrow = value(source)
    half = isinstance(narrow, Tensor) and narrow.dtype in HALF
    if not half or value(x).dtype is not torch.float32 or written(cast):
        return None
    same = isinstance(value(cast), Tensor) and value(cast).dtype is narrow.dtype
    return Norm(source, eps, None, x, cast) if same and cast.args[0] is scaled else None


def _weighted(x: Node, scaled: Node, eps: float, square: Node) -> Norm:
    """With the weight (K,) that the result is multiplied by, if there is one."""
    cast = next(iter(scaled.users), scaled) if len(scaled.users) == 1 else scaled
    idle = op_name(cast) in CASTS and cast.args[0] is scaled and _dtype(cast) is _dtype(scaled)
    result = cast if idle and not written(cast) else scaled
    times = _user(result, "mul")
    if times is not None and len(times.args) == 2 and not written(times):
        weight = next((a for a in times.args if a is not result), None)
        w = value(weight) if isinstance(weight, Node) else None
        own = (_dtype(x), value(x).device, [value(x).shape[-1]])
        fits = isinstance(w, Tensor) and (w.dtype, w.device, [*w.shape]) == own
        if fits and isinstance(weight, Node):
            return Norm(x, eps, weight, square, times)
    return Norm(x, eps, None, square, scaled)


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(value(node), "dtype", None)


def _only(node: object, *names: str) -> Node | None:
    """`node` if it is one of these operations with a single reader."""
    if not isinstance(node, Node) or op_name(node) not in names:
        return None
    return node if len(node.users) == 1 else None


def _user(node: Node, name: str) -> Node | None:
    """The only reader of `node`, if it is this operation."""
    reader = next(iter(node.users), None)
    fits = len(node.users) == 1 and reader is not None and op_name(reader) == name
    return reader if fits else None


def _squares(node: Node, x: Node) -> bool:
    name = op_name(node)
    if not isinstance(value(x), Tensor) or value(x).dim() == 0 or node.kwargs:
        return False
    if name == "mul":
        return node.args == (x, x)
    return name == "square" or node.args[1:] == (2,)


def _over_last(node: Node, x: Node) -> bool:
    """Whether a mean is over the last axis, a number that is known, and keeps it."""
    axes = argument(node, 1, "dim")
    axis = axes[0] if isinstance(axes, (list, tuple)) and len(axes) == 1 else axes
    last = axis in (-1, value(x).dim() - 1) and isinstance(value(x).shape[-1], int)
    return last and argument(node, 2, "keepdim") is True and not node.kwargs.get("dtype")


def _replace(graph: Graph, norm: Norm) -> None:
    size = [value(norm.x).shape[-1]]
    with graph.inserting_before(norm.last):
        new = graph.call_function(RMS_NORM, (norm.x, size, norm.weight, norm.eps))
    new.meta = dict(norm.last.meta)
    norm.last.replace_all_uses_with(new)
    pending = {norm.last}
    while pending:
        node = pending.pop()
        if node not in (norm.x, norm.weight) and not node.users and node.op.startswith("call_"):
            pending.update(node.all_input_nodes)
            graph.erase_node(node)


def _by_engine(graph: Graph, node: Node) -> bool:
    """Put `sparsefx::norm` in this norm's place if it is one on CPUs and that is faster."""
    centred = op_name(node) == "layer_norm"
    x, weight = argument(node, 0, "input"), argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if centred else None
    eps = argument(node, 4 if centred else 3, "eps")
    eps = 1e-5 if eps is None and centred else eps
    out = value(node)
    if not isinstance(x, Node) or not isinstance(out, Tensor) or not isinstance(eps, float):
        return False
    vectors = [v for v in (weight, bias) if v is not None]
    if not _engine_has(x, out, argument(node, 1, "normalized_shape"), vectors):
        return False
    addends = _addends(x, node, vectors)
    if centred and (not addends or _is_small(out)):
        return False
    first, residual = addends or (x, None)
    keep = bool(addends) and len(x.users) > 1
    with graph.inserting_before(node):
        new = graph.call_function(NORM, (first, residual, weight, bias, eps, centred, keep))
        results = [graph.call_function(operator.getitem, (new, i)) for i in range(1 + keep)]
    replaced = [node, x] if keep else [node]
    for key in ("val", "example_value"):
        if key in node.meta:
            new.meta[key] = [n.meta[key] for n in replaced]
    for old, result in zip(replaced, results, strict=True):
        result.meta = dict(old.meta)
        old.replace_all_uses_with(result)
    graph.erase_node(node)
    if addends:
        graph.erase_node(x)
    return True


def _engine_has(x: Node, out: Tensor, size: object, vectors: list[object]) -> bool:
    """A norm over the last axis on CPUs that rounds where `sparsefx::norm` does."""
    given, over = value(x), list(size) if isinstance(size, (list, tuple)) else [size]
    if not isinstance(given, Tensor) or out.device.type != "cpu" or given.dtype is not out.dtype:
        return False
    if len(over) != 1 or not isinstance(over[0], int) or given.shape[-1] != over[0]:
        return False
    if not all(_dtype(v) is out.dtype for v in vectors if isinstance(v, Node)):
        return False
    return out.dtype is torch.float32 or (out.dtype in HALF and not vectors)


def _addends(s: Node, norm: Node, vectors: list[object]) -> tuple[Node, Node] | None:
    """The tensors that `s` is the sum of, if the sum can be taken where the norm is."""
    if op_name(s) != "add" or len(s.args) != 2 or s.kwargs or written(s):
        return None
    x, y = s.args
    if not isinstance(x, Node) or not isinstance(y, Node):
        return None
    if not _like(x, s) or not _like(y, s) or any(user < norm for user in s.users):
        return None
    read = [n for n in (x, y, s, *vectors) if isinstance(n, Node)]
    return None if changed_between(read, s, norm) is not None else (x, y)


def _like(node: Node, other: Node) -> bool:
    a, b = value(node), value(other)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.device != b.device:
        return False
    return a.dtype is b.dtype and [*map(str, a.shape)] == [*map(str, b.shape)]


def _is_small(t: Tensor) -> bool:
    """Known to be; sizes that are open may be any."""
    return all(isinstance(side, int) for side in t.shape) and t.numel() <= FEW
