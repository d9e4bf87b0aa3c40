"""Faults for `mutate_native.py`: text that occurs once, what replaces it, what that breaks."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault in `runtime/native/`."""

    file: str
    old: str
    new: str
    breaks: str
    isa: str = ""
    """The only instruction set that has this code; empty: all have."""


# fmt: off
PACK = [
    ("unit = c / 4;", "unit = step() / 4 - 1 - c / 4;", "nibbles of a byte in reverse order"),
    ("(code >> 2) << (byte + unit)", "(code >> 2) << (byte + 7 - unit)", "third bits reversed"),
    ("(code & 3) << (byte + 2 * (unit % 4))", "(code & 3) << (byte + unit % 4)",
     "low bits of a 3-bit code shifted too little"),
    ("zero_points[row * groups_ + group]", "zero_points[row * groups_]",
     "zero point of the row's first group for all"),
    ("(row + r) * groups_ + segment.first / s_.group_size;", "(row + r) * groups_;",
     "scale of the row's first group for all"),
    ("mask |= uint64_t(1) << (4 * r + i);", "mask |= uint64_t(1) << (4 * r + 3 - i);",
     "columns of a mask in reverse order"),
    ("longest = std::max(longest, kept);", "longest = kept;",
     "units that share bytes: only the last one's are kept"),
    ("if (columns[0] >= 0 && stored(row + r, columns[0])) mask |= uint16_t(1) << r;",
     "if (columns[0] >= 0 && stored(row + r, columns[0])) mask |= uint16_t(1) << (kRows - 1 - r);",
     "rows of a mask in reverse order"),
    ("stored(row, segment.first + from + i)) << i", "stored(row, segment.first + i)) << i",
     "the first 64 columns' mask for all"),
    ("if (row % kRows && std::memcmp", "if (row % kRows > 1 && std::memcmp",
     "a panel's first row is not compared with the others"),
    ("(c - first) % columns &&", "(c - first) % ((columns + 1) / 2) &&",
     "masks that agree over half a step pass for whole ones"),
    ("std::find(s_.mask, s_.mask + total, 0) == s_.mask + total)",
     "std::find(s_.mask, s_.mask + total - 1, 0) == s_.mask + total - 1)",
     "a mask without its last position passes for full"),
    ("padded_ += steps * unit;", "padded_ += end - c;", "segments of activations are not padded"),
    ("(s_.a8_group ? c / s_.a8_group : 0)", "(0)", "one activation scale for all groups"),
    ("columns.push_back(segment.first + i);", "columns.push_back(segment.first);",
     "the first column of a segment for all"),
]

KERNELS = [
    ("V::set(w->zero * sum)", "V::zero()", "zero-point correction skipped"),
    ("V::mul(zero, V::set(sum))", "V::set(w->zero * sum)", "one zero point for all rows"),
    ("return V::fma(acc, scale, result);", "return V::fma(acc, scale, V::zerof());",
     "a segment overwrites those before it"),
    ("if (i < steps) step(0);", "", "an odd last step is dropped"),
    ("i + 2 <= steps;", "i + 2 < steps;", "an even last step is dropped"),
    ("for (int c = 1; c < kChains; ++c)", "for (int c = 2; c < kChains; ++c)",
     "one chain of sums is lost"),
    ("V::load_half(panel + 32 * s)", "V::load_half(panel)", "the first segment's scales for all"),
    ("V::load_bytes(panel + w->zeros_at + kRows * s)", "V::load_bytes(panel + w->zeros_at)",
     "the first segment's zero points for all"),
    ("sums[r * sums_stride + s]", "sums[s]", "the first row's sum of codes for all"),
    ("scales[r * scales_stride + s]", "scales[s]", "the first row's activation scale for all"),
    ("u < count; ++u, at += 4", "u + 1 < count; ++u, at += 4", "the last unit is dropped"),
    ("tile + r * tile_stride + kRows * q;", "tile + r * tile_stride + kRows * (kN - 1 - q);",
     "panels change places"),
    ("for (; r + kM <= rows; r += kM)", "for (; r + kM < rows; r += kM)",
     "the last row is dropped"),
    ("x + r * stride,\n", "x + (r + 1) * stride,\n", "rows of x off by one"),
]

MULTIPLY = [
    ("to += __builtin_popcountll(mask) * kSize;", "to += __builtin_popcountll(mask >> 1) * kSize;",
     "kept activations: a column overwritten"),
    ("to < end; to += 64)", "to < start; to += 64)", "no zeros behind the kept activations"),
    ("panel + w.masks_at + segment.start / 8", "panel + w.masks_at",
     "the first segment's columns for all"),
    ("out += bytes;", "out += bytes + 4;", "segments of kept activations too far apart"),
    ("if (r < rows) direct<Reader, kCodes, 1>", "if (false) direct<Reader, kCodes, 1>",
     "an odd last row is dropped"),
    ("__builtin_nearbyintf(x[i] / scale)", "__builtin_floorf(x[i] / scale + 0.5f)",
     "activations rounded half up"),
    ("most / 127;", "most / 128;", "activation scale off by one code"),
    ("most = bits > most ? bits : most;", "most = bits > most && bits <= 0x7f800000 ? bits : most;",
     "NaN passes for a small activation"),
    ("finite ? scale : __builtin_nanf(\"\")", "scale == scale ? 1 : scale",
     "infinity passes for a small activation"),
    ("last.first + last.columns - first)", "last.first - first + 1)",
     "the largest activation of the last segment is overlooked"),
    ("sum += whole;", "sum = whole;", "sum of codes: the last one"),
]

READERS = [
    ("codes += 4 * __builtin_popcount(mask);", "codes += 4 * __builtin_popcount(mask & 0x7fff);",
     "popcount without the last lane"),
    ("rest = V::mul(zero, V::set(kFamily == kBytes ? 0x01010101 : repeat_code(kBits)));",
     "rest = V::zero();", "what is not stored decodes from 0, not from the zero point"),
    ("mask_of(j - kUnits), v)", "mask_of(-1 - j), v)", "the mask of another unit"),
    ("kept > longest ? kept : longest", "kept", "units that share bytes: the last one's length"),
    ("V::shift_right(raw[2], j - 2)", "V::shift_right(raw[2], j - 1)",
     "third bits shifted too far"),
    ("8 * i + kBits * j)", "8 * i + 4 * j)", "2-bit codes shifted like 4-bit ones"),
    ("V::set(255)", "V::set(127)", "8-bit codes lose a bit"),
    ("- (kZeros ? 0 : w.zero));", "- 0);", "zero point left out of the table of values"),
    ("codes += kBytesPerValue * kept;", "codes += 4 * kept;", "16-bit values read as 32-bit ones"),
]

LINEAR = [
    ("read(other, call.bias, column,", "read(other, call.bias, 0,",
     "the first panel's bias for all"),
    ("read(other, call.multiply, (row + r) * n", "read(other, call.multiply, r * n",
     "factors of the first 256 rows for all"),
    ("    activate(v, columns, call.activation);\n    if (call.multiply) {",
     "    if (call.multiply) {\n      activate(v, columns, call.activation);",
     "activation only where there are factors"),
    ("v[i] *= other[i];\n    }",
     "v[i] *= other[i];\n    }\n    activate(v, columns, call.activation);",
     "activation after the factors too"),
    ("low[i] *= call.branch_scale[i % down.n];", "low[i] *= call.branch_scale[0];",
     "one scale for the whole branch"),
    ("prepare(isa, down, in, false, call, arena)", "prepare(isa, down, in, call.a8, call, arena)",
     "the branch is refused or sees rounded activations"),
    ("(row + r) * call.y_stride + column", "(row + r) * n + column",
     "distance of y's rows ignored"),
    ("out.stride = in.stride * 4;", "out.stride = w.k * 4;", "distance of x's rows ignored"),
    ("row < in.m * (t + 1) / workers", "row + 1 < in.m * (t + 1) / workers",
     "each thread leaves out its last row of x"),
    ("std::memset(codes, 0, w.padded);", "", "codes are not padded with zeros"),
    ("std::memset(tile, 0,", "std::memset(tile, 0, 0 *", "sums start from what the tile held"),
]

FLOATS = [
    ("(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16", "bfloat16 cut off, not rounded"),
    ("0xc8000fff + (size >> 13 & 1)", "0xc8001000", "float16 rounded half up"),
    ("sign | (rounded - 0x3f000000)", "sign", "subnormal float16 flushed to zero"),
    ("size >= 0x477ff000", "size >= 0x477fe000", "the largest float16 becomes infinity"),
    ("v[i] < 0 ? 0.0f : v[i]", "v[i] > 0 ? v[i] : 0.0f", "relu turns NaN into 0"),
    ("float e = 1.0f / 720;", "float e = 0;", "e^x without its last term"),
    ("0.044715f", "0.0447f", "a constant of gelu_tanh rounded"),
    ("v[i] * 0.70710678118654752f", "v[i]", "gelu's argument not divided by the root of 2"),
]

AVX512 = [
    ("to += __builtin_popcount(part);", "to += 16;", "kept floats are left apart"),
    ("_mm512_maskz_compress_epi8(mask, load(x))", "load(x)",
     "codes of all columns, not those kept"),
    ("_mm512_mask_expand_epi32(rest, mask,", "_mm512_maskz_expand_epi32(mask,",
     "lanes that are not stored decode from 0"),
    ("_mm512_mask_expand_epi8(rest, mask, v)", "_mm512_maskz_expand_epi8(mask, v)",
     "bytes that are not stored decode from 0"),
    ("_mm512_ternarylogic_epi32(mask, a, b, 0xca)", "_mm512_ternarylogic_epi32(mask, a, b, 0xac)",
     "select takes the other operand"),
]
# fmt: on


def _of(file: str, texts: list[tuple[str, str, str]], isa: str = "") -> list[Mutation]:
    return [Mutation(file, *text, isa) for text in texts]


MUTATIONS = [
    *_of("pack.cpp", PACK),
    *_of("linear.cpp", LINEAR),
    *_of("floats.h", FLOATS),
    *_of("kernels.h", KERNELS),
    *_of("multiply.h", MULTIPLY),
    *_of("readers.h", READERS),
    *_of("vec_avx512.h", AVX512, "avx512"),
]
