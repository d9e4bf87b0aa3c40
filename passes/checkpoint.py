"""Finished parts of a long compression, kept so that a run that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import ArtifactError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.sites import Site
from sparsefx.passes.compress_site import Result, Step


class Checkpoint:
    """One safetensors file per part in a folder, valid for one model, spec and calibration.

    Files of another run are left alone: the key in their names differs.
    """

    def __init__(self, folder: Path, model: nn.Module, spec: str, batches: Sequence[Any]) -> None:
        """Raises ArtifactError when `folder` cannot be made."""
        self.folder, self.model = folder, model
        self.key = _key(model, spec, batches)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"resume folder '{folder}': {error.strerror}") from None

    def has(self, sites: Sequence[Site]) -> bool:
        """Whether a run before finished these Sites."""
        return self._path(sites).is_file()

    def load(self, sites: Sequence[Site]) -> list[Result] | None:
        """The Results of these Sites if a run before finished them."""
        from safetensors import SafetensorError, safe_open

        path = self._path(sites)
        if not self.has(sites):
            return None
        try:
            with safe_open(path, "pt") as file:
                rows = json.loads(file.metadata()["rows"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name in [n for n in tensors if n.startswith("parameter ")]:
                own = self.model.get_parameter(name.removeprefix("parameter "))
                own.data.copy_(tensors.pop(name))
            return [_result(site, row, tensors) for site, row in zip(sites, rows, strict=True)]
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(f"'{path}' is damaged ({error}); delete it to go on") from None

    def save(self, results: Sequence[Result], small: Mapping[str, Tensor] | None = None) -> None:
        """Keep a finished part, with the parameters `small` that were trained along."""
        from safetensors.torch import save_file

        tensors = {f"parameter {name}": t.detach().clone() for name, t in (small or {}).items()}
        for result in results:
            for i, tensor in enumerate((*result.packed.buffers, *result.branch)):
                tensors[f"{result.site.name} {i}"] = tensor.contiguous().clone()
        rows = json.dumps([_row(result) for result in results])
        path = self._path([result.site for result in results])
        handle, draft = tempfile.mkstemp(dir=self.folder, prefix=".")
        os.close(handle)
        save_file(tensors, draft, {"rows": rows})
        os.replace(draft, path)

    def _path(self, sites: Sequence[Site]) -> Path:
        names = "\n".join(site.name for site in sites)
        part = hashlib.sha256(f"{self.key}\n{names}".encode()).hexdigest()[:24]
        return self.folder / f"part-{part}.safetensors"


def _row(result: Result) -> dict[str, Any]:
    return {
        "format": str(result.packed.format), "buffers": len(result.packed.buffers),
        "sqnr_db": result.sqnr_db, "algorithm": result.algorithm, "note": result.note,
        "seconds": result.seconds, "steps": [[s.name, s.error, s.kept] for s in result.steps],
        "branch": len(result.branch),
    }  # fmt: skip


def _result(site: Site, row: dict[str, Any], tensors: Mapping[str, Tensor]) -> Result:
    found = [tensors[f"{site.name} {i}"] for i in range(row["buffers"] + row["branch"])]
    split = row["buffers"]
    packed = Packed(Format.parse(row["format"]), site.n, site.k, tuple(found[:split]))
    steps = tuple(Step(*step) for step in row["steps"])
    return Result(
        site, packed, tuple(found[split:]), row["sqnr_db"], row["algorithm"], row["note"],
        row["seconds"], steps,
    )  # fmt: skip


def _key(model: nn.Module, spec: str, batches: Sequence[Any]) -> str:
    """Digest of everything that the results depend on."""
    digest = hashlib.sha256(f"{spec}\n{torch.__version__}".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(f"{parameter.detach().double().sum().item()!r}".encode())
    for batch in batches:
        _update(digest, batch)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for one in value:
            _update(digest, one)
    else:
        digest.update(repr(value).encode())
