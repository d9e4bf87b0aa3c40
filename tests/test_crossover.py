"""When another kernel takes over from the CPU engine: measured once, kept, and never guessed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsefx.codegen import crossover, native
from sparsefx.codegen.kernels import NATIVE, Problem, choose, describe
from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format
from sparsefx.ir.op import reference

ENGINE = native.engine()
INT4 = Format.parse("int4g128")


@pytest.mark.parametrize(
    ("engine", "rival", "rows"),
    [
        ((1.0, 8.0), (3.0, 5.0), 64 + 794),  # 2 behind at 64 rows, 5 / 1984 gained per row
        ((1.0, 8.0), (0.5, 4.0), 64),  # ahead from the start
        ((1.0, 8.0), (3.0, 12.0), crossover.NEVER),  # falls behind
        ((1.0, 8.0), (3.0, 9.9), crossover.NEVER),  # cheaper by less than is measured surely
        ((1.0, 1.0), (3.0, 2.9), crossover.NEVER),  # noise
    ],
)
def test_where_two_lines_cross(
    engine: tuple[float, float], rival: tuple[float, float], rows: int
) -> None:
    assert crossover.crossing(engine, rival) == rows


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setenv("SPARSEFX_TUNE", "full")
    monkeypatch.setattr(crossover, "_known", {})
    choose.cache_clear()
    yield tmp_path
    choose.cache_clear()


def entries(folder: Path) -> int:
    return len(list(folder.iterdir()))


@pytest.mark.skipif(ENGINE is None, reason="no CPU engine")
def test_measured_once_and_kept(tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENGINE is not None
    calls: list[int] = []

    def slow(x: Tensor, *rest: object) -> Tensor:
        calls.append(len(x))
        end = crossover.CLOCK() + 0.02 + len(x) / 10_000
        while crossover.CLOCK() < end:
            pass
        return x

    assert crossover.rows(INT4, torch.float32, ENGINE, "slow", slow) == crossover.NEVER
    assert sorted(set(calls)) == [crossover.LEAST, crossover.MOST]
    assert entries(tuning) == 1
    calls.clear()
    monkeypatch.setattr(crossover, "_known", {})  # another process
    monkeypatch.setenv("SPARSEFX_TUNE", "cached")
    assert crossover.rows(INT4, torch.float32, ENGINE, "slow", slow) == crossover.NEVER
    assert crossover.rows(INT4, torch.bfloat16, ENGINE, "slow", slow) == crossover.NEVER
    assert (calls, entries(tuning)) == ([], 1)
    fast = crossover.rows(INT4, torch.float32, ENGINE, "nothing", lambda x, *rest: x)
    assert fast == crossover.NEVER  # not measured: cached
    monkeypatch.setenv("SPARSEFX_TUNE", "full")
    fast = crossover.rows(INT4, torch.float32, ENGINE, "nothing", lambda x, *rest: x)
    assert (fast, entries(tuning)) == (crossover.LEAST, 2)


@pytest.mark.skipif(ENGINE is None, reason="no CPU engine")
def test_off_always_takes_the_engine(tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_TUNE", "off")
    choice = choose(INT4, Problem(4096, 256, 256, torch.float32, "cpu"))
    assert choice.kernel.name == "cpu_native"
    assert entries(tuning) == 0


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_TUNE", "fast")
    with pytest.raises(SpecError, match="SPARSEFX_TUNE is 'fast': off, cached and full"):
        crossover.mode()


@pytest.mark.skipif(ENGINE is None, reason="no CPU engine")
def test_both_sides_of_a_measured_crossing_agree(tuning: Path) -> None:
    """Whatever the stopwatch says here, products are right and the refusal names the rival."""
    assert ENGINE is not None
    packed = INT4.pack(torch.randn(96, 128))
    rows = crossover.rows(INT4, torch.float32, ENGINE, "unpack_then_dense", reference)
    for m in (crossover.LEAST - 1, crossover.LEAST, 700):
        x = torch.randn(m, 128)
        y = torch.ops.sparsefx.linear(x, packed.buffers, None, [], "int4g128", 96)
        torch.testing.assert_close(y, reference(x, packed, None, ()), atol=1e-4, rtol=1e-4)
        choice = choose(INT4, Problem(m, 96, 128, torch.float32, "cpu"))
        if m >= crossover.LEAST and m >= rows:
            assert choice.kernel.name == "unpack_then_dense"
            said = f"cpu_native: unpack_then_dense is faster from {rows} rows on"
            assert choice.refused[0].startswith(said)
        else:
            assert choice.kernel.name == "cpu_native"


@pytest.mark.skipif(ENGINE is None, reason="no CPU engine")
def test_explain_says_from_how_many_rows_on_another_kernel_serves(
    tuning: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossover, "rows", lambda *rest: 100)
    packed = INT4.pack(torch.randn(96, 128))
    for m, said in ((1, ""), (64, ", unpack_then_dense from 100 rows on (measured)")):
        torch.ops.sparsefx.linear(torch.randn(m, 128), packed.buffers, None, [], "int4g128", 96)
        text, size = describe(NATIVE, packed.buffers)
        assert text.endswith(f"{ENGINE.isa}{said}" if ENGINE else "")
        assert size > 0
