"""Slots for LoRA adapters: inputs of an exported graph that hold nothing until a run fills them.

Each chosen product gets `<module>.lora_A.weight` (r, K) and `<module>.lora_B.weight` (N, r) as
initializers that a run may override, with r = 0 in the file: y + (x · Aᵀ) · Bᵀ. ONNX Runtime's
`.onnx_adapter` files and run options set them by name, so one compressed base serves many adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sparsefx.codegen.onnx import DOMAIN, Lowered
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.errors import SpecError, nearest

if TYPE_CHECKING:
    import onnx_ir as ir

PARTS = ("lora_A", "lora_B")


def add_slots(
    model: ir.Model, rows: Sequence[Lowered], modules: Sequence[str], prefix: str = ""
) -> list[str]:
    """Give the products of these modules slots, in `model`; the names of the new inputs.

    Names are those of `rows` without `prefix`. One stands for a module, all inside it, or as
    `*.q_proj` for every one whose path ends so.
    Raises SpecError for a name that is no product's.
    """
    chosen: dict[str, list[Lowered]] = {}
    for wanted in modules:
        found = [row for row in rows if _named(wanted, row.name.removeprefix(prefix))]
        if not found:
            names = [row.name.removeprefix(prefix) for row in rows]
            raise SpecError(f"adapters: '{wanted}' is no packed product{nearest(wanted, names)}")
        for row in found:
            uses = chosen.setdefault(row.name.removeprefix(prefix), [])
            if row not in uses:
                uses.append(row)
    values = {v.name: v for node in model.graph for v in node.outputs if v.name}
    return [
        name for key, uses in chosen.items()
        for name in _slot(model.graph, key, [values[row.output] for row in uses])
    ]  # fmt: skip


def _named(wanted: str, module: str) -> bool:
    if wanted.startswith("*"):
        return module.endswith(wanted[1:])
    return module == wanted or module.startswith(wanted + ".")


def _slot(graph: ir.Graph, module: str, results: list[ir.Value]) -> list[str]:
    """Two inputs for one module, added to every product by its weight."""
    made: list[ir.Value] = []
    for y in results:
        node = _product(y)
        if node is None:
            raise SpecError(f"adapters: '{module}' is not a product of float32 rows by a weight")
        x = node.inputs[0]
        assert x is not None
        if not made:
            n, k = (node.attributes[key].as_int() for key in ("n", "k"))
            rank = f"{module}.rank"  # of each its own: an adapter may leave some slots empty
            made = [_input(graph, f"{module}.{PARTS[0]}.weight", (rank, k), (0, k)),
                    _input(graph, f"{module}.{PARTS[1]}.weight", (n, rank), (n, 0))]  # fmt: skip
        _add(graph, node, x, *made)
    return [str(value.name) for value in made]


def _product(y: ir.Value) -> ir.Node | None:
    """The `sparsefx::Linear` node behind a result."""
    node = y.producer()
    while node is not None and node.domain != DOMAIN:
        before = node.inputs[0] if node.op_type == "Cast" else None
        node = None if before is None else before.producer()
    return node


def _input(
    graph: ir.Graph, name: str, shape: tuple[int | str, ...], now: tuple[int, ...]
) -> ir.Value:
    """A graph input with an empty initializer: a run may give another, of any rank."""
    import onnx_ir

    tensor = onnx_ir.tensor_adapters.TorchTensor(torch.zeros(now), name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
        const_value=tensor,
    )  # fmt: skip
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def _add(graph: ir.Graph, node: ir.Node, x: ir.Value, a: ir.Value, b: ir.Value) -> None:
    """The adapter's product behind `node`, whose users get the sum."""
    y = node.outputs[0]
    users = list(y.uses())
    w = Writer(str(node.name))
    low = w.op("MatMul", x, w.op("Transpose", a, perm=[1, 0]))
    total = w.op("Add", y, w.op("MatMul", low, w.op("Transpose", b, perm=[1, 0])))
    total.type, total.shape = y.type, y.shape
    graph.insert_after(node, list(w.tape.nodes))
    for user, index in users:
        user.replace_input_with(index, total)
    if y.is_graph_output():
        total.name, y.name = y.name, f"{y.name}/base"
        position = graph.outputs.index(y)
        graph.outputs[position] = total
