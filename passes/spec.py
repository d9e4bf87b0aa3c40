"""Spec: what the user asks for, as a string, a mapping, a YAML/JSON file or this class."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from sparsefx.ir.errors import SpecError, nearest
from sparsefx.ir.format import Format
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.ratios import RATIOS
from sparsefx.passes.solvers import AFTER, SOLVERS

NAMES: Mapping[str, Iterable[str]] = {
    "criterion": tuple(CRITERIA), "solver": tuple(SOLVERS), "after": tuple(AFTER),
    "ratios": tuple(RATIOS),
}  # fmt: skip
"""Fields that name a row of a table."""


class Recovery(BaseModel):
    """Training after pruning and rounding (`passes.recover`); epochs are passes over the
    calibration inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=4, ge=0, le=1000)
    """Of the kept values of each block."""
    scale_epochs: int = Field(default=1, ge=0, le=1000)
    """Of the scales of each block, codes fixed."""
    whole_epochs: int = Field(default=0, ge=0, le=1000)
    """Of all blocks together, towards the dense model's outputs."""
    learning_rate: float = Field(default=5e-3, gt=0, le=1)
    """Greatest step of Adam as a share of each tensor's root mean square, block by block."""
    whole_learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """The same for all blocks together."""


class Spec(BaseModel):
    """Which Sites get which Format, and how the weights are chosen.

    Patterns in `targets`, `ignore` and `overrides` are a parameter or module name ("lm_head"), a
    module class ("Linear") or a regular expression over the parameter name ("re:.*mlp.*").

    >>> Spec.read("2:4+int8").format
    '2:4+int8'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = "int8"
    """Format of every Site that no override names."""
    targets: tuple[str, ...] = ()
    """Only these Sites; empty is all of them."""
    ignore: tuple[str, ...] = ()
    """These stay dense."""
    overrides: Mapping[str, str] = Field(default_factory=dict)
    """Pattern → format ("dense" leaves it alone); the first pattern that matches wins."""
    criterion: str = "auto"
    """What a weight is worth, a key of `passes.criteria.CRITERIA`; "auto" is "obs" with calibration
    data (with the sweep that is SparseGPT) and "magnitude" without."""
    solver: str = "auto"
    """How kept weights become codes: "sweep" (GPTQ), "auto" with data, or "nearest"."""
    after: tuple[str, ...] = ("auto",)
    """What is tried afterwards, keys of `passes.solvers.AFTER`, in order; each is undone where it
    does not lower the output error. "auto" is "descend" with data and nothing without."""
    follow: float | None = Field(default=None, ge=0, le=1)
    """Of what the blocks before it lost, the share that a layer is asked to make up for (1 is
    GPTAQ's asymmetric calibration); None is half with the solver "sweep" and 0 without."""
    ratios: str = "uniform"
    """How a share is spread over the layers, a key of `passes.ratios.RATIOS`."""
    smooth: bool = False
    """Move factors between layers so that weights round better (AWQ, SmoothQuant); exact."""
    rotate: bool = False
    """Rotate residual stream and heads (QuaRot) before anything else; exact."""
    recovery: Recovery | None = None
    """Train every block after it was compressed; none by default."""
    seed: int = 0
    """Of everything that is drawn."""
    damping: float = Field(default=0.01, gt=0, le=1)
    """Share of the mean diagonal added to the Hessian (SparseGPT's percdamp)."""

    @field_validator("criterion", "solver", "ratios", "after")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        table = NAMES[str(info.field_name)]
        for name in value if isinstance(value, tuple) else (value,):
            if name != "auto" and name not in table:
                raise SpecError(
                    f"spec field '{info.field_name}' knows no {name!r}{nearest(name, table)}"
                )
        return value

    @field_validator("format")
    @classmethod
    def _parses(cls, text: str) -> str:
        return str(Format.parse(text))

    @field_validator("overrides")
    @classmethod
    def _all_parse(cls, overrides: Mapping[str, str]) -> Mapping[str, str]:
        return {pattern: str(Format.parse(text)) for pattern, text in overrides.items()}

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any] | Format | Spec) -> Spec:
        """A validated Spec from format text, a mapping, or the path of a YAML or JSON file.

        Raises SpecError naming the offending token or field and the nearest valid one.
        """
        if isinstance(source, Spec):
            return source
        if isinstance(source, Format):
            return cls(format=str(source))
        if isinstance(source, Mapping):
            return cls._checked(dict(source))
        if isinstance(source, Path) or str(source).endswith((".yaml", ".yml", ".json")):
            return cls._checked(_read_file(Path(source)))
        if not isinstance(source, str):
            raise SpecError(f"spec is a {type(source).__name__}; give text, a mapping or a Spec")
        return cls._checked({"format": source})

    @classmethod
    def _checked(cls, fields: dict[str, Any]) -> Spec:
        try:
            return cls(**fields)
        except ValidationError as error:
            raise SpecError(_explain(error)) from None

    def format_for(self, names: Iterable[str], classes: Iterable[str]) -> tuple[Format, str]:
        """The Format asked for a Site, and the filter that leaves it dense ("" when none does)."""
        names, classes = tuple(names), tuple(classes)
        for pattern in self.ignore:
            if matches(pattern, names, classes):
                return Format(), f"ignore={pattern!r} in the spec"
        if self.targets and not any(matches(t, names, classes) for t in self.targets):
            return Format(), "not among the spec's targets"
        for pattern, text in self.overrides.items():
            if matches(pattern, names, classes):
                return Format.parse(text), f"overrides={pattern!r} in the spec"
        return Format.parse(self.format), ""

    def patterns(self) -> tuple[str, ...]:
        return (*self.targets, *self.ignore, *self.overrides)


def matches(pattern: str, names: Iterable[str], classes: Iterable[str]) -> bool:
    """Whether a pattern names the Site: a parameter, its module (or a parent), a class, a regex."""
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise SpecError(f"filter {pattern!r} is not a regular expression: {error}") from None
        return any(compiled.fullmatch(n) or compiled.fullmatch(_owner(n)) for n in names)
    if pattern in classes:
        return True
    return any(name == pattern or name.startswith(pattern + ".") for name in names)


def check_patterns(spec: Spec, sites: Iterable[tuple[tuple[str, ...], tuple[str, ...]]]) -> None:
    """Raise SpecError for a filter that matches no Site, with the nearest name that would."""
    known = list(sites)
    words = [w for names, classes in known for w in (*names, *map(_owner, names), *classes)]
    for pattern in spec.patterns():
        if not any(matches(pattern, names, classes) for names, classes in known):
            hint = "" if pattern.startswith("re:") else nearest(pattern, words)
            raise SpecError(f"filter {pattern!r} matches none of the {len(known)} weights{hint}")


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"spec file {path}: {error.strerror}") from None
    try:
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise SpecError(f"spec file {path} does not parse: {error}") from None
    if not isinstance(fields, dict):
        raise SpecError(
            f"spec file {path} holds a {type(fields).__name__}, not fields like 'format:'"
        )
    return fields


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"spec has no field '{field}'{nearest(field, Spec.model_fields)}"
    if cause := first.get("ctx", {}).get("error"):
        return str(cause)
    given = repr(first.get("input"))
    return f"spec field '{field}' = {given}: {first['msg']}"
