"""Where a graph multiplies by a weight: one table of product ops, one walk from weight to product.

The table is keyed by the op's bare name ("linear", "addmm", "conv2d"), which is the same whether a
node is `F.linear`, `torch._C._nn.linear`, `aten.linear.default` or a method, so the three doors
(dynamo, export, symbolic_trace) need no tables of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.fx import Graph, Node

Kind = Literal["linear", "conv1x1", "opaque", "refused"]
"""linear: x · Wᵀ. conv1x1: the same over channels. opaque: a product, but one that takes the dense
weight (it is unpacked on every call). refused: stays dense, with a reason."""


@dataclass(frozen=True)
class Use:
    """One product node and the weight it multiplies by."""

    weight: Node
    node: Node
    kind: Kind
    reason: str = ""
    transposed: bool = False
    """The parameter is stored (K, N)."""


@dataclass(frozen=True)
class Operand:
    """An argument of a product op that may be a weight."""

    position: int
    name: str
    role: Literal["nk", "kn", "left", "conv", "conv_transposed", "inside", "batched", "rnn"]


_RIGHT = (Operand(0, "input", "left"), Operand(1, "other", "kn"))
_ADD = (Operand(1, "mat1", "left"), Operand(2, "mat2", "kn"))
_CONV = (Operand(1, "weight", "conv"),)
_UNCONV = (Operand(1, "weight", "conv_transposed"),)
_BATCH = tuple(Operand(i, "", "batched") for i in range(3))
_RNN = tuple(Operand(i, "", "rnn") for i in range(8))
_MHA = tuple(
    Operand(i, name, "inside")
    for i, name in (
        (5, "in_proj_weight"), (11, "out_proj_weight"), (18, "q_proj_weight"),
        (19, "k_proj_weight"), (20, "v_proj_weight"),
    )
)  # fmt: skip

PRODUCTS: Mapping[str, tuple[Operand, ...]] = {
    "linear": (Operand(1, "weight", "nk"),),
    "mm": _RIGHT, "matmul": _RIGHT, "mv": _RIGHT, "dot": _RIGHT,
    "addmm": _ADD, "addmv": _ADD, "addbmm": _BATCH,
    "conv1d": _CONV, "conv2d": _CONV, "conv3d": _CONV, "convolution": _CONV,
    "conv_transpose1d": _UNCONV, "conv_transpose2d": _UNCONV, "conv_transpose3d": _UNCONV,
    "einsum": _BATCH, "bmm": _BATCH, "baddbmm": _BATCH[1:], "tensordot": _BATCH,
    "bilinear": (Operand(2, "weight", "batched"),),
    "_grouped_mm": _BATCH, "grouped_mm": _BATCH, "grouped_mm_fallback": _BATCH,
    "lstm": _RNN, "gru": _RNN, "rnn_tanh": _RNN, "rnn_relu": _RNN,
    "lstm_cell": _RNN, "gru_cell": _RNN, "rnn_tanh_cell": _RNN, "rnn_relu_cell": _RNN,
    "multi_head_attention_forward": _MHA,
    "_native_multi_head_attention": tuple(Operand(i, "", "inside") for i in (5, 7)),
    "_transformer_encoder_layer_fwd": tuple(Operand(i, "", "inside") for i in (3, 5, 14, 16)),
}  # fmt: skip

TRANSPOSES = {"t", "numpy_T", "T", "mT", "adjoint", "transpose", "swapaxes", "permute"}
VIEWS = {
    "alias", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "lift_fresh_copy",
    "narrow", "reshape", "select", "slice", "squeeze", "to", "_to_copy", "type", "float", "half",
    "bfloat16", "type_as", "unflatten", "unsqueeze", "view", "view_as", "chunk", "split",
    "split_with_sizes", "unbind", "getitem", "wait_tensor", "requires_grad_", "cpu", "cuda",
    "broadcast_to", "index_select", "_assert_tensor_metadata",
}  # fmt: skip
KEEPS_SHAPE = {
    "alias",
    "clone",
    "contiguous",
    "detach",
    "to",
    "_to_copy",
    "lift_fresh_copy",
    "float",
}
READS_SHAPE = {"size", "sym_size", "dim", "numel", "is_floating_point", "shape", "dtype", "device"}


def op_name(node: Node) -> str:
    """The op's bare name, "" for nodes that call nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).rpartition("::")[2]
    name = str(getattr(node.target, "__name__", node.target))
    return str(node.args[1]) if name == "getattr" else name.strip("_") if "__" in name else name


def argument(node: Node, position: int, name: str) -> Any:
    """The argument of a call by position or keyword, None when absent."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name) if name else None


def value(node: Any) -> Any:
    """The (fake) tensor a node stands for, where the door recorded one."""
    meta = getattr(node, "meta", {})
    return meta.get("val", meta.get("example_value"))


def uses(graph: Graph, weights: Mapping[Node, Tensor]) -> list[Use]:
    """Every product whose operand is a weight of two or more dimensions, if only through views."""
    found: list[Use] = []
    for node, weight in weights.items():
        if weight.dim() >= 2:
            found += _walk(node, weight)
    # Nodes compare by their place in the graph: no walk over all of it for one weight's few uses.
    return sorted(found, key=lambda use: use.node)


def other_readers(node: Node) -> list[Node]:
    """Readers of a weight (through views) that are not products: an embedding look-up, a norm, …"""
    out: list[Node] = []
    for user in node.users:
        name = op_name(user)
        if name in VIEWS or name in TRANSPOSES:
            out += other_readers(user)
        elif name not in PRODUCTS and name not in READS_SHAPE and user.op != "output":
            out.append(user)
    return out


def _walk(weight: Node, tensor: Tensor) -> Iterator[Use]:
    pending: list[tuple[Node, bool, bool]] = [(weight, False, True)]
    while pending:
        node, flipped, whole = pending.pop()
        for user in node.users:
            name = op_name(user)
            if name in PRODUCTS:
                for operand in _operands(user, node, PRODUCTS[name]):
                    yield _classify(weight, user, operand, tensor, flipped, whole)
            elif name in TRANSPOSES:
                swaps = tensor.dim() == 2 and _swaps(user)
                pending.append((user, flipped ^ swaps, whole and tensor.dim() == 2))
            elif name in VIEWS:
                pending.append((user, flipped, whole and name in KEEPS_SHAPE))


def _operands(user: Node, node: Node, table: tuple[Operand, ...]) -> Iterator[Operand]:
    for operand in table:
        arg = argument(user, operand.position, operand.name)
        if arg is node or (isinstance(arg, (list, tuple)) and node in arg):
            yield operand


def _swaps(node: Node) -> bool:
    """Whether a transposing op on a matrix really swaps its two axes."""
    dims = [a for a in node.args[1:] if isinstance(a, int)]
    if op_name(node) == "permute":
        order = node.args[1] if isinstance(node.args[1], (list, tuple)) else dims
        return [int(d) % 2 for d in order] == [1, 0]  # type: ignore[arg-type]
    return len(dims) < 2 or dims[0] % 2 != dims[1] % 2


def _classify(
    weight: Node, node: Node, operand: Operand, tensor: Tensor, flipped: bool, whole: bool
) -> Use:
    def use(kind: Kind, reason: str = "", transposed: bool = False) -> Use:
        return Use(weight, node, kind, reason, transposed)

    name = op_name(node)
    if operand.role == "conv":
        return use(*_convolution(node, tensor))
    if operand.role == "conv_transposed":
        return use(
            "refused", "transposed convolution: not a product with the weight as it is stored"
        )
    if operand.role == "rnn":
        return use("refused", f"recurrent weight inside {name}: the op takes dense weights only")
    if tensor.dim() > 2:
        return use("refused", f"{tensor.dim()}-D weight {tuple(tensor.shape)} in {name}: "
                   "a stack of matrices (experts), no layout covers it yet")  # fmt: skip
    if operand.role == "inside":
        return use("opaque", f"multiplied inside {name}, which takes the dense weight")
    if operand.role == "batched":
        return use("opaque", f"{name} takes the dense weight; F.linear would not")
    if operand.role == "left":
        return use("opaque", f"{name} has the weight on its left")
    if not whole:
        return use("opaque", f"{name} takes a slice or reshape of the weight")
    if name.startswith("add") and (why := _scaled(node)):
        return use("opaque", why)
    return use("linear", transposed=flipped if operand.role == "nk" else not flipped)


def _scaled(node: Node) -> str:
    factors = [node.kwargs.get(k, 1) for k in ("alpha", "beta")]
    return "" if factors == [1, 1] else f"{op_name(node)} with alpha, beta = {factors}"


def _convolution(node: Node, weight: Tensor) -> tuple[Kind, str]:
    kernel = tuple(weight.shape[2:])
    if any(side != 1 for side in kernel):
        return "refused", f"convolution with kernel {kernel}: only 1×1 is a plain matrix product"
    named = op_name(node) == "convolution"
    groups = argument(node, 8 if named else 6, "groups")
    if groups not in (None, 1):
        return "refused", f"1×1 convolution in {groups} groups: each group is a matrix of its own"
    padding = argument(node, 4, "padding")
    if isinstance(padding, str) or any(_sides(padding)):
        return "refused", f"1×1 convolution with padding {padding}"
    if named and argument(node, 6, "transposed"):
        return "refused", "transposed convolution"
    return "conv1x1", ""


def _sides(padding: Any) -> list[int]:
    return list(padding) if isinstance(padding, (list, tuple)) else [padding or 0]
