"""Reading somebody's ONNX file: what is safe to open, and which weights it multiplies by.

Files are data from elsewhere: where external tensors lie is checked before anything is read, and
nothing in a file is executed but its graph, by ONNX Runtime.
"""

from __future__ import annotations

import logging
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefx.codegen.onnx import DOMAIN, IR_VERSION, OPSET
from sparsefx.ir.errors import ArtifactError

if TYPE_CHECKING:
    import onnx_ir as ir

MINIMUM = 10
"""The oldest IR version with overloaded functions."""


def load(path: Path) -> tuple[ir.Model, tuple[Path, ...]]:
    """The model in the file, weights in other files mapped, and those files.

    Raises ArtifactError for a file that is no ONNX model, is compressed already, would lose
    something, or whose external data is not wholly inside regular files beside it.
    """
    import onnx
    import onnx_ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"'{path}' is not a readable ONNX file: {error}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ArtifactError(f"'{path}' is not an ONNX model: it has no graph or no opset")
    if why := _lost(proto):
        raise ArtifactError(f"'{path}' {why}")
    files = {_checked(tensor, path.parent) for tensor in _tensors(proto) if _external(tensor)}
    try:
        onnx.checker.check_model(str(path))
        model = onnx_ir.load(path)
    except Exception as error:  # onnx_ir raises whatever a malformed field leads to
        raise ArtifactError(f"'{path}' is not a valid ONNX model: {error}") from error
    return model, tuple(sorted(files))


def _lost(proto: Any) -> str:
    """What compressing the file could not keep, "" for nothing."""
    from onnx import AttributeProto

    if any(node.domain == DOMAIN for node in proto.graph.node):
        return "holds packed weights already; compress the original file"
    if proto.training_info:
        return "holds training information, which would be lost"
    if any(message.DESCRIPTOR.name == "SparseTensorProto" for message in _messages(proto)):
        return "holds sparse tensors, which are not supported"
    inside = (m for m in _messages(proto) if isinstance(m, AttributeProto))
    if any(_external(t) for a in inside for t in (a.t, *a.tensors)):
        return "keeps constants of nodes in other files; only initializers may be there"
    return ""


def _messages(message: Any) -> Iterator[Any]:
    """`message` and every protobuf message inside it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner)


def _tensors(proto: Any) -> Iterator[Any]:
    return (m for m in _messages(proto) if m.DESCRIPTOR.name == "TensorProto")


def _external(tensor: Any) -> bool:
    return bool(tensor.data_location == 1 or tensor.external_data)


def _checked(tensor: Any, folder: Path) -> Path:
    """The file that holds `tensor`. Raises ArtifactError unless it is a plain file in `folder`."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    place, what = fields.get("location", ""), f"the data of '{tensor.name}'"
    parts = Path(place).parts
    if not parts or ".." in parts or Path(place).is_absolute() or "\\" in place or "\0" in place:
        raise ArtifactError(f"{what} lies at {place!r}; only files below the model's folder may")
    file = folder
    for part in parts:
        file = file / part
        try:
            found = os.lstat(file)
        except OSError as error:
            raise ArtifactError(f"{what}: '{file}' cannot be read: {error.strerror}") from None
        if stat.S_ISLNK(found.st_mode):
            raise ArtifactError(f"{what}: '{file}' is a symbolic link; copy the file itself there")
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{what}: '{file}' is not a regular file")
    if found.st_nlink > 1:
        raise ArtifactError(f"{what}: '{file}' is a hard link; copy the file itself there")
    _check_range(tensor, fields, found.st_size, f"{what} in '{file}'")
    return file


def _check_range(tensor: Any, fields: dict[str, str], size: int, what: str) -> None:
    """Raises ArtifactError unless the stretch of the file is inside it and as long as its type."""
    import onnx_ir

    try:
        start, length = int(fields.get("offset", 0)), int(fields.get("length", -1))
        bits = round(8 * onnx_ir.DataType(tensor.data_type).itemsize)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{what} has an offset, length or type that is none") from error
    count = 1
    for side in tensor.dims:
        count *= side
    need = -(-count * bits // 8)
    if start < 0 or count < 0 or (length not in (-1, need)) or start + need > size:
        raise ArtifactError(
            f"{what} is missing or too short: {need} bytes from {start} on are needed, "
            f"{length if length >= 0 else 'no'} length is given, the file has {size}"
        )


def modernise(model: ir.Model) -> str:
    """Bring the opset and file version to where packed weights can be; says what changed, or ""."""
    from onnxscript import version_converter

    graph = model.graph
    opset = graph.opset_imports.get("", OPSET)
    if model.ir_version < 4:  # initializers had to be inputs too, and were constants all the same
        kept = [value for value in graph.inputs if not value.is_initializer()]
        graph.inputs.clear()
        graph.inputs.extend(kept)
    if model.ir_version < MINIMUM:
        model.ir_version = IR_VERSION
    if opset >= OPSET or "" not in graph.opset_imports:
        return ""
    if model.functions:
        raise ArtifactError(f"opset {opset} with functions: convert the model to opset {OPSET}")
    for name in ("onnxscript.version_converter", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        version_converter.convert_version(model, target_version=OPSET, fallback=True)
    except Exception as error:  # the converter's exceptions share no base class
        raise ArtifactError(_no_conversion(opset, str(error))) from error
    if model.graph.opset_imports.get("") != OPSET:
        raise ArtifactError(_no_conversion(opset, "one of its operators has no such conversion"))
    return f"converted from opset {opset} to {OPSET}, in which packed weights are written"


def _no_conversion(opset: int, why: str) -> str:
    return f"opset {opset} cannot be converted to {OPSET}, which packed weights need: {why}"


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """The same values; memory is shared where it can be, so the result must not be written to."""
    import numpy as np
    import onnx_ir

    try:
        values = tensor.numpy()
    except (ValueError, TypeError, OSError) as error:
        raise ArtifactError(f"the tensor '{tensor.name}' cannot be read: {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that cannot be written
        if tensor.dtype == onnx_ir.DataType.BFLOAT16:
            return torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).view(
                torch.bfloat16
            )
        return torch.from_numpy(np.ascontiguousarray(values))
