"""What a node writes to: graphs from dynamo keep in-place operations, so order is meaning.

A pass that moves a read to another place asks `changed_between` first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sparsefx.ir.products import op_name, value

STATE = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "inference_mode")
"""Parts of names of functions that change what later operations mean."""


def written(node: Node) -> list[Node]:
    """Nodes whose memory `node` writes to; all its inputs where that cannot be told."""
    if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes
    if node.op not in ("call_function", "call_method"):
        return []
    out = [arg for arg in (node.kwargs.get("out"),) if isinstance(arg, Node)]
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return out + _by_schema(node, schema)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    module = getattr(node.target, "__module__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    operator = module == "_operator" and (name == "setitem" or name in IN_PLACE)
    if in_place or operator or name == "__setitem__" or _asked_in_place(node):
        out += [arg for arg in node.args[:1] if isinstance(arg, Node)]
    return out


IN_PLACE = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "ifloordiv": "floordiv",
    "imod": "mod", "ipow": "pow", "imatmul": "matmul", "iand": "and", "ior": "or", "ixor": "xor",
    "ilshift": "lshift", "irshift": "rshift",
}  # fmt: skip
"""Functions of `operator` that write to their first argument, and what they compute."""


def changed_between(reads: Iterable[Node], first: Node, last: Node) -> Node | None:
    """A node from `first` to before `last` after which some of `reads` may hold something else."""
    operands = list(dict.fromkeys(reads))
    node = first
    while node is not last:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and any(part in name for part in STATE):
            return node
        for target in written(node):
            if any(may_alias(target, read) for read in operands):
                return node
        node = node.next
    return None


def may_alias(changed: Node, read: Node) -> bool:
    """Whether two nodes may share memory; decided by the storages of their recorded values."""
    a, b = value(changed), value(read)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    if read.op == "get_attr":  # an attribute without a record: only what derives from it
        return any(n.op == "get_attr" and n.target == read.target for n in _ancestors(changed))
    return b is None or isinstance(b, (Tensor, tuple, list))


def _ancestors(node: Node) -> Iterable[Node]:
    seen, pending = {node}, [node]
    while pending:
        current = pending.pop()
        yield current
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh


def _by_schema(node: Node, schema: Any) -> list[Node]:
    out = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            many = given if isinstance(given, (list, tuple)) else [given]
            out += [arg for arg in many if isinstance(arg, Node)]
    return out


def _asked_in_place(node: Node) -> bool:
    """Whether a function such as `F.relu` was called with `inplace=True`."""
    if node.kwargs.get("inplace"):
        return True
    if node.op != "call_function" or len(node.args) < 2:
        return False
    place = _place_of_inplace(node.target)
    return place is not None and place < len(node.args) and node.args[place] is True


@lru_cache(maxsize=1024)
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    """Where `inplace` stands among the arguments; reading a signature takes half a millisecond."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def plain_name(node: Node) -> str:
    """The op's bare name, of the in-place form the name of what it computes."""
    name = op_name(node)
    if name in IN_PLACE:
        return IN_PLACE[name]
    return name.removesuffix("_")
