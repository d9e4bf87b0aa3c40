"""What an ONNX file really holds: weights decoded by the operators' rules, not by our packer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsefx.codegen.onnx_columns import MARK

if TYPE_CHECKING:
    import onnx_ir as ir


def inlined(model: ir.Model) -> dict[str, ir.Value]:
    """Graph values by name, with all function bodies in their nodes' place; changes `model`."""
    from onnx_ir.passes import common

    common.InlinePass()(model)
    values = {v.name: v for node in model.graph for v in node.outputs if v.name}
    return values | {v.name: v for v in model.graph.initializers.values() if v.name}


def written_weight(values: dict[str, ir.Value], output: str) -> np.ndarray[Any, Any]:
    """The (N, K) weight that the product with result `output` multiplies by, or that it is."""
    value: ir.Value | None = values[output]
    while value is not None and (node := value.producer()) is not None:
        matrix = _operand(node)
        if (strips := _strips(node, matrix)) is not None:
            return strips
        if matrix is not None:
            return matrix
        value = node.inputs[0] if node.inputs else None  # bias and branch are added on the right
    return _evaluate(values[output])


def _operand(node: ir.Node) -> np.ndarray[Any, Any] | None:
    """The (N, K) that a product's node multiplies by; None for other nodes."""
    if node.op_type == "MatMulNBits":
        return _decode_blocks(node)
    if node.op_type != "MatMul":
        return None
    assert node.inputs[1] is not None
    return _evaluate(node.inputs[1]).T


def _strips(node: ir.Node, matrix: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
    """The (N, K) weight of a product over gathered columns, or of several side by side.

    Columns that none multiplies are zero, one that several multiply is their sum. `matrix` is what
    `node` itself multiplies by, if it is a product.
    """
    products = node.inputs if node.op_type == "Concat" else [node.outputs[0]]
    found: list[np.ndarray[Any, Any]] = []
    for value in products:
        product = value.producer() if value is not None else None
        narrow = matrix if product is node else _operand(product) if product else None
        gather = _gather_before(product.inputs[0]) if product and narrow is not None else None
        if narrow is None or gather is None or gather.inputs[1] is None:
            return None
        columns, index = int(gather.metadata_props[MARK]), _evaluate(gather.inputs[1])
        run = narrow.shape[1] // len(index)  # an index may stand for several columns in a row
        index = (index[:, None] * run + np.arange(run)).reshape(-1)
        wide = np.zeros((columns, len(narrow)), narrow.dtype)
        np.add.at(wide, index, narrow.T)
        found.append(wide.T)
    return np.concatenate(found)


def _gather_before(x: ir.Value | None) -> ir.Node | None:
    """The Gather of kept columns that `x` comes from, with nothing but changes of shape between."""
    node = x.producer() if x is not None else None
    while node is not None and node.op_type in ("Reshape", "Transpose", "Cast"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and MARK in node.metadata_props else None


def _decode_blocks(node: ir.Node) -> np.ndarray[Any, Any]:
    """MatMulNBits's contract: codes low bits first along K; (code − zero) · scale per block."""
    read = {key: attribute.as_int() for key, attribute in node.attributes.items()}
    bits, size, n, k = read["bits"], read["block_size"], read["N"], read["K"]
    b, s = node.inputs[1], node.inputs[2]
    assert b is not None
    assert s is not None
    codes = _fields(_evaluate(b), bits).reshape(n, -1, size)
    count = codes.shape[1]
    zeros = np.full((n, count), 1 << (bits - 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zeros = _fields(_evaluate(node.inputs[3]).reshape(n, -1), bits)[:, :count]
    scales = _evaluate(s).reshape(n, count, 1)
    values = codes.astype(np.float32)  # differences of codes are exact
    values -= zeros[..., None].astype(np.float32)
    values *= scales
    out: np.ndarray[Any, Any] = values.reshape(n, count * size)[:, :k]
    return out


def _fields(stream: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The bit fields of a uint8 array, lowest first, along its last axis."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    out: np.ndarray[Any, Any] = fields[stream].reshape(*stream.shape[:-1], -1)
    return out


def _evaluate(
    value: ir.Value, known: dict[ir.Value, np.ndarray[Any, Any]] | None = None
) -> np.ndarray[Any, Any]:
    """A constant value, computed node by node with onnx's reference implementation.

    `known` holds what is computed already, and grows.
    """
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    known = {} if known is None else known
    if value.const_value is not None:
        return value.const_value.numpy()
    if value not in known:
        node = value.producer()
        assert node is not None, value.name
        inputs = {str(v.name): _evaluate(v, known) for v in node.inputs if v is not None}
        results = ReferenceEvaluator(onnx_ir.to_proto(node)).run(None, inputs)
        known.update(zip(node.outputs, map(np.asarray, results), strict=True))
    return known[value]
