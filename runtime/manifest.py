"""What an artifact's manifest may say, and how its files are opened: nothing in them is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsefx.ir.errors import ArtifactError
from sparsefx.ir.format import Format
from sparsefx.runtime.install import split_name

MANIFEST = "manifest.json"
VERSION = 2
LIMIT = 64 << 20
WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
# A ParameterList calls its members by number; a packed one stands beside them as '0_packed'.
_PART = r"(?:(?!__)[A-Za-z_][A-Za-z0-9_]*|[0-9]+(?:_packed)?)"
_NAME = re.compile(rf"{_PART}(?:\.{_PART})*")
_AGAIN = "save the model again with sparsefx.save"


def _plain_name(name: str) -> str:
    if len(name) > 1000 or not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is not made of identifiers and numbers joined by dots")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]
Size = Annotated[int, Field(ge=0, lt=1 << 31)]
Step = Annotated[int, Field(ge=1, lt=1 << 31)]


class Record(BaseModel):
    """A part of the manifest: unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Weight(Record):
    """A packed weight: what it replaces and how it is stored."""

    names: Annotated[list[Name], Field(min_length=1)]
    """Names of the dense parameter this replaces; several when one module is used under each."""
    format: Annotated[str, Field(max_length=200)]
    n: Size
    k: Size
    dtype: Literal["float16", "bfloat16", "float32"]

    def prefix(self, name: str) -> str:
        """Name of the module that holds the buffers of the parameter `name`."""
        return split_name(name)[0]

    def keys(self, fmt: Format) -> tuple[str, ...]:
        """Names of the tensors it is rebuilt from, relative to the prefix."""
        return fmt.buffers


class Product(Weight):
    """A module that is a product by the weight."""

    bias: bool
    rank: Size

    def keys(self, fmt: Format) -> tuple[str, ...]:
        return fmt.buffers + ("down", "up", "branch_scale") * (self.rank > 0)


class Linear(Product):
    """Becomes a SparseLinear."""

    kind: Literal["linear"] = "linear"


class Conv1x1(Product):
    """Becomes a SparseConv1x1."""

    kind: Literal["conv1x1"] = "conv1x1"
    stride: Annotated[list[Step], Field(min_length=1, max_length=3)]


class Parameter(Weight):
    """Becomes a SparseParameter, unpacked at every read."""

    kind: Literal["parameter"] = "parameter"
    shape: Annotated[list[Size], Field(max_length=16)]
    transposed: bool

    def prefix(self, name: str) -> str:
        return f"{name}_packed"


Entry = Linear | Conv1x1 | Parameter

MOST = 2000
"""Characters of a text for people."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds characters that a terminal would obey")
    return text


Text = Annotated[str, Field(max_length=MOST), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class Taken(Record):
    """One step of a weight's compression (`passes.compress_site.Step`)."""

    name: Text
    error: Number | None
    """Relative output error; None where it was infinite."""
    kept: bool


class Made(Record):
    """How one weight was compressed, or why it stayed dense. What it is now is in `packed`."""

    name: Text
    aliases: list[Text]
    shape: list[Count]
    calls: Count
    reason: Text
    sqnr_db: Number | None
    """None where nothing was lost."""
    algorithm: Text
    seconds: Number
    steps: list[Taken]
    fallbacks: list[Text]


class History(Record):
    """How the model was compressed: `explain` shows it, nothing is built from it."""

    door: Text
    notes: list[Text]
    seconds: Number
    peak_bytes: Count
    weights: list[Made]


class Manifest(Record):
    """The whole of `manifest.json`."""

    format_version: Literal[2] = 2
    seal: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = "0" * 64
    """SHA-256 of all other fields (`seal`): finds damage, proves nothing about who wrote it."""
    sparsefx: Annotated[str, Field(max_length=100)]
    model: Annotated[str, Field(max_length=200)]
    """The model's class; for people, never looked up."""
    weights: Annotated[str, Field(pattern=rf"^{WEIGHTS.pattern}$")] = f"weights-{0:016}.safetensors"
    bytes: Annotated[int, Field(ge=0, lt=1 << 62)] = 0
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = "0" * 64
    packed: list[Annotated[Entry, Field(discriminator="kind")]]
    aliases: dict[Name, Name]
    """Further names of a tensor that is stored once, and the name it is stored under."""
    transient: list[Name]
    """Buffers outside `state_dict`: they fill a model on the meta device and no other."""
    history: History | None = None

    @model_validator(mode="after")
    def _named_by_content(self) -> Manifest:
        if self.weights != f"weights-{self.sha256[:16]}.safetensors":
            raise ValueError("the weights file is not named by its SHA-256")
        return self


R = TypeVar("R", bound=Record)


def record(make: type[R], where: object, fields: dict[str, Any], way_out: str = _AGAIN) -> R:
    """`make(**fields)`; ArtifactError with the first complaint when the fields are not valid."""
    try:
        return make.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:200]
        raise ArtifactError(f"{where}: '{place}': {first['msg']}; {way_out}") from None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a saved folder. Raises ArtifactError unless every field is valid."""
    path = folder / MANIFEST
    if not folder.is_dir() or not os.path.lexists(path):
        raise ArtifactError(f"{_not_ours(folder)}; {_AGAIN}")
    with open_plain(path) as file:
        text = file.read(LIMIT + 1)
    if len(text) > LIMIT:
        raise ArtifactError(f"{path}: is over {LIMIT} bytes, no manifest is; {_AGAIN}")
    try:
        fields = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ArtifactError(f"{path}: is nested too deeply; {_AGAIN}") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: is not sound JSON ({error}); {_AGAIN}") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is not int or version != VERSION:
        raise ArtifactError(
            f"{path}: format_version is {str(version)[:40]}, this sparsefx reads {VERSION}; "
            "install the sparsefx that wrote it, or save the model again with this one"
        )
    manifest = record(Manifest, path, fields)
    if manifest.seal != seal(fields):
        raise ArtifactError(
            f"{path}: was altered since it was saved (SHA-256); copy the folder again, or save "
            "the model again"
        )
    return manifest


def seal(fields: dict[str, Any]) -> str:
    """SHA-256 of a manifest's fields but its seal, as JSON with sorted keys."""
    rest = {key: value for key, value in fields.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode("ascii")).hexdigest()


def _not_ours(folder: Path) -> str:
    """What is at `folder` instead of an artifact."""
    found = [folder] if folder.is_file() else []
    if folder.is_dir():
        found = [
            p for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")
        ]
    if found:
        return f"{found[0]}: looks like a pickle or checkpoint, which sparsefx.load never opens"
    if folder.is_dir():
        return f"{folder}: holds no {MANIFEST}, so it is no saved model"
    return f"{folder}: is not a folder that sparsefx.save wrote"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in out if keys.count(k) > 1)[:80]!r} stands twice")
    return out


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def open_plain(path: Path) -> BinaryIO:
    """`path` opened for reading. Raises ArtifactError for links, devices, pipes and hard links,
    FileNotFoundError when it is not there.
    """
    # Without O_NONBLOCK a pipe would block here for ever; without O_NOFOLLOW a link could be
    # put in place between a check and the opening.
    names = ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in names)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be opened as a plain file ({error.strerror})"
        ) from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or path.is_symlink():
        file.close()
        raise ArtifactError(
            f"{path}: is a link, or no plain file, or also linked from elsewhere; copy the "
            "artifact so that its files are its own"
        )
    return file


def digest(file: BinaryIO) -> tuple[str, int]:
    """SHA-256 and size of the rest of an open file, read in pieces."""
    sha, size = hashlib.sha256(), 0
    while piece := file.read(1 << 20):
        sha.update(piece)
        size += len(piece)
    return sha.hexdigest(), size
