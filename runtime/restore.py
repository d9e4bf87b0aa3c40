"""Rebuild a packed model from an opened artifact: check all of it, then change the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import ArtifactError, SparsefxError
from sparsefx.ir.format import Format, Packed
from sparsefx.passes.replaceable import plain_conv1x1
from sparsefx.runtime.install import set_module, split_name
from sparsefx.runtime.manifest import Conv1x1, Entry, Linear, Manifest, Parameter
from sparsefx.runtime.modules import (
    PackedWeight,
    SparseConv1x1,
    SparseLinear,
    SparseParameter,
    unpack_on_read,
)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return state | dict(model.named_buffers(remove_duplicate=False))


def transient_names(model: nn.Module) -> set[str]:
    """Names of the buffers that `state_dict` leaves out."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def restore(model: nn.Module, where: Path, manifest: Manifest, file: Any) -> None:
    """Put everything in `file`, an open safetensors file, into `model`.

    Raises ArtifactError, the model untouched, when the file or the manifest does not fit it.
    """
    plan = _Plan(model, where, manifest, file)
    plan.check_names()
    modules = [(entry, plan.module(entry)) for entry in manifest.packed]
    shared = plan.dense()
    with torch.no_grad():
        for entry, module in modules:
            plan.place(entry, module)
        for home, names in shared.items():
            plan.fill(home, names)


class _Plan:
    """One load: the model's tensors by name on one side, the file's on the other."""

    def __init__(self, model: nn.Module, where: Path, manifest: Manifest, file: Any) -> None:
        self.model, self.where, self.manifest, self.file = model, where, manifest, file
        self.state = state_of(model)
        self.owned: dict[str, Tensor] = {}
        self.home = {name: name for name in file.keys()}  # noqa: SIM118  (it is no dict)
        for name, target in manifest.aliases.items():
            if name in self.home or target not in self.home or target in manifest.aliases:
                raise self.error(f"alias '{name}' of '{target}' names no stored tensor")
            self.home[name] = target
        self.formats = {entry.format: self.format(entry) for entry in manifest.packed}

    def error(self, why: str, way_out: str = "save the model again") -> ArtifactError:
        return ArtifactError(f"{self.where}: {why}; {way_out}")

    def format(self, entry: Entry) -> Format:
        try:
            fmt = Format.parse(entry.format)
            why = fmt.rejects(entry.n, entry.k)
        except SparsefxError as error:
            raise self.error(f"'{entry.names[0]}': {error}") from None
        if why or str(fmt) != entry.format:
            raise self.error(
                f"'{entry.names[0]}': format '{entry.format[:60]}' does not fit: {why}"
            )
        return fmt

    # --- checks -----------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """The stored tensor, mapped from the file."""
        out: Tensor = self.file.get_tensor(self.home[name])
        return out

    def own(self, name: str) -> Tensor:
        """A copy in our own memory, the same one for every name of a shared tensor."""
        home = self.home[name]
        if home not in self.owned:
            self.owned[home] = self.tensor(name).clone()
        return self.owned[home]

    def check_names(self) -> None:
        """Raises unless the packed and dense names are exactly those the model has."""
        replaced = Counter(name for entry in self.manifest.packed for name in entry.names)
        wanted = self.state.keys() - replaced.keys()
        for entry in self.manifest.packed:
            for name in entry.names:
                if why := self.misfit(entry, name):
                    raise self.error(
                        f"'{name}': {why}", "load into the architecture that was saved"
                    )
                if replaced[name] > 1:
                    raise self.error(f"'{name}' is packed twice")
                wanted |= {f"{entry.prefix(name)}.{key}" for key in self.keys(entry)}
        optional = transient_names(self.model)
        optional = {n for n in optional if n in self.state and self.state[n].device.type != "meta"}
        held = self.home.keys()
        missing = sorted(wanted - held - optional)
        left = sorted(held - wanted - set(self.manifest.transient))
        if missing or left:
            raise self.error(
                f"the tensors are not those of this {type(self.model).__name__}: "
                f"missing {_some(missing)}; left over {_some(left)}",
                f"load into the architecture that was saved ({self.manifest.model})",
            )

    def keys(self, entry: Entry) -> tuple[str, ...]:
        bias = ("bias",) if isinstance(entry, Linear | Conv1x1) and entry.bias else ()
        return entry.keys(self.formats[entry.format]) + bias

    def misfit(self, entry: Entry, name: str) -> str | None:
        """Why the model's parameter `name` cannot be what `entry` packs, or None."""
        path, attribute = split_name(name)
        weight = self.state.get(name)
        if not isinstance(weight, nn.Parameter):
            return "the model has no such parameter, or it is packed already; pass a dense model"
        if str(weight.dtype) != f"torch.{entry.dtype}":
            return f"is {weight.dtype} in the model, {entry.dtype} in the file; call .to() first"
        owner, shape = self.model.get_submodule(path), tuple(weight.shape)
        if isinstance(entry, Parameter):
            flat = len(shape) == 2 if entry.transposed else len(shape) > 0
            fits = flat and shape[0] == (entry.k if entry.transposed else entry.n)
            if fits and shape == tuple(entry.shape) and weight.numel() == entry.n * entry.k:
                return None
            return f"is {shape} in the model, {entry.shape} for {entry.n}×{entry.k} in the file"
        if attribute != "weight" or not path or state_of(owner).keys() - {"weight", "bias"}:
            return f"{type(owner).__name__} is no plain {entry.kind}"
        if owner._forward_hooks or owner._forward_pre_hooks or owner._backward_hooks:
            return "the module has hooks that would be lost; add them after loading"
        if f"{path}.bias" in self.state and not entry.bias:
            return "the model has a bias, the file has none"
        return _misshapen(entry, owner, shape)

    def module(self, entry: Entry) -> PackedWeight:
        """The packed module, of checked tensors in our own memory."""
        fmt, prefix = self.formats[entry.format], entry.prefix(entry.names[0])
        for name in entry.names[1:]:
            for key in self.keys(entry):
                if self.home[f"{entry.prefix(name)}.{key}"] != self.home[f"{prefix}.{key}"]:
                    raise self.error(f"'{name}' and '{entry.names[0]}' are not one weight")
        packed = Packed(
            fmt, entry.n, entry.k, tuple(self.own(f"{prefix}.{key}") for key in fmt.buffers)
        )
        if why := fault(packed):
            raise self.error(f"'{entry.names[0]}' ({fmt}, {entry.n}×{entry.k}): {why}")
        common: dict[str, Any] = {"dtype": getattr(torch, entry.dtype), "name": entry.names[0]}
        if isinstance(entry, Parameter):
            return SparseParameter(packed, tuple(entry.shape), entry.transposed, **common)
        branch = self.branch(entry, prefix)
        if entry.bias and self.tensor(f"{prefix}.bias").shape != (entry.n,):
            raise self.error(f"'{prefix}.bias' has not {entry.n} values")
        if isinstance(entry, Conv1x1):
            return SparseConv1x1(tuple(entry.stride), packed, None, branch, **common)
        return SparseLinear(packed, None, branch, **common)

    def branch(self, entry: Linear | Conv1x1, prefix: str) -> tuple[Tensor, ...]:
        if not entry.rank:
            return ()
        shapes = {"down": (entry.rank, entry.k), "up": (entry.n, entry.rank),
                  "branch_scale": (entry.rank,)}  # fmt: skip
        for key, shape in shapes.items():
            found = self.own(f"{prefix}.{key}")
            if found.shape != shape or found.dtype not in _FLOATS:
                raise self.error(f"'{prefix}.{key}' is {found.dtype} {tuple(found.shape)}, "
                                 f"a branch of rank {entry.rank} needs {shape}")  # fmt: skip
        return tuple(self.own(f"{prefix}.{key}") for key in shapes)

    def dense(self) -> dict[str, list[str]]:
        """Stored name → all names, for the tensors that stay as they are in the model."""
        shared: dict[str, list[str]] = {}
        inside = {f"{e.prefix(n)}.{key}" for e in self.manifest.packed for n in e.names
                  for key in self.keys(e) if key != "bias"}  # fmt: skip
        for name in self.home.keys() - inside:
            old = self.state.get(name)
            if name in self.manifest.transient and (old is None or old.device.type != "meta"):
                continue
            new = self.tensor(name)
            if old is not None and (old.shape, old.dtype) != (new.shape, new.dtype):
                raise self.error(
                    f"'{name}' is {old.dtype} {tuple(old.shape)} in the model, {new.dtype} "
                    f"{tuple(new.shape)} in the file", "build the model as it was saved"
                )  # fmt: skip
            shared.setdefault(self.home[name], []).append(name)
        self.users = Counter(
            id(self.state[n]) for ns in shared.values() for n in ns if n in self.state
        )
        return shared

    # --- changes ----------------------------------------------------------------------------

    def place(self, entry: Entry, module: PackedWeight) -> None:
        """Put a packed module where its dense parameter is."""
        for name in entry.names:
            path, attribute = split_name(name)
            owner, old = self.model.get_submodule(path), self.state[name]
            if old.device.type != "meta":
                module.to(old.device)
            if not isinstance(module, SparseParameter):
                module.train(owner.training)
                set_module(self.model, path, module)
            elif attribute in owner._parameters:
                unpack_on_read(owner, attribute, module)

    def fill(self, home: str, names: list[str]) -> None:
        """Copy a stored tensor into the model's, or replace one on meta or tied otherwise."""
        olds = [self.state[name] for name in names if name in self.state]
        old = olds[0] if olds else None
        if old is not None and self.writable(olds, len(names)):
            value = old.copy_(self.tensor(home))
        else:
            value = self.own(home)
            if old is not None and old.device.type != "meta":
                value = value.to(old.device)
            if old is None or isinstance(old, nn.Parameter):
                trained = value.is_floating_point() if old is None else old.requires_grad
                value = nn.Parameter(value, requires_grad=trained)
        for name in names:
            path, attribute = split_name(name)
            owner = self.model.get_submodule(path)
            if getattr(owner, attribute) is not value:
                setattr(owner, attribute, value)

    def writable(self, olds: list[Tensor], names: int) -> bool:
        """Whether copying into the model's tensor changes exactly the names meant."""
        old = olds[0]
        alone = len(olds) == names == self.users[id(old)] and all(o is old for o in olds)
        plain = old.device.type != "meta" and old.is_contiguous() and not old.is_inference()
        return alone and plain


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown


def _misshapen(entry: Linear | Conv1x1, owner: nn.Module, shape: tuple[int, ...]) -> str | None:
    if isinstance(entry, Conv1x1):
        fits = plain_conv1x1(owner) and tuple(entry.stride) == owner.stride
        fits = fits and shape == (entry.n, entry.k, *[1] * len(entry.stride))
    else:
        # A transposed linear (GPT-2's Conv1D) is (K, N); only nn.Linear is known to be (N, K).
        sides = [(entry.n, entry.k)] + [(entry.k, entry.n)] * (not isinstance(owner, nn.Linear))
        fits = shape in sides and not isinstance(owner, nn.Embedding | nn.EmbeddingBag)
    if fits:
        return None
    return f"{type(owner).__name__} of {shape} is no {entry.kind} of {entry.n}×{entry.k}"


def fault(packed: Packed) -> str | None:
    """Why these buffers are not what `Format.pack` writes for an (n, k) weight, or None.

    Kernels trust the index and the lengths of buffers, so everything read from a file comes here.
    """
    fmt, n, k = packed.format, packed.n, packed.k
    split = len(fmt.layout.buffers)
    index, rest = packed.buffers[:split], packed.buffers[split:]
    if any(b.dtype != torch.uint8 for b in index):
        return "its index is not of bytes"
    if why := _wrong_length(index, fmt.layout.index_bits(n, k)):
        return f"its index {why}"
    kept = n * k
    if index:
        mask = _try(lambda: fmt.layout.mask(index, n, k))
        if mask is None or fmt.layout.violation(mask) or not _same(fmt.layout.index(mask), index):
            return f"its index is not one of layout {fmt.layout}"
        kept = int(mask.sum())
    like = rest[0].dtype if rest[0].dtype in _FLOATS else torch.float32
    expected = Format(codec=fmt.codec).pack(torch.zeros(1, 1, dtype=like)).buffers
    if [b.dtype for b in rest] != [b.dtype for b in expected]:
        return f"its buffers are {[str(b.dtype) for b in rest]}, not {fmt.codec}'s"
    if why := _wrong_length(rest, fmt.codec.value_bits(n, k, kept, rest[0].element_size())):
        return f"its values {why} for {kept} kept"
    again = _try(lambda: fmt.codec.write(*fmt.codec.read(rest, kept, n, k)))
    if not all(torch.isfinite(b).all() for b in rest if b.is_floating_point()):
        return "a scale or value is not finite"
    if again is None or not _same(again, rest):
        return f"its buffers are not as {fmt.codec} writes them"
    return None


def _try(read: Callable[[], Any]) -> Any:
    """What `read` returns, None when the bytes make torch fail (a position past its run's end)."""
    try:
        return read()
    except (RuntimeError, IndexError):
        return None


def _wrong_length(buffers: tuple[Tensor, ...], bits: int) -> str | None:
    found = sum(b.numel() * b.element_size() for b in buffers)
    if -(-bits // 8) <= found < bits / 8 + max(len(buffers), 1):
        return None
    return f"take {found} bytes where {-(-bits // 8)} are needed"


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )
