"""What ONNX Runtime made of a graph: nothing may be decoded at every run, no slow path taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparsefx.codegen.onnx_lower import BLOCKS, ORT_DOMAIN
from sparsefx.ir.errors import ExportError

OURS = ("_inlfunc_Linear_", ("BitShift", "BitwiseOr", "BitwiseXor", "CumSum"))
"""How nodes of an inlined body are called, and operators that only decode."""
STRAY = ("DequantizeLinear", "NonZero", "ScatterElements", "ScatterND")
"""Operators that a weight may go through only on its way to being folded."""


def check_graph(optimised: Path) -> None:
    """Raises ExportError naming the first node of the optimised graph that is a known slow path."""
    import onnx

    graph = onnx.load(str(optimised), load_external_data=False).graph
    found = next(_complaints(graph), None)
    if found is not None:
        raise ExportError(
            f"onnxruntime would be slow: {found}. Nothing was written; verify=False skips this"
        )


def _complaints(graph: Any) -> Iterator[str]:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        inputs = [name for name in node.input if name]
        folded = [name in constants for name in inputs]
        label = f"node '{node.name}' ({node.op_type})"
        if node.op_type == "MatMulNBits" and node.domain == ORT_DOMAIN:
            yield from (f"{label} {why}" for why in _matmul_nbits(node, constants))
        elif folded and all(folded) and (node.name.startswith(OURS[0]) or node.op_type in OURS[1]):
            yield f"{label} depends on constants alone, yet is computed at every run"
        elif node.op_type in STRAY and folded[0]:
            yield f"{label} decodes a constant at every run"


def _matmul_nbits(node: Any, constants: dict[str, Any]) -> Sequence[str]:
    """What makes this node slow, as measured on ONNX Runtime 1.31: 30 times and more."""
    import onnx

    read = {a.name: a.i for a in node.attribute}
    inputs = [*node.input, *[""] * (6 - len(node.input))]
    zeros = constants.get(inputs[3])
    checks = (
        (inputs[1] not in constants or inputs[2] not in constants, "has no constant weight"),
        (read["block_size"] not in BLOCKS, f"has blocks of {read['block_size']}"),
        (read.get("bits", 4) != 4 and read.get("accuracy_level", 0) != 4,
         f"dequantises {read.get('bits', 4)}-bit codes: they need accuracy_level 4"),
        (read.get("accuracy_level", 0) == 0, "has no accuracy_level"),
        (zeros is not None and zeros.data_type != onnx.TensorProto.UINT8,
         "has zero points that are not uint8"),
        (bool(inputs[4]), "has g_idx"),
    )  # fmt: skip
    return [text for wrong, text in checks if wrong]
