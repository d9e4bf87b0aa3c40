"""Target: what `auto` is asked for: text (`auto:latency=0.5,rows=1`), a mapping or this class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sparsefx.ir.errors import SpecError, nearest

Goal = Literal["latency", "bits", "size", "quality_loss"]
GOALS: tuple[Goal, ...] = ("latency", "bits", "size", "quality_loss")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
EXAMPLE = "write one of auto:latency=0.5, auto:bits=3.2, auto:size=40MB, auto:quality_loss=0.01"


class Target(BaseModel):
    """Exactly one goal, and for how many rows at a time, on which device.

    >>> str(Target.read("auto:latency=0.5,rows=128"))
    'auto:latency=0.5,rows=128'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency: float | None = Field(default=None, gt=0, le=1)
    """Time of all products with weights, as a share of what dense weights take here."""
    bits: float | None = Field(default=None, gt=0, le=64)
    """Stored bits per weight, averaged over the Sites."""
    size: int | None = Field(default=None, gt=0)
    """Bytes of all the model's parameters and buffers, of Sites or not; "40MB" is understood."""
    quality_loss: float | None = Field(default=None, ge=0)
    """Distance from the dense model on held-out batches (`passes.distance`): for logits, nats."""
    rows: int = Field(default=1, ge=1, le=1 << 20)
    """M of the products that latencies are measured for: 1 for decoding. Sites that see fewer rows
    than others in the example inputs see as many fewer here."""
    device: str = "cpu"
    ignore: tuple[str, ...] = ()
    """These stay dense (patterns as in `Spec.ignore`)."""

    @field_validator("size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|B?)\s*", value.upper())
        if not found:
            raise SpecError(f"size {value!r} is no number of bytes; write 40MB or 40000000")
        return round(float(found[1]) * UNITS[found[2].removesuffix("B") and found[2]])

    @model_validator(mode="after")
    def _one_goal(self) -> Target:
        asked = [goal for goal in GOALS if getattr(self, goal) is not None]
        if len(asked) != 1:
            raise SpecError(f"auto takes one goal, not {' and '.join(asked) or 'none'}: {EXAMPLE}")
        return self

    @property
    def goal(self) -> tuple[Goal, float]:
        """What is limited, and to how much."""
        name = next(goal for goal in GOALS if getattr(self, goal) is not None)
        return name, float(getattr(self, name))

    def __str__(self) -> str:
        name, value = self.goal
        parts = [f"{name}={value:.12g}", f"rows={self.rows}"]
        parts += [f"device={self.device}"] * (self.device != "cpu")
        return "auto:" + ",".join(parts)

    @classmethod
    def read(cls, source: str | Mapping[str, Any] | Target) -> Target:
        """A validated Target. Raises SpecError naming the field and the nearest valid one."""
        if isinstance(source, Target):
            return source
        fields = _fields(source) if isinstance(source, str) else dict(source)
        try:
            return cls(**fields)
        except ValidationError as error:
            raise SpecError(_explain(error)) from None

    @classmethod
    def asked(cls, source: Any) -> Target | None:
        """The Target that a spec is: "auto:…", {"auto": text or mapping} or a Target; else None."""
        if isinstance(source, Target):
            return source
        if isinstance(source, str) and re.match(r"\s*auto\s*(:|$)", source):
            return cls.read(source)
        if isinstance(source, Mapping) and "auto" in source:
            if others := [str(key) for key in source if key != "auto"]:
                raise SpecError(f"'auto' stands alone; move '{others[0]}' into it")
            return cls.read(source["auto"])
        return None


def _fields(text: str) -> dict[str, Any]:
    """The fields of `auto:name=value,name=value`; the word before the colon may be left out."""
    body = re.sub(r"^\s*auto\s*(:|$)", "", text)
    fields: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in body.split(","))):
        name, equals, value = (side.strip() for side in part.partition("="))
        if not equals or not value:
            raise SpecError(f"auto: '{part}' is no 'name=value'; {EXAMPLE}")
        if name in fields:
            raise SpecError(f"auto: '{name}' is given twice")
        fields[name] = (value,) if name == "ignore" else value
    return fields


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"auto has no field '{field}'{nearest(field, Target.model_fields)}"
    if cause := first.get("ctx", {}).get("error"):
        return str(cause)
    return f"auto: {field}={first.get('input')}: {first['msg']}"
