"""Formats: what is unpacked is exactly what was asked to be stored, for every layout and codec:
over the registries, so a new layout or codec is tested as soon as it is listed.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_fp8 import slow_e4m3
from torch import Tensor

from sparsefx.ir.bits import pack_bits, stream_bytes, unpack_bits
from sparsefx.ir.codecs import CODECS, Codec, Float, Fp8, Grid, Int
from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import LAYOUTS, NM, Bitmap, Dense, Layout, Tile

torch.set_num_threads(1)

MORE_LAYOUTS = [
    "1:4",
    "3:5",
    "100:256",
    "tile1x16@50%",
    "tile64x64@75%",
    "tile3x5@37.5%",
    "bitmap@99%",
]
MORE_CODECS = [
    "fp16",
    "int2",
    "int3g16",
    "int5",
    "int8",
    "int8g128",
    "uint2g8",
    "uint3",
    "uint4g16",
]


def layout_of(token: str) -> Layout:
    return next(found for kind in LAYOUTS if (found := kind.parse(token)) is not None)


def codec_of(token: str) -> Codec:
    return next(found for kind in CODECS if (found := kind.parse(token)) is not None)


LAYOUT_VALUES = [layout_of(t) for t in [*(kind.example for kind in LAYOUTS), *MORE_LAYOUTS]]
CODEC_VALUES = [Float(), *(codec_of(t) for t in [*(kind.example for kind in CODECS), *MORE_CODECS])]
PAIRS = list(product(LAYOUT_VALUES, CODEC_VALUES))
INTS = [c for c in CODEC_VALUES if isinstance(c, Int)]
SIDES = [0, 1, 7, 8, 9, 13, 15, 16, 17, 31, 63, 64, 65]


def weight(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator).to(dtype)


def fitting(layout: Layout, k: int) -> int:
    """The nearest K that this layout can have."""
    return -(-k // layout.step) * layout.step if layout.rejects(1, k) else k


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that −0 and NaN payloads count."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# --- a slow second opinion, written without the code under test ----------------------------------

Array = npt.NDArray[np.float32]


def slow_stream(stream: Array, width: int, count: int) -> list[int]:
    whole = int.from_bytes(bytes(stream.astype(np.uint8)), "little")
    return [(whole >> (i * width)) & ((1 << width) - 1) for i in range(count)]


def slow_mask(layout: Layout, index: list[Array], n: int, k: int) -> npt.NDArray[np.bool_]:
    keep = np.zeros((n, k), dtype=bool)
    if isinstance(layout, Dense):
        keep[:] = True
    elif isinstance(layout, NM):
        runs = [(row, start) for row in range(n) for start in range(0, k, layout.m)]
        width = max(1, int(np.ceil(np.log2(layout.m))))
        if layout.m <= layout.n * width:
            for i, bit in enumerate(slow_stream(index[0], 1, n * k)):
                keep[divmod(i, k)] = bit
        else:
            where = slow_stream(index[0], width, len(runs) * layout.n)
            for i, position in enumerate(where):
                row, start = runs[i // layout.n]
                keep[row, start + position] = True
    elif isinstance(layout, Tile):
        across = -(-k // layout.cols)
        cells = slow_stream(index[0], 1, -(-n // layout.rows) * across)
        for i, j in np.ndindex(n, k):
            keep[i, j] = cells[(i // layout.rows) * across + j // layout.cols]
    else:
        pytest.skip(f"no second opinion is written for {type(layout).__name__}")
    return keep


def slow_unpack(packed: Packed) -> Array:
    """(N, K) float32 values read straight from the buffers, one at a time."""
    fmt, n, k = packed.format, packed.n, packed.k
    split = len(fmt.layout.buffers)
    arrays = [b.float().numpy().reshape(-1) for b in packed.buffers]
    keep = slow_mask(fmt.layout, arrays[:split], n, k)
    out = np.zeros((n, k), dtype=np.float32)
    cells = [(i, j) for i in range(n) for j in range(k) if keep[i, j]]
    values, rest = arrays[split], arrays[split + 1 :]
    if isinstance(fmt.codec, Float):
        for cell, value in zip(cells, values, strict=True):
            out[cell] = value
        return out
    assert isinstance(fmt.codec, Int | Fp8), "write a second opinion for the new codec"
    width, size = fmt.codec.bits, fmt.codec.group_size or max(k, 1)
    groups = -(-k // size)
    zeros = [0] * (n * groups) if fmt.codec.symmetric else slow_stream(rest[1], width, n * groups)
    for (i, j), code in zip(cells, slow_stream(values, width, len(cells)), strict=True):
        if isinstance(fmt.codec, Int) and fmt.codec.symmetric and code >= 1 << (width - 1):
            code -= 1 << width
        group = i * groups + j // size
        value = np.float32(slow_e4m3(code) if isinstance(fmt.codec, Fp8) else code - zeros[group])
        out[i, j] = value * np.float32(rest[0][group]) + np.float32(0)  # 0 is +0, not −0
    return out


def masked_and_rounded(fmt: Format, w: Tensor) -> Tensor:
    """The masked, quantised weight, computed on dense tensors without any packing."""
    mask = fmt.layout.select(w.abs())
    kept = torch.where(mask, w, 0)
    grid = fmt.codec.fit(kept).columns(0, w.shape[1], fmt.codec.group(w.shape[1]))
    codes = fmt.codec.encode(kept, grid)
    if grid.scales is not None:
        codes = codes + 0.0  # integers know no −0
    return torch.where(mask, fmt.codec.decode(codes, grid).float(), 0)


def assert_exact(fmt: Format, w: Tensor) -> Packed:
    packed = fmt.pack(w)
    got = packed.unpack()
    assert got.shape == w.shape
    assert torch.equal(bits(got), bits(masked_and_rounded(fmt, w))), f"{fmt} {tuple(w.shape)}"
    assert torch.equal(bits(got), bits(torch.from_numpy(slow_unpack(packed)))), (
        f"{fmt} {tuple(w.shape)}"
    )
    assert torch.isfinite(got).all()
    return packed


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "codec"), PAIRS, ids=str)
def test_unpack_is_the_masked_quantised_weight(layout: Layout, codec: Codec) -> None:
    fmt = Format(layout, codec)
    for n, k in ((5, 13), (17, 33), (1, 1)):
        w = weight(n, fitting(layout, k))
        packed = assert_exact(fmt, w)
        once = packed.unpack()
        assert all(torch.equal(bits(a), bits(b)) for a, b in
                   zip(packed.buffers, fmt.pack(w).buffers, strict=True))  # fmt: skip
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(bits(packed.unpack(dtype)), bits(once.to(dtype)))


@pytest.mark.parametrize("layout", LAYOUT_VALUES, ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_boundary_shapes(layout: Layout, side: int) -> None:
    for codec in (Float(), Int(3, 8), Int(4, 0, False)):
        for n, k in ((side, 16), (3, side), (side, 1)):
            if n * k <= 2100:
                assert_exact(Format(layout, codec), weight(n, fitting(layout, k)))


@pytest.mark.parametrize(
    "layout", [kind for kind in LAYOUT_VALUES if isinstance(kind, Tile)], ids=str
)
def test_tiles_at_their_own_edges(layout: Tile) -> None:
    for dn, dk in product((-1, 0, 1), repeat=2):
        n, k = max(layout.rows + dn, 0), max(layout.cols + dk, 0)
        assert_exact(Format(layout, Int(4, 16)), weight(n, k))


@settings(max_examples=150, deadline=None)
@given(
    pair=st.sampled_from(PAIRS), n=st.integers(0, 20), k=st.integers(0, 40),
    seed=st.integers(0, 1 << 30), scale=st.sampled_from([1e-3, 1.0, 1e3]), zeroed=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_any_weight_round_trips(
    pair: tuple[Layout, Codec],
    n: int,
    k: int,
    seed: int,
    scale: float,
    zeroed: float,
    dtype: torch.dtype,
) -> None:
    w = weight(n, fitting(pair[0], k), seed, dtype) * scale
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < zeroed] = 0
    assume(not w.any() or float(w.abs().max()) >= 448 * 2.0**-20)  # else scales are refused
    assert_exact(Format(*pair), w)


@pytest.mark.parametrize("layout", LAYOUT_VALUES, ids=str)
def test_stored_floats_keep_every_bit(layout: Layout) -> None:
    """Minus zero, denormals and the extremes; nothing is stored that `select` did not choose."""
    odd = torch.tensor(
        [-0.0, 0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 1 / 3]
    )
    w = odd.repeat(16, 128)[:, : fitting(layout, 512)]
    mask = layout.select(torch.rand(w.shape))
    got = Format(layout).pack(w, mask).unpack()
    assert torch.equal(bits(got), bits(torch.where(mask, w, 0.0)))


@pytest.mark.parametrize("layout", LAYOUT_VALUES, ids=str)
def test_pruning_a_pruned_weight_changes_nothing(layout: Layout) -> None:
    w = weight(37, fitting(layout, 45))
    once = Format(layout).pack(w)
    twice = Format(layout).pack(once.unpack())
    assert torch.equal(bits(once.unpack()), bits(twice.unpack()))
    mask = layout.select(w.abs())
    assert layout.violation(mask) is None
    again = layout.mask(layout.index(mask), *w.shape)
    assert torch.equal(mask if again is None else again, mask)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("kind", [Bitmap(), Tile(4, 1, 0.5), Tile(1, 16, 0.5)], ids=str)
def test_the_share_asked_for_is_removed(kind: Tile, share: float) -> None:
    layout = type(kind)(kind.rows, kind.cols, share)
    mask = layout.select(weight(64, 64).abs())
    assert abs(1 - float(mask.float().mean()) - share) <= kind.rows * kind.cols / 64**2


def test_the_best_scores_are_kept() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 9.0, 8.0, 7.0]])
    assert NM(2, 4).select(scores).int().tolist() == [[1, 0, 1, 0, 0, 1, 1, 0]]
    assert Tile(1, 2, 0.5).select(scores).int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    ragged = torch.tensor([[1.0, 1.0, 1.0, 1.5]])
    assert Tile(1, 3, 0.5).select(ragged).int().tolist() == [[0, 0, 0, 1]], (
        "mean, not sum, per tile"
    )


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "codec"), PAIRS, ids=str)
def test_stored_bytes_are_the_needed_bits(layout: Layout, codec: Codec) -> None:
    """Within 2%, plus one byte per buffer: each bit stream is rounded up to whole bytes."""
    fmt = Format(layout, codec)
    for n, k in ((1, 1), (3, 7), (33, 65), (64, 256)):
        w = weight(n, fitting(layout, k))
        packed = fmt.pack(w)
        mask = layout.mask(packed.buffers[: len(layout.buffers)], *w.shape)
        kept = w.numel() if mask is None else int(mask.sum())
        needed = fmt.needed_bits(n, w.shape[1], kept, w.element_size())
        assert needed <= 8 * packed.stored_bytes <= 1.02 * needed + 8 * len(packed.buffers)
        held = sum(b.untyped_storage().nbytes() for b in packed.buffers)
        assert held <= packed.stored_bytes + 8 * len(packed.buffers), "a buffer is a view of more"


def test_known_sizes() -> None:
    """Counted by hand, so that `needed_bits` itself is checked."""

    def size(text: str) -> float:
        return Format.parse(text).pack(weight(64, 256)).bits_per_weight

    assert size("int4g128") == 4 + 16 / 128
    assert size("uint4g128") == 4 + 16 / 128 + 4 / 128
    assert size("2:4+int8") == 1 + 4 + 16 / 256
    assert size("1:4+bf16") == 2 / 4 + 16 / 4
    assert size("bitmap@75%+int4g64") == 1 + 1 + 16 / 64
    assert size("tile16x1@50%+int4g128") == 1 / 16 + 2 + 16 / 128


# --- refusals and odd values ---------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "codec"), PAIRS, ids=str)
def test_zero_groups_stay_zero_and_finite(layout: Layout, codec: Codec) -> None:
    w = weight(8, fitting(layout, 64))
    w[:, :32] = 0
    w[3] = 0
    packed = Format(layout, codec).pack(w)
    got = packed.unpack()
    assert all(torch.isfinite(b).all() for b in packed.buffers if b.is_floating_point())
    assert not got[3].any()
    nothing = Format(layout, codec).pack(torch.zeros_like(w))
    assert not nothing.unpack().any()
    assert all(torch.isfinite(b).all() for b in nothing.buffers if b.is_floating_point())


@pytest.mark.parametrize("layout", [v for v in LAYOUT_VALUES if isinstance(v, NM)], ids=str)
def test_a_mask_of_another_pattern_is_refused(layout: NM) -> None:
    w = weight(3, 2 * layout.m)
    mask = layout.select(w.abs())
    wrong = mask.clone()
    wrong[1, layout.m : layout.m + layout.n + 1] = True
    with pytest.raises(
        WeightError, match=rf"not {layout}: row 1, columns {layout.m}…{2 * layout.m - 1}"
    ):
        Format(layout).pack(w, wrong)
    fewer = mask.clone()
    fewer[:, : layout.m] = False
    assert not Format(layout, Int(8)).pack(w, fewer).unpack()[:, : layout.m].any()


@pytest.mark.parametrize("codec", INTS, ids=str)
def test_scales_that_fp16_cannot_hold_are_refused(codec: Int) -> None:
    for scale in (1e-12, 1e9):
        with pytest.raises(WeightError, match="leaves the range of fp16"):
            Format(codec=codec).pack(weight(4, 32) * scale)


@pytest.mark.parametrize("token", ["fp16", "bf16"])
def test_values_that_overflow_are_refused(token: str) -> None:
    w = weight(2, 8)
    w[1, 3] = 3.4e38
    with pytest.raises(WeightError, match=f"overflows {token}"):
        Format.parse(token).pack(w)


@pytest.mark.parametrize("codec", CODEC_VALUES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(codec: Codec, bad: float) -> None:
    w = weight(4, 16)
    w[2, 5] = bad
    with pytest.raises(WeightError):
        Format(codec=codec).pack(w)


@pytest.mark.parametrize("layout", [v for v in LAYOUT_VALUES if isinstance(v, NM)], ids=str)
def test_a_k_that_does_not_divide_is_refused(layout: NM) -> None:
    with pytest.raises(WeightError, match=rf"K={layout.m + 1} is not a multiple"):
        Format(layout).pack(weight(2, layout.m + 1))


@pytest.mark.parametrize("codec", INTS, ids=str)
def test_rounding_is_within_half_a_step(codec: Int) -> None:
    """For values inside the grid; those outside land on its end."""
    w = weight(16, 128)
    packed = Format(codec=codec).pack(w)
    codes, grid = codec.read(packed.buffers, w.numel(), *w.shape)
    wide = grid.columns(0, 128, codec.group(128))
    assert wide.scales is not None
    zero = 0 if wide.zero_points is None else wide.zero_points
    ends = torch.stack([(codec.low - zero) * wide.scales, (codec.high - zero) * wide.scales])
    inside = w.clamp(ends.amin(0), ends.amax(0))
    assert torch.equal(codec.decode(codes.view_as(w), wide), packed.unpack())
    error, step = (packed.unpack() - inside).abs(), wide.scales.abs()
    assert (error <= step * (0.5 + 1e-3)).all()
    assert (inside == w).float().mean() > (0.9 if codec.bits > 2 else 0.5)


@pytest.mark.parametrize("codec", INTS, ids=str)
def test_all_codes_are_used_and_come_back(codec: Int) -> None:
    """Every code value survives, at every position of a byte."""
    codes = torch.arange(codec.low, codec.high + 1).float().repeat(3, 3)
    n, k = codes.shape
    groups = codec.groups(k)
    zeros = None if codec.symmetric else torch.full((n, groups), float(codec.high))
    scales = torch.full((n, groups), 0.25)
    got, grid = codec.read(codec.write(codes.flatten(), Grid(scales, zeros)), n * k, n, k)
    assert torch.equal(got.view(n, k), codes)
    assert grid.scales is not None
    assert torch.equal(grid.scales, scales)
    assert zeros is None or (grid.zero_points is not None and torch.equal(grid.zero_points, zeros))


# --- bit streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(1, 9))
@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 70), seed=st.integers(0, 1 << 20))
def test_bit_streams(width: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << width, (count,), generator=torch.Generator().manual_seed(seed))
    stream = pack_bits(codes, width)
    assert stream.numel() == stream_bytes(count, width) == -(-count * width // 8)
    assert unpack_bits(stream, width, count).tolist() == codes.tolist()
    assert slow_stream(stream.numpy(), width, count) == codes.tolist()
    high = torch.randint(0, 256, (count,)) & ~((1 << width) - 1)
    assert torch.equal(pack_bits(codes | high, width), stream), "only the low bits are stored"
    whole = int.from_bytes(bytes(stream.tolist()), "little")
    assert whole >> (count * width) == 0, "padding is zero"
