"""Where an ONNX graph multiplies by constant weights, and which of those cannot be packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from sparsefx.ir.sites import Site
from sparsefx.runtime.from_onnx_read import to_torch

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm", "Conv")
QUANTISED = ("DequantizeLinear", "DynamicQuantizeLinear")


@dataclass
class Use:
    """One product of activations with a weight."""

    node: ir.Node
    transposed: bool
    """The constant is stored (K, N)."""
    reason: str = ""
    """Why this node cannot take a packed weight."""

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def strides(self) -> list[int]:
        """Steps along the image's axes; empty for matrices."""
        if self.node.op_type != "Conv":
            return []
        axes = _shape(self.node.inputs[1])[2:]
        return ints(self.node, "strides") or [1] * len(axes)

    @property
    def dtype(self) -> ir.DataType:
        """In which the node multiplies: the weight's own, or what it is cast to."""
        import onnx_ir

        value = self.node.inputs[1]
        assert value is not None
        while not constant(value):
            node = value.producer()
            assert node is not None
            if node.op_type == "Cast":
                return onnx_ir.DataType(node.attributes["to"].as_int())
            assert node.inputs[0] is not None
            value = node.inputs[0]
        return tensor_of(value).dtype

    def rows(self, x: Tensor) -> Tensor:
        """The activations as (…, K), in the places that are multiplied."""
        if self.node.op_type != "Conv":
            return x
        steps = [slice(None, None, step) for step in self.strides]
        return x[(slice(None), slice(None), *steps)].movedim(1, -1)


@dataclass
class Weight:
    """One constant, its Site and every product it takes part in."""

    site: Site
    root: ir.Value
    uses: list[Use]
    operators: tuple[str, ...]
    """Kinds of products, which filters of a spec may name."""

    def tensor(self) -> Tensor:
        """The stored values; must not be written to."""
        return to_torch(tensor_of(self.root))


def find(model: ir.Model) -> list[Weight]:
    """Every constant that a MatMul, Gemm or Conv multiplies by, in order; bodies included."""
    groups: dict[int, tuple[ir.Value, list[Use]]] = {}
    for node in model.graph.all_nodes():
        if node.op_type not in PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        for place in (1, 0):
            value = node.inputs[place]
            root, flipped, why = (None, False, "") if value is None else _root(value)
            if root is None:
                continue
            why = why or _refuses(node, place, root, model)
            columns_last = node.op_type == "MatMul" or (
                node.op_type == "Gemm" and not number(node, "transB", 0)
            )
            use = Use(node, columns_last != flipped, why)
            groups.setdefault(id(root), (root, []))[1].append(use)
            break
    return [_weight(root, uses) for root, uses in groups.values()]


def _weight(root: ir.Value, found: list[Use]) -> Weight:
    mine = {id(use.node) for use in found}
    readers = [node for node in _consumers(root) if id(node) not in mine]
    names = (str(root.name), *(use.node.name for use in found if use.node.name))
    convolution = found[0].node.op_type == "Conv"
    shape = tuple(tensor_of(root).shape.numpy())
    site = Site(
        names, shape, "conv1x1" if convolution else "linear", found[0].transposed, len(found)
    )
    reason = next((use.reason for use in found if use.reason), "")
    if readers:
        read = readers[0]
        tied = " (tied weight)" if read.op_type == "Gather" else ""
        reason = f"also read by {read.op_type} '{read.name}'{tied}; kept dense"
    elif root.is_graph_input():
        reason = "an input of the graph too, so a caller may replace it"
    elif any(value.is_graph_output() for value in _forms(root)):
        reason = "an output of the graph too"
    elif not reason and len({(use.transposed, use.node.op_type == "Conv") for use in found}) > 1:
        reason = f"multiplied in {len(found)} different ways"
    elif not reason and tensor_of(root).dtype.name not in ("FLOAT", "FLOAT16", "BFLOAT16"):
        reason = f"stored as {tensor_of(root).dtype.name.lower()}"
    if reason:
        site.kind, site.reason, site.transposed = "refused", reason, False
    operators = tuple(dict.fromkeys(use.node.op_type for use in found))
    return Weight(site, root, found, operators)


# --- from a product back to a constant -----------------------------------------------------------


def _root(value: ir.Value) -> tuple[ir.Value | None, bool, str]:
    """The constant behind `value`, whether it is transposed on the way, and why it is unusable."""
    flipped, why = False, ""
    while not constant(value):
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return None, False, ""
        if node.op_type == "Transpose":
            if ints(node, "perm") not in ([], [1, 0]):
                return None, False, ""
            flipped = not flipped
        elif node.op_type in QUANTISED:
            why = f"quantised already ({node.op_type})"
        elif node.op_type not in ("Identity", "Cast"):
            return None, False, ""
        value = node.inputs[0]
    return value, flipped, why


def constant(value: ir.Value) -> bool:
    """Whether `value` is an initializer or the result of a Constant node."""
    node = value.producer()
    if node is not None:
        return node.op_type == "Constant" and "value" in node.attributes
    return value.const_value is not None


def tensor_of(root: ir.Value) -> ir.TensorProtocol:
    """The constant itself."""
    node = root.producer()
    tensor = root.const_value if node is None else node.attributes["value"].as_tensor()
    assert tensor is not None
    return tensor


def _shape(value: ir.Value | None) -> list[int]:
    """The constant's shape as its product sees it; a transposed matrix is not needed here."""
    root = None if value is None else _root(value)[0]
    return [] if root is None else list(tensor_of(root).shape.numpy())


def _forms(value: ir.Value) -> Iterator[ir.Value]:
    """`value` and what Identity, Transpose and Cast make of it."""
    yield value
    for node, _ in value.uses():
        if node.op_type in ("Identity", "Transpose", "Cast"):
            yield from _forms(node.outputs[0])


def _consumers(value: ir.Value) -> list[ir.Node]:
    return [
        node for form in _forms(value) for node, _ in form.uses()
        if node.op_type not in ("Identity", "Transpose", "Cast")
    ]  # fmt: skip


def _refuses(node: ir.Node, place: int, root: ir.Value, model: ir.Model) -> str:
    """Why the node cannot multiply by a packed weight, "" when it can."""
    rank, kind = len(tensor_of(root).shape), node.op_type
    if node.graph is not model.graph:
        return "inside the body of an If, Loop or Scan"
    if place == 0:
        return f"stands left of the activations in {kind} '{node.name}'"
    if kind == "Conv":
        return _refuses_convolution(node, list(tensor_of(root).shape.numpy()))
    if rank != 2:
        return "a vector" if rank < 2 else f"a stack of matrices ({rank} axes)"
    if number(node, "transA", 0):
        return f"Gemm '{node.name}' transposes the activations"
    return ""


def _refuses_convolution(node: ir.Node, shape: list[int]) -> str:
    size = "×".join(map(str, shape[2:]))
    group = number(node, "group", 1)
    if any(side != 1 for side in shape[2:]) or len(shape) < 3:
        return f"{size} convolution"
    if group != 1:
        return f"convolution in {group:g} groups"
    return "1×1 convolution with padding" if any(ints(node, "pads")) else ""


def ints(node: ir.Node, name: str) -> list[int]:
    """An attribute that lists integers; empty when it is not there."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else []


def number(node: ir.Node, name: str, default: float) -> float:
    """An attribute that is one number."""
    return float(node.attributes[name].value) if name in node.attributes else default
