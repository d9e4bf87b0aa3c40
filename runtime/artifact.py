"""Artifacts: a folder with `manifest.json` and one safetensors file that rebuilds a packed model.

Nothing in a folder is run or unpickled. A save is committed by replacing the manifest, so a crash
leaves the artifact that was there; a load changes the model only after every byte has been checked.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.errors import ArtifactError
from sparsefx.runtime.history import history_of, remember
from sparsefx.runtime.manifest import (
    LIMIT,
    MANIFEST,
    WEIGHTS,
    Conv1x1,
    Entry,
    Linear,
    Manifest,
    Name,
    Parameter,
    Record,
    digest,
    open_plain,
    read_manifest,
    record,
    seal,
)
from sparsefx.runtime.modules import PackedWeight, SparseConv1x1, SparseLinear, SparseParameter
from sparsefx.runtime.restore import restore, state_of, transient_names

if sys.platform != "win32":
    import fcntl

M = TypeVar("M", bound=nn.Module)
SCRATCH = ".sparsefx-"
RENAME = "rename the module or change what it holds"
_STORABLE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip


class _Names(Record):
    tensors: list[Name]


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write everything `model` holds to `folder`; what was saved there stays whole until the end.

    Raises ArtifactError before anything is written when the model or the folder is not fit for it.
    """
    root, target = _root(model), Path(folder)
    tensors, aliases = _collect(root)
    fields = {
        "sparsefx": sparsefx.__version__,
        "model": type(root).__name__[:200],
        "packed": _entries(root, target),
        "aliases": aliases,
        "transient": sorted(transient_names(root) & (tensors.keys() | aliases.keys())),
        "history": history_of(root),
    }
    head = record(Manifest, target, fields, RENAME)
    record(_Names, target, {"tensors": list(tensors)}, RENAME)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArtifactError(f"{target}: is a link or no folder; name a new folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _alone(target) as alone:
            _check_files(target)
            try:
                _write(target, tensors, head)
            finally:
                if alone:
                    _sweep(target)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{target}: cannot be written ({error}); what was saved there before is unchanged"
        ) from error


def load(folder: str | os.PathLike[str], model: M) -> M:
    """Turn `model`, a dense instance of the saved architecture, into the saved one; returns it.

    It may be on the meta device. Raises ArtifactError, the model untouched, unless the folder is
    complete, unaltered and fits the model. Only JSON and safetensors are read, nothing is run.
    """
    root, where = _root(model), Path(folder)
    while True:
        manifest = read_manifest(where)
        try:
            _check_weights(where, manifest)
            with safe_open(where / manifest.weights, framework="pt") as file:
                restore(root, where, manifest, file)
            if manifest.history is not None:
                remember(root, manifest.history)
            return model
        except FileNotFoundError:
            # A save in another process may have replaced the weights since the manifest was read.
            if read_manifest(where) == manifest:
                raise ArtifactError(
                    f"{where / manifest.weights}: is missing; copy the whole folder, or save again"
                ) from None
        except SafetensorError as error:
            raise ArtifactError(
                f"{where / manifest.weights}: is not sound ({error}); save the model again"
            ) from None


def _root(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper, so that names do not begin with `_orig_mod`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


# --- what is saved -----------------------------------------------------------------------------


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store by name, each once, and the further names of those that have several."""
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ArtifactError(
                f"'{path}': {type(module).__name__} keeps extra state that may not be tensors; "
                "hold it in buffers"
            )
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in state_of(model).items():
        if why := _unstorable(tensor):
            raise ArtifactError(f"'{name}': {why}")
        place = tensor.data_ptr() if tensor.numel() else id(tensor)
        key = (place, tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        home = first.setdefault(key, name)
        if home == name:
            stored[name] = tensor.detach()
        else:
            aliases[name] = home
    # The library refuses tensors that share memory in part; those alone are copied.
    storages = Counter(t.untyped_storage().data_ptr() for t in stored.values())
    for name, tensor in stored.items():
        shared = storages[tensor.untyped_storage().data_ptr()] > 1
        stored[name] = tensor.clone().contiguous() if shared else tensor.contiguous()
    return stored, aliases


def _unstorable(tensor: Tensor) -> str | None:
    if tensor.device.type == "meta":
        return "is on the meta device and has no values; load the weights first"
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return f"a {type(tensor).__name__} of layout {tensor.layout} is no plain dense tensor"
    if tensor.dtype not in _STORABLE:
        return f"safetensors has no {tensor.dtype}; convert it first"
    return None


def _entries(model: nn.Module, where: Path) -> list[Entry]:
    """What rebuilds each packed module: its kind, names, format and sizes."""
    paths: dict[PackedWeight, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedWeight):
            paths.setdefault(module, []).append(path)
    return [_entry(module, names, where) for module, names in paths.items()]


def _entry(module: PackedWeight, paths: list[str], where: Path) -> Entry:
    fields: dict[str, Any] = {"format": module.format, "n": module.n, "k": module.k}
    fields["dtype"] = str(module.dtype).removeprefix("torch.")
    if isinstance(module, SparseParameter) and type(module) is SparseParameter:
        fields["names"] = [path.removesuffix("_packed") for path in paths]
        fields |= {"shape": list(module.shape), "transposed": module.transposed}
        return record(Parameter, where, fields, RENAME)
    if not isinstance(module, SparseLinear) or "" in paths:
        raise ArtifactError(
            f"{where}: the {type(module).__name__} at '{paths[0]}' could not be put back by a "
            "load; save a model that contains it, e.g. nn.Sequential(layer)"
        )
    fields["names"] = [f"{path}.weight" for path in paths]
    fields["bias"] = module.bias is not None
    fields["rank"] = len(module.branch[0]) if module.branch else 0
    if isinstance(module, SparseConv1x1):
        return record(Conv1x1, where, fields | {"stride": list(module.stride)}, RENAME)
    return record(Linear, where, fields, RENAME)


# --- files -------------------------------------------------------------------------------------


def _check_files(folder: Path) -> None:
    """Raises ArtifactError when a file that a save would replace is no plain file of ours."""
    for path in folder.iterdir():
        ours = path.name == MANIFEST or WEIGHTS.fullmatch(path.name)
        if ours and not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactError(f"{path}: is a link or no plain file; remove it first")
    if (folder / MANIFEST).exists() and _committed(folder) is None:
        raise ArtifactError(
            f"{folder / MANIFEST}: was not written by sparsefx; remove it or name a new folder"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """One writer at a time; yields False if folders cannot be locked: then nothing is removed."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            held = False
        yield held
    finally:
        os.close(descriptor)


def _write(folder: Path, tensors: dict[str, Tensor], head: Manifest) -> None:
    """Weights first, under the name of their hash; then the manifest, which commits them."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        weights, manifest = Path(scratch, "weights"), Path(scratch, MANIFEST)
        manifest.touch()
        save_file(tensors, weights)
        weights.chmod(manifest.stat().st_mode)  # the library makes it private, whatever the umask
        with weights.open("rb") as file:
            sha, size = digest(file)
        name = f"weights-{sha[:16]}.safetensors"
        final = head.model_copy(update={"weights": name, "bytes": size, "sha256": sha})
        fields = final.model_dump()
        text = json.dumps(fields | {"seal": seal(fields)}, indent=1)
        if len(text) > LIMIT:
            raise ArtifactError(f"{folder}: a manifest of {len(text)} bytes is over {LIMIT}")
        manifest.write_text(text, encoding="ascii")
        for source, target in ((weights, name), (manifest, MANIFEST)):
            _sync(source)
            os.replace(source, folder / target)
            _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _committed(folder: Path) -> str | None:
    """The weights file that the folder's manifest names, None when the manifest is not ours."""
    try:
        fields = json.loads((folder / MANIFEST).read_bytes())
        name = fields["weights"] if "format_version" in fields else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) and WEIGHTS.fullmatch(name) else None


def _sweep(folder: Path) -> None:
    """Remove what earlier saves left: their weights, and the scratch folders of killed ones."""
    keep = _committed(folder)
    for path in folder.iterdir():
        if path.name.startswith(SCRATCH) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif WEIGHTS.fullmatch(path.name) and keep not in (None, path.name):
            path.unlink(missing_ok=True)


def _check_weights(folder: Path, manifest: Manifest) -> None:
    """Raises ArtifactError unless the weights file is plain, complete and unaltered."""
    path = folder / manifest.weights
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == manifest.bytes and digest(file) == (manifest.sha256, size):
            return
    raise ArtifactError(
        f"{path}: has {size} bytes or other content than the {manifest.bytes} that were saved "
        "(SHA-256); copy the folder again, or save the model again"
    )
