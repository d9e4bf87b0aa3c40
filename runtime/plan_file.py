"""The plan that `auto` made: prices of every Site, the choice, and a file to read, edit and apply.

The file is a Spec (YAML) with one override per Site; what was found out stands beside it as
comments. `sparsify(model, "plan.yaml")` applies it, edited or not, and refuses unknown Sites and
formats as it does in every Spec.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsefx.ir.errors import SpecError
from sparsefx.passes.candidates import DENSE
from sparsefx.passes.spec import Spec

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Price:
    """What one Format costs one Site: predicted rise of the loss, microseconds of all its products,
    bytes stored. A refused one has a reason instead."""

    format: str
    loss: float = 0.0
    us: float = 0.0
    bytes: int = 0
    refused: str = ""


@dataclass(frozen=True)
class SitePrices:
    """The price list of one Site (N, K) that is multiplied `calls` times by M = `rows` rows."""

    name: str
    n: int
    k: int
    rows: int
    calls: int
    prices: tuple[Price, ...]
    chosen: str = DENSE

    def price(self, text: str) -> Price:
        return next(price for price in self.prices if price.format == text)

    @property
    def paid(self) -> Price:
        """The chosen one."""
        return self.price(self.chosen)


@dataclass(frozen=True)
class Plan:
    """A Format for every Site."""

    target: str
    sites: tuple[SitePrices, ...]
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    other_bytes: int = 0
    """Parameters and buffers that belong to no Site."""
    predicted_loss: float = 0.0
    """Of this choice, before it was measured."""
    measured_loss: float = 0.0
    """Distance from the dense model on held-out batches (`passes.distance`)."""
    gap: float = 0.0
    """How far the solver may be from the best choice at these prices; 0 is proven best."""
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> Spec:
        """What `sparsify` applies."""
        return Spec(format=DENSE, overrides={site.name: site.chosen for site in self.sites})

    @property
    def us(self) -> float:
        """Predicted microseconds of all products."""
        return sum(site.paid.us for site in self.sites)

    @property
    def dense_us(self) -> float:
        return sum(site.price(DENSE).us for site in self.sites)

    @property
    def bytes(self) -> int:
        """Of the whole model."""
        return sum(site.paid.bytes for site in self.sites) + self.other_bytes

    @property
    def bits(self) -> float:
        """Stored bits per weight of the Sites."""
        weights = sum(site.n * site.k for site in self.sites)
        return 8 * sum(site.paid.bytes for site in self.sites) / max(weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: every price of every Site, and the totals."""
        totals = {"us": self.us, "dense_us": self.dense_us, "bytes": self.bytes, "bits": self.bits}
        return {**asdict(self), **totals}

    def text(self) -> str:
        """The file's content; the same Plan is the same bytes."""
        lines = [f"# {line}" for line in self._head()] + ["", f'format: "{DENSE}"', "overrides:"]
        quoted = [(json.dumps(s.name), json.dumps(s.chosen), s) for s in self.sites]
        wide = max((len(name) for name, _, _ in quoted), default=0)
        for name, chosen, site in quoted:
            paid, dense = site.paid, site.price(DENSE)
            lines.append(
                f"  {name + ':':<{wide + 1}} {chosen:<32} # loss {paid.loss:.2e}  "
                f"{paid.us:8.4g} µs of {dense.us:<8.4g} {paid.bytes:>11,} bytes"
            )
        return "\n".join(lines) + "\n"

    def _head(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        share = self.us / self.dense_us if self.dense_us else 1.0
        best = "proven best" if self.gap == 0 else f"at most {self.gap:.1e} from the best"
        loss = f"{self.predicted_loss:.4g} predicted, {self.measured_loss:.4g} measured on held-out"
        return [
            "A sparsefx plan. Edit formats and apply it: sparsefx.sparsify(model, 'plan.yaml', …)",
            f"target:   {self.target}",
            f"machine:  {self.machine}",
            f"versions: {versions}",
            f"loss:     {loss} batches (distance from the dense model)",
            f"latency:  {self.us:.5g} µs in products predicted, {share:.3f} of dense",
            f"size:     {self.bytes:,} bytes in all, {self.bits:.3f} bits per weight of the sites",
            f"solved:   {best} at these prices",
            *(f"note:     {note}" for note in self.notes),
            "Latencies were measured on this machine once and come from its cache since, so that a",
            "second run writes this file again. Beside each site stand the loss (corrected by what",
            "was measured), the time of its products and its size.",
        ]

    def save(self, path: str | Path) -> Path:
        """Write the file in one step. Raises SpecError unless it is called *.yaml or *.yml."""
        path = Path(path)
        if path.suffix not in (".yaml", ".yml"):
            raise SpecError(f"plan file {path}: call it *.yaml, as JSON holds no comments")
        write_atomically(path, self.text().encode())
        return path


def price_table(plan: Plan) -> RenderableType:
    """Every candidate of every Site, cheapest in time first; refused ones with their reason."""
    from rich.table import Table
    from rich.text import Text

    title = f"what every format would cost ({plan.target}; ● chosen)"
    table = Table(title=title, title_justify="left")
    for name, justify in (
        ("weight", "left"), ("format", "left"), ("loss", "right"), ("µs", "right"),
        ("bytes", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for site in plan.sites:
        table.add_section()
        offered = sorted((p for p in site.prices if not p.refused), key=lambda p: (p.us, p.format))
        for i, p in enumerate(offered):
            mark = " ●" * (p.format == site.chosen)
            table.add_row(Text("" if i else site.name), p.format + mark, f"{p.loss:.2e}",
                          f"{p.us:.4g}", f"{p.bytes:,}")  # fmt: skip
        reasons: dict[str, list[str]] = {}
        for p in site.prices:
            if p.refused:
                reasons.setdefault(p.refused, []).append(p.format)
        for why, formats in reasons.items():
            table.add_row("", Text(f"{len(formats)} refused ({formats[0]}, …): {why}"), "", "", "")
    return table


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step; a reader sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
