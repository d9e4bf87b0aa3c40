"""The CPU engine against exact arithmetic: every instruction set, layout, codec and boundary.

Most cases are integers, for which equality is demanded; the rest is held to a derived bound
(native_cases.py). `tests/mutate_native.py` breaks the engine on purpose and runs `tests/native`.
"""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import (
    DTYPES,
    ENGINE,
    FAMILIES,
    FLOATS,
    GROUPS,
    INTS,
    KINDS,
    LAYOUTS,
    LONG,
    PAIRS,
    ROWS,
    SIDES,
    Case,
    Extras,
    assert_close,
    assert_exact,
    each_isa,
    integer_rows,
    integer_weight,
    integers,
    masked_integers,
    masks,
    packed_into,
    random_branch,
    reals,
    seeded,
)

from sparsefx.codegen.native import ACTIVATIONS, branch_weights, why_missing
from sparsefx.ir.codecs import Grid
from sparsefx.ir.format import Format

torch.set_num_threads(1)

isa = each_isa
pytestmark = pytest.mark.skipif(ENGINE is None, reason=why_missing())


def examples(count: int) -> settings:
    """The same ones in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# --- integers: equality --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_codec(isa: str, layout: str) -> None:
    tails = cycle(product(GROUPS, ["", "+a8g64", "+a8g24"]))
    for bits in INTS:
        for group, tail in (next(tails), next(tails)):
            case = integers(f"{layout}+{bits}{group}{tail}", 21, 37, 208)
            for m in (1, 3, 5, 21):
                assert_exact(case, m)
    for name in FLOATS:
        case = integers(f"{layout}+{name}", 21, 37, 208)
        for m in (1, 2, 4, 21):
            assert_exact(case, m)


@pytest.mark.parametrize("text", PAIRS)
def test_any_number_of_rows(isa: str, text: str) -> None:
    case = integers(text, max(ROWS), 50, 200)
    for m, dtype in zip(ROWS, cycle(DTYPES), strict=False):
        assert_exact(case, m, dtype)


@pytest.mark.parametrize("side", SIDES + LONG)
@pytest.mark.parametrize("family", [*FAMILIES, "2:4"])
def test_boundary_sides(isa: str, family: str, side: int) -> None:
    for kind, dtype in zip(KINDS, cycle(DTYPES), strict=False):
        for n, k in ((side, 33), (17, side)):
            case = integers(f"{family}+{kind}", 6, n, k)
            for m in (1, 6):
                assert_exact(case, m, dtype)


@examples(150)
@given(
    layout=st.sampled_from(LAYOUTS), codec=st.sampled_from(INTS + FLOATS),
    group=st.sampled_from(GROUPS), a8=st.sampled_from(["", "+a8g8", "+a8g40", "+a8g128"]),
    m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 30), threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_any_integers(
    isa: str, layout: str, codec: str, group: str, a8: str, m: int, n: int, k: int,
    dtype: torch.dtype, seed: int, threads: int,
) -> None:  # fmt: skip
    text = f"{layout}+{codec}" if codec in FLOATS else f"{layout}+{codec}{group}{a8}"
    assert_exact(integers(text, m, n, k, seed), m, dtype, threads=threads)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("codec", ["int2", "uint2", "int3", "uint4", "int8", "uint8"])
def test_codes_and_activations_at_either_end(isa: str, family: str, codec: str) -> None:
    """Sums of bytes that saturate 16 bits are not allowed to; 1024 products fill 25 bits."""
    k = 1024 if family == "dense" else 512
    packed = integer_weight(f"{family}+{codec}", 35, k, extreme=True)
    x = integer_rows(20, k, extreme=True)
    x[0], x[1] = 127, -127
    case = packed_into(packed, x)
    for m in (1, 2, 6, 20):
        assert torch.equal(case.y(m, a8=True), case.exact[:m].float())
        assert k > 512 or torch.equal(case.y(m), case.exact[:m].float())


@pytest.mark.parametrize("text", ["int8", "int4g32+a8g32", "bitmap@50%+uint3g64"])
def test_activations_round_half_to_even(isa: str, text: str) -> None:
    """Halves between integers, 127 and hence a scale of 1."""
    case = integers(text, 20, 37, 96)
    x = case.x + 0.5 * ((case.x.abs() != 127) & case.x.any(1, keepdim=True))
    rounded = x.round() @ case.packed.unpack().T
    assert not torch.equal(rounded, x.add(0.5).floor() @ case.packed.unpack().T)
    for m in (1, 5, 20):
        assert torch.equal(case.weight.linear(x[:m], a8=True), rounded[:m])


@pytest.mark.parametrize("codec", ["int2g64", "uint4g64", "uint3g64", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", list(masks(40, 200)))
def test_empty_and_full_places(isa: str, name: str, codec: str) -> None:
    case = masked_integers(f"bitmap@50%+{codec}", 20, 40, 200, masks(40, 200)[name])
    for m in (1, 2, 5, 20):
        assert_exact(case, m)


def test_zero_weights_and_zero_rows(isa: str) -> None:
    for text in PAIRS:
        fmt = Format.parse(text)
        zero = packed_into(fmt.pack(torch.zeros(20, 96)), integer_rows(9, 96))
        still = Case(zero.packed, reals(text, 1, 20, 96).weight, torch.zeros(9, 96))
        for case, m in product((zero, still), (1, 9)):
            assert not any(case.y(m, a8=a8).any() for a8 in case.modes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_numbers(isa: str, family: str) -> None:
    """Integers times the least value of a type, and the least fp16 scale, stay exact."""
    for name, least in (("fp32", 2.0**-149), ("fp16", 2.0**-24), ("bf16", 2.0**-133)):
        dense = integer_weight(f"{family}+fp32", 20, 96).unpack() * least
        fmt = Format.parse(f"{family}+{name}")
        case = packed_into(fmt.pack(dense, dense != 0), integer_rows(20, 96))
        for m, dtype in product((1, 6, 20), DTYPES):
            assert_exact(case, m, dtype)
    fmt = Format.parse(f"{family}+int4g32")
    codes = torch.randint(-8, 8, (20, 96), generator=seeded(1)).float()
    grid = Grid(torch.full((20, 3), 2.0**-24))
    case = packed_into(fmt.pack(codes * 2.0**-24, None, grid), integer_rows(20, 96))
    for m, dtype in product((1, 6, 20), DTYPES):
        assert_exact(case, m, dtype)


# --- reals: the derived bound --------------------------------------------------------------------


@examples(120)
@given(
    layout=st.sampled_from(LAYOUTS), codec=st.sampled_from(INTS + FLOATS),
    group=st.sampled_from(GROUPS), a8=st.sampled_from(["", "+a8", "+a8g64"]),
    m=st.sampled_from(ROWS), n=st.sampled_from(SIDES), k=st.sampled_from(SIDES + LONG[:-1]),
    dtype=st.sampled_from(DTYPES), activation=st.sampled_from(list(ACTIVATIONS)),
    rank=st.sampled_from([0, 0, 1, 8, 32, 33]), more=st.integers(0, 7), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_product(
    isa: str, layout: str, codec: str, group: str, a8: str, m: int, n: int, k: int,
    dtype: torch.dtype, activation: str, rank: int, more: int, seed: int,
) -> None:  # fmt: skip
    a8 = "" if codec in FLOATS else a8
    text = f"{layout}+{codec}{'' if codec in FLOATS else group}{a8}"
    case = reals(text, m, n, k, seed)
    rng, (m, k) = seeded(seed), case.x.shape
    extras = Extras(
        torch.randn(n, generator=rng) if more & 1 else None,
        random_branch(n, k, rank, seed) if rank else (),
        activation,
        torch.randn(m, n, generator=rng) if more & 2 else None,
        torch.randn(m, n, generator=rng) if more & 4 else None,
    )
    assert_close(case, case.x.to(dtype), bool(a8), extras)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogue(isa: str, activation: str, dtype: torch.dtype) -> None:
    rng = seeded(3)
    for m, n in ((1, 17), (3, 48), (257, 33)):
        case = reals("tile16x1@50%+int4g32", m, n, 64)
        bias, factor, rest = (torch.randn(shape, generator=rng) for shape in ((n,), (m, n), (m, n)))
        for extras in (
            Extras(activation=activation),
            Extras(bias, activation=activation),
            Extras(bias, activation=activation, multiply=factor),
            Extras(bias, activation=activation, residual=rest),
            Extras(bias, random_branch(n, 64, 5), activation, factor, rest),
        ):
            for a8 in (False, True):
                assert_close(case, case.x.to(dtype), a8, extras)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_over_their_range(isa: str, activation: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-1, 1, 2001), torch.zeros(1)])
    x = torch.cat([x, -torch.logspace(-40, 4, 500), torch.logspace(-40, 4, 500)])[:, None]
    case = packed_into(Format.parse("fp32").pack(torch.ones(1, 1)), x)
    assert_close(case, x, extras=Extras(activation=activation))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_number_is_read_and_rounded(isa: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)[:, None]
    for w in (1.0, 1 + 2.0**-9, 1 + 2.0**-11, 1 / 3, 2.0**-12):
        weight = torch.tensor([[w]])
        case = packed_into(Format.parse("fp32").pack(weight), x)
        got, want = case.weight.linear(x), (x.float() * weight).to(dtype)
        assert bool(((got == want) | (got.isnan() & want.isnan())).all())


@pytest.mark.parametrize("rank", [1, 8, 32, 33])
@pytest.mark.parametrize("m", [1, 4, 5, 257])
def test_branch(isa: str, rank: int, m: int) -> None:
    for text, dtype in (("int4g64+a8", torch.float32), ("2:4+uint3", torch.bfloat16)):
        case = reals(text, m, 40, 132)
        for kind in (torch.float32, torch.bfloat16):
            branch = [t.to(kind) for t in random_branch(40, 132, rank)]
            for a8 in (False, True):
                assert_close(case, case.x.to(dtype), a8, Extras(branch=branch))


def test_branch_of_integers_is_exact(isa: str) -> None:
    """The branch sees x as it is, not rounded to int8."""
    case = integers("int4g32", 9, 40, 96)
    x = case.x * 0.5
    x[x.abs() < 60] += 0.25
    down, up = (torch.randint(-3, 4, s, generator=seeded(2)).float() for s in ((33, 96), (40, 33)))
    assert ENGINE is not None
    scale = torch.tensor([1.0, -2.0, 0.5]).repeat(11)
    branch = branch_weights(ENGINE, (down, up, scale))
    exact = ((x.double() @ down.double().T) * scale) @ up.double().T
    zero = ENGINE.pack(Format.parse("int4g32").pack(torch.zeros(40, 96)))
    for m in (1, 2, 9):
        for a8 in (False, True):
            assert torch.equal(zero.linear(x[:m], a8=a8, branch=branch), exact[:m].float())


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e30, 1e34])
@pytest.mark.parametrize("text", ["bitmap@50%+int8g32", "uint4+a8g32", "2:4+bf16"])
def test_tiny_and_huge_activations(isa: str, scale: float, text: str) -> None:
    """Up to where a code times x overflows: codes are scaled after they are summed."""
    for m in (1, 6, 20):
        case = reals(text, m, 20, 96)
        for a8 in case.modes:
            assert_close(case, case.x * scale, a8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("text", ["int4g32", "2:4+uint3", "tile16x1@50%+int8+a8g32", "1:4+bf16"])
def test_a_bad_row_spoils_no_other(isa: str, text: str, bad: float) -> None:
    clean = reals(text, 22, 40, 96)
    x = clean.x.clone()
    dense = clean.packed.unpack()
    column = int(dense.count_nonzero(0).argmax())
    x[2, column] = bad
    case = Case(clean.packed, clean.weight, x)
    for m, a8 in product((3, 4, 22), clean.modes):
        got, want = case.y(m, a8=a8), clean.y(m, a8=a8)
        others = torch.arange(m) != 2
        assert torch.equal(got[others], want[others])
        assert not got[2, dense[:, column] != 0].isfinite().any()
        assert got[2].isnan().all() or not a8, "the whole row, as quantize_rows says"
        for name in ACTIVATIONS if a8 else ():
            assert case.y(m, a8=True, activation=name)[2].isnan().all()
