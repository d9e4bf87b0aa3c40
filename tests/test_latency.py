"""Latencies: what disturbs is noticed and not kept, slow periods cancel out. Clocks are fake."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import torch

from sparsefx.runtime import latency
from sparsefx.runtime.latency import Product, Watch, microseconds

SMALL = Product(16, 32, 2, torch.float32, "cpu", 512)


def ticking(monkeypatch: pytest.MonkeyPatch, own: float, every: float) -> None:
    """Each reading is a second of wall time later, of which the process computed these."""
    seconds = count()

    def read() -> tuple[float, float, float]:
        now = next(seconds)
        return float(now), now * own, now * every

    monkeypatch.setattr(latency, "clocks", read)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and turns that are short."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "TURNS", 2)
    monkeypatch.setattr(latency, "SHORTEST", 1e-5)
    return tmp_path


def names(_: str) -> None:
    """No progress is shown."""


@pytest.mark.parametrize(
    ("own", "every", "threads", "share"),
    [(1.0, 1.0, 1, 1.0), (0.5, 0.5, 1, 0.5), (0.6, 1.6, 2, 0.8), (1.0, 1.2, 2, 1.0),
     (1.1, 1.1, 1, 1.0)],
)  # fmt: skip
def test_the_share_that_was_left(
    own: float, every: float, threads: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, own, every)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert Watch().share() == pytest.approx(share)


def test_what_was_disturbed_is_told_and_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, 0.7, 0.7)
    found = microseconds(SMALL, ["int8"], names)
    assert found.disturbed == {"dense": pytest.approx(0.7), "int8": pytest.approx(0.7)}
    assert set(found.us) == {"dense", "int8"}
    assert all(us > 0 for us in found.us.values())
    assert not [*cache.iterdir()]
    ticking(monkeypatch, 0.95, 0.95)
    calm = microseconds(SMALL, ["int8"], names)
    assert not calm.disturbed
    assert len([*cache.iterdir()]) == 2
    ticking(monkeypatch, 0.7, 0.7)
    assert microseconds(SMALL, ["int8"], names) == calm, "from the cache, however busy it is now"


class Turn:
    """Turns of set lengths: one list for the format, one for the dense product."""

    def __init__(self, lengths: Sequence[float], device: str) -> None:
        self.left = list(lengths)

    def seconds(self) -> float:
        return self.left.pop(0)


def test_disturbed_turns_are_taken_again_and_the_least_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "_Turn", Turn)
    monkeypatch.setattr(latency, "TURNS", 2)
    runs = ([9.0, 5.0, 2.0, 8.0, 7.0, 7.0], [10.0, 8.0, 6.0, 4.0, 9.0, 9.0])
    for shares, expected in (
        ((0.5, 0.6, 0.7), (0.5, 4.0, 0.7)),
        ((0.5, 0.95, 0.7), (0.5, 4.0, 0.95)),
        ((0.9, 0.1, 0.1), (0.625, 8.0, 0.9)),
    ):
        left = iter(shares)
        monkeypatch.setattr(Watch, "share", lambda self, left=left: next(left))
        assert latency._compare(*runs, "cpu") == expected  # type: ignore[arg-type]
    monkeypatch.setattr(Watch, "share", lambda self: 0.0)
    assert latency._compare(*runs, "cuda")[2] == 1.0, "there the process only waits"  # type: ignore[arg-type]


def test_a_slow_period_cancels_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While int8 was timed all took three times as long, the dense product beside it as well."""
    measured = iter([(1.0, 2e-6, 1.0), (0.25, 6e-6, 1.0)])
    monkeypatch.setattr(latency, "_compare", lambda *_: next(measured))
    assert microseconds(SMALL, ["int8"], names).us == {"dense": 2.0, "int8": 0.5}
