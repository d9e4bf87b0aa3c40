"""What the Triton kernels share: codes to numbers, products, and the way to the result.

Integer codes become floats exactly, by a magic number in the exponent instead of a conversion.
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
def e4m3(codes, DTYPE: tl.constexpr):
    """int32 codes of float8_e4m3fn, none of them NaN, exactly, as DTYPE.

    Shifted into place they are, subnormal ones too, 2⁻⁸ of what they mean as float16 and 2⁻¹²⁰ as
    float32. No conversion of the card's is used: those before sm_89 have none.
    """
    if DTYPE == tl.float16:
        bits = ((codes << 24) >> 17) & 0xBF80
        return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    else:
        bits = ((codes << 24) >> 4) & -0x78100000  # sign and the seven bits at 20
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)


@triton.jit
def field(words, WIDTH: tl.constexpr, part):
    """Field `part` of WIDTH bits in every word."""
    return (words.to(tl.int32) >> (part * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def in_place(words, WIDTH: tl.constexpr, part: tl.constexpr, zeros, OFFSET: tl.constexpr):
    """Field `part` minus OFFSET and zero points, times 2^low, exactly, as float32.

    `low` is where the field lies in the lower 16 bits: one shift serves the fields of a half word.
    """
    low: tl.constexpr = part * WIDTH % 16
    high: tl.constexpr = part * WIDTH // 16 * 16
    masked = (words.to(tl.int32) >> high) & (((1 << WIDTH) - 1) << low)
    wide = (masked | 0x4B000000).to(tl.float32, bitcast=True)  # 2²³ + field · 2^low
    return wide - (8388608 + ((zeros + OFFSET) << low)).to(tl.float32)


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
def group_of(column, GROUP: tl.constexpr):
    """The scale group of a column; GROUP 0 is one for all."""
    return column // GROUP if GROUP > 0 else 0


@triton.jit
def grid_at(scales, zeros, at, ok):
    """float32 scales and int32 zero points, 0 where there are none."""
    scale = tl.load(scales + at, mask=ok, other=0.0).to(tl.float32)
    zero = tl.zeros(at.shape, tl.int32)
    if zeros is not None:
        zero = tl.load(zeros + at, mask=ok, other=0).to(tl.int32)
    return scale, zero


@triton.jit
def ones(words):
    """Set bits of every int32 word, spelt as LLVM knows it: one instruction on GPUs."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24) & 0xFF


@triton.jit
def stored(plane, begin, index, ok, WIDTH: tl.constexpr):
    """Codes number `index` (32, N) behind `begin` (N,) of a stream of WIDTH-bit codes in int32."""
    PER: tl.constexpr = 32 // WIDTH
    word = tl.load((plane + begin // PER)[None, :] + index // PER, mask=ok, other=0)
    return (word >> (index % PER * WIDTH)) & ((1 << WIDTH) - 1)


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
                low + ms[:, None].to(tl.int64) * rank + ranks[None, :],
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
