"""`explain`: per weight its format, kernel, size, error, and every refused choice with reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsefx.codegen import native
from sparsefx.codegen.kernels import UNPACK, Problem, choose, describe
from sparsefx.ir import plugins
from sparsefx.ir.format import Format
from sparsefx.passes.manager import PassRecord, records_of
from sparsefx.runtime.install import packed_modules
from sparsefx.runtime.modules import PackedWeight, SparseParameter
from sparsefx.runtime.plan_file import Plan, price_table
from sparsefx.runtime.report import Report, Row, as_text, attached

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass
class Line:
    """One weight: the Row of what was done, the kernel that serves it, and who was passed over."""

    row: Row
    kernel: str = "dense"
    refused: tuple[str, ...] = ()
    memory: int = 0
    """Bytes of the copy that the CPU engine keeps, from the first product on."""


@dataclass
class PassLine:
    """What a pass did to one graph. `bytes`, `operations` (multiply-adds) and `launches` are
    before → after where they changed, in the graph's open sizes (`s0`, …).
    """

    graph: int
    name: str
    changed: bool
    seconds: float
    nodes: str
    bytes: str
    operations: str
    launches: str
    notes: tuple[str, ...] = ()


@dataclass
class Explanation:
    """Printable (`print`, a notebook, rich) and plain data (`to_dict`, `to_json`)."""

    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    engine: str = ""
    """The CPU engine's instruction set and threading, or why there is none."""
    passes: list[PassLine] = field(default_factory=list)
    """Of every graph compiled for the model, where `explain(…, passes=True)` asked for them."""
    plugins: list[str] = field(default_factory=list)
    """What other packages bring that had to be left out, and why."""
    plan: Plan | None = None
    """What `auto` found: the price of every candidate of every weight."""
    steps: bool = False
    """Whether tables show what each step of compression did to the output error."""

    @property
    def fallbacks(self) -> list[str]:
        """Every place where something other than what was asked for, or fastest, is used."""
        out = list(self.notes)
        out += [f"plugin left out: {problem}" for problem in self.plugins]
        if native.engine() is None or "serial" in self.engine:
            out += [self.engine] * any(line.kernel != "dense" for line in self.lines)
        for line in self.lines:
            out += [f"{line.row.name}: {text}" for text in line.row.fallbacks]
        return out

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "fallbacks": self.fallbacks}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*_render(self))

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def explain(model: Any, passes: bool = False, steps: bool = False) -> Explanation:
    """What sparsefx did to `model`: a sparsified or loaded module, or a `torch.compile`d one.

    For `torch.compile(…, backend="sparsefx")` the weights packed at compile time are shown once
    the model has run; with `passes` also what each graph pass changed, saved and refused, with
    `steps` what each step of compression left as output error.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"explain takes a module, not {type(model).__name__}")
    report = attached(inner) or Report(door="", spec={})
    modules = {m.name or n: m for n, m in packed_modules(inner).items()}
    rows = {row.name: row for row in [*report.rows, *_compiled(inner)]}
    if inner is not model:
        rows |= _uncompiled(inner, rows)
    for name, module in modules.items():
        if not any(name in (row.name, *row.aliases) for row in rows.values()):
            rows[name] = _row(name, module)
    lines = [_line(row, modules.get(row.name)) for row in rows.values()]
    tensors = [*inner.parameters(), *inner.buffers()] if passes else []
    return Explanation(
        lines, report.notes, report.seconds, report.peak_bytes, _engine(),
        [_pass(i, record) for i, run in enumerate(records_of(tensors)) for record in run],
        plugins.problems(), report.plan, steps,
    )  # fmt: skip


def _engine() -> str:
    engine = native.engine()
    if engine is None:
        return native.why_missing()
    serial = engine.threading == "serial"
    threads = "serial, as no OpenMP runtime is in this process" if serial else engine.threading
    return f"CPU engine: {engine.isa}, {threads}"


def _compiled(model: nn.Module) -> Iterator[Row]:
    from sparsefx.runtime.backend import COMPILED

    for parameter in model.parameters():
        if parameter in COMPILED:
            yield COMPILED[parameter]


def _uncompiled(model: nn.Module, known: Mapping[str, Row]) -> dict[str, Row]:
    """Rows of linear layers that torch.compile never handed over, once it has handed over some."""
    from sparsefx.runtime.backend import COMPILED

    linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, linear) and isinstance(module.weight, nn.Parameter)
    }
    if not any(weight in COMPILED for weight in weights.values()):
        return {}
    reason = "not compiled: not run yet, or dynamo stopped at its recompile_limit (it warns)"
    return {
        name: Row(name, tuple(weight.shape), "dense", 0, (), reason=reason)
        for name, weight in weights.items()
        if weight not in COMPILED and name not in known
    }


def _row(name: str, module: PackedWeight) -> Row:
    """A Row for a weight of which no report tells."""
    row = Row(name, (module.n, module.k), module.format, 0, ())
    row.stored(module.packed, getattr(module, "branch", ()))
    return row


def _line(row: Row, module: PackedWeight | None) -> Line:
    fmt = Format.parse(row.format)
    if fmt.is_dense:
        return Line(row)
    if isinstance(module, SparseParameter):
        return Line(row, "unpack on read")
    dtype = module.dtype if module is not None else torch.float32
    device = module.buffer_list[0].device.type if module is not None else "cpu"
    n, k = (module.n, module.k) if module is not None else (row.shape[0], row.shape[1])
    choice = choose(fmt, Problem(None, n, k, dtype, device))
    refused = choice.refused
    if choice.kernel is UNPACK and not refused:
        refused = (f"no faster kernel covers '{fmt}' on {device}",)
    name, memory = describe(choice.kernel, module.buffer_list if module is not None else [])
    return Line(row, name, refused, memory)


def _pass(graph: int, record: PassRecord) -> PassLine:
    a, b = record.before, record.after
    pairs = ((a.bytes, b.bytes), (a.operations, b.operations), (a.launches, b.launches))
    nodes, moved, operations, launches = (_change(*pair) for pair in (record.nodes, *pairs))
    notes = list(record.notes)
    if b.unknown:
        notes.append(f"{b.unknown} launches of unknown shape are not in bytes and operations")
    return PassLine(
        graph, record.name, record.changed, record.seconds, nodes, moved, operations, launches,
        tuple(notes),
    )  # fmt: skip


def _change(before: Any, after: Any) -> str:
    old, new = _amount(before), _amount(after)
    return new if old == new else f"{old} → {new}"


def _amount(size: Any) -> str:
    """A number or expression with coefficients in thousands: `73.7k·s0 + 4.2M`."""
    if isinstance(size, int):
        return _short(size)
    parts = []
    for term in size.expand().as_ordered_terms():
        number, rest = term.as_coeff_Mul()
        parts.append(_short(number) if rest == 1 else f"{_short(number)}·{rest}".replace("**", "^"))
    return " + ".join(parts)


def _short(number: Any) -> str:
    value, unit = float(number), ""
    for larger in ("k", "M", "G", "T"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.4g}{unit}"


def _render(e: Explanation) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what each weight became", title_justify="left")
    for name, justify in (
        ("weight", "left"), ("shape", "left"), ("calls", "right"), ("format", "left"),
        ("kernel", "left"), ("bits", "right"), ("SQNR dB", "right"), ("because", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for line in e.lines:
        row = line.row
        dense = Format.parse(row.format).is_dense
        known = "exact" if row.algorithm else "not known"
        sqnr = "" if dense else known if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        why = "; ".join(part for part in (row.reason, *line.refused, *row.fallbacks) if part)
        table.add_row(
            Text(row.name), "×".join(map(str, row.shape)), str(row.calls), Text(row.format),
            line.kernel, "" if dense else f"{row.bits:.2f}", sqnr, Text(why),
        )  # fmt: skip
    yield table
    packed = sum(line.row.stored_bytes + line.row.branch_bytes for line in e.lines)
    yield Text(
        f"{sum(line.kernel != 'dense' for line in e.lines)} packed in {packed / 1e6:.2f} MB, "
        f"{sum(line.kernel == 'dense' for line in e.lines)} dense"
        + (f"; {e.seconds:.1f} s, peak memory {e.peak_bytes / 1e6:.0f} MB" if e.seconds else "")
    )
    copies = sum(line.memory for line in e.lines)
    yield Text(e.engine + (f"; its copies take {copies / 1e6:.2f} MB of memory" * (copies > 0)))
    for note in e.notes:
        yield Text(note)
    for problem in e.plugins:
        yield Text(f"plugin left out: {problem}")
    if e.steps:
        yield _step_table(e.lines)
    if e.plan is not None:
        yield price_table(e.plan)
    if e.passes:
        yield _pass_table(e.passes)


def _step_table(lines: list[Line]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table("weight", "relative output error after each step", title_justify="left")
    table.title = "how each weight was compressed (undone steps in brackets)"
    for line in lines:
        shown = [
            f"{step['name']} {step['error']:.4f}" if step["kept"]
            else f"[{step['name']} {step['error']:.4f}]"
            for step in line.row.steps
        ]  # fmt: skip
        if shown:
            table.add_row(Text(line.row.name), Text(" → ".join(shown)))
    return table


def _pass_table(lines: list[PassLine]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what each pass did (cost before → after)", title_justify="left")
    left = ("pass", "because")
    for name in ("graph", "pass", "changed", "ms", "nodes", "bytes", "multiply-adds", "launches",
                 "because"):  # fmt: skip
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for line in lines:
        table.add_row(
            str(line.graph), line.name, "yes" if line.changed else "no",
            f"{1e3 * line.seconds:.1f}", line.nodes, line.bytes, line.operations, line.launches,
            Text("; ".join(line.notes)),
        )  # fmt: skip
    return table
