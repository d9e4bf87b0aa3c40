"""Counts products with weights by watching a model run; shares no code with the compiler.

Every tensor is followed through every aten operator as one of: a constant, an activation, a
parameter moved or cast (`exact`), or a value computed from parameters and constants only.
Not seen: a product written as an elementwise multiplication and a sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LAST_TWO: tuple[int, ...] = (1, 2)
_FIRST_TWO: tuple[int, ...] = (0, 1)

PRODUCTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "inner", "tensordot"), _FIRST_TWO),
    **dict.fromkeys(("matmul", "linear", "mkldnn_linear", "chain_matmul"), _FIRST_TWO),
    **dict.fromkeys(("_int_mm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm"), _FIRST_TWO),
    **dict.fromkeys(("_sparse_mm", "smm", "hspmm"), _FIRST_TWO),
    **dict.fromkeys(("_weight_int8pack_mm", "_weight_int4pack_mm"), _FIRST_TWO),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addbmm", "_addmm_activation"), _LAST_TWO),
    **dict.fromkeys(("sspaddmm", "_sparse_addmm"), _LAST_TWO),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), _FIRST_TWO),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_tbc", "mkldnn_convolution"), _FIRST_TWO),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _FIRST_TWO),
    **dict.fromkeys(("_slow_conv2d_forward", "slow_conv3d", "thnn_conv2d"), _FIRST_TWO),
    **dict.fromkeys(("_conv_depthwise2d", "conv_depthwise3d", "cudnn_convolution"), _FIRST_TWO),
    **dict.fromkeys(("slow_conv_transpose2d", "slow_conv_transpose3d"), _FIRST_TWO),
    **dict.fromkeys(("slow_conv_dilated2d", "slow_conv_dilated3d"), _FIRST_TWO),
    **dict.fromkeys(("miopen_convolution", "miopen_depthwise_convolution"), _FIRST_TWO),
    **dict.fromkeys(("bilinear", "_trilinear"), (0, 1, 2)),
    "einsum": (1,),
    "linalg_multi_dot": (0,),
    "mkldnn_rnn_layer": (0, 1, 2),  # 3 and 4 are biases
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (0, 2)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), (0, 2, 3)),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _FIRST_TWO),
    "_native_multi_head_attention": (0, 1, 2, 5, 7),
    "_transformer_encoder_layer_fwd": (0, 3, 5, 13, 15),
    "grouped_mm": _FIRST_TWO,
    "grouped_mm_fallback": _FIRST_TWO,
    **dict.fromkeys(("scaled_dot_product_attention",), (0, 1, 2)),
    **dict.fromkeys(("_scaled_dot_product_flash_attention_for_cpu",), (0, 1, 2)),
    **dict.fromkeys(("_scaled_dot_product_flash_attention",), (0, 1, 2)),
    **dict.fromkeys(("_scaled_dot_product_efficient_attention",), (0, 1, 2)),
    **dict.fromkeys(("_scaled_dot_product_attention_math",), (0, 1, 2)),
}
"""Operator to the argument positions that are multiplied, bias left out."""

MOVES = {
    *("clone", "_to_copy", "contiguous", "copy_", "copy", "cat", "stack", "repeat", "roll", "flip"),
    *("reshape", "_reshape_copy", "_unsafe_view", "_reshape_alias", "index_select", "index"),
    *("constant_pad_nd", "pad", "tril", "triu", "slice_scatter", "select_scatter", "to"),
    *("view_copy", "expand_copy", "permute_copy", "transpose_copy", "t_copy", "repeat_interleave"),
    *("lift_fresh", "lift_fresh_copy", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
"""Operators, besides views, whose result holds its input's values unchanged."""

BLANK = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "randint_like"),
    *("fill_", "zero_", "normal_", "uniform_", "bernoulli_", "is_same_size", "sym_size"),
}
"""Operators that read a tensor's shape only."""

HARMLESS = {
    *("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"),
    *("add", "sub", "rsub", "mul", "div", "pow", "where", "maximum", "minimum", "lerp", "atan2"),
    *("addcmul", "addcdiv", "remainder", "fmod", "hypot", "clamp", "masked_fill", "prelu"),
    *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and"),
    *("cat", "stack", "index", "index_select", "index_put", "copy", "index_copy"),
    *("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "batch_norm"),
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_impl_index"),
    *("rms_norm", "_fused_rms_norm", "instance_norm"),
}
"""Operators that combine a weight and an activation without multiplying matrices."""


@dataclass(frozen=True)
class _Origin:
    """Where a tensor's values come from; neither activation nor names means a constant."""

    activation: bool = False
    names: frozenset[str] = frozenset()
    exact: bool = False


_CONSTANT, _ACTIVATION = _Origin(), _Origin(activation=True)


@dataclass(frozen=True)
class Products:
    """How often each parameter, by its first name, was an operand of a matrix product."""

    counts: dict[str, int]
    """Products with the parameter itself: moved, sliced, cast or concatenated at most.
    Where both operands are parameters, the right one is the weight, as in `x @ w`."""
    others: dict[str, int]
    """Products it entered otherwise: as the left of two parameters, or computed with first."""
    unknown: dict[str, list[str]]
    """Operators outside every list here that met an activation and the parameter."""
    operators: dict[str, list[str]] = field(default_factory=dict)
    """Which operators `counts` saw, for messages."""


def count_products(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Products:
    """Run the model once and count products by parameter; vectors and biases do not count."""
    with _plain_attention(), torch.no_grad(), _Watch(model, (args, kwargs)) as watch:
        model(*args, **(kwargs or {}))
    return Products(
        counts=dict(watch.counts),
        others=dict(watch.others),
        unknown={name: sorted(found) for name, found in watch.unknown.items()},
        operators={name: sorted(found) for name, found in watch.operators.items()},
    )


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` from running as one opaque operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _name(func: OpOverload) -> str:
    return str(func.overloadpacket.__name__)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the origin of every tensor and tallies the products it sees."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.unknown: dict[str, set[str]] = {}
        self.operators: dict[str, set[str]] = {}
        self._matrices = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
        # Tensors are kept alive with their origin, so that an id is never used again.
        self._known: dict[int, tuple[Tensor, _Origin]] = {}
        self._written: dict[int, tuple[Tensor, _Origin]] = {}
        for name, parameter in model.named_parameters():
            self._note(parameter, _Origin(names=frozenset({name}), exact=True))
        for tensor in _tensors(inputs):
            self._note(tensor, _ACTIVATION)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name in PRODUCTS:
            self._tally(name, args)
        result = func(*args, **kwargs)
        inputs = [(t, self._origin(t)) for t in _tensors((args, kwargs))]
        if name not in PRODUCTS and name not in BLANK:
            self._report(name, inputs)
        origin = self._result(func, name, inputs)
        self._note_writes(func, args, kwargs, origin)
        for tensor in _tensors(result):
            self._note(tensor, origin)
        return result

    def _note(self, tensor: Tensor, origin: _Origin) -> None:
        self._known[id(tensor)] = (tensor, origin)

    def _note_writes(self, func: OpOverload, args: Any, kwargs: Any, origin: _Origin) -> None:
        """Give what was written in place, and every view of it, the origin of the write."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                key = tensor.untyped_storage()._cdata
                before = self._written[key][1] if key in self._written else origin
                self._written[key] = (tensor, _join([before, origin], moves=True))
                self._note(tensor, origin)

    def _origin(self, tensor: Tensor) -> _Origin:
        """Return a tensor's origin; one made out of sight is known by its storage."""
        known = self._known.get(id(tensor))
        written = self._written.get(tensor.untyped_storage()._cdata)
        if known is not None and written is not None:
            return _join([known[1], written[1]], moves=True)
        if known is not None or written is not None:
            return (known or written)[1]  # type: ignore[index]
        sharing = [
            (name, parameter)
            for name, parameter in self._matrices.items()
            if parameter.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        ]
        same = {name for name, parameter in sharing if parameter.data_ptr() == tensor.data_ptr()}
        names = frozenset(same or (name for name, _ in sharing))
        return _Origin(names=names, exact=True) if names else _CONSTANT

    def _result(self, func: OpOverload, name: str, inputs: list[tuple[Tensor, _Origin]]) -> _Origin:
        """Return the origin of an operator's results."""
        if name in BLANK:
            return _CONSTANT
        origins = [origin for _, origin in inputs]
        if name == "copy_":  # what was there before is gone
            origins = origins[1:]
        if name in ("index", "index_select") and origins and inputs[0][0].dim() >= 3:
            origins = origins[:1]  # whole matrices, chosen by a router, are still the weight
        return _join(origins, moves=name in MOVES or func.is_view)

    def _tally(self, name: str, args: tuple[Any, ...]) -> None:
        """Count one product for the weights and the other parameters among its operands."""
        operands = [_tensors(args[i]) for i in PRODUCTS[name] if i < len(args)]
        origins = [[self._origin(tensor) for tensor in operand] for operand in operands]
        exact = [{n for o in operand if o.exact for n in o.names} for operand in origins]
        if PRODUCTS[name] in (_FIRST_TWO, _LAST_TWO) and len(exact) == 2 and exact[1]:
            exact[0] = set()
        weights = set[str]().union(*exact) & self._matrices.keys()
        entered = {n for operand in origins for o in operand for n in o.names}
        self.counts.update(weights)
        self.others.update((entered & self._matrices.keys()) - weights)
        for parameter in weights:
            self.operators.setdefault(parameter, set()).add(name)

    def _report(self, name: str, inputs: list[tuple[Tensor, _Origin]]) -> None:
        """Note an operator nobody classified, where a weight meets an activation."""
        if name.rstrip("_") in HARMLESS or not any(o.activation for _, o in inputs):
            return
        for tensor, origin in inputs:
            if tensor.dim() >= 2 and not origin.activation:
                for parameter in origin.names & self._matrices.keys():
                    self.unknown.setdefault(parameter, set()).add(name)


def _join(origins: list[_Origin], *, moves: bool) -> _Origin:
    """Return the origin of a value made from values of these origins."""
    if any(origin.activation for origin in origins):
        return _ACTIVATION
    names = frozenset[str]().union(*(origin.names for origin in origins))
    exact = moves and all(origin.exact or not origin.names for origin in origins)
    return _Origin(names=names, exact=exact and bool(names))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
