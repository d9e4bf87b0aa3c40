"""The CPU engine in use: threads, memory, shapes, refusals and what a packed weight takes."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from native_cases import (
    DTYPES,
    ENGINE,
    FAMILIES,
    PAIRS,
    Extras,
    each_isa,
    expected,
    guarded,
    integers,
    random_branch,
    raw,
    reals,
    seeded,
    shared_out,
)
from torch import Tensor

from sparsefx.codegen.native import branch_weights, why_missing
from sparsefx.ir.codecs import Int
from sparsefx.ir.errors import SpecError, WeightError

torch.set_num_threads(1)

isa = each_isa
pytestmark = pytest.mark.skipif(ENGINE is None, reason=why_missing())


@pytest.mark.parametrize("text", PAIRS)
def test_the_same_bits_every_time(isa: str, text: str) -> None:
    """For any number of threads and again."""
    case = reals(text, 21, 150, 200)
    for m, a8 in product((1, 21), case.modes):
        once = case.y(m, a8=a8, threads=1)
        for threads in (1, 2, 5):
            assert torch.equal(case.y(m, a8=a8, threads=threads), once)


def test_two_python_threads_share_a_weight(isa: str) -> None:
    case = reals("bitmap@50%+int4g32", 40, 150, 200)
    branch = branch_weights(case.weight.engine, random_branch(150, 200, 8))

    def work(turn: int) -> Tensor:
        x = case.x[turn % 7 : turn % 7 + (1, 4, 33)[turn % 3]]
        return case.weight.linear(x, a8=turn % 2 > 0, branch=branch, threads=1 + turn % 2)

    alone = [work(turn) for turn in range(42)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert all(map(torch.equal, alone, pool.map(work, range(42))))


@pytest.mark.parametrize("text", ["fp32", "int4g64", "tile64x64@50%+int8"])
def test_work_is_shared_out_once(isa: str, text: str) -> None:
    """Every column of y is written by one piece of the parallel loop, whatever their number."""
    case = integers(text, 3, 150, 192)
    for threads in (2, 3, 5, 64):
        writers, y = shared_out(case, threads)
        assert writers.tolist() == [1] * 150
        assert torch.equal(y, case.exact.float())


@pytest.mark.parametrize("text", PAIRS)
def test_nothing_beyond_the_ends_is_touched(isa: str, text: str) -> None:
    """x, y and the epilogue's tensors end where readable memory does; gaps between rows too."""
    for m, n, k in ((1, 17, 33), (3, 40, 64), (5, 33, 129), (2, 16, 1), (13, 33, 64)):
        case, rng = reals(text, m, n, k), seeded(m)
        for dtype in DTYPES:
            x = guarded(case.x.to(dtype))
            y = guarded(torch.full((m, n), torch.nan, dtype=dtype))
            bias, factor, rest = (
                guarded(torch.randn(shape, generator=rng).to(dtype))
                for shape in (n, (m, n), (m, n))
            )
            for mode in case.modes:
                raw(case.weight, x, y, a8=mode, bias=bias, multiply=factor, residual=rest)
                exact, limit = expected(
                    case.packed, x, mode, Extras(bias, (), "none", factor, rest)
                )
                assert bool(((y.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("text", ["fp32", "int4g32+a8", "tile64x64@50%+int8", "tile4x1@50%+bf16"])
@pytest.mark.parametrize("m", [1, 3, 260])
def test_rows_any_distance_apart(isa: str, text: str, m: int) -> None:
    case = integers(text, m, 37, 128)
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.full((m, 150), torch.nan, dtype=dtype)
        out = torch.full((m, 45), 7.0, dtype=dtype)
        wide[:, 11:139] = case.x.to(dtype)
        for threads in (1, 2):
            raw(case.weight, wide[:, 11:139], out[:, 3:40], threads=threads)
            assert torch.equal(out[:, 3:40], case.y(m, dtype))
            assert bool((out[:, :3] == 7).all() and (out[:, 40:] == 7).all())
        assert torch.equal(case.weight.linear(wide[:, 11:139]), case.y(m, dtype))


def test_x_of_any_shape(isa: str) -> None:
    case = integers("2:4+int4g32", 12, 37, 96)
    want = case.y(12)
    for lead in ((12,), (3, 4), (2, 1, 6), (1, 12)):
        assert torch.equal(case.weight.linear(case.x.view(*lead, 96)), want.view(*lead, 37))
    assert torch.equal(case.weight.linear(case.x[5]), want[5])
    assert torch.equal(case.weight.linear(case.x.T.contiguous().T), want)
    assert case.weight.linear(case.x.view(3, 4, 96)[:, :0]).shape == (3, 0, 37)


def test_weights_without_columns_give_the_epilogue(isa: str) -> None:
    bias, x = torch.randn(20), torch.empty(3, 0)
    for text in ("fp32", "int4g32", "bitmap@50%+uint4", "2:4+int8"):
        case = integers(text, 3, 20, 0)
        for a8 in case.modes:
            got = case.weight.linear(x, bias, a8=a8, activation="relu")
            assert torch.equal(got, bias.relu().expand(3, 20))


# --- what does not depend on the instruction set -------------------------------------------------


def test_refusals() -> None:
    assert ENGINE is not None
    case, other = reals("fp16", 2, 20, 32), reals("fp32", 2, 24, 40).weight
    down, up, scale = branch_weights(ENGINE, random_branch(20, 32, 4))
    with pytest.raises(SpecError, match="this machine runs"):
        ENGINE.use("abacus")
    with pytest.raises(WeightError, match="need a weight of codes"):
        case.y(2, a8=True)
    for branch in ((other, up, scale), (down, other, scale), (up, up, scale)):
        with pytest.raises(WeightError, match=r"than the weight|differ in rank"):
            case.y(2, branch=branch)


@pytest.mark.parametrize("layout", [*FAMILIES, "2:4", "tile1x16@90%"])
@pytest.mark.parametrize("codec", ["int2g64", "int4g128", "uint4g128", "int8", "fp16"])
def test_packed_size(layout: str, codec: str) -> None:
    """What is stored, within 3%: padding to 64 bytes per part of a panel and to whole steps.

    dense: codes and scales. columns: and one bit per column and panel. lanes: and one bit per row
    and step. bytes: and one bit per position, but units of a step share bytes, as many as the
    fullest of them needs.
    """
    case = reals(f"{layout}+{codec}", 1, 256, 2048)
    fmt, family, n, k = case.packed.format, case.weight.family, 256, 2048
    mask = fmt.layout.mask(case.packed.buffers[:1], n, k)
    if mask is None:
        mask = torch.ones(n, k, dtype=torch.bool)
    bits = fmt.codec.bits if isinstance(fmt.codec, Int) else 16
    step = {2: 16, 4: 8, 8: 4, 16: 1}[bits]
    index = {"dense": 0.0, "columns": 1 / 16, "lanes": 1 / step, "bytes": 1.0}[family]
    values = int(mask.sum()) * bits
    if family == "bytes":
        units = mask.view(n // 16, 16, k // step, -1, 4).sum((1, 4))
        values = 8 * int(units.amax(-1).sum())
    needed = n * k * index + values
    if isinstance(fmt.codec, Int):
        zero_bits = 0 if fmt.codec.symmetric else 8
        needed += n * fmt.codec.groups(k) * (16 + zero_bits)
    assert needed <= 8 * case.weight.bytes <= 1.03 * needed


@pytest.mark.skipif(platform.machine() != "x86_64", reason="counts x86's instruction")
def test_prefetches_survive_the_compiler() -> None:
    """GCC drops `_mm_prefetch` in a function of its own: decoding then waits for memory, 1.6 times
    as long. Each reader of each instruction set has several; other bytes look like one by chance.
    """
    assert ENGINE is not None
    code = ENGINE.path.read_bytes()
    assert code.count(b"\x0f\x18") > 300 + 2 * len(code) / 2**16
