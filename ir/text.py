"""A graph as text: one node per line, stable names, shapes and formats; golden tests compare it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from sparsefx.ir.products import op_name, value


def text(graph: Graph) -> str:
    """`%name : f32[2, 16] = linear(%x, %w, None)` for every node, in order."""
    names = {node: f"%{i}" if node.op in ("call_function", "call_method") else f"%{node.name}"
             for i, node in enumerate(graph.nodes)}  # fmt: skip
    return "\n".join(_line(node, names) for node in graph.nodes)


def _line(node: Node, names: dict[Node, str]) -> str:
    args = ", ".join([*(_show(a, names) for a in node.args),
                      *(f"{k}={_show(v, names)}" for k, v in node.kwargs.items())])  # fmt: skip
    if node.op == "output":
        return f"return {args}"
    call = node.op if node.op == "placeholder" else f"get_attr {node.target}"
    if node.op not in ("placeholder", "get_attr"):
        call = f"{_namespace(node)}{op_name(node) or node.target}({args})"
    return f"{names[node]}{_shape(value(node))} = {call}"


def _namespace(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "sparsefx." if schema is not None and schema.name.startswith("sparsefx") else ""


def _shape(v: Any) -> str:
    if not isinstance(v, Tensor):
        return ""
    short = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    dtype = short.get(v.dtype, str(v.dtype).removeprefix("torch."))
    return f" : {dtype}[{', '.join(str(s) for s in v.shape)}]"


def _show(arg: Any, names: dict[Node, str]) -> str:
    if isinstance(arg, Node):
        return names[arg]
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_show(a, names) for a in arg) + "]"
    return repr(arg) if isinstance(arg, str) else str(arg)
