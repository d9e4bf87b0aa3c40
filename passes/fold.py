"""Fold constant factors and sums around a product into its weight: exactly, rounded once.

`linear(x · g + h) · c + d` becomes one linear with W' = c·W·g and b' = c·(b + W·h) + d. That covers
the factors of norms, batch norm in eval mode, and constants. A fold makes new constants and never
edits a parameter. It is left out, with the reason in `traced.notes`, where the weight has
another reader (pytorch#197539: a convolution called twice; pytorch/ao#2795: a shared weight), where
batch norm is training, and where a value may still be trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.nn import functional as F

from sparsefx.ir.products import Use, argument, op_name, other_readers, uses, value
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import graph_pass
from sparsefx.passes.mutation import changed_between, may_alias, written
from sparsefx.passes.normalise import operands, products_are_linear

PREFIX = "folded_"
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
BINARY = {"mul", "div", "truediv", "add", "sub"}
NORMS = {"layer_norm", "rms_norm"}
"""Affine only after what they divide by: their factors go into the product behind them."""


_Affine = tuple[Tensor, Tensor]
"""channel ↦ scale · channel + shift, float64 (channels,) each."""


class _Left(Exception):
    """Why an op next to a product stays."""


@graph_pass(requires=[products_are_linear], ensures=[products_are_linear])
def fold(traced: Traced) -> bool:
    """Fold what is before and after every product whose weight is chosen or a constant."""
    work = _Work(traced)
    changed = False
    for node in list(work.products):
        while _after(work, work.products[node]) or _before(work, work.products[node]):
            changed = True
    traced.notes += [
        f"{op_name(node)} %{node.name} stays: {why}" for node, why in work.left.items()
    ]
    return changed


class _Work:
    """The graph's products, kept up to date, so that a fold costs no walk over the graph."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.uses: dict[Node, list[Use]] = {}
        """By weight, all kinds."""
        self.products: dict[Node, Use] = {}
        """What may be folded into, by product."""
        self.left: dict[Node, str] = {}
        """Ops that stay next to a product, and why."""
        for use in uses(traced.graph, traced.weights):
            self.uses.setdefault(use.weight, []).append(use)
            if use.kind in ("linear", "conv1x1") or _plain_convolution(use):
                self.products[use.node] = use
        pointers = [t.untyped_storage().data_ptr() for t in traced.weights.values()]
        self.storages = Counter(pointers)
        self.written = {target for node in traced.graph.nodes for target in written(node)}

    def folded(self, node: Node, instead: Node) -> None:
        """An op is gone, its values are those of `instead`."""
        node.replace_all_uses_with(instead)
        self.traced.graph.erase_node(node)
        self.left.pop(node, None)

    def editable(self, use: Use) -> None:
        """Raise _Left where the product may not have a new weight and bias."""
        node, weight = use.weight, self.traced.weights[use.weight]
        if len(self.uses[node]) > 1 or other_readers(node):
            raise _Left(f"{node.name} is used by another op too")
        if self.storages[weight.untyped_storage().data_ptr()] > 1:
            raise _Left(f"{node.name} shares its memory with another weight")
        trained = weight.requires_grad and torch.is_grad_enabled()
        if node not in self.traced.chosen and (node.op != "get_attr" or trained):
            raise _Left(f"{node.name} is not to be packed and may still change")
        self.constant(operands(use)[1])

    def edit(self, use: Use, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Give the product the weight and bias that `change` makes of (N, K), (N,) in float64."""
        traced, weight = self.traced, self.traced.weights[use.weight]
        matrix = weight.detach().double()
        matrix = matrix.T if use.transposed else matrix.flatten(1)
        old = self.constant(operands(use)[1])
        made, shift = change(matrix, matrix.new_zeros(len(matrix)) if old is None else old.double())
        made = made.T if use.transposed else made.reshape(weight.shape)
        stem = use.weight.name.removeprefix(PREFIX)
        rounded = made.to(weight.dtype).contiguous()
        new = _hold(traced, use.weight, stem, rounded)
        traced.weights[new] = rounded
        if new is not use.weight:
            if use.weight in traced.chosen:
                traced.chosen[new] = traced.chosen.pop(use.weight)
            use.weight.replace_all_uses_with(new)
            self.products[use.node] = replace(use, weight=new)
            self.uses[new] = [self.products[use.node]]
        if old is not None or bool(shift.any()):
            dtype = weight.dtype if old is None else old.dtype
            held = operands(use)[1]
            _set_bias(use.node, _hold(traced, held, f"{stem}_bias", shift.to(dtype)))

    def constant(self, operand: Any) -> Any:
        """The value of a constant operand. Raises _Left where it may still change."""
        if operand is None or isinstance(operand, (int, float)):
            return operand
        tensor = self.tensor(operand) if isinstance(operand, Node) else None
        if tensor is None:
            raise _Left(f"{getattr(operand, 'name', operand)} is computed or given on every call")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise _Left(f"{operand.name} may still be trained")
        if any(may_alias(target, operand) for target in self.written):
            raise _Left(f"{operand.name} may be written to")
        return tensor.detach()

    def tensor(self, node: Node) -> Tensor | None:
        """The parameter or the attribute behind a node."""
        if node in self.traced.weights:
            return self.traced.weights[node]
        owner = self.traced.graph.owning_module
        if node.op != "get_attr" or owner is None:
            return None
        parent, _, name = str(node.target).rpartition(".")
        found = getattr(owner.get_submodule(parent), name, None)
        return found if isinstance(found, Tensor) else None


def _plain_convolution(use: Use) -> bool:
    """Any convolution of a whole weight: what follows it scales its rows."""
    name = op_name(use.node)
    transposed = name == "convolution" and bool(argument(use.node, 6, "transposed"))
    weight = argument(use.node, 1, "weight")
    return name in CONVOLUTIONS and not transposed and weight is use.weight


# --- after and before a product ------------------------------------------------------------------


def _after(work: _Work, use: Use) -> bool:
    user = next(iter(use.node.users), None)
    if len(use.node.users) != 1 or user is None or op_name(user) in NORMS:
        return False
    weight = work.traced.weights[use.weight]
    rows = weight.shape[1] if use.transposed else weight.shape[0]
    try:
        found = _affine(work, user, use.node, _axis(use, weight), rows)
        if found is None:
            return False
        work.editable(use)
    except _Left as why:
        work.left[user] = str(why)
        return False
    scale, shift = found
    work.edit(use, lambda w, b: (scale[:, None] * w, scale * b + shift))
    work.folded(user, use.node)
    return True


def _before(work: _Work, use: Use) -> bool:
    traced, node = work.traced, operands(use)[0]
    if use.kind not in ("linear", "conv1x1") or not isinstance(node, Node):
        return False
    weight = traced.weights[use.weight]
    columns = weight.shape[0] if use.transposed else weight.shape[1]
    source = _source(work, node)
    try:
        if source is None:
            return False
        found = _affine(work, node, source, _axis(use, weight), columns)
        if found is None:
            return False
        readers = _readers(work, node)
        for reader in readers:
            work.editable(reader)
            if writer := changed_between([source], node, reader.node):
                raise _Left(f"{writer.name} writes to what it reads")
    except _Left as why:
        work.left[node] = str(why)
        return False
    scale, shift = found
    for reader in readers:
        work.edit(reader, lambda w, b: (w * scale, b + w @ shift))
    work.folded(node, _bare(traced, node, source))
    return True


def _axis(use: Use, weight: Tensor) -> int:
    """The channel axis of the product's operands, counted from the right."""
    return -1 if use.kind == "linear" else 1 - weight.dim()


def _source(work: _Work, node: Node) -> Node | None:
    """The operand that is no constant."""
    inputs = [a for a in node.args[:2] if isinstance(a, Node)]
    moving = [a for a in inputs if work.tensor(a) is None]
    return moving[0] if len(moving) == 1 else None


def _readers(work: _Work, node: Node) -> list[Use]:
    """The products that read `node`, all as their x and along one axis."""
    found = [work.products.get(user) for user in node.users]
    out = [u for u in found if u is not None and operands(u)[0] is node]
    if len(out) < len(found) or any(u.kind not in ("linear", "conv1x1") for u in out):
        raise _Left("read by more than plain products")
    if len({_axis(u, work.traced.weights[u.weight]) for u in out}) > 1:
        raise _Left("read by products along different axes")
    return out


def _bare(traced: Traced, node: Node, source: Node) -> Node:
    """What is left of `node`: nothing of a constant op, the norm itself of a norm."""
    name = op_name(node)
    if name not in NORMS:
        return source
    factors = slice(2, 4 if name == "layer_norm" else 3)
    keep = [*node.args]
    keep[factors] = [None] * len(keep[factors])
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")}
    with traced.graph.inserting_before(node):
        new = traced.graph.call_function(node.target, tuple(keep), kwargs)  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    return new


# --- what an op does to channels -----------------------------------------------------------------


def _affine(work: _Work, node: Node, source: Node, axis: int, size: int) -> _Affine | None:
    """What the op does to each channel of `source`, None when it is no such op."""
    name = op_name(node)
    ones, zeros = torch.ones(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    if name == "batch_norm" and node.args[0] is source:
        return _batch_norm(work, node, source, axis)
    if name in NORMS and node.args[0] is source and axis == -1:
        weight = argument(node, 2, "weight")
        bias = argument(node, 3, "bias") if name == "layer_norm" else None
        if list(argument(node, 1, "normalized_shape")) != [size] or weight is bias is None:
            return None
        scale = ones if weight is None else _vector(work, weight, node, axis, size)
        return scale, zeros if bias is None else _vector(work, bias, node, axis, size)
    if name not in BINARY or len(node.args) != 2 or node.kwargs:
        return None
    other = node.args[1] if node.args[0] is source else node.args[0]
    if (name not in ("mul", "add") and node.args[0] is not source) or other is source:
        return None
    if isinstance(other, Node) and work.tensor(other) is None:
        return None
    vector = _vector(work, other, node, axis, size)
    if name in ("add", "sub"):
        return ones, vector if name == "add" else -vector
    return vector if name == "mul" else 1 / vector, zeros


def _batch_norm(work: _Work, node: Node, source: Node, axis: int) -> _Affine:
    python = node.target is F.batch_norm
    names = ("running_mean", "running_var", "weight", "bias")
    places = (1, 2, 3, 4) if python else (3, 4, 1, 2)
    if argument(node, 5, "training") is not False and not (
        python and argument(node, 5, "training") is None
    ):
        raise _Left("batch norm is in training mode")
    out = value(source)
    if axis == -1 and not (isinstance(out, Tensor) and out.dim() == 2):
        raise _Left("batch norm is not over the product's channels")
    mean, var, weight, bias = (
        work.constant(argument(node, place, name))
        for place, name in zip(places, names, strict=True)
    )
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise _Left("batch norm has no running statistics")
    eps = argument(node, 7, "eps")
    scale = (var.double() + (1e-5 if eps is None else eps)).rsqrt()
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.double()


def _vector(work: _Work, operand: Any, node: Node, axis: int, size: int) -> Tensor:
    """A constant operand as one float64 per channel."""
    constant = work.constant(operand)
    if isinstance(constant, (int, float)):
        return torch.full((size,), float(constant), dtype=torch.float64)
    if not constant.is_floating_point():
        raise _Left(f"{operand.name} holds {constant.dtype}")
    out = value(node)
    rank = out.dim() if isinstance(out, Tensor) else -axis
    wide = constant.reshape(*[1] * (rank - constant.dim()), *constant.shape)
    others = [side for i, side in enumerate(wide.shape) if i != wide.dim() + axis]
    if constant.dim() > rank or any(side != 1 for side in others):
        raise _Left(f"{operand.name} {tuple(constant.shape)} is not one value per channel")
    vector: Tensor = wide.flatten().double().expand(size)
    return vector


def _set_bias(node: Node, bias: Node) -> None:
    args = [*node.args, *[None] * (3 - len(node.args))]
    args[2] = bias
    node.args = tuple(args)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}


def _hold(traced: Traced, old: Node | None, stem: str, tensor: Tensor) -> Node:
    """A get_attr node of a buffer with `tensor`: `old` itself where an earlier fold made it."""
    owner = traced.graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    if old is not None and old.op == "get_attr" and str(old.target).startswith(PREFIX):
        owner.register_buffer(str(old.target), tensor, persistent=False)
        return old
    name = f"{PREFIX}{stem}"
    owner.register_buffer(name, tensor, persistent=False)
    first = next(n for n in traced.graph.nodes if n.op != "placeholder")
    with traced.graph.inserting_before(first):
        node = traced.graph.get_attr(name)
    example = value(old)
    if isinstance(example, Tensor):
        node.meta["val"] = example.new_empty(tensor.shape)
    return node
