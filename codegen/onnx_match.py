"""What rewrites of ONNX graphs ask of nodes and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

KEPT = "sparsefx.kept"
"""Marks values that others ask for by name: they stay what they are."""


def is_seen(value: ir.Value) -> bool:
    """Whether more than nodes read a value."""
    return bool(value.meta.get(KEPT)) or value.is_graph_output()


def source(value: ir.Value | None, op: str) -> ir.Node | None:
    """The standard `op` that computes `value`; None when something else does."""
    node = None if value is None or value.meta.get(KEPT) else value.producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op) else None


def own_source(value: ir.Value | None, op: str) -> ir.Node | None:
    """The same of a value that one node reads and nobody else sees."""
    node = source(value, op)
    return None if value is None or len(value.uses()) != 1 or is_seen(value) else node


def number(value: ir.Value | None) -> float | None:
    """A constant's only number."""
    constant = None if value is None else value.const_value
    return None if constant is None or constant.size != 1 else float(constant.numpy().item())


def order(node: ir.Node) -> list[int] | None:
    """The order that a Transpose is told."""
    perm = node.attributes.get("perm")
    return None if perm is None else list(perm.as_ints())


def is_float(value: ir.Value) -> bool:
    """Whether a value is known to be float32."""
    return value.dtype is not None and value.dtype.name == "FLOAT"
