"""An artifact remembers how its weights were made: the report's figures, there and back."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from sparsefx.runtime.install import packed_modules
from sparsefx.runtime.manifest import MOST, History
from sparsefx.runtime.report import Report, Row, attach, attached


def history_of(model: nn.Module) -> dict[str, Any] | None:
    """The fields of `model`'s History, None for a model that `sparsify` did not compress."""
    report = attached(model)
    if report is None:
        return None
    return {
        "door": report.door, "notes": [*map(_plain, report.notes)], "seconds": report.seconds,
        "peak_bytes": report.peak_bytes, "weights": [_made(row) for row in report.rows],
    }  # fmt: skip


def _plain(text: str) -> str:
    """`text` as a manifest may hold it."""
    return "".join(c if c.isprintable() else " " for c in text[:MOST])


def _made(row: Row) -> dict[str, Any]:
    steps = [{**s, "error": s["error"] if math.isfinite(s["error"]) else None} for s in row.steps]
    return {
        "name": row.name, "aliases": [*row.aliases], "shape": [*row.shape], "calls": row.calls,
        "reason": _plain(row.reason), "sqnr_db": row.sqnr_db, "algorithm": row.algorithm,
        "seconds": row.seconds, "steps": steps, "fallbacks": [*map(_plain, row.fallbacks)],
    }  # fmt: skip


def remember(model: nn.Module, history: History) -> None:
    """Let `explain` show `history` of a model that was just loaded; sizes are read from it."""
    modules = {m.name or name: m for name, m in packed_modules(model).items()}
    rows = []
    for made in history.weights:
        module = modules.get(made.name)
        row = Row(made.name, tuple(made.shape), "dense", made.calls, (), tuple(made.aliases))
        if module is not None:
            row.stored(module.packed, getattr(module, "branch", ()))
            row.sqnr_db, row.algorithm = made.sqnr_db, made.algorithm
        row.reason, row.seconds, row.fallbacks = made.reason, made.seconds, [*made.fallbacks]
        for step in made.steps:
            error = math.inf if step.error is None else step.error
            row.steps.append({**step.model_dump(), "error": error})
        rows.append(row)
    attach(model, Report(
        history.door, {}, rows, [*history.notes], history.seconds, history.peak_bytes
    ))  # fmt: skip
