"""Rewrites of an ONNX graph: what torch.onnx leaves behind, forms that ONNX Runtime knows.

All are exact but `_divide`, which rounds once where torch's `rsqrt` rounds twice, and `_halve_last`
where a number is below the smallest normal one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from sparsefx.codegen.onnx_match import KEPT, number, order, source

if TYPE_CHECKING:
    import onnx_ir as ir


def rewrite(model: ir.Model, keep: Collection[str]) -> None:
    """Rewrite the main graph of `model` in place, then drop what nothing uses.

    Values called as in `keep` stay what they are.
    """
    import onnx_ir.passes.common as passes

    for node in model.graph:
        for value in node.outputs:
            value.meta[KEPT] = value.name in keep
    for node in list(model.graph):
        for rule in RULES.get(node.op_type, ()) if node.domain == "" else ():
            rule(node)
    passes.RemoveUnusedNodesPass()(model)


def _divide(node: ir.Node) -> None:
    """x · 1/√v becomes x / √v: the form in which ONNX Runtime finds root-mean-square norms."""
    import onnx_ir as ir

    for i, value in enumerate(node.inputs):
        inverse = source(value, "Reciprocal")
        root = source(inverse.inputs[0], "Sqrt") if inverse is not None else None
        if inverse is None or root is None:
            continue
        quotient = ir.node("Div", [node.inputs[1 - i], root.outputs[0]])
        _put(node, quotient)
        return


def _halve_last(node: ir.Node) -> None:
    """x · (½ · (1 + erf)) becomes (x · (1 + erf)) · ½: so ONNX Runtime finds GELU."""
    import onnx_ir as ir

    for i, value in enumerate(node.inputs):
        inner = source(value, "Mul")
        if inner is None or len(inner.outputs[0].uses()) > 1:
            continue
        for j, half in enumerate(inner.inputs):
            shifted = source(inner.inputs[1 - j], "Add")
            if number(half) == 0.5 and shifted is not None and source(shifted.inputs[0], "Erf"):
                product = ir.node("Mul", [node.inputs[1 - i], shifted.outputs[0]])
                product.outputs[0].type = node.outputs[0].type
                product.outputs[0].shape = node.outputs[0].shape
                assert node.graph is not None
                node.graph.insert_before(node, product)
                _put(node, ir.node("Mul", [product.outputs[0], half]))
                return


def _untranspose(node: ir.Node) -> None:
    """Two transpositions that undo each other are none."""
    before = source(node.inputs[0], "Transpose")
    if before is None:
        return
    first, second = (order(n) or [] for n in (before, node))
    # Without an order both reverse all axes; one that is told and one that is not stay.
    if len(first) == len(second) and [first[i] for i in second] == list(range(len(first))):
        _forget(node, before.inputs[0])


def _reshape_once(node: ir.Node) -> None:
    """Of two reshapes the second does; one that changes nothing goes too."""
    target = node.inputs[1]
    constant = None if target is None else target.const_value
    copies = constant is None or 0 in constant.numpy()  # zeros may stand for the input's own sizes
    before = source(node.inputs[0], "Reshape")
    if before is not None and (not copies or _literal(node)):
        node.replace_input_with(0, before.inputs[0])
    x, y = node.inputs[0], node.outputs[0]
    if x is not None and x.shape is not None and y.shape is not None:
        known = None not in [d if isinstance(d, int) else d.value for d in y.shape]
        if known and list(x.shape) == list(y.shape):
            _forget(node, x)


def _literal(node: ir.Node) -> bool:
    """Whether a zero in the target of this Reshape means zero."""
    allow = node.attributes.get("allowzero")
    return allow is not None and allow.as_int() == 1


def _swap_last(node: ir.Node) -> None:
    """torch.onnx's transposition of the last two axes, by way of three axes and the sizes of all,
    is one Transpose, together with one before it."""
    import onnx_ir as ir

    turned = source(node.inputs[0], "Transpose")
    flat = None if turned is None else source(turned.inputs[0], "Reshape")
    x = None if flat is None else flat.inputs[0]
    if turned is None or flat is None or x is None or x.shape is None:
        return
    sides = [_sizes(x, shape) for shape in (flat.inputs[1], node.inputs[1])]
    if order(turned) != [0, 2, 1] or sides != [[-1, (-2, -1), (-1, None)], SWAPPED]:
        return
    axes = [*range(x.shape.rank() - 2), x.shape.rank() - 1, x.shape.rank() - 2]
    before = source(x, "Transpose")
    if before is not None and (first := order(before)) is not None:
        x, axes = before.inputs[0], [first[i] for i in axes]
    _put(node, ir.node("Transpose", [x], {"perm": axes}))


SWAPPED = [(None, -2), (-1, None), (-2, -1)]
FARTHEST = 1 << 62


def _sizes(x: ir.Value, target: ir.Value | None) -> list[Any] | None:
    """A Concat of numbers and of parts (first, end) of the shape of `x`."""
    concat = source(target, "Concat")
    return None if concat is None else [_size(x, value) for value in concat.inputs]


def _size(x: ir.Value, value: ir.Value | None) -> Any:
    if (known := number(value)) is not None:
        return known
    part = source(value, "Slice")
    whole = None if part is None or len(part.inputs) > 3 else source(part.inputs[0], "Shape")
    if part is None or whole is None or whole.inputs[0] is not x or _is_part(whole):
        return None
    ends = [v.const_value.numpy().item() if v is not None and v.const_value is not None else 0
            for v in part.inputs[1:]]  # fmt: skip
    return tuple(None if abs(end) > FARTHEST else end for end in ends)


def _is_part(shape: ir.Node) -> bool:
    start = shape.attributes.get("start")
    return "end" in shape.attributes or (start is not None and start.as_int() != 0)


RULES: Mapping[str, tuple[Callable[[ir.Node], None], ...]] = {
    "Mul": (_divide, _halve_last),
    "Transpose": (_untranspose,),
    "Reshape": (_swap_last, _reshape_once),
}


def _put(old: ir.Node, new: ir.Node) -> None:
    from onnx_ir.convenience import replace_nodes_and_values

    before, after = old.outputs[0], new.outputs[0]
    assert old.graph is not None
    after.name, after.shape, after.type = before.name, before.shape, before.type
    replace_nodes_and_values(old.graph, old, [old], [new], [before], [after])


def _forget(node: ir.Node, value: ir.Value | None) -> None:
    """Let users of `node` read `value`; a result of the graph keeps its name, so its node stays."""
    old = node.outputs[0]
    if value is not None and not old.is_graph_output() and not old.meta.get(KEPT):
        old.replace_all_uses_with(value)


def tidy(model: ir.Model) -> None:
    """Fold constants, share what is equal, drop what is unused.

    torch.onnx's own `optimize` also tries rewrite rules whose matching walks the whole graph for
    every node (minutes for 30 layers); ONNX Runtime does those rewrites when it loads.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    common.InlinePass()(model)
    fold_constants_ir(model, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),  # stack traces: half a megabyte of local paths
    )(model)


def in_place(model: ir.Model) -> None:
    """Write the bodies of functions where they are called."""
    from onnx_ir.passes import common

    common.InlinePass()(model)
    common.RemoveUnusedOpsetsPass()(model)
