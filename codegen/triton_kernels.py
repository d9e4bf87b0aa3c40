"""Triton kernels of `sparsefx::linear`: weights in strips or under a mask, and what surrounds.

Numbers are those of the reference: integer codes become floats exactly (a magic number in the
exponent instead of a conversion), sums are float32 or int32, scales multiply sums. From
`BLOCK_M` 64 on with float activations scales multiply the weights before the product, as
`Packed.unpack` rounds them. Importing this module needs triton; only `triton_launch` does.
"""

# mypy: ignore-errors
# (Kernels are read by Triton's compiler, whose types mypy does not know.)

import triton
import triton.language as tl


@triton.jit
def numbers(codes, zeros, OFFSET: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """int32 codes minus OFFSET and zero points, exactly, as DTYPE."""
    if DTYPE == tl.float16:
        wide = (codes | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)  # 1024 + code
        return wide - (zeros + (1024 + OFFSET)).to(tl.float32).to(tl.float16)
    elif DTYPE == tl.bfloat16 and BITS < 8:
        wide = (codes | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # 128 + code
        return wide - (zeros + (128 + OFFSET)).to(tl.float32).to(tl.bfloat16)
    elif DTYPE == tl.float32:
        wide = (codes | 0x4B000000).to(tl.float32, bitcast=True)  # 2²³ + code
        return wide - (zeros + (8388608 + OFFSET)).to(tl.float32)
    elif DTYPE == tl.int8:
        return (codes - (zeros + OFFSET)).to(tl.int8)
    else:
        return (codes - (zeros + OFFSET)).to(tl.float32).to(DTYPE)


@triton.jit
def field(words, WIDTH: tl.constexpr, part):
    """Field `part` of WIDTH bits in every word."""
    return (words.to(tl.int32) >> (part * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def finish(
    acc, ms, ns, M, N, y, row_scales, bias, low, up, rank, multiply, residual,
    RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y[ms, ns] = act(acc · row scale + bias + low · upᵀ) · multiply + residual."""
    m_ok, n_ok = ms < M, ns < N
    if row_scales is not None:
        acc = acc * tl.load(row_scales + ms, mask=m_ok, other=0.0)[:, None]
    if bias is not None:
        acc += tl.load(bias + ns, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        for r in tl.static_range(0, RANK, 16):
            ranks = r + tl.arange(0, 16)
            r_ok = ranks < rank
            left = tl.load(
                low + ms[:, None] * rank + ranks[None, :],
                mask=m_ok[:, None] & r_ok[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                up + ns[None, :].to(tl.int64) * rank + ranks[:, None],
                mask=n_ok[None, :] & r_ok[:, None], other=0.0,
            )  # fmt: skip
            acc = product(left, right, acc)
    if ACTIVATION == 1:
        acc = tl.maximum(acc, 0.0)
    elif ACTIVATION == 2:
        acc = acc * tl.sigmoid(acc)
    elif ACTIVATION == 3:
        acc = gelu(acc)
    elif ACTIVATION == 4:
        acc = gelu_tanh(acc)
    at = ms[:, None].to(tl.int64) * N + ns[None, :]
    ok = m_ok[:, None] & n_ok[None, :]
    if multiply is not None:
        acc = acc * tl.load(multiply + at, mask=ok, other=0.0).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=ok)


@triton.jit
def product(left, right, acc):
    """acc (M, N) + left (M, K) · right (K, N), on tensor cores where the sizes allow it."""
    if left.shape[0] < 16 or right.shape[1] < 16:
        wide = left.to(tl.float32)[:, :, None] * right.to(tl.float32)[None, :, :]
        acc += tl.sum(wide, axis=1)
    elif left.dtype == tl.int8:
        acc += tl.dot(left, right, out_dtype=tl.int32)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def grid_at(scales, zeros, at, ok):
    """float32 scales and int32 zero points, 0 where there are none."""
    scale = tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)
    zero = tl.zeros(at.shape, tl.int32)
    if zeros is not None:
        zero = tl.load(zeros + at, mask=ok, other=0).to(tl.int32)
    return scale, zero


@triton.jit
def keep(
    acc, task, ms, n_local, n_ok, ns, M, N, y, partial,
    row_scales, bias, low, up, rank, multiply, residual,
    SPLIT: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The result, or, where several tasks share it, this task's part of it."""
    if SPLIT:
        at = (task.to(tl.int64) * M + ms[:, None]) * BLOCK_N + n_local[None, :]
        tl.store(partial + at, acc, mask=(ms < M)[:, None] & n_ok[None, :])
    else:
        finish(
            acc, ms, tl.where(n_ok, ns, N), M, N, y, row_scales, bias, low, up, rank, multiply,
            residual, RANK, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def columns_kernel(
    x, y, M, N, K,
    plane0, plane1, plane2, scales, zeros, columns, tasks,
    row_scales, bias, low, up, rank, multiply, residual, partial,
    R, group, groups,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, OFFSET: tl.constexpr,
    PARTS: tl.constexpr, SLICE: tl.constexpr, GATHER: tl.constexpr, UNIFORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr, PRESCALE: tl.constexpr,
    SPLIT: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One task: BLOCK_N rows of one strip times its stored columns first…last, in whole blocks.

    A strip is R rows of the weight that store the same columns (`triton_pack.Columns`). A block is
    PARTS slices of SLICE columns; word s of a block holds column s of every slice. GATHER: slices
    are consecutive columns of x (0), start at `columns[block, part]` (1), or every column is named
    by `columns[block, part, s]` (2); −1 is padding.
    """
    task = tl.program_id(0)
    strip = tl.load(tasks + task * 4).to(tl.int64)
    row0 = tl.load(tasks + task * 4 + 1)
    first, last = tl.load(tasks + task * 4 + 2), tl.load(tasks + task * 4 + 3)
    n_local = tl.arange(0, BLOCK_N)
    rows = row0 + n_local
    ns = strip * R + rows
    n_ok = (rows < R) & (ns < N)
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = ms < M
    x_rows = x + ms[:, None].to(tl.int64) * K
    s = tl.arange(0, SLICE)
    DTYPE: tl.constexpr = tl.float32 if VECTOR else x.dtype.element_ty
    BITS: tl.constexpr = WIDTH0 + WIDTH1 + WIDTH2
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    if VECTOR:
        acc = tl.zeros((BLOCK_M, SLICE, BLOCK_N), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at = (first.to(tl.int64) * SLICE + s[:, None]) * R + rows[None, :]
    for block in range(first, last):
        words0 = tl.load(plane0 + at, mask=n_ok[None, :], other=0)
        if WIDTH1 > 0:
            words1 = tl.load(plane1 + at, mask=n_ok[None, :], other=0)
        if WIDTH2 > 0:
            words2 = tl.load(plane2 + at, mask=n_ok[None, :], other=0)
        if UNIFORM:
            grid = (strip * groups + block * (PARTS * SLICE) // group) * R + rows
            scale, zero = grid_at(scales, zeros, grid, n_ok)
        total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for part in tl.static_range(PARTS):
            if GATHER == 0:
                start = block * (PARTS * SLICE) + part * SLICE
                cols = start + s
            elif GATHER == 1:
                start = tl.load(columns + block * PARTS + part)
                cols = tl.where(start < 0, K, start + s)
            else:
                cols = tl.load(columns + (block * PARTS + part) * SLICE + s)
                start = tl.max(cols, axis=0)
                cols = tl.where(cols < 0, K, cols)
            xs = tl.load(x_rows + cols[None, :], mask=m_ok[:, None] & (cols < K)[None, :], other=0)
            if BITS == 0:
                w = words0.to(DTYPE)
            else:
                codes = field(words0, WIDTH0, part)
                if WIDTH1 > 0:
                    codes |= field(words1, WIDTH1, part) << WIDTH0
                if WIDTH2 > 0:
                    codes |= field(words2, WIDTH2, part) << (WIDTH0 + WIDTH1)
                if not UNIFORM:
                    grid = (strip * groups + tl.maximum(start, 0) // group) * R + rows
                    scale, zero = grid_at(scales, zeros, grid, n_ok & (start < K))
                w = numbers(codes, zero[None, :], OFFSET, BITS, DTYPE)
            if VECTOR:
                if BITS > 0:
                    w *= scale[None, :]
                acc += xs.to(tl.float32)[:, :, None] * w[None, :, :]
            elif BITS == 0:
                acc = product(xs, w, acc)
            elif PRESCALE:
                acc = product(xs, (w.to(tl.float32) * scale[None, :]).to(w.dtype), acc)
            elif UNIFORM:
                total = product(xs, w, total)
            else:
                part_sum = product(xs, w, tl.zeros_like(total))
                acc += part_sum.to(tl.float32) * scale[None, :]
        if UNIFORM and not VECTOR and not PRESCALE:
            acc += total.to(tl.float32) * scale[None, :]
        at += SLICE * R
    if VECTOR:
        acc = tl.sum(acc, axis=1)
    keep(
        acc, task, ms, n_local, n_ok, ns, M, N, y, partial,
        row_scales, bias, low, up, rank, multiply, residual, SPLIT, RANK, ACTIVATION, BLOCK_N,
    )  # fmt: skip


@triton.jit
def ones(words):
    """Set bits of every int32 word."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24) & 0xFF


@triton.jit
def stored(plane, index, ok, WIDTH: tl.constexpr):
    """Code number `index` of a stream of WIDTH-bit codes in int32 words."""
    PER: tl.constexpr = 32 // WIDTH
    word = tl.load(plane + index // PER, mask=ok, other=0)
    return (word >> ((index % PER).to(tl.int32) * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit(do_not_specialize=["M"])
def mask_kernel(
    x, y, M, N, K,
    plane0, plane1, plane2, scales, zeros, mask, begins, starts, tasks,
    row_scales, bias, low, up, rank, multiply, residual, partial,
    group, groups, mask_rows, words, steps,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, OFFSET: tl.constexpr,
    CELL: tl.constexpr, WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, VECTOR: tl.constexpr, PRESCALE: tl.constexpr,
    SPLIT: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """One task: BLOCK_N rows times columns in steps first…last of WORDS mask words each.

    A mask bit stands for CELL consecutive columns of `mask_rows` rows; a row's stored codes follow
    each other from `begins[row]` on, those of a step `starts[row, step]` behind that
    (`triton_pack.Masked`).
    32 columns are decoded at a time: the rank of a column among its row's set bits is its place.
    """
    task = tl.program_id(0)
    row0 = tl.load(tasks + task * 4 + 1)
    first, last = tl.load(tasks + task * 4 + 2), tl.load(tasks + task * 4 + 3)
    n_local = tl.arange(0, BLOCK_N)
    ns = row0 + n_local
    n_ok = ns < N
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_ok = ms < M
    x_rows = x + ms[:, None].to(tl.int64) * K
    j = tl.arange(0, 32)
    DTYPE: tl.constexpr = tl.float32 if VECTOR else x.dtype.element_ty
    BITS: tl.constexpr = WIDTH0 + WIDTH1 + WIDTH2
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    CELLS: tl.constexpr = 32 // CELL
    below = (1 << (j // CELL)) - 1
    position = tl.load(begins + ns, mask=n_ok, other=0)
    position += tl.load(starts + ns.to(tl.int64) * steps + first, mask=n_ok, other=0)
    mask_at = mask + (ns // mask_rows).to(tl.int64) * words
    if VECTOR:
        acc = tl.zeros((BLOCK_M, 32, BLOCK_N), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for word in range(first * WORDS, tl.minimum(last * WORDS, words)):
        bits32 = tl.load(mask_at + word, mask=n_ok, other=0)
        for part in tl.static_range(CELL):
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
                w = tl.load(plane0 + index, mask=ok, other=0.0).to(DTYPE)
            else:
                codes = stored(plane0, index, ok, WIDTH0)
                if WIDTH1 > 0:
                    codes |= stored(plane1, index, ok, WIDTH1) << WIDTH0
                if WIDTH2 > 0:
                    codes |= stored(plane2, index, ok, WIDTH2) << (WIDTH0 + WIDTH1)
                grid = ns.to(tl.int64) * groups + start // group
                scale, zero = grid_at(scales, zeros, grid, n_ok & (start < K))
                # What is not stored is zero: its code is the zero point.
                codes = tl.where(ok, codes, zero[None, :] + OFFSET)
                w = numbers(codes, zero[None, :], OFFSET, BITS, DTYPE)
            if VECTOR:
                if BITS > 0:
                    w *= scale[None, :]
                acc += xs.to(tl.float32)[:, :, None] * w[None, :, :]
            elif BITS == 0:
                acc = product(xs, w, acc)
            elif PRESCALE:
                acc = product(xs, (w.to(tl.float32) * scale[None, :]).to(w.dtype), acc)
            else:
                none = tl.zeros((BLOCK_M, BLOCK_N), SUM)
                acc += product(xs, w, none).to(tl.float32) * scale[None, :]
    if VECTOR:
        acc = tl.sum(acc, axis=1)
    keep(
        acc, task, ms, n_local, n_ok, ns, M, N, y, partial,
        row_scales, bias, low, up, rank, multiply, residual, SPLIT, RANK, ACTIVATION, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    partial, y, M, N, R, blocks,
    row_scales, bias, low, up, rank, multiply, residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Add the parts of every block of results in the tasks' order: the same sum at every run.

    `blocks` (row blocks, 4): strip, first row in it, its first task and the one after its last.
    """
    at = blocks + tl.program_id(0) * 4
    strip, row0 = tl.load(at).to(tl.int64), tl.load(at + 1)
    first, last = tl.load(at + 2), tl.load(at + 3)
    n_local = tl.arange(0, BLOCK_N)
    rows = row0 + n_local
    ns = strip * R + rows
    n_ok = (rows < R) & (ns < N)
    ms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    place = (first.to(tl.int64) * M + ms[:, None]) * BLOCK_N + n_local[None, :]
    for _ in range(first, last):
        acc += tl.load(partial + place, mask=(ms < M)[:, None] & n_ok[None, :], other=0.0)
        place += M * BLOCK_N
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
    inverse = tl.zeros((BLOCK_M,), tl.float32)
    if row_scales is not None:
        reach = tl.zeros((BLOCK_M,), tl.float32)
        bad = tl.zeros((BLOCK_M,), tl.int32)
        for k in range(0, K, BLOCK_K):
            ok = m_ok[:, None] & (k + j < K)[None, :]
            size = tl.abs(tl.load(x + at + (k + j)[None, :], mask=ok, other=0.0).to(tl.float32))
            finite = size < float("inf")
            bad = tl.maximum(bad, tl.max((~finite).to(tl.int32), axis=1))
            reach = tl.maximum(reach, tl.max(tl.where(finite, size, 0.0), axis=1))
        inverse = tl.where(reach == 0, 1.0, reach / 127.0)
        kept = tl.where(bad > 0, float("nan"), inverse)
        tl.store(row_scales + ms, kept, mask=m_ok)
    if RANK > 0:
        ranks = tl.arange(0, RANK)
        r_ok = ranks < rank
        acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    for k in range(0, K, BLOCK_K):
        ok = m_ok[:, None] & (k + j < K)[None, :]
        xs = tl.load(x + at + (k + j)[None, :], mask=ok, other=0.0)
        if row_scales is not None:
            share = xs.to(tl.float32) / inverse[:, None]
            share = tl.where(tl.abs(share) <= 127.5, share, 0.0)
            # 1.5·2²³ added and taken away rounds half to even.
            near = tl.minimum(tl.maximum((share + 12582912.0) - 12582912.0, -127.0), 127.0)
            tl.store(codes + at + (k + j)[None, :], near.to(tl.int8), mask=ok)
        if RANK > 0:
            part = tl.load(
                down + ranks[None, :] * K + (k + j)[:, None],
                mask=r_ok[None, :] & (k + j < K)[:, None], other=0.0,
            )  # fmt: skip
            acc = product(xs, part, acc)
    if RANK > 0:
        acc *= tl.load(strength + ranks, mask=r_ok, other=0.0).to(tl.float32)[None, :]
        place = ms[:, None] * rank + ranks[None, :]
        tl.store(low + place, acc.to(low.dtype.element_ty), mask=m_ok[:, None] & r_ok[None, :])
