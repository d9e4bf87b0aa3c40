"""What an ONNX file really holds: weights decoded by the operators' rules, not by our packer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

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
        if node.op_type == "MatMulNBits":
            return _decode_blocks(node)
        if node.op_type == "MatMul":
            assert node.inputs[1] is not None
            return _evaluate(node.inputs[1]).T
        value = node.inputs[0] if node.inputs else None  # bias and branch are added on the right
    return _evaluate(values[output])


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
    values = (codes - zeros[..., None]).astype(np.float32) * scales
    out: np.ndarray[Any, Any] = values.reshape(n, count * size)[:, :k]
    return out


def _fields(stream: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The bit fields of a uint8 array, lowest first, along its last axis."""
    shifts = np.arange(0, 8, bits)
    fields = (stream[..., None].astype(np.int32) >> shifts) & ((1 << bits) - 1)
    return fields.reshape(*stream.shape[:-1], -1)


def _evaluate(value: ir.Value) -> np.ndarray[Any, Any]:
    """A constant value, computed node by node with onnx's reference implementation."""
    import onnx_ir
    from onnx.reference import ReferenceEvaluator

    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    assert node is not None, value.name
    inputs = {str(v.name): _evaluate(v) for v in node.inputs if v is not None}
    (out,) = ReferenceEvaluator(onnx_ir.to_proto(node)).run(None, inputs)
    return np.asarray(out)
