"""The demo's plan: the longest recipe first, rows in the table's order."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from rich.progress import Progress

import sparsefx
from sparsefx.models import demo


class AtOnce:
    """An executor in this process; what it is given goes through pickle, as to another one."""

    def __init__(self, count: int, mp_context: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, run: Any, name: str, recipe: demo.Recipe, out: Path, events: Any) -> Any:
        future: Future[demo.Row] = Future()
        future.set_result(run(name, pickle.loads(pickle.dumps(recipe)), out, events))
        return future


def test_longest_recipes_are_first_and_rows_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, str]] = []

    def prepare(name: str, recipe: demo.Recipe, out: Path, events: Any) -> demo.Row:
        order.append((name, recipe.spec))
        return demo.Row(recipe.spec, name, 32.0, 0.0, 0, 0)

    @contextlib.contextmanager
    def manager() -> Iterator[Any]:
        yield SimpleNamespace(Queue=queue.Queue)

    context = SimpleNamespace(Manager=manager)
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(demo, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(demo, "_prepare", prepare)
    names = ["smollm2", "minilm"]
    rows = demo._prepare_all(names, tmp_path, Progress(disable=True))
    assert {name: [row.spec for row in rows[name]] for name in names} == {
        name: ["dense", *(r.spec for r in demo.RECIPES[name])] for name in names
    }
    assert [spec for name, spec in order if name == "smollm2"] == [
        "bitmap@50%+int4g128", "int4g64", "dense",
    ]  # fmt: skip
    assert [name for name, _ in order] == ["smollm2"] * 3 + ["minilm"] * 3


def test_the_dense_recipe_is_known_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it is a copy: it is not compressed, and its export is not compared."""
    seen: dict[str, Any] = {}

    def export(model: Any, path: Path, inputs: Any, shapes: Any, verify: bool) -> Any:
        seen.update(model=model, verify=verify)
        return SimpleNamespace(bytes=1)

    monkeypatch.setattr(sparsefx, "export_onnx", export)
    monkeypatch.setattr(sparsefx, "save", lambda model, folder: folder.mkdir())
    bundle: Any = SimpleNamespace(
        name="m", model=object(), example_inputs={}, metric=lambda model: {"loss": 1.0},
        headline="loss", dynamic_shapes=None,
    )  # fmt: skip
    copy = pickle.loads(pickle.dumps(demo.DENSE))
    row = demo._measure(bundle, copy, tmp_path, lambda text: None)
    assert (row.bits, seen) == (32.0, {"model": bundle.model, "verify": False})
