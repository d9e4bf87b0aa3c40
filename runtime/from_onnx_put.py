"""Packed weights in an ONNX graph: each product becomes a `sparsefx::Linear` node, as in an export.

Products are written as the placeholders that torch.onnx writes during an export, and
`codegen.onnx.lower` makes of them what it makes there. A 1×1 convolution is a product over its
last axis between two Transposes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefx.codegen.onnx import DOMAIN, Lowered, lower
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.passes.compress_site import Result
from sparsefx.runtime.from_onnx_find import Use, Weight, constant, number, tensor_of

if TYPE_CHECKING:
    import onnx_ir as ir

ANY_RANK = 3
"""Stands for every number of axes but one: only vectors are multiplied in another way."""


def replace_weights(
    model: ir.Model, done: Sequence[tuple[Weight, Result]], ranks: Mapping[str, int]
) -> list[tuple[Lowered, Result]]:
    """Every use of these weights of `model` becomes a packed product; one row per use.

    `ranks` are numbers of axes by value name; what the model says itself goes before.
    """
    taken = _names(model)
    tensors: dict[str, Tensor] = {}
    results: dict[str, Result] = {}
    with _described(model, done, ranks):
        for weight, result in done:
            base = _put(model, weight, result, taken, tensors)
            results[base] = result
        rows = lower(model, tensors, tidy=False)
    return [(row, results[row.name]) for row in rows]


@contextmanager
def _described(
    model: ir.Model, done: Sequence[tuple[Weight, Result]], ranks: Mapping[str, int]
) -> Iterator[None]:
    """While active all operands have a type and a shape, as the lowering needs."""
    import onnx_ir

    before: dict[str, tuple[ir.Shape | None, ir.TypeProtocol | None]] = {}
    for weight, result in done:
        for use in weight.uses:
            x = use.x
            before.setdefault(str(x.name), (x.shape, x.type))
            rank = ranks.get(str(x.name), ANY_RANK)
            dims: list[Any] = [None] * rank if x.shape is None else list(x.shape.dims)
            if use.node.op_type != "Conv":
                dims[-1] = result.packed.k
            x.shape, x.type = onnx_ir.Shape(dims), onnx_ir.TensorType(use.dtype)
    yield
    for value in _values(model):
        if value.name in before:
            value.shape, value.type = before[value.name]


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _names(model: ir.Model) -> set[str]:
    return {str(value.name) for value in _values(model)} | set(model.graph.initializers)


def _put(
    model: ir.Model, weight: Weight, result: Result, taken: set[str], tensors: dict[str, Tensor]
) -> str:
    """Write placeholders for every use; returns the name under which the weight is stored."""
    base, packed = weight.site.name, result.packed
    mine = dict(zip(packed.format.buffers, packed.buffers, strict=True))
    mine |= dict(zip(("down", "up", "branch_scale"), result.branch, strict=False))
    while any(f"{base}.{name}" in taken for name in mine):
        base += "_"
    named = {f"{base}.{name}": tensor for name, tensor in mine.items()}
    values = [_initializer(model, name, tensor) for name, tensor in named.items()]
    for use in weight.uses:
        _replace(model, use, result, values)
    _drop(model, weight.root)
    tensors.update(named)
    taken.update(named)
    return base


def _initializer(model: ir.Model, name: str, tensor: Tensor) -> ir.Value:
    import onnx_ir

    held = onnx_ir.tensor_adapters.TorchTensor(tensor.contiguous(), name=name)
    kind = onnx_ir.TensorType(held.dtype)
    value = onnx_ir.Value(name=name, type=kind, shape=held.shape, const_value=held)
    model.graph.register_initializer(value)
    return value


def _replace(model: ir.Model, use: Use, result: Result, values: Sequence[ir.Value]) -> None:
    """Put a placeholder of the packed product where the node of `use` is."""
    import onnx_ir
    from onnx_ir.convenience import replace_nodes_and_values

    node, packed = use.node, result.packed
    w = Writer(node.name or "")
    kind = onnx_ir.TensorType(use.dtype)
    x = channels_last(w, use, use.x)
    if x is not use.x:
        x.type, x.shape = kind, onnx_ir.Shape([*[None] * (len(use.strides) + 1), packed.k])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    joined = bias if bias is not None and _joins(use, bias, packed.n) else None
    attributes: dict[str, str | int] = {
        "format": str(packed.format), "n": packed.n, "weights": len(packed.format.buffers),
        "biased": int(joined is not None),
    }  # fmt: skip
    operands = [x, *values, *([] if joined is None else [joined])]
    y = w.tape.op("linear", operands, attributes, domain=DOMAIN)
    y.type, y.shape = kind, onnx_ir.Shape([*list(x.shape.dims)[:-1], packed.n] if x.shape else [])
    y = _finish(w, use, y, None if joined is not None else bias)
    old = node.outputs[0]
    replace_nodes_and_values(model.graph, node, [node], w.tape.nodes, [old], [y])


def channels_last(w: Writer, use: Use, x: ir.Value) -> ir.Value:
    """The activations of `use` as (…, K), in the places that are multiplied."""
    steps = use.strides
    if use.node.op_type != "Conv":
        return x
    if any(step != 1 for step in steps):
        count = len(steps)
        ends, axes = [torch.iinfo(torch.int64).max] * count, range(2, 2 + count)
        x = w.op("Slice", x, w.ints(*[0] * count), w.ints(*ends), w.ints(*axes), w.ints(*steps))
    return w.op("Transpose", x, perm=[0, *range(2, 2 + len(steps)), 1])


def _joins(use: Use, bias: ir.Value, n: int) -> bool:
    """Whether the bias is a constant of N values, added as it is."""
    plain = number(use.node, "alpha", 1) == 1 and number(use.node, "beta", 1) == 1
    return plain and constant(bias) and list(tensor_of(bias).shape.numpy()) == [n]


def _finish(w: Writer, use: Use, y: ir.Value, bias: ir.Value | None) -> ir.Value:
    """What the node does after its product: Gemm's factors and bias, a convolution's axes."""
    dtype = {"FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}.get(
        use.dtype.name, torch.float32
    )
    alpha, beta = (number(use.node, name, 1) for name in ("alpha", "beta"))
    if alpha != 1:
        y = w.op("Mul", y, _scalar(w, alpha, dtype))
    if bias is not None:
        y = w.op("Add", y, w.op("Mul", bias, _scalar(w, beta, dtype)) if beta != 1 else bias)
    if use.node.op_type == "Conv":
        axes = len(use.strides)
        y = w.op("Transpose", y, perm=[0, axes + 1, *range(1, axes + 1)])
    return y


def _scalar(w: Writer, value: float, dtype: torch.dtype) -> ir.Value:
    import onnx_ir

    tensor = onnx_ir.tensor_adapters.TorchTensor(torch.tensor(value, dtype=dtype))
    return w.tape.op("Constant", (), {"value": tensor})


def _drop(model: ir.Model, value: ir.Value) -> None:
    """Remove a constant and what was made of it, now that no product reads it."""
    for node, _ in list(value.uses()):
        _drop(model, node.outputs[0])
    maker = value.producer()
    if value.uses():
        return
    if maker is not None:
        model.graph.remove(maker, safe=True)
    else:
        model.graph.initializers.pop(str(value.name), None)
