"""Example inputs of an export: which axes are dynamic, and the same inputs at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.errors import ExportError

PLUS = " + "
"""An axis named "past + sequence" is as long as those two together."""
NAMES = "write {input name: {axis: 'batch'}} with axis names or torch.export.Dim"


@dataclass(frozen=True)
class Axis:
    """A dynamic axis: its name in the file and the sizes that the user allows."""

    name: str
    min: int = 0
    max: float = float("inf")

    @property
    def hint(self) -> Any:
        """What torch.export is told. Sizes 0 and 1 would make it specialise: the gate tries 1."""
        high = None if self.max == float("inf") else int(self.max)
        return torch.export.Dim.DYNAMIC(min=self.min or None, max=high)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call, in the order of `forward`'s signature."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any] | None
    """As torch.export takes them."""
    axes: tuple[dict[int, Axis], ...]
    """Dynamic axes of every tensor, in order."""
    also: tuple[Mapping[str, int], ...] = ()
    """Sizes, by axis name, that the gate tries besides its own."""

    @staticmethod
    def of(model: nn.Module, example_inputs: Any, dynamic_shapes: Any = None) -> Inputs:
        """Raises ExportError for unknown names, bad axes and examples that fix a dynamic axis."""
        # torch.onnx cannot convert what torch.export records for strided inputs (torch 2.13).
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, split_inputs(example_inputs))
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ExportError(
                f"example_inputs do not fit {type(model).__name__}: {error}"
            ) from error
        spread = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
        wanted = dict(dynamic_shapes or {})
        for name in spread:
            extra = bound.arguments.get(name, {})
            if name not in wanted and extra:
                wanted[name] = {key: wanted.pop(key) for key in list(wanted) if key in extra}
        if unknown := sorted(map(str, set(wanted) - set(bound.arguments))):
            have = ", ".join(bound.arguments)
            raise ExportError(
                f"dynamic_shapes names {unknown}, but the inputs are: {have}; {NAMES}"
            )
        found: list[dict[int, Axis]] = []
        shapes = {
            name: _walk(name, value, wanted.get(name), found)
            for name, value in bound.arguments.items()
        }
        order = [n for n in bound.arguments if n in kwargs] + list(kwargs)
        ordered = {name: kwargs[name] for name in dict.fromkeys(order)}
        inputs = Inputs(args, ordered, shapes if any(found) else None, tuple(found))
        _check_sums(inputs)
        return inputs

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order: the ONNX inputs."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every dynamic axis, by name; axes that are sums of others are left out."""
        pairs = zip(self.tensors, self.axes, strict=True)
        found = {a.name: tensor.shape[i] for tensor, axes in pairs for i, a in axes.items()}
        return {name: size for name, size in found.items() if PLUS not in name}

    def resized(self, sizes: Mapping[str, int]) -> Inputs | None:
        """The same call with dynamic axes repeated or cut to `sizes`.

        None when a new size is outside what the user allows.
        """
        queue = iter(self.axes)
        allowed = True

        def change(leaf: Any) -> Any:
            nonlocal allowed
            if not isinstance(leaf, Tensor):
                return leaf
            for axis, rule in next(queue).items():
                old, new = leaf.shape[axis], sum(sizes[part] for part in rule.name.split(PLUS))
                allowed = allowed and rule.min <= new <= rule.max
                leaf = leaf.index_select(axis, torch.arange(new, device=leaf.device) % old)
            return leaf

        args, kwargs = pytree.tree_map(change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs) if allowed else None


def _check_sums(inputs: Inputs) -> None:
    sizes = inputs.sizes
    for tensor, axes in zip(inputs.tensors, inputs.axes, strict=True):
        for axis, rule in axes.items():
            parts = [sizes.get(part) for part in rule.name.split(PLUS)]
            if None in parts or sum(filter(None, parts)) != tensor.shape[axis]:
                raise ExportError(
                    f"the axis named '{rule.name}' has size {tensor.shape[axis]} in one input; the "
                    f"others say {sizes}"
                )


def _walk(name: str, value: Any, wanted: Any, found: list[dict[int, Axis]]) -> Any:
    """torch.export's form of `wanted` for `value`; the axes of its tensors are added to `found`."""
    if isinstance(value, Tensor):
        axes = dict(_axes(name, value, wanted))
        found.append(axes)
        return {axis: rule.hint for axis, rule in axes.items()} or None
    if isinstance(value, (list, tuple)):
        parts: Sequence[Any] = wanted if wanted is not None else [None] * len(value)
        if not isinstance(parts, (list, tuple)) or len(parts) != len(value):
            raise ExportError(f"dynamic_shapes['{name}'] must list {len(value)} entries; {NAMES}")
        walked = [_walk(name, v, w, found) for v, w in zip(value, parts, strict=True)]
        return walked if isinstance(value, list) else tuple(walked)
    if isinstance(value, Mapping):
        chosen = wanted or {}
        return {key: _walk(f"{name}.{key}", v, chosen.get(key), found) for key, v in value.items()}
    if wanted is not None:
        raise ExportError(
            f"dynamic_shapes names '{name}', which is a {type(value).__name__}; {NAMES}"
        )
    found += [{} for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    return None


def _axes(name: str, value: Tensor, wanted: Any) -> Iterator[tuple[int, Axis]]:
    if wanted is not None and not isinstance(wanted, Mapping):
        raise ExportError(f"dynamic_shapes['{name}'] is {wanted!r}; {NAMES}")
    for key, dim in (wanted or {}).items():
        if not isinstance(key, int) or not -value.dim() <= key < value.dim():
            raise ExportError(f"dynamic_shapes['{name}'] has axis {key!r} of {tuple(value.shape)}")
        axis = key % value.dim()
        if dim is None:
            continue
        if value.shape[axis] < 2:
            raise ExportError(
                f"axis {axis} of '{name}' is to be dynamic, but its example size is "
                f"{value.shape[axis]}: torch.export would fix it; use an example size of 2 or more"
            )
        yield axis, _axis(name, dim)


def _axis(name: str, dim: Any) -> Axis:
    if isinstance(dim, str):
        return Axis(dim)
    if isinstance(dim, torch.export.Dim):
        bounds = getattr(dim, "min", None), getattr(dim, "max", None)
        high = float("inf") if bounds[1] is None else float(bounds[1])
        return Axis(dim.__name__, int(bounds[0] or 0), high)
    raise ExportError(f"dynamic_shapes['{name}'] has {dim!r}; {NAMES}")
