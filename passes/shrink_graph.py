"""Shrink the exported graph: smaller parameters, and the sizes written into its nodes.

Needs nothing of the module's Python code, so it also takes models that `shrink_module` refuses;
shapes are those of the example inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sparsefx.ir.errors import PassError
from sparsefx.ir.products import argument, op_name, value
from sparsefx.passes.coupled_axes import rank
from sparsefx.passes.shrink_cut import Cut, differ, named_tensors, outputs


def shrink_graph(model: nn.Module, cut: Cut, example_inputs: Any) -> fx.GraphModule:
    """A new module with the cut made; `model` stays. Raises PassError when it does not equal the
    masked model."""
    tensors = named_tensors(model)
    want = outputs(model, example_inputs, cut.masked(tensors))
    pairs = _rewritten(cut)
    for name, tensor in cut.smaller(tensors).items():
        for other in [n for n, t in tensors.items() if t is tensors[name]]:
            _put(pairs, other, tensor, tensors[name])
    pairs.recompile()
    why = differ(want, outputs(pairs, example_inputs))
    if why:
        raise PassError(f"{type(model).__name__}: the shrunk graph is wrong: {why}")
    return pairs


def _rewritten(cut: Cut) -> fx.GraphModule:
    """A copy of the exported graph with its literal sizes adjusted."""
    source = cut.couplings.module
    out = copy.deepcopy(source)
    twins = dict(zip(source.graph.nodes, out.graph.nodes, strict=True))
    for node, twin in twins.items():
        rewrite = SIZES.get(op_name(node).rstrip("_"))
        if rewrite is not None:
            rewrite(cut, node, twin)
    return out


def _put(module: nn.Module, name: str, new: torch.Tensor, old: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    try:
        found = module.get_submodule(owner)
    except AttributeError:  # a name of a tied parameter that the graph does not use
        return
    if hasattr(found, attribute):
        kept = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        setattr(found, attribute, kept)


def _count(cut: Cut, node: fx.Node, axis: int) -> int:
    return len(cut.stays(cut.couplings.atoms.axes.axis(node, axis)))


def _shape(position: int, key: str) -> Callable[[Cut, fx.Node, fx.Node], None]:
    """view, expand: the literal sizes of the result; -1 stays."""

    def rewrite(cut: Cut, node: fx.Node, twin: fx.Node) -> None:
        literal = argument(node, position, key)
        new = [
            _count(cut, node, i) if isinstance(side, int) and side != -1 else side
            for i, side in enumerate(literal)
        ]
        _write(twin, position, key, new)

    return rewrite


def _write(twin: fx.Node, position: int, key: str, new: Any) -> None:
    if key in twin.kwargs:
        twin.update_kwarg(key, new)
    else:
        twin.update_arg(position, new)


def _unflatten(cut: Cut, node: fx.Node, twin: fx.Node) -> None:
    sizes: Any = node.args[2]
    start = int(node.args[1]) % rank(node.args[0])  # type: ignore[arg-type]
    twin.update_arg(2, [_count(cut, node, start + i) for i in range(len(sizes))])


def _slice(cut: Cut, node: fx.Node, twin: fx.Node) -> None:
    x: Any = node.args[0]
    dim = argument(node, 1, "dim") or 0
    stays = cut.stays(cut.couplings.atoms.axes.axis(x, dim))
    size = value(x).shape[dim]
    if len(stays) == size:
        return
    start = argument(node, 2, "start") or 0
    first = int(np.searchsorted(stays, start + size if start < 0 else start))
    last = first + _count(cut, node, dim)
    name = op_name(node)
    twin.args = (twin.args[0], dim, first, last if name == "slice" else last - first)
    twin.kwargs = {}


def _select(cut: Cut, node: fx.Node, twin: fx.Node) -> None:
    x: Any = node.args[0]
    stays = cut.stays(cut.couplings.atoms.axes.axis(x, argument(node, 1, "dim")))
    index = argument(node, 2, "index")
    if index >= 0:
        _write(twin, 2, "index", int(np.searchsorted(stays, index)))


def _split(cut: Cut, node: fx.Node, twin: fx.Node) -> None:
    """Pieces may end up uneven, so every split gets its sizes written out."""
    x: Any = node.args[0]
    dim = argument(node, 2, "dim") or 0
    stays = cut.stays(cut.couplings.atoms.axes.axis(x, dim))
    ends = np.cumsum([int(t.shape[dim]) for t in value(node)])
    sizes = np.diff(np.searchsorted(stays, ends), prepend=0)
    twin.target = torch.ops.aten.split_with_sizes.default
    twin.args, twin.kwargs = (twin.args[0], sizes.tolist(), dim), {}


def _groups(position: int) -> Callable[[Cut, fx.Node, fx.Node], None]:
    def rewrite(cut: Cut, node: fx.Node, twin: fx.Node) -> None:
        if (node, -1) in cut.couplings.atoms.axes.made_up:
            _write(twin, position, "groups", len(cut.stays((node, -1))))

    return rewrite


SIZES: dict[str, Callable[[Cut, fx.Node, fx.Node], None]] = {
    "view": _shape(1, "size"), "_unsafe_view": _shape(1, "size"),
    "reshape": _shape(1, "shape"), "expand": _shape(1, "size"),
    "unflatten": _unflatten, "slice": _slice, "narrow": _slice, "select": _select,
    "split": _split, "split_with_sizes": _split, "chunk": _split, "unsafe_split": _split,
    "conv1d": _groups(6), "conv2d": _groups(6), "conv3d": _groups(6), "convolution": _groups(8),
}  # fmt: skip
