"""Modules with packed weights: `SparseLinear`, `SparseConv1x1`, and parameters unpacked on read."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.codegen import kernels  # noqa: F401  (registers the kernel table with the op)
from sparsefx.codegen.prepared import forget
from sparsefx.ir.errors import ArtifactError, FrozenWeightError, StaleWeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import LINEAR

EDIT = (
    "{name} is packed as '{format}': what you read is a copy, and editing it has no effect. "
    "Edit the dense model and call sparsefx.sparsify again"
)


class ReadOnlyWeight(Tensor):
    """The dense copy of a packed weight: reads like a tensor, refuses to be edited or trained."""

    _message: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        edited = [*args[:1], *(kwargs.get(key) for key in ("out", "tensor", "input"))]
        owner = next((t for t in edited if isinstance(t, ReadOnlyWeight)), None)
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if owner is not None:
            if name == "requires_grad_" or (name == "__set__" and attribute == "requires_grad"):
                raise FrozenWeightError(owner._message + "; train a branch ('+r16') or the bias")
            setting = name in ("__set__", "__setitem__") or kwargs.get("out") is owner
            in_place = name.endswith("_") and not name.endswith("__")
            if setting or in_place or (name == "__get__" and attribute == "data"):
                raise StaleWeightError(owner._message)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            return out if owner is None else _guard_views(out, owner)


def _guard_views(out: Any, owner: ReadOnlyWeight) -> Any:
    """`out`, guarded like `owner` where it shares its memory: an edit there would be lost too."""
    if type(out) in (tuple, list):
        return type(out)(_guard_views(o, owner) for o in out)
    if not isinstance(out, Tensor):
        return out
    if out.untyped_storage().data_ptr() != owner.untyped_storage().data_ptr():
        return out
    view = out.as_subclass(ReadOnlyWeight)
    view._message = owner._message
    return view


class PackedWeight(nn.Module):
    """Buffers of one packed weight. Base of everything that holds one."""

    def __init__(self, packed: Packed, dtype: torch.dtype, name: str = "") -> None:
        super().__init__()
        self.format = str(packed.format)
        self.n, self.k = packed.n, packed.k
        self.dtype = dtype
        """Data type of the dense weight this replaces."""
        self.name = name
        self.keys = packed.format.buffers
        for key, buffer in zip(self.keys, packed.buffers, strict=True):
            self.register_buffer(key, buffer)

    @property
    def buffer_list(self) -> list[Tensor]:
        buffers = self._buffers  # not getattr, which searches for 1 µs before it looks here
        return [buffers[key] for key in self.keys]  # type: ignore[misc]

    @property
    def packed(self) -> Packed:
        """The stored form, sharing this module's buffers."""
        return Packed(Format.parse(self.format), self.n, self.k, tuple(self.buffer_list))

    def dense(self) -> Tensor:
        """A new dense (N, K) tensor of what is stored."""
        out: Tensor = torch.ops.sparsefx.unpack(
            self.buffer_list, self.format, self.n, self.k, self.dtype
        )
        return out

    def read_only(self, weight: Tensor) -> Tensor:
        """`weight`, guarded against edits that would be lost."""
        if torch.compiler.is_compiling():
            return weight
        guarded = weight.detach().as_subclass(ReadOnlyWeight)
        guarded._message = EDIT.format(name=self.name or "this weight", format=self.format)
        return guarded

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise StaleWeightError(EDIT.format(name=self.name or "this weight", format=self.format))
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedWeight:
        """Devices move every buffer; float casts change what is computed, never what is stored."""
        before = {key: b for key, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe = fn(torch.empty(0, dtype=self.dtype))
        if probe.dtype.is_floating_point:
            self.dtype = probe.dtype
        for key, old in before.items():
            new = self._buffers[key]
            if new is not None and new.dtype != old.dtype:
                self._buffers[key] = old.to(new.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        forget(self.buffers())  # inference tensors do not count what is loaded over them

    def extra_repr(self) -> str:
        bits = self.packed.bits_per_weight
        return (
            f"in_features={self.k}, out_features={self.n}, format='{self.format}', bits={bits:.2f}"
        )


class SparseLinear(PackedWeight):
    """y = x · Wᵀ + bias (+ branch) with W packed; stands where an `nn.Linear` stood.

    x is (…, K) of any rank from 1 and any float dtype; y is (…, N) in the dtype that a dense
    linear would return, autocast included. Gradients flow to x, bias and branch, not to W; to
    train a branch hold it in float32: `layer.up = layer.up.float().requires_grad_()`.
    """

    down: Tensor
    up: Tensor
    branch_scale: Tensor

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None = None,
        branch: Sequence[Tensor] = (),
        dtype: torch.dtype = torch.float32,
        name: str = "",
    ) -> None:
        super().__init__(packed, dtype, name)
        self.bias = bias
        for key, tensor in zip(("down", "up", "branch_scale"), branch, strict=False):
            self.register_buffer(key, tensor)
        self.has_branch = bool(branch)

    @property
    def in_features(self) -> int:
        return self.k

    @property
    def out_features(self) -> int:
        return self.n

    @property
    def weight(self) -> Tensor:
        """The dense (N, K) weight, unpacked anew at every read and guarded against edits."""
        return self.read_only(self.dense())

    @property
    def branch(self) -> list[Tensor]:
        """[down (r, K), up (N, r), branch_scale (r,)], or []."""
        return [self.down, self.up, self.branch_scale] if self.has_branch else []

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch if self.has_branch else []
        out: Tensor = LINEAR(x, self.buffer_list, self.bias, branch, self.format, self.n)
        return out


class SparseConv1x1(SparseLinear):
    """A 1×1 convolution without groups or padding: the product runs over the channel axis."""

    def __init__(self, stride: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stride = stride

    @property
    def weight(self) -> Tensor:
        return self.read_only(self.dense().view(self.n, self.k, *[1] * len(self.stride)))

    def forward(self, x: Tensor) -> Tensor:
        batched = x.dim() == len(self.stride) + 2
        if not batched:
            x = x.unsqueeze(0)
        for axis, step in enumerate(self.stride, start=2):
            if step > 1:
                x = x[(slice(None),) * axis + (slice(None, None, step),)]
        y = super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return y if batched else y.squeeze(0)


class SparseParameter(PackedWeight):
    """A packed parameter whose owner computes with the dense weight: unpacked at every read."""

    def __init__(self, packed: Packed, shape: tuple[int, ...], transposed: bool, **kw: Any) -> None:
        super().__init__(packed, **kw)
        self.shape, self.transposed = shape, transposed

    def read(self) -> Tensor:
        dense = self.dense()
        if self.transposed or dense.shape != self.shape:
            dense = dense.T if self.transposed else dense.view(self.shape)
        return self.read_only(dense)


def unpack_on_read(owner: nn.Module, attribute: str, parameter: SparseParameter) -> None:
    """Replace `owner.<attribute>` by a read-only property over `parameter`."""
    del owner._parameters[attribute]
    key = f"{attribute}_packed"
    owner.add_module(key, parameter)

    def read(self: nn.Module) -> Tensor:
        return self.get_submodule(key).read()  # type: ignore[operator, no-any-return]

    base = type(owner)

    def assign(self: nn.Module, name: str, value: Any) -> None:
        if name == attribute:
            raise StaleWeightError(EDIT.format(name=parameter.name, format=parameter.format))
        base.__setattr__(self, name, value)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        raise ArtifactError(
            f"{base.__name__} holds the packed {parameter.name} and cannot be pickled; "
            "use sparsefx.save and sparsefx.load"
        )

    def copy_deeply(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    members = {
        attribute: property(read), "__setattr__": assign, "__reduce_ex__": reduce,
        "__deepcopy__": copy_deeply,
    }  # fmt: skip
    owner.__class__ = type(base.__name__, (base,), members)
