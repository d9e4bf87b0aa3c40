"""The record of what was done to each weight, and why; `explain` shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsefx.ir.format import Packed
from sparsefx.passes.compress_site import Result
from sparsefx.passes.plan import Choice

if TYPE_CHECKING:
    from sparsefx.runtime.plan_file import Plan

ATTRIBUTE = "_sparsefx_report"


@dataclass
class Row:
    """One Site. Sizes in bytes, `bits` stored per weight, `sqnr_db` of the stored weight."""

    name: str
    shape: tuple[int, ...]
    format: str
    calls: int
    rows: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    reason: str = ""
    bits: float = 0.0
    stored_bytes: int = 0
    branch_bytes: int = 0
    sqnr_db: float | None = None
    """None where nothing was lost."""
    algorithm: str = ""
    """Empty where compression was not seen here."""
    seconds: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    """What each step of compression left as relative output error, and whether it was kept."""
    fallbacks: list[str] = field(default_factory=list)

    @classmethod
    def planned(cls, choice: Choice) -> Row:
        site = choice.site
        return cls(
            site.name, site.shape, str(choice.format), site.calls, site.rows, site.names[1:],
            choice.reason,
        )  # fmt: skip

    def stored(self, packed: Packed, branch: Sequence[Tensor] = ()) -> None:
        """Fill in what is stored."""
        self.format = str(packed.format)
        self.bits = packed.bits_per_weight
        self.stored_bytes = packed.stored_bytes
        self.branch_bytes = sum(t.numel() * t.element_size() for t in branch)

    def compressed(self, result: Result, unpacked: dict[str, str]) -> None:
        """Fill in what compression found out."""
        self.stored(result.packed, result.branch)
        self.sqnr_db = result.sqnr_db if math.isfinite(result.sqnr_db) else None
        self.algorithm, self.seconds = result.algorithm, result.seconds
        self.steps = [asdict(step) for step in result.steps]
        if result.note:
            self.fallbacks.append(result.note)
        for name, why in unpacked.items():
            self.fallbacks.append(f"{name} is unpacked at every read: {why}")


@dataclass
class Report:
    """All rows, and what concerns the whole model."""

    door: str
    spec: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    plan: Plan | None = None
    """What `auto` found, with the price of every candidate."""

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def attach(model: nn.Module, report: Report) -> None:
    """Remember `report` on the model (outside its state dict)."""
    object.__setattr__(model, ATTRIBUTE, report)


def attached(model: nn.Module) -> Report | None:
    """The report of the last `sparsify`, None for a model that was never compressed here."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, Report) else None


def as_text(renderable: Any) -> str:
    """What rich prints, for `str`."""
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
