"""The Triton kernels in Triton's interpreter against exact arithmetic: formats, sides, extras.

Most cases are integers, for which equality is demanded; the rest is held to a derived bound
(triton_cases.py). `tests/mutate_triton.py` breaks the kernels on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import (
    BF16,
    CONFIGS,
    FP16,
    ROW,
    VECTOR,
    WIDE,
    Case,
    Extras,
    assert_close,
    assert_exact,
    integers,
    order,
    random_branch,
    reals,
    run,
    seeded,
)
from triton_interpreter import interpreted

from sparsefx.codegen.triton import rejects
from sparsefx.codegen.triton_launch import ACTIVATIONS, Config, Product, plan
from sparsefx.ir.codecs import Grid
from sparsefx.ir.format import Format
from sparsefx.ir.op import quantize_rows

torch.set_num_threads(1)

INTS = ["int2", "int3", "int4", "uint4", "int5", "uint6", "int7", "int8", "uint8"]
CODECS = [*INTS, "fp8", "fp16", "bf16"]
LAYOUTS = [
    "dense", "tile16x1@50%", "tile16x16@50%", "tile64x16@50%", "tile32x3@50%", "tile17x48@50%",
]  # fmt: skip
LANES = ["tile1x16@50%", "tile4x16@50%", "tile2x32@50%", "tile8x48@50%"]
MASKED = [
    "2:4", "1:4", "3:8", "5:16", "1:16", "bitmap@50%", "bitmap@95%", "tile4x4@50%", "tile1x3@50%",
    "tile16x1@50%", "tile2x8@50%", "tile1x16@50%", "tile3x64@50%",
]  # fmt: skip
FAMILIES = {"columns": LAYOUTS, "lanes": LANES, "masked": MASKED}
PAIRS = [(layout, family) for family, layouts in FAMILIES.items() for layout in layouts]
SIDES = [1, 15, 16, 17, 31, 33, 61, 127, 129]


def usable(text: str, family: str, k: int) -> bool:
    """Whether this kernel serves this format for some number of rows."""
    return rejects(family, Format.parse(text), k, 1, FP16) is None


def fitting(config: Config, family: str, m: int, n: int) -> Config:
    """`config`, or a like one that the kernel takes or that saves interpreted tasks."""
    least = max(config.block_n, min(16, 1 << n.bit_length()))
    if family == "lanes":
        return replace(config, block_m=1, block_n=min(least, 64), vector=True)
    if config.vector and m > 4:
        return replace(config, block_m=16, block_n=16, vector=False)
    return replace(config, block_n=least)


# --- integers: equality --------------------------------------------------------------------------


FIRST = {"columns": "tile16x1@50%", "lanes": "tile1x16@50%", "masked": "bitmap@50%"}


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec(codec: str, family: str) -> None:
    text = f"{FIRST[family]}+{codec}"
    grouped = text if codec in ("fp16", "bf16") else f"{text}g32"
    if family != "lanes":
        assert_exact(integers(grouped, family, 3, 7, 97), ROW)
        assert_exact(integers(grouped, family, 3, 7, 97, BF16), WIDE)
    assert_exact(integers(grouped, family, 1, 7, 97), VECTOR)
    assert_exact(integers(grouped, family, 1, 7, 97, BF16), VECTOR)
    if usable(f"{text}+a8", family, 97):
        assert_exact(integers(f"{grouped}+a8", family, 3, 7, 97), ROW)


@pytest.mark.parametrize("codec", [*INTS, "fp8"])
def test_every_dense_codec(codec: str) -> None:
    assert_exact(integers(codec, "columns", 2, 17, 129), Config(16, 32))
    assert_exact(integers(f"{codec}g16", "columns", 2, 17, 49, BF16), Config(1, 32, True))
    if usable(f"{codec}+a8", "columns", 33):
        assert_exact(integers(f"{codec}g32+a8", "columns", 2, 17, 65, BF16), WIDE)


@pytest.mark.parametrize(("layout", "family"), PAIRS)
def test_every_layout(layout: str, family: str) -> None:
    for config, codec in ((Config(1, 32, True), "int5"), (WIDE, "uint3g64")):
        fits = fitting(config, family, 2, 35)
        assert_exact(integers(f"{layout}+{codec}", family, 2, 35, 81), fits)
    if usable(f"{layout}+int4+a8", family, 96):
        assert_exact(integers(f"{layout}+int4g32+a8", family, 2, 35, 81), Config(16, 32))


@pytest.mark.parametrize("group", ["", "g16", "g32", "g64", "g128"])
def test_every_group(group: str) -> None:
    """Also more columns than `PARTS · SLICE`, and groups that the last block cuts."""
    for text, family in (("uint4", "columns"), ("tile16x16@50%+int3", "columns"),
                         ("tile1x16@50%+uint3", "lanes"), ("2:4+uint5", "masked")):  # fmt: skip
        for config in (ROW, VECTOR):
            if usable(f"{text}{group}", family, 150):
                fits = fitting(config, family, 2, 16)
                assert_exact(integers(f"{text}{group}", family, 2, 16, 150), fits)
        if usable(f"{text}{group}+a8", family, 150):
            assert_exact(integers(f"{text}{group}+a8", family, 2, 16, 150), ROW)


@pytest.mark.parametrize("m", [0, 1, 2, 4, 5, 15, 16, 17, 33])
def test_rows_of_x(m: int) -> None:
    for text, family in (("int3g32", "columns"), ("bitmap@50%+uint4", "masked")):
        for config in (Config(16, 8), Config(32, 16), VECTOR, Config(1, 8, True, tasks=3)):
            if m <= 5 or not config.vector:
                assert_exact(integers(text, family, m, 5, 33), config)
        assert_exact(integers(f"{text}+a8", family, m, 5, 33), Config(16, 8))
    if m <= 5:
        assert_exact(integers("tile1x16@50%+int3g32", "lanes", m, 5, 33), VECTOR)


@pytest.mark.parametrize("side", SIDES)
def test_boundary_sides(side: int) -> None:
    for text, family in (("uint4g32", "columns"), ("tile16x1@50%+int3", "columns"),
                         ("tile2x16@50%+int4", "masked")):  # fmt: skip
        assert_exact(integers(text, family, 2, side, 17), Config(16, 64))
        assert_exact(integers(text, family, 1, 5, side), Config(1, 8, True))
    assert_exact(integers("int4+a8", "columns", 2, 5, side), Config(16, 16))
    for n, k in ((side, 17), (5, side)):
        assert_exact(integers("tile1x16@50%+uint4g32", "lanes", 1, n, k), Config(1, 64, True))


def test_a_weight_of_one_number() -> None:
    for text, family in (("uint3", "columns"), ("bitmap@50%+int8", "masked")):
        assert_exact(integers(text, family, 1, 1, 1), VECTOR)
        assert_exact(integers(text, family, 1, 1, 1), ROW)


@pytest.mark.parametrize(
    ("text", "family"),
    [("tile16x16@50%+uint4g32", "columns"), ("tile16x1@50%+int3", "columns"),
     ("tile1x16@50%+int2", "lanes"), ("tile4x16@50%+uint4g32", "lanes"),
     ("tile16x16@50%+uint4g32", "masked"), ("tile1x16@50%+int2", "masked")],
)  # fmt: skip
def test_rows_that_store_nothing_or_all(text: str, family: str) -> None:
    n, k = 48, 40
    case = integers(text, family, 2, n, k)
    fmt, weight = case.packed.format, case.packed.unpack()
    mask = torch.ones(n, k, dtype=torch.bool)
    mask[: n // 3] = False
    some = fmt.layout.select(torch.rand(n, k, generator=seeded(1)))
    mask[n // 3 : 2 * n // 3] = some[: n // 3]
    grid = case.packed.read()[2]
    none, every = torch.zeros_like(mask), torch.ones_like(mask)
    wide, split = Config(1, 64, True), Config(16, 16, tasks=6)
    for chosen, wanted in ((mask, wide), (mask, split), (none, ROW), (every, ROW)):
        config = fitting(wanted, family, 2, n)
        whole = fmt.layout.mask(fmt.layout.index(chosen), n, k)
        assert_exact(replace(case, packed=fmt.pack(weight, whole, grid)), config)


def test_codes_and_zero_points_at_their_ends() -> None:
    """The largest differences: every x type must hold codes minus zero points."""
    for codec, dtype in product(("uint7", "uint8", "int8", "uint4"), (FP16, BF16)):
        fmt = Format.parse(codec)
        low, high = fmt.codec.low, fmt.codec.high  # type: ignore[attr-defined]
        codes = torch.tensor([[low, high], [high, low]]).repeat(1, 8).float()
        for zero in (0, high) if codec[0] == "u" else (0,):
            zeros = torch.full((2, 1), float(zero)) if codec[0] == "u" else None
            weight = (codes - zero) * 0.25
            packed = fmt.pack(weight, None, Grid(torch.full((2, 1), 0.25), zeros))
            assert torch.equal(packed.unpack(), weight)
            x = torch.eye(16)[:4].to(dtype)
            for config in (ROW, Config(1, 2, True)):
                assert_exact(Case(packed, "columns", x), config)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7)], ids=str)
def test_any_shape_of_x(shape: tuple[int, ...]) -> None:
    case = integers("int4", "columns", 6, 5, 7)
    x = case.x.flatten()[: torch.Size(shape).numel()].view(shape)
    want = (x.double() @ case.packed.unpack(torch.float64).T).to(FP16)
    assert torch.equal(run(replace(case, x=x), ROW), want)
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(run(replace(case, x=strided), ROW), want)


# --- int8 activations ----------------------------------------------------------------------------


def rows_of_kinds(dtype: torch.dtype, k: int) -> Tensor:
    """Ordinary rows, zeros, ties, subnormals, the largest numbers, NaN and infinities."""
    rng = seeded(4)
    least, info = 2.0**-24 if dtype == FP16 else 2.0**-133, torch.finfo(dtype)
    x = torch.randn(12, k, generator=rng)
    x[1] = 0
    x[2] = torch.randint(-127, 128, (k,), generator=rng) + 0.5
    x[2, 0] = 127.0  # the scale is 1: halves are ties
    x[3] = torch.randint(-9, 10, (k,), generator=rng) * least
    x[4] *= info.max / 8
    x[5, -1], x[6, 0], x[7, k // 2] = torch.inf, torch.nan, -torch.inf
    x[8] = torch.where(torch.arange(k) == k - 1, 100.0, 0.0)
    x[9] = torch.randint(-9, 10, (k,), generator=rng) * info.tiny
    return x.clamp(info.min, info.max).where(x.isfinite(), x).to(dtype)


def quantized(x: Tensor, branch: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and low of `rows_kernel`, as a product launches it."""
    weight = order(Format.parse("int4+a8").pack(torch.zeros(1, x.shape[1])), "columns")
    codes, scales, low, _ = Product(weight, interpreted())._rows(x, x.shape[0], branch)
    assert scales is not None
    return codes, scales, x if low is None else low


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 1025])
def test_activation_codes_are_the_references(dtype: torch.dtype, k: int) -> None:
    x = rows_of_kinds(dtype, k)
    want_codes, want_scales = quantize_rows(x)
    down = tuple(t.to(dtype) for t in random_branch(1, k, 1))
    for rows, branch in ((12, ()), (4, ()), (12, down)):
        codes, scales, _ = quantized(x[:rows], branch)
        assert torch.equal(codes, want_codes[:rows])
        want = want_scales[:rows, 0]
        assert bool(((scales == want) | (scales.isnan() & want.isnan())).all())


@pytest.mark.parametrize("family", ["columns", "masked"])
def test_a_bad_row_spoils_no_other(family: str) -> None:
    case = integers("tile16x1@50%+int4+a8", family, 3, 17, 40)
    clean = run(case, ROW)
    for bad in (torch.nan, torch.inf):
        x = case.x.clone()
        x[1, 5] = bad
        got = run(replace(case, x=x), ROW)
        assert bool(got[1].isnan().all())
        assert torch.equal(got[[0, 2]], clean[[0, 2]])


# --- reals: the derived bound --------------------------------------------------------------------


def check_any(
    layout: tuple[str, str], codec: str, group: str, m: int, n: int, k: int, dtype: torch.dtype,
    config: Config, activation: str, rank: int, more: int, a8: bool, seed: int,
) -> None:  # fmt: skip
    """One product of reals; what no kernel serves is left out."""
    group = "" if codec in ("fp16", "bf16", "fp32") else group
    text, family = f"{layout[0]}+{codec}{group}" + "+a8" * a8, layout[1]
    m = min(m, 4) if family == "lanes" else m
    case = reals(text, family, m, n, k, dtype, seed)
    k, m = case.x.shape[1], len(case.x)
    if not usable(text, family, k):
        return
    rng = seeded(seed)
    extras = Extras(
        torch.randn(n, generator=rng) if more & 1 else None,
        random_branch(n, k, rank, seed) if rank else (),
        activation,
        torch.randn(m, n, generator=rng) if more & 2 else None,
        torch.randn(m, n, generator=rng) if more & 4 else None,
    )
    assert_close(case, fitting(config, family, m, n), extras)


def any_product(count: int, sides: list[int]) -> Callable[[Callable[..., None]], Any]:
    """`count` products, the same ones in every run, of weights up to the last of `sides`."""
    products = given(
        layout=st.sampled_from(PAIRS), codec=st.sampled_from([*CODECS, "fp32"]),
        group=st.sampled_from(["", "g16", "g32", "g64", "g128"]),
        m=st.sampled_from([0, 1, 2, 4, 5, 15, 16, 17, 33]), n=st.sampled_from(sides),
        k=st.sampled_from([*sides, 150]), dtype=st.sampled_from([FP16, BF16]),
        config=st.sampled_from(CONFIGS), activation=st.sampled_from(list(ACTIVATIONS)),
        rank=st.sampled_from([0, 0, 1, 3, 16, 33]), more=st.integers(0, 7), a8=st.booleans(),
        seed=st.integers(0, 999),
    )  # fmt: skip
    same = settings(max_examples=count, deadline=None, derandomize=True, database=None)
    return lambda check: same(products(check))


test_any_product = any_product(12, SIDES[:5])(check_any)
test_many_products = pytest.mark.slow(any_product(100, SIDES)(check_any))


TURNS = ("", "g64", "g32+a8")


def format_of(number: int) -> str:
    """Codec `number` of `PAIRS` × `CODECS` with one of `TURNS`, those shifted by one per layout."""
    codec = CODECS[number % len(CODECS)]
    turn = TURNS[(number + number // len(CODECS)) % len(TURNS)]
    return codec if codec in ("fp16", "bf16") else codec + turn


TRIPLES = [
    (*pair, format_of(number), config)
    for number, (pair, config) in enumerate(
        zip(product(PAIRS, CODECS), cycle(CONFIGS), strict=False)
    )
]
"""Every layout with every codec; each of both with all `TURNS`, the configurations in turn."""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "codec", "more", "config"), TRIPLES, ids=str)
def test_every_pair(layout: tuple[str, str], codec: str, more: str, config: Config) -> None:
    name, family = layout
    text = f"{name}+{more}" if usable(f"{name}+{more}", family, 144) else f"{name}+{codec}"
    assert_exact(integers(text, family, 3, 19, 130), fitting(config, family, 3, 19))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("config", [ROW, Config(1, 8, True), Config(16, 16, tasks=9)], ids=str)
def test_epilogue(activation: str, config: Config) -> None:
    rng = seeded(3)
    for text, family, dtype in (("tile16x1@50%+int4g32", "columns", FP16),
                                ("2:4+int8+a8", "masked", BF16),
                                ("tile2x16@50%+int3", "lanes", BF16)):  # fmt: skip
        if family == "lanes" and not config.vector:
            continue
        case = reals(text, family, 3, 17, 40, dtype)
        bias, factor, rest = (torch.randn(s, generator=rng) * 3 for s in ((17,), (3, 17), (3, 17)))
        branch = random_branch(17, 40, 5) if dtype == BF16 else ()
        assert_close(case, config, Extras(bias, branch, activation, factor, rest))


@pytest.mark.parametrize("rank", [1, 3, 16, 33])
@pytest.mark.parametrize("text", ["int4g32", "bitmap@50%+int4g32+a8"])
def test_branch(rank: int, text: str) -> None:
    family = "masked" if "bitmap" in text else "columns"
    for m, config, dtype in ((1, VECTOR, FP16), (5, ROW, BF16), (5, Config(16, 32, tasks=8), FP16)):
        case = reals(text, family, m, 20, 70, dtype)
        assert_close(case, config, Extras(branch=random_branch(20, 70, rank)))


def test_branch_of_integers_is_exact() -> None:
    """The branch sees x as it is, not rounded to int8; neighbours of `low` in memory are not it."""
    zero = Format.parse("int4+a8").pack(torch.zeros(20, 70))
    x = torch.randint(-4, 5, (17, 70), generator=seeded(1)) * 0.5
    down, up = (torch.randint(-3, 4, s, generator=seeded(2)).float() for s in ((33, 70), (20, 33)))
    scale = torch.tensor([1.0, -2.0, 0.5]).repeat(11)
    for rank in (3, 16, 33):
        parts = (down[:rank], up[:, :rank], scale[:rank])
        extras = Extras(branch=parts).to(FP16)
        low = (x.double() @ parts[0].double().T * parts[2]).half()
        assert torch.equal(quantized(x.half(), extras.branch)[2], low)
        got = run(Case(zero, "columns", x.half()), ROW, extras)
        assert torch.equal(got, (low.double() @ parts[1].double().T).half())


# --- split sums ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "family"),
    [("int4g128", "columns"), ("tile16x1@80%+uint3g64", "columns"), ("bitmap@50%+int3", "masked"),
     ("tile2x16@50%+uint3g32", "lanes")],
)  # fmt: skip
def test_split_sums(text: str, family: str) -> None:
    """Within the bound, the same bits at every run, exact where one task's sum is."""
    case = reals(text, family, 2, 17, 600)
    extras = Extras(torch.randn(17, generator=seeded(1)), random_branch(17, 600, 3), "gelu")
    config = fitting(Config(16, 32, tasks=3), family, 2, 17)
    weight, given = Product(order(case.packed, family), interpreted()), extras.to(FP16)
    first, second = (
        weight.linear(case.x, config, given.bias, given.branch, "gelu") for _ in range(2)
    )
    assert weight.plans[config].split
    assert torch.equal(first, second)
    assert_close(case, config, extras)
    assert_exact(integers(text, family, 2, 17, 600), Config(1, 32, True, tasks=2))


@pytest.mark.parametrize("config", [Config(16, 64), Config(1, 64, True)], ids=str)
def test_tasks_write_their_own_rows_only(config: Config) -> None:
    """On a GPU tasks end in any order; a strip of 48 rows leaves 16 of its block to others."""
    case = integers("tile48x16@50%+int4g32", "columns", 1, 130, 64)
    weight = Product(order(case.packed, "columns"), interpreted())
    tasks = plan(weight.weight, config)
    weight.plans[config] = replace(tasks, tasks=tasks.tasks.flip(0).contiguous())
    assert torch.equal(weight.linear(case.x, config), run(case, config))
    assert_exact(case, config)
