"""What `explain` shows of a model that was saved and loaded is what it showed before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import edit
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.errors import ArtifactError

torch.set_num_threads(1)


class Net(nn.Module):
    """A tied pair, a weight that something else computes with, and a layer left dense."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(12, 32), nn.Linear(32, 48)
        self.attn = nn.MultiheadAttention(48, 2, batch_first=True)
        self.last, self.head = nn.Linear(48, 32), nn.Linear(32, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.first(self.embed(ids)))
        x = self.attn(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(self.last(x))
        return out


SPEC = {"format": "bitmap@50%+int4g16", "overrides": {"last": "dense", "first": "int8+r2"}}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = Net().eval()
    batches = [torch.randint(0, 12, (2, 9)) for _ in range(3)]
    sparsefx.sparsify(model, SPEC, calibration=batches, progress=False)
    sparsefx.save(model, tmp_path)
    return model, tmp_path


def test_a_loaded_model_is_explained_as_before(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    want = sparsefx.explain(model)
    got = sparsefx.explain(sparsefx.load(folder, Net().eval()))
    for new, old in zip(got.lines, want.lines, strict=True):
        old.row.rows = ()  # symbolic sizes of the call are not kept
        assert (new.row, new.kernel) == (old.row, old.kernel)
    assert any(line.row.steps for line in got.lines)
    assert any(line.row.fallbacks for line in got.lines)
    assert (got.notes, got.seconds, got.peak_bytes) == (want.notes, want.seconds, want.peak_bytes)
    assert str(got) == str(want)


def test_saved_again_it_is_the_same_manifest(saved: tuple[nn.Module, Path]) -> None:
    _, folder = saved
    sparsefx.save(sparsefx.load(folder, Net().eval()), folder / "again")
    first, second = ((f / "manifest.json").read_text() for f in (folder, folder / "again"))
    assert first == second


def test_without_a_history_nothing_is_called_exact(saved: tuple[nn.Module, Path]) -> None:
    _, folder = saved
    edit(folder, lambda fields: fields.pop("history"))
    got = sparsefx.explain(sparsefx.load(folder, Net().eval()))
    assert "not known" in str(got)
    assert "exact" not in str(got)


def test_infinite_errors_and_odd_texts_are_kept_as_json_can(tmp_path: Path) -> None:
    model = sparsefx.sparsify(
        nn.Sequential(nn.Linear(8, 8)), "int8", example_inputs=torch.ones(1, 8)
    )
    report: Any = model._sparsefx_report
    report.rows[0].steps = [{"name": "odd", "error": float("inf"), "kept": True}]
    report.notes = ["a\nb\x1b[31m" + "c" * 3000]
    sparsefx.save(model, tmp_path)
    json.loads((tmp_path / "manifest.json").read_text(), parse_constant=pytest.fail)
    got = sparsefx.explain(sparsefx.load(tmp_path, nn.Sequential(nn.Linear(8, 8))))
    assert got.lines[0].row.steps == report.rows[0].steps
    assert got.notes == ["a b [31m" + "c" * 1992]


@pytest.mark.parametrize(("place", "change"), [
    ("history", lambda h: h.update(more=1)),
    ("history.notes.0", lambda h: h.update(notes=["\x1b]0;owned\x07"])),
    ("history.peak_bytes", lambda h: h.update(peak_bytes=-1)),
    ("history.weights.0.reason", lambda h: h["weights"][0].update(reason="a\rb")),
    ("history.weights.0.reason", lambda h: h["weights"][0].update(reason="x" * 2001)),
    ("history.weights.0.sqnr_db", lambda h: h["weights"][0].update(sqnr_db="20")),
    ("history.weights.0.shape", lambda h: h["weights"][0].update(shape="32")),
])  # fmt: skip
def test_hostile_histories_are_refused(
    place: str, change: Callable[[dict[str, Any]], None], saved: tuple[nn.Module, Path]
) -> None:
    _, folder = saved
    edit(folder, lambda fields: change(fields["history"]))
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArtifactError, match=place):
        sparsefx.load(folder, model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_what_a_history_says_of_formats_is_not_believed(saved: tuple[nn.Module, Path]) -> None:
    """A weight it calls compressed is shown as what it is: dense."""
    _, folder = saved

    def claim(fields: dict[str, Any]) -> None:
        made = next(w for w in fields["history"]["weights"] if w["name"] == "last.weight")
        made.update(algorithm="magic", sqnr_db=99.0)

    edit(folder, claim)
    lines = sparsefx.explain(sparsefx.load(folder, Net().eval())).lines
    row = next(line.row for line in lines if line.row.name == "last.weight")
    assert (row.format, row.sqnr_db, row.algorithm, row.bits) == ("dense", None, "", 0.0)
