"""`compress_onnx`: an ONNX file becomes a smaller one, its weights pruned and quantised."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsefx.codegen.onnx import Lowered, require_packages
from sparsefx.ir.errors import ExportError, SpecError
from sparsefx.ir.format import Format
from sparsefx.passes.compress_site import Result, compress_site
from sparsefx.passes.outliers import Probe
from sparsefx.passes.plan import Choice, check
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.spec import Spec, check_patterns
from sparsefx.passes.statistics import Statistics, shrunk
from sparsefx.runtime import export
from sparsefx.runtime.from_onnx_calibrate import (
    Activations,
    Feeds,
    read_batches,
    session,
    watch_activations,
)
from sparsefx.runtime.from_onnx_find import Weight, find
from sparsefx.runtime.from_onnx_gate import (
    STEPS,
    check_weights,
    compare,
    draw_samples,
    make_reference,
)
from sparsefx.runtime.from_onnx_put import replace_weights
from sparsefx.runtime.from_onnx_read import load, modernise
from sparsefx.runtime.gate import Difference, nearest_to_limit
from sparsefx.runtime.gate_graph import OURS, STRAY
from sparsefx.runtime.progress import Progress
from sparsefx.runtime.report import Row, as_text

if TYPE_CHECKING:
    import onnx_ir as ir
    from rich.console import RenderableType

SAMPLES = 1
"""Calibration batches that the gate compares on: they may be large, and it runs them often."""


@dataclass(frozen=True)
class OnnxReport:
    """What was written and what each weight became; printable (`print`, rich)."""

    path: Path
    data: Path | None
    """The second file with the weights, when they did not fit into the first."""
    bytes_before: int
    bytes: int
    rows: tuple[Row, ...]
    operators: Mapping[str, str]
    """What stock ONNX Runtime multiplies by, by the packed weight's name."""
    differences: tuple[Difference, ...]
    """One per runtime, sample and output; empty when the gate was skipped."""
    notes: tuple[str, ...]
    """What was converted, or could not be tried."""
    seconds: float

    @property
    def worst(self) -> Difference | None:
        """The difference that comes nearest to its tolerance."""
        return nearest_to_limit(self.differences)

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*_render(self))

    def __str__(self) -> str:
        return as_text(self)


def compress_onnx(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    spec: str | Path | Mapping[str, Any] | Format | Spec,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    verify: bool = True,
    progress: bool | None = None,
) -> OnnxReport:
    """Compress the constant weights of `source` to `spec`, write `target` and say what was done.

    MatMul, Gemm and 1×1 Conv of a constant become `sparsefx::Linear` nodes; all else stays (a model
    older than opset 18 is converted to it). `calibration` is an iterable of {input name: array};
    with it ONNX Runtime shows the activations and SparseGPT/GPTQ is used, without it magnitude.
    `target` appears only after it agreed in ONNX Runtime, optimised and not, with the source over
    the decoded weights; `verify=False` skips that. Raises ArtifactError for a malformed or hostile
    source, SpecError or WeightError before anything is computed, ExportError for a mismatch.
    """
    require_packages()
    start = time.perf_counter()
    job = _Job.of(Path(source), export._target(target), Spec.read(spec), calibration)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{job.target.name}.", dir=job.target.parent
        ) as room:
            results = job.compress(Path(room), progress)
            draft, data, rows = job.write(Path(room), results)
            seen, notes = (
                job.verify(Path(room), draft, rows, results, progress) if verify else ((), ())
            )
            written = export._publish(draft, data, job.target)
    except OSError as error:
        raise ExportError(f"'{job.target}' could not be written: {error}") from error
    size = sum(file.stat().st_size for file in written if file)
    ops = {result.site.name: row.op for row, result in rows}
    table = tuple(_row(choice, results.get(choice.site.name)) for choice in job.choices)
    return OnnxReport(
        job.target, written[1], job.size, size, table, ops, seen, (*job.notes, *notes),
        time.perf_counter() - start,
    )  # fmt: skip


@dataclass
class _Job:
    """One file on its way, checked and planned."""

    source: Path
    target: Path
    spec: Spec
    model: ir.Model
    weights: list[Weight]
    choices: list[Choice]
    batches: list[Feeds] | None
    size: int
    notes: list[str]

    @staticmethod
    def of(source: Path, target: Path, spec: Spec, calibration: Any) -> _Job:
        model, files = load(source)
        size = sum(file.stat().st_size for file in (source, *files))
        note = modernise(model)
        weights = find(model)
        choices = _plan(weights, spec)
        batches = None if calibration is None else read_batches(model, calibration)
        Recipe.of(spec, batches is not None).refuse_gradients("an ONNX file has no gradients")
        notes = [note] if note else []
        return _Job(source, target, spec, model, weights, choices, batches, size, notes)

    @property
    def chosen(self) -> list[Weight]:
        packed = {choice.site.name for choice in self.choices if not choice.dense}
        return [weight for weight in self.weights if weight.site.name in packed]

    def again(self) -> tuple[ir.Model, list[Weight]]:
        """The source once more, and the chosen weights in it."""
        model, _ = load(self.source)
        modernise(model)
        names = {weight.site.name for weight in self.chosen}
        return model, [weight for weight in find(model) if weight.site.name in names]

    def compress(self, room: Path, progress: bool | None) -> dict[str, Result]:
        """Every chosen weight packed, by its Site's name."""
        formats = {c.site.name: c.format for c in self.choices if not c.dense}
        probe, recipe = Probe(formats), Recipe.of(self.spec, self.batches is not None)
        watched = bool(recipe.needs_inputs) or bool(probe.formats)
        runs, parts = self._runs(room) if watched and formats else (None, [self.chosen])
        batches = [] if runs is None else runs.batches
        out: dict[str, Result] = {}
        with Progress("compressing", len(formats) + len(parts) * len(batches), progress) as bar:
            for part in parts:
                sums: dict[str, Statistics] = {}
                for feeds in batches:
                    assert runs is not None
                    summed = sums if recipe.needs_inputs else None
                    runs.show(part, feeds, summed, probe.watch)
                    bar.advance("calibration")
                shrunk(sums)
                for weight in part:
                    site = weight.site
                    bar.advance(site.name)
                    fmt, note = probe.decide(site, formats[site.name])
                    own, found, seen = recipe.seen(fmt, sums.pop(site.name, None), site.k)
                    note = "; ".join(filter(None, (seen, note)))
                    matrix = site.matrix(weight.tensor())
                    out[site.name] = compress_site(site, matrix, fmt, own, found, note=note)
        return out

    def _runs(self, room: Path) -> tuple[Activations | None, list[list[Weight]]]:
        """What shows the products' inputs, and parts of the weights that fit in memory together."""
        if self.batches is None:
            return None, [self.chosen]
        model, weights = self.again()
        outputs = watch_activations(model, weights)
        made = session(_save(model, room / "dense.onnx"))
        runs = Activations(made, outputs, self.batches)
        return runs, runs.parts(weights)

    def write(
        self, room: Path, results: Mapping[str, Result]
    ) -> tuple[Path, Path | None, list[tuple[Lowered, Result]]]:
        """The compressed model in `room`."""
        done = [(weight, results[weight.site.name]) for weight in self.chosen]
        copy, _ = self.again()
        _infer(copy)
        values = [*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs)]
        ranks = {str(v.name): v.shape.rank() for v in values if v.shape is not None}
        rows = replace_weights(self.model, done, ranks)
        _settle(self.model)
        draft, data = export._write(self.model, room, self.target.name)
        return draft, data, rows

    def verify(
        self,
        room: Path,
        draft: Path,
        rows: Sequence[tuple[Lowered, Result]],
        results: Mapping[str, Result],
        progress: bool | None,
    ) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
        """Differences from the source over the decoded weights, and what could not be tried."""
        check_weights(draft, rows)
        model, weights = self.again()
        _infer(model)
        usual = {*STRAY, *OURS[1]}.isdisjoint(node.op_type for node in model.graph.all_nodes())
        make_reference(model, [(weight, results[weight.site.name]) for weight in weights])
        reference = _save(model, room / "reference.onnx")
        samples = self.batches[:SAMPLES] if self.batches else draw_samples(self.model, reference)
        a8 = any(result.packed.format.a8 for result in results.values())
        with Progress("checking", STEPS, progress) as bar:
            return compare(reference, draft, samples, a8, usual, bar.advance)


def _plan(weights: Sequence[Weight], spec: Spec) -> list[Choice]:
    """One Choice per weight. Raises SpecError or WeightError listing all bad ones."""
    if not weights:
        raise SpecError("the graph multiplies by no constant weight: there is nothing to shrink")
    check_patterns(spec, [(weight.site.names, weight.operators) for weight in weights])
    choices = [_choose(weight, spec) for weight in weights]
    chosen = zip(choices, weights, strict=True)
    check([(choice, weight.tensor()) for choice, weight in chosen if not choice.dense])
    return choices


def _choose(weight: Weight, spec: Spec) -> Choice:
    site = weight.site
    fmt, reason = spec.format_for(site.names, weight.operators)
    if site.kind == "refused":
        return Choice(site, Format(), site.reason)
    return Choice(site, fmt, reason or "the spec says dense" * fmt.is_dense)


def _infer(model: ir.Model) -> None:
    """Write types and shapes into the graph, as far as ONNX can tell them."""
    from onnx_ir.passes import common

    common.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _settle(model: ir.Model) -> None:
    """Bring tensors of other files into memory when all fit into one file."""
    import onnx_ir

    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    if sum(tensor.nbytes for tensor in tensors) <= export.SINGLE_FILE:
        onnx_ir.external_data.load_to_model(model)


def _save(model: ir.Model, path: Path) -> Path:
    """The model in a file for ONNX Runtime alone, large tensors in another."""
    import onnx_ir

    onnx_ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=export.SMALL)
    return path


# --- the report ----------------------------------------------------------------------------------


def _row(choice: Choice, result: Result | None) -> Row:
    row = Row.planned(choice)
    if result is not None:
        row.compressed(result, {})
    return row


def _render(report: OnnxReport) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="what each weight became", title_justify="left")
    for name, justify in (
        ("weight", "left"), ("shape", "left"), ("uses", "right"), ("format", "left"),
        ("ONNX operator", "left"), ("bytes", "right"), ("bits", "right"), ("SQNR dB", "right"),
        ("because", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in report.rows:
        op = report.operators.get(row.name, "")
        sqnr = "" if not op else "exact" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        why = "; ".join(filter(None, (row.reason, *row.fallbacks)))
        size = f"{row.stored_bytes + row.branch_bytes:,}" if op else ""
        table.add_row(
            Text(row.name), "×".join(map(str, row.shape)), str(row.calls), Text(row.format), op,
            size, f"{row.bits:.2f}" if op else "", sqnr, Text(why),
        )  # fmt: skip
    yield table
    packed = sum(row.stored_bytes + row.branch_bytes for row in report.rows)
    yield Text(
        f"{report.path}: {report.bytes / 1e6:.2f} MB, before {report.bytes_before / 1e6:.2f} MB; "
        f"{len(report.operators)} packed in {packed / 1e6:.2f} MB, "
        f"{len(report.rows) - len(report.operators)} dense; {report.seconds:.1f} s"
    )
    if worst := report.worst:
        yield Text(
            f"checked: nearest to its limit is output {worst.output} in {worst.runtime}: "
            f"{worst.measure} difference {worst.difference:.2g}, limit {worst.tolerance:.2g}"
        )
    else:
        yield Text("not checked against the source")
    for note in report.notes:
        yield Text(f"note: {note}")
