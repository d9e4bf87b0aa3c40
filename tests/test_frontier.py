"""Frontiers from given points: who beats whom, and files that are whole or not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsefx.ir.errors import MissingPackageError, SpecError
from sparsefx.models import MODELS, Bundle
from sparsefx.models.frontier import frontier as run
from sparsefx.passes import candidates
from sparsefx.runtime import frontier as module
from sparsefx.runtime import latency
from sparsefx.runtime.frontier import Frontier, Point, check_packages, read, write

POINTS = (
    Point("dense", 0.90, 10.0, 40_000_000, ours=True),
    Point("fast", 0.85, 4.0, 9_000_000, ours=True, note="auto:latency=0.4"),
    Point("worse", 0.80, 5.0, 10_000_000, ours=True),
    Point("peer int8", 0.84, 4.0, 11_000_000),
    Point("peer fp32", 0.90, 9.0, 40_000_000),
    Point("peer int2", 0.20, 1.0, 3_000_000),
    Point("peer that died", reason="RuntimeError: no"),
)
HIGHER = Frontier("MiniLM", "MRR", "higher", "32 rows", POINTS)


def flipped() -> Frontier:
    """The same with perplexities: 1 / quality."""
    points = tuple(
        Point(p.name, 0.0 if p.reason else 1 / p.quality, p.ms, p.bytes, p.ours, p.note, p.reason)
        for p in POINTS
    )
    return Frontier("SmolLM2", "perplexity", "lower", "1 row", points)


@pytest.mark.parametrize("frontier", [HIGHER, flipped()])
def test_who_beats_whom(frontier: Frontier) -> None:
    assert frontier.beaten("ms") == {"peer int8": "fast"}
    assert frontier.beaten("megabytes") == {"peer int8": "fast", "peer fp32": "dense"}
    assert [p.name for p in frontier.edge("ms")] == ["fast", "dense"]
    said = frontier.report()
    assert "not beaten: peer fp32, peer int2" in said
    assert "peer that died did not run: RuntimeError: no" in said


def test_what_is_far_off_stands_at_the_edge() -> None:
    """A perplexity of millions would press all others into one line."""
    lost = Point("int2", 3e8, 1.0, 3_000_000)
    frontier = replace(flipped(), points=(*flipped().points, lost))
    assert frontier.height(lost) == pytest.approx(5 / 0.9)
    assert frontier.label(lost) == "int2, perplexity 3e+08"
    near = frontier.points[0]
    assert (frontier.height(near), frontier.label(near)) == (near.quality, "dense")
    assert HIGHER.height(lost) == lost.quality


@pytest.mark.parametrize("frontier", [HIGHER, flipped()])
def test_files(frontier: Frontier, tmp_path: Path) -> None:
    paths = write(frontier, tmp_path / "frontier-a.b")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
    page, data, picture = (p.read_bytes() for p in sorted(paths))
    assert read(tmp_path / "frontier-a.b.json") == frontier
    assert json.loads(data)["beaten"]["ms"] == {"peer int8": "fast"}
    assert picture.startswith(b"\x89PNG\r\n")
    text = page.decode()
    for point in frontier.shown:
        assert f"\\u003cb\\u003e{point.name}\\u003c" in text, "hover text names each point"
    assert "peer that died" not in text
    assert "<script src=" not in text, "self-contained"
    assert len(text) > 1_000_000, "plotly itself is inside"


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(HIGHER, tmp_path / "f")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(frontier: Frontier) -> bytes:
        raise RuntimeError("cannot draw")

    monkeypatch.setattr(module, "_html", broken)
    with pytest.raises(RuntimeError, match="cannot draw"):
        write(flipped(), tmp_path / "f")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_missing_packages_are_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'sparsefx\[frontier\]' \(plotly"):
        check_packages()


class Tiny(nn.Module):
    """Vectors of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.words(input_ids)).relu())
        return out


def tiny() -> Bundle:
    torch.manual_seed(0)
    model = Tiny().eval()
    ids = torch.randint(0, 50, (64, 8))
    want = model(ids).detach()

    def metric(judged: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"error": float((judged(ids) - want).norm() / want.norm())}

    return Bundle(
        "tiny", model, {"input_ids": ids[:2]},
        lambda count: [{"input_ids": ids[i::count]} for i in range(count)],
        metric, "error", "lower", {},
    )  # fmt: skip


def test_a_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "TURNS", 1)
    monkeypatch.setattr(latency, "SHORTEST", 1e-4)
    monkeypatch.setattr(latency.Watch, "share", lambda self: 0.6)
    monkeypatch.setattr(candidates, "CANDIDATES", ("int8", "int4g32"))
    monkeypatch.setitem(MODELS, "tiny", tiny)
    targets = ["bits=10", "auto:bits=6"]
    found, plans = run("tiny", targets, ["int8"], rows=16, calibrate=4, rounds=2, progress=False)
    names = ["dense", "auto:bits=10,rows=16", "auto:bits=6,rows=16", "int8"]
    assert [point.name for point in found.points] == names
    assert [plan.target for plan in plans] == names[1:3]
    dense, eight, four, fixed = found.points
    assert (dense.quality, dense.ours, dense.bytes) == (0.0, False, 4 * (50 * 32 + 4096 + 96))
    assert 0 < eight.quality < four.quality
    assert four.bytes == plans[1].bytes < eight.bytes == fixed.bytes < dense.bytes
    assert all(point.ms > 0 for point in found.points)
    assert "1×16 tokens" in found.setting
    assert found.setting.endswith("; a busy machine: other programs took 40% of the processor")
    assert all("a busy machine" in plan.notes[-1] for plan in plans)
    with pytest.raises(SpecError, match="did you mean 'tiny'"):
        run("tyny")
