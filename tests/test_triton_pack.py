"""The orders that the Triton kernels read, decoded by plain loops, and how work becomes tasks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import integers

from sparsefx.codegen.triton import ORDERS
from sparsefx.codegen.triton_lanes import lanes
from sparsefx.codegen.triton_launch import Config, cut, plan
from sparsefx.codegen.triton_pack import (
    Columns,
    Masked,
    Task,
    columns,
    columns_rejects,
    masked,
    masked_rejects,
    planes,
)
from sparsefx.ir.codecs import Int
from sparsefx.ir.format import Format

torch.set_num_threads(1)

ROW_BLOCKS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 60)), max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(strips=ROW_BLOCKS, wanted=st.integers(0, 300))
def test_tasks_hold_every_block_once(strips: list[tuple[int, int]], wanted: int) -> None:
    """Each row block's tasks follow each other; none is more than one block above the mean."""
    row_blocks: list[Task] = []
    begin = 0
    for strip, (rows, count) in enumerate(strips):
        row_blocks += [(strip, 16 * row, begin, begin + count) for row in range(rows)]
        begin += count
    parts = cut(row_blocks, wanted)
    assert parts == cut(list(row_blocks), wanted)
    for (strip, row, first, last), tasks in zip(row_blocks, parts, strict=True):
        assert [t[:2] for t in tasks] == [(strip, row)] * len(tasks)
        edges = [first, *(t[3] for t in tasks)]
        assert [t[2] for t in tasks] == edges[:-1]
        assert edges[-1] == last
        assert edges == sorted(edges)
        assert len(tasks) == 1 or all(t[2] < t[3] for t in tasks)
    total = sum(last - first for *_, first, last in row_blocks)
    flat = [t for tasks in parts for t in tasks]
    if wanted and flat:
        assert max(last - first for *_, first, last in flat) <= total / wanted + 1
        assert len(flat) <= wanted + len(row_blocks)
    else:
        assert len(flat) == len(row_blocks)


def test_a_plan_names_every_blocks_tasks() -> None:
    weight = columns(integers("tile16x16@70%+int4", "columns", 1, 70, 600).packed, False)
    made = plan(weight, Config(16, 16, tasks=13))
    assert made.split
    last = 0
    for strip, row, first, end in made.blocks.tolist():
        assert first == last
        assert [t[:2] for t in made.tasks[first:end].tolist()] == [[strip, row]] * (end - first)
        last = end
    assert last == len(made.tasks)
    whole = plan(weight, Config(16, 16))
    assert not whole.split
    assert len(whole.tasks) == len(whole.blocks) == 5


def codes_of(words: tuple[Tensor, ...], codec: Int, parts: int) -> list[Tensor]:
    """Codes of every part of words (…): plane by plane, lowest bits first."""
    out = []
    for part in range(parts):
        code, low = torch.zeros(words[0].shape, dtype=torch.int64), 0
        for width, plane in zip(planes(codec.bits), words, strict=True):
            code |= ((plane.to(torch.int64) >> (part * width)) & ((1 << width) - 1)) << low
            low += width
        out.append(code)
    return out


def decode_columns(weight: Columns) -> tuple[Tensor, Tensor]:
    """The dense weight, and how often each position is named."""
    codec = weight.format.codec
    assert isinstance(codec, Int)
    w, named = torch.zeros(weight.n, weight.k), torch.zeros(weight.n, weight.k, dtype=torch.int64)
    codes = torch.stack(codes_of(weight.planes, codec, weight.parts), 1)
    strips = torch.arange(len(weight.counts)).repeat_interleave(torch.tensor(weight.counts))
    assert weight.scales is not None
    done = 0
    for block, strip in enumerate(strips.tolist()):
        done = 0 if block and strip != strips[block - 1] else done
        for part in range(weight.parts):
            for s in range(weight.slice):
                if weight.columns is None:
                    c = (done * weight.parts + part) * weight.slice + s
                elif weight.gather == 1:
                    start = int(weight.columns[block, part])
                    c = start + s if start >= 0 else -1
                else:
                    c = int(weight.columns[block, part, s])
                if not 0 <= c < weight.k:
                    continue
                group = c // codec.group(weight.k)
                rows = slice(strip * weight.rows, min((strip + 1) * weight.rows, weight.n))
                r = rows.stop - rows.start
                zero = 0 if weight.zeros is None else weight.zeros[strip, group, :r].float()
                value = codes[block, part, s, :r].float() - weight.offset - zero
                w[rows, c] += value * weight.scales[strip, group, :r].float()
                named[rows, c] += 1
        done += 1
    return w, named


def decode_masked(weight: Masked) -> tuple[Tensor, Tensor]:
    codec = weight.format.codec
    assert isinstance(codec, Int)
    assert weight.scales is not None
    w, named = torch.zeros(weight.n, weight.k), torch.zeros(weight.n, weight.k, dtype=torch.int64)
    streams = [
        torch.stack([(p.to(torch.int64) >> (i * b)) & ((1 << b) - 1) for i in range(32 // b)], 1)
        for b, p in zip(planes(codec.bits), weight.planes, strict=True)
    ]
    for row in range(weight.n):
        place = int(weight.begins[row])
        for word, bits in enumerate(weight.mask[row // weight.mask_rows].tolist()):
            if word % weight.step_words == 0:
                start = int(weight.begins[row] + weight.starts[row, word // weight.step_words])
                assert place == start
            for bit in range(32):
                if not (bits >> bit) & 1:
                    continue
                for c in range(
                    (word * 32 + bit) * weight.cell, (word * 32 + bit + 1) * weight.cell
                ):
                    code, low = 0, 0
                    for b, stream in zip(planes(codec.bits), streams, strict=True):
                        code |= int(stream.flatten()[place]) << low
                        low += b
                    place += 1
                    if c < weight.k:
                        group = c // codec.group(weight.k)
                        zero = 0 if weight.zeros is None else int(weight.zeros[row, group])
                        w[row, c] = (code - weight.offset - zero) * weight.scales[
                            row, group
                        ].float()
                        named[row, c] += 1
    return w, named


@pytest.mark.parametrize(
    "text",
    ["int4", "uint3g32", "int7g64", "int8", "tile16x1@50%+uint5g32", "tile16x16@50%+int2",
     "tile1x16@50%+uint3g32", "tile2x64@50%+int6g64", "tile32x3@50%+uint8", "tile64x16@50%+int3"],
)  # fmt: skip
@pytest.mark.parametrize("a8", [False, True])
def test_columns_hold_the_weight(text: str, a8: bool) -> None:
    for n, k in ((1, 1), (5, 40), (37, 150)):
        packed = integers(text, "columns", 1, n, k).packed
        if columns_rejects(packed.format, k, a8) is None:
            weight = columns(packed, a8)
            got, named = decode_columns(weight)
            assert torch.equal(got, packed.unpack())
            mask = packed.read()[1]
            assert bool((named == (1 if mask is None else mask)).all())
            assert weight.slice % (32 if a8 else 16) == 0
            assert len(weight.planes[0]) == sum(weight.counts)


def decode_lanes(weight: Columns) -> tuple[Tensor, Tensor]:
    """The dense weight, and how often each position is named."""
    codec = weight.format.codec
    assert isinstance(codec, Int)
    assert weight.columns is not None
    assert weight.order is not None
    assert weight.scales is not None
    w, named = torch.zeros(weight.n, weight.k), torch.zeros(weight.n, weight.k, dtype=torch.int64)
    codes = torch.stack(codes_of(weight.planes, codec, weight.parts), 1)  # block, part, row, s
    strips = [strip for strip, count in enumerate(weight.counts) for _ in range(count)]
    assert len(strips) == len(codes) == len(weight.columns)
    for block, strip in enumerate(strips):
        for part in range(weight.parts):
            for lane in range(weight.rows):
                row = int(weight.order[strip * weight.rows + lane])
                start = int(weight.columns[block, part, lane])
                if start < 0:
                    continue
                for c in range(start, min(start + weight.slice, weight.k)):
                    group = c // codec.group(weight.k)
                    zero = 0 if weight.zeros is None else int(weight.zeros[strip, group, lane])
                    value = int(codes[block, part, lane, c - start]) - weight.offset - zero
                    w[row, c] += value * weight.scales[strip, group, lane].float()
                    named[row, c] += 1
    return w, named


@pytest.mark.parametrize(
    "text",
    ["tile1x16@50%+uint3g32", "tile4x16@50%+int8", "tile2x32@50%+uint5g16", "tile8x48@50%+int4"],
)
def test_lanes_hold_the_weight(text: str) -> None:
    for n, k in ((1, 1), (5, 40), (70, 150)):
        packed = integers(text, "lanes", 1, n, k).packed
        mask = packed.read()[1]
        assert mask is not None
        mask = mask.clone()
        mask[: n // 2] = False  # uneven rows, and those that store nothing
        whole = packed.format.layout.mask(packed.format.layout.index(mask), *mask.shape)
        assert whole is not None
        packed = packed.format.pack(packed.unpack(), whole, packed.read()[2])
        weight = lanes(packed)
        got, named = decode_lanes(weight)
        assert torch.equal(got, packed.unpack())
        assert bool((named >= whole).all())
        assert bool((named <= 1).all())


def test_lanes_store_like_rows_together() -> None:
    """Every second row is nearly empty: sorted, one strip of two has room for full ones."""
    weight, fmt = torch.ones(128, 256), Format.parse("tile1x16@50%+int4")
    mask = torch.zeros(128, 256, dtype=torch.bool)
    mask[::2] = True
    mask[1::2, :16] = True
    full, sparse = lanes(fmt.pack(weight, mask)).counts
    assert sparse == 1 < full


@pytest.mark.parametrize(
    ("text", "order"),
    [("int4", "columns"), ("tile16x16@50%+int4", "columns"), ("tile1x16@50%+int4", "lanes"),
     ("2:4+int4", "masked")],
)  # fmt: skip
def test_weights_without_rows_have_no_tasks(text: str, order: str) -> None:
    weight = ORDERS[order](Format.parse(text).pack(torch.zeros(0, 48)))
    assert weight.row_blocks(16) == []


@pytest.mark.parametrize(
    "text",
    ["bitmap@50%+int4", "bitmap@90%+uint3g32", "2:4+int8", "5:16+uint7g64", "tile1x16@50%+uint5",
     "tile3x48@50%+int2g32", "tile2x64@50%+int6", "tile4x4@50%+int3", "tile1x3@50%+uint4"],
)  # fmt: skip
def test_masked_holds_the_weight(text: str) -> None:
    for n, k in ((1, 1), (5, 48), (7, 560)):
        packed = integers(text, "masked", 1, n, k).packed
        got, named = decode_masked(masked(packed))
        assert torch.equal(got, packed.unpack())
        mask = packed.read()[1]
        assert mask is not None
        assert bool((named == mask).all())


def test_rows_of_blocks_that_no_strip_divides() -> None:
    weight = columns(integers("tile48x1@50%+int4", "columns", 1, 100, 40).packed, False)
    found = [(strip, row) for strip, row, *_ in weight.row_blocks(32)]
    assert found == [(0, 0), (0, 32), (1, 0), (1, 32), (2, 0)]


@pytest.mark.parametrize(
    ("text", "a8", "both"),
    [("int4g16", False, (True, False)), ("int4g16", True, (False, False)),
     ("int4g24", False, (False, False)), ("2:4+int4g32", False, (False, True)),
     ("bitmap@50%+int4g16", False, (False, False)), ("tile1x8@50%+int4", False, (False, True)),
     ("tile1x16@50%+int4g64", True, (False, True)), ("tile16x1@50%+int4g48", False, (True, False))],
)  # fmt: skip
def test_what_no_order_holds_is_said(text: str, a8: bool, both: tuple[bool, bool]) -> None:
    fmt = Format.parse(text)
    assert (columns_rejects(fmt, 192, a8) is None, masked_rejects(fmt, 192) is None) == both
