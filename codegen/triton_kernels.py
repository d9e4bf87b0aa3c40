"""Triton kernels of `sparsefx::linear`: weights in strips or under a mask, and what surrounds.

Numbers are those of the reference: codes and their sums are exact where they are integers, sums of
floats are float32. Scales multiply sums; from `BLOCK_M` 64 on with float activations they multiply
the weights before the product, as `Packed.unpack` rounds them. Importing this needs triton.
"""

# mypy: ignore-errors
# (Kernels are read by Triton's compiler, whose types mypy does not know.)

import triton
import triton.language as tl

from sparsefx.codegen.triton_parts import (
    e4m3,
    field,
    finish,
    grid_at,
    group_of,
    in_place,
    keep,
    numbers,
    ones,
    product,
    stored,
)  # fmt: skip


@triton.jit(do_not_specialize=["M", "groups"])
def columns_kernel(
    x, y, M, N, K,
    plane0, plane1, plane2, scales, zeros, columns, tasks,
    row_scales, bias, low, up, rank, multiply, residual, partial,
    R, groups,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SLICE: tl.constexpr, GATHER: tl.constexpr,
    UNIFORM: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRESCALE: tl.constexpr, UNROLL: tl.constexpr,
    SPLIT: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One task: BLOCK_N rows of one strip times its stored columns first…last, in whole blocks.

    A strip is R rows of the weight that store the same columns (`triton_pack.Columns`). A block is
    PARTS slices of SLICE columns; word s of a block holds column s of every slice. GATHER: slices
    are consecutive columns of x (0), start at `columns[block, part]` (1), or every column is named
    by `columns[block, part, s]` (2); what is below 0 is padding.
    """
    task = tl.program_id(0)
    strip = tl.load(tasks + task * 4).to(tl.int64)
    row0 = tl.multiple_of(tl.load(tasks + task * 4 + 1), BLOCK_N)
    first, last = tl.load(tasks + task * 4 + 2), tl.load(tasks + task * 4 + 3)
    n_local = tl.arange(0, BLOCK_N)
    rows = row0 + n_local
    ns = strip * R + rows
    n_ok = (rows < R) & (ns < N)
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = ms < M
    x_rows = x + ms[:, None].to(tl.int64) * K
    s = tl.arange(0, SLICE)
    DTYPE: tl.constexpr = x.dtype.element_ty
    BITS: tl.constexpr = WIDTH0 + WIDTH1 + WIDTH2
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at = (first.to(tl.int64) * SLICE + s[:, None]) * R + rows[None, :]
    if BITS > 0:
        scales += strip * groups * R
        if zeros is not None:
            zeros += strip * groups * R
    for block in range(first, last):
        words0 = tl.load(plane0 + at, mask=n_ok[None, :], other=0)
        if WIDTH1 > 0:
            words1 = tl.load(plane1 + at, mask=n_ok[None, :], other=0)
        if WIDTH2 > 0:
            words2 = tl.load(plane2 + at, mask=n_ok[None, :], other=0)
        if UNIFORM and BITS > 0:
            grid = group_of(block * (PARTS * SLICE), GROUP) * R + rows
            scale, zero = grid_at(scales, zeros, grid, n_ok)
        total = tl.zeros(acc.shape, SUM)
        for part in tl.range(0, PARTS, loop_unroll_factor=UNROLL):
            if GATHER == 0:
                start = block * (PARTS * SLICE) + part * SLICE
                cols = start + s
            elif GATHER == 1:
                start = tl.multiple_of(tl.load(columns + block * PARTS + part), SLICE)
                cols = start + s
            else:
                cols = tl.load(columns + (block * PARTS + part) * SLICE + s)
                start = tl.max(cols, axis=0)
            k_ok = (cols >= 0) & (cols < K)
            xs = tl.load(x_rows + cols[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0)
            if BITS == 0:
                w = words0.to(DTYPE)
            else:
                codes = field(words0, WIDTH0, part)
                if WIDTH1 > 0:
                    codes |= field(words1, WIDTH1, part) << WIDTH0
                if WIDTH2 > 0:
                    codes |= field(words2, WIDTH2, part) << (WIDTH0 + WIDTH1)
                if not UNIFORM:
                    grid = group_of(tl.maximum(start, 0), GROUP) * R + rows
                    scale, zero = grid_at(scales, zeros, grid, n_ok & (start < K))
                if FP8:
                    w = e4m3(codes, DTYPE)
                else:
                    w = numbers(codes, zero[None, :], OFFSET, BITS, DTYPE)
            if BITS == 0:
                acc = product(xs, w, acc)
            elif PRESCALE:
                acc = product(xs, (w.to(tl.float32) * scale[None, :]).to(w.dtype), acc)
            elif UNIFORM:
                total = product(xs, w, total)
            else:
                part_sum = product(xs, w, tl.zeros_like(total))
                acc += part_sum.to(tl.float32) * scale[None, :]
        if UNIFORM and BITS > 0 and not PRESCALE:
            acc += total.to(tl.float32) * scale[None, :]
        at += tl.full((), SLICE, tl.int64) * R
    keep(
        acc, task, ms, n_local, n_ok, ns, M, N, y, partial,
        row_scales, bias, low, up, rank, multiply, residual, SPLIT, RANK, ACTIVATION, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "groups"])
def vector_kernel(
    x, y, M, N, K,
    plane0, plane1, plane2, scales, zeros, columns, order, tasks,
    row_scales, bias, low, up, rank, multiply, residual, partial,
    R, groups,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, OFFSET: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SLICE: tl.constexpr, GATHER: tl.constexpr,
    UNIFORM: tl.constexpr, FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`columns_kernel` for one row of x (BLOCK_M 1), in float32 without tensor cores.

    GATHER 3: every row of the strip names its own slices, `columns[block, part, row]`, and the
    strip's rows are those of the result that `order` names; words lie row by row.
    """
    task = tl.program_id(0)
    strip = tl.load(tasks + task * 4).to(tl.int64)
    row0 = tl.multiple_of(tl.load(tasks + task * 4 + 1), BLOCK_N)
    first, last = tl.load(tasks + task * 4 + 2), tl.load(tasks + task * 4 + 3)
    n_local = tl.arange(0, BLOCK_N)
    rows = row0 + n_local
    n_ok = rows < R
    ns = strip * R + rows
    if GATHER == 3:
        ns = tl.load(order + ns, mask=n_ok, other=N)
    n_ok = n_ok & (ns < N)
    x_row = x + tl.program_id(1).to(tl.int64) * K
    s = tl.arange(0, SLICE)
    BITS: tl.constexpr = WIDTH0 + WIDTH1 + WIDTH2
    acc = tl.zeros((SLICE, BLOCK_N), tl.float32)
    if GATHER == 3:
        at = (first.to(tl.int64) * R + rows[None, :]) * SLICE + s[:, None]
    else:
        at = (first.to(tl.int64) * SLICE + s[:, None]) * R + rows[None, :]
    if BITS > 0:
        scales += strip * groups * R
        if zeros is not None:
            zeros += strip * groups * R
    for block in range(first, last):
        words0 = tl.load(plane0 + at, mask=n_ok[None, :], other=0)
        if WIDTH1 > 0:
            words1 = tl.load(plane1 + at, mask=n_ok[None, :], other=0)
        if WIDTH2 > 0:
            words2 = tl.load(plane2 + at, mask=n_ok[None, :], other=0)
        if UNIFORM and BITS > 0:
            grid = group_of(block * (PARTS * SLICE), GROUP) * R + rows
            scale, zero = grid_at(scales, zeros, grid, n_ok)
        total = tl.zeros((SLICE, BLOCK_N), tl.float32)
        for part in tl.static_range(PARTS):
            if GATHER == 0:
                start = block * (PARTS * SLICE) + part * SLICE
                cols = (start + s)[:, None]
            elif GATHER == 1:
                start = tl.multiple_of(tl.load(columns + block * PARTS + part), SLICE)
                cols = (start + s)[:, None]
            elif GATHER == 2:
                cols = tl.load(columns + (block * PARTS + part) * SLICE + s)[:, None]
                start = tl.max(cols)
            else:
                start = tl.load(columns + (block * PARTS + part) * R + rows, mask=n_ok, other=-32)
                start = tl.multiple_of(start.to(tl.int32), [SLICE])
                cols = start[None, :] + s[:, None]
            xs = tl.load(x_row + cols, mask=(cols >= 0) & (cols < K), other=0).to(tl.float32)
            if BITS == 0:
                w = words0.to(tl.float32)
            else:
                if not UNIFORM:
                    grid = group_of(tl.maximum(start, 0), GROUP) * R + rows
                    scale, zero = grid_at(scales, zeros, grid, n_ok & (start < K))
                if FP8:
                    w = e4m3(field(words0, WIDTH0, part), tl.float32)
                elif WIDTH1 == 0:
                    w = in_place(words0, WIDTH0, part, zero[None, :], OFFSET)
                    xs *= 1.0 / (1 << (part * WIDTH0 % 16))
                else:
                    codes = field(words0, WIDTH0, part) | (field(words1, WIDTH1, part) << WIDTH0)
                    if WIDTH2 > 0:
                        codes |= field(words2, WIDTH2, part) << (WIDTH0 + WIDTH1)
                    w = numbers(codes, zero[None, :], OFFSET, BITS, tl.float32)
            if BITS > 0 and not UNIFORM:
                w *= scale[None, :]
            total += xs * w
        acc += total * scale[None, :] if UNIFORM and BITS > 0 else total
        at += tl.full((), SLICE, tl.int64) * R
    keep(
        tl.sum(acc, axis=0)[None, :], task, tl.program_id(1) + tl.arange(0, 1), n_local, n_ok, ns,
        M, N, y, partial,
        row_scales, bias, low, up, rank, multiply, residual, SPLIT, RANK, ACTIVATION, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "groups", "mask_rows", "words", "steps"])
def mask_kernel(
    x, y, M, N, K,
    plane0, plane1, plane2, scales, zeros, mask, begins, starts, tasks,
    row_scales, bias, low, up, rank, multiply, residual, partial,
    groups, mask_rows, words, steps,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, OFFSET: tl.constexpr,
    FP8: tl.constexpr, GROUP: tl.constexpr, CELL: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRESCALE: tl.constexpr,
    SPLIT: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One task: BLOCK_N rows times columns in steps first…last of WORDS mask words each.

    A mask bit stands for CELL consecutive columns of `mask_rows` rows; a row's stored codes follow
    each other from `begins[row]` on, those of a step `starts[row, step]` behind that
    (`triton_pack.Masked`).
    32 columns are decoded at a time: the rank of a column among its row's set bits is its place.
    """
    task = tl.program_id(0)
    row0 = tl.multiple_of(tl.load(tasks + task * 4 + 1), BLOCK_N)
    first, last = tl.load(tasks + task * 4 + 2), tl.load(tasks + task * 4 + 3)
    n_local = tl.arange(0, BLOCK_N)
    ns = row0 + n_local
    n_ok = ns < N
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = ms < M
    x_rows = x + ms[:, None].to(tl.int64) * K
    j = tl.arange(0, 32)
    DTYPE: tl.constexpr = x.dtype.element_ty
    BITS: tl.constexpr = WIDTH0 + WIDTH1 + WIDTH2
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    CELLS: tl.constexpr = 32 // CELL
    below = (1 << (j // CELL)) - 1
    begin = tl.load(begins + ns, mask=n_ok, other=0)
    position = tl.load(starts + ns.to(tl.int64) * steps + first, mask=n_ok, other=0)
    mask_at = mask + (ns // mask_rows).to(tl.int64) * words
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for word in range(first * WORDS, tl.minimum(last * WORDS, words)):
        bits32 = tl.load(mask_at + word, mask=n_ok, other=0)
        # Not unrolled: with cells of 16 columns and more compilers took minutes over the code.
        for part in tl.range(0, CELL, loop_unroll_factor=1):
            start = (word * CELL + part) * 32
            bits = bits32
            if CELL > 1:
                bits = (bits32 >> (part * CELLS)) & ((1 << CELLS) - 1)
            cols = start + j
            ok = ((bits[None, :] >> (j // CELL)[:, None]) & 1) != 0
            rank_of = ones(bits[None, :] & below[:, None]) * CELL + (j % CELL)[:, None]
            index = position[None, :] + rank_of
            position += ones(bits) * CELL
            xs = tl.load(x_rows + cols[None, :], mask=m_ok[:, None] & (cols < K)[None, :], other=0)
            if BITS == 0:
                w = tl.load((plane0 + begin)[None, :] + index, mask=ok, other=0.0).to(DTYPE)
            else:
                codes = stored(plane0, begin, index, ok, WIDTH0)
                if WIDTH1 > 0:
                    codes |= stored(plane1, begin, index, ok, WIDTH1) << WIDTH0
                if WIDTH2 > 0:
                    codes |= stored(plane2, begin, index, ok, WIDTH2) << (WIDTH0 + WIDTH1)
                grid = ns.to(tl.int64) * groups + group_of(start, GROUP)
                scale, zero = grid_at(scales, zeros, grid, n_ok & (start < K))
                # What is not stored is zero: its code is the zero point.
                codes = tl.where(ok, codes, zero[None, :] + OFFSET)
                if FP8:
                    w = e4m3(codes, DTYPE)
                else:
                    w = numbers(codes, zero[None, :], OFFSET, BITS, DTYPE)
            if BITS == 0:
                acc = product(xs, w, acc)
            elif PRESCALE:
                acc = product(xs, (w.to(tl.float32) * scale[None, :]).to(w.dtype), acc)
            else:
                none = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                acc += product(xs, w, none).to(tl.float32) * scale[None, :]
    keep(
        acc, task, ms, n_local, n_ok, ns, M, N, y, partial,
        row_scales, bias, low, up, rank, multiply, residual, SPLIT, RANK, ACTIVATION, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    partial, y, M, N, R, blocks, order,
    row_scales, bias, low, up, rank, multiply, residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Add the parts of every block of results in the tasks' order: the same sum at every run.

    `blocks` (row blocks, 4): strip, first row in it, its first task and the one after its last.
    """
    at = blocks + tl.program_id(0) * 4
    strip = tl.load(at).to(tl.int64)
    row0 = tl.multiple_of(tl.load(at + 1), BLOCK_N)
    first, last = tl.load(at + 2), tl.load(at + 3)
    n_local = tl.arange(0, BLOCK_N)
    rows = row0 + n_local
    ns = strip * R + rows
    n_ok = rows < R
    if order is not None:
        ns = tl.load(order + ns, mask=n_ok, other=N)
    n_ok = n_ok & (ns < N)
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    place = (first.to(tl.int64) * M + ms[:, None]) * BLOCK_N + n_local[None, :]
    for _ in range(first, last):
        acc += tl.load(partial + place, mask=(ms < M)[:, None] & n_ok[None, :], other=0.0)
        place += tl.full((), BLOCK_N, tl.int64) * M
    finish(
        acc, ms, tl.where(n_ok, ns, N), M, N, y, row_scales, bias, low, up, rank, multiply,
        residual, RANK, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    x, codes, row_scales, low, down, strength, M, K, rank,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The activation pass: int8 codes and a scale per row of x, and low = (x · downᵀ) · strength.

    One scale per row: max|x| / 127, NaN for a row that holds NaN or infinity, as
    `ir.op.quantize_rows` gives it.
    """
    ms = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = ms < M
    at = ms[:, None].to(tl.int64) * K
    j = tl.arange(0, BLOCK_K)
    if row_scales is not None:
        reach = tl.zeros((BLOCK_M,), tl.float32)
        bad = tl.zeros((BLOCK_M,), tl.int32)
        for k in range(0, K, BLOCK_K):
            ok = m_ok[:, None] & (k + j < K)[None, :]
            size = tl.abs(tl.load(x + at + (k + j)[None, :], mask=ok, other=0.0).to(tl.float32))
            finite = size < float("inf")
            bad = tl.maximum(bad, tl.max((~finite).to(tl.int32), axis=1))
            reach = tl.maximum(reach, tl.max(tl.where(finite, size, 0.0), axis=1))
        # Plain `/` is an approximation on GPUs, and ties would fall elsewhere.
        scale = tl.where(reach == 0, 1.0, tl.div_rn(reach, tl.full(reach.shape, 127.0, tl.float32)))
        scale = tl.where(bad > 0, float("nan"), scale)
        tl.store(row_scales + ms, scale, mask=m_ok)
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        r_ok = ranks < rank
        acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for k in range(0, K, BLOCK_K):
        ok = m_ok[:, None] & (k + j < K)[None, :]
        xs = tl.load(x + at + (k + j)[None, :], mask=ok, other=0.0)
        if row_scales is not None:
            wide = xs.to(tl.float32)
            share = tl.div_rn(wide, tl.broadcast_to(scale[:, None], wide.shape))
            share = tl.where(tl.abs(share) <= 127.5, share, 0.0)  # 0 for NaN too
            # 1.5·2²³ added and taken away rounds half to even.
            near = tl.minimum(tl.maximum((share + 12582912.0) - 12582912.0, -127.0), 127.0)
            tl.store(codes + at + (k + j)[None, :], near.to(tl.int8), mask=ok)
        if RANK > 0:
            part = tl.load(
                down + ranks[None, :].to(tl.int64) * K + (k + j)[:, None],
                mask=r_ok[None, :] & (k + j < K)[:, None], other=0.0,
            )  # fmt: skip
            acc = product(xs, part, acc)
    if RANK > 0:
        acc *= tl.load(strength + ranks, mask=r_ok, other=0.0).to(tl.float32)[None, :]
        place = ms[:, None].to(tl.int64) * rank + ranks[None, :]
        tl.store(low + place, acc.to(low.dtype.element_ty), mask=m_ok[:, None] & r_ok[None, :])
