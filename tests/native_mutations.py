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
    """The instruction set to break; empty: any, all have this code."""


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
    ("V::set((w->zero - bias) * sum)", "V::zero()", "zero-point correction skipped"),
    ("V::mul(V::sub(zero, V::set(bias)), V::set(sum))",
     "V::set((w->zero - bias) * sum)", "one zero point for all rows"),
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
    ("V::store(to, V::zero()); // as far", "// as far", "no zeros behind the kept activations"),
    ("panel + w.masks_at + segment.start / 8", "panel + w.masks_at",
     "the first segment's columns for all"),
    ("* step * kSize;", "* step * kSize + 4;", "segments of kept activations too far apart"),
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
    ("scratch.units + q * kPanelBytes, kPanelBytes", "scratch.units, kPanelBytes",
     "the first panel's weights for all"),
    ("segment.scale, tile + q * kRows, stride, to);", "segment.scale, tile, stride, to);",
     "panels of a tile land on the first"),
    ("Rows part = x.from(r);", "Rows part = x;", "scales of the first kept activations for all"),
]

EIGHTS = [
    ("kCodes, 8>(w, p, x.from(r)", "kCodes, 8>(w, p, x", "the first eight rows for all"),
    ("if (r < rows) few<", "if (false) few<", "rows after the last eight are dropped"),
]

READERS = [
    ("codes += 4 * __builtin_popcount(mask);", "codes += 4 * __builtin_popcount(mask & 0x7fff);",
     "popcount without the last lane"),
    ("rest = V::mul(zero, V::set(kUnpacked ? 0x01010101 : repeat_code(kBits)));",
     "rest = V::zero();", "what is not stored decodes from 0, not from the zero point"),
    ("mask_of(j - kUnits), field(raw[0], j))", "mask_of(-1 - j), field(raw[0], j))",
     "the mask of another unit"),
    ("kept > longest ? kept : longest", "kept", "units that share bytes: the last one's length"),
    ("V::shift_right(raw[2], j - 2)", "V::shift_right(raw[2], j - 1)",
     "third bits shifted too far"),
    ("8 * i + kBits * j)", "8 * i + 4 * j)", "2-bit codes shifted like 4-bit ones"),
    ("V::set((1 << kBits) - 1)", "V::set(127 & ((1 << kBits) - 1))", "8-bit codes lose a bit"),
    ("- (kZeros ? 0 : w.zero));", "- 0);", "zero point left out of the table of values"),
    ("codes += kBytesPerValue * kept;", "codes += 4 * kept;", "16-bit values read as 32-bit ones"),
]

LINEAR = [
    ("read(bias, part.bias, b.column,", "read(bias, part.bias, 0,",
     "the first panel's bias for all"),
    ("read(other, call.multiply, (b.row + r) * n", "read(other, call.multiply, r * n",
     "factors of the first 256 rows for all"),
    ("    isa.activate(v, b.columns, call.activation);\n",
     "    if (call.multiply) isa.activate(v, b.columns, call.activation);\n",
     "activation only where there are factors"),
    ("v[j] *= other[j];\n    }",
     "v[j] *= other[j];\n    }\n    isa.activate(v, b.columns, call.activation);",
     "activation after the factors too"),
    ("*= part.branch_scale[j];", "*= part.branch_scale[0];", "one scale for the whole branch"),
    ("ordered(isa, down, false, call, rooms)", "ordered(isa, down, call.a8, call, rooms)",
     "the branch is refused or sees rounded activations"),
    ("(b.row + r) * parts[0].y_stride + b.column", "(b.row + r) * n + b.column",
     "distance of y's rows ignored"),
    ("out.stride = in.stride * 4;", "out.stride = w.k * 4;", "distance of x's rows ignored"),
    ("row < in.m * (t + 1) / workers", "row + 1 < in.m * (t + 1) / workers",
     "each thread leaves out its last row of x"),
    ("std::memset(codes, 0, w.padded);", "", "codes are not padded with zeros"),
    ("begin(call, parts[i], tiles[i], block);", "", "sums start from what the tile held"),
    ("made.x.slices == slices && alike(*made.w, w)", "made.x.slices == slices",
     "parts read x in the first one's order"),
    ("from - start,", "0,", "each share of a part begins at its first panel"),
    ("v[j] *= tiles[1][r * b.stride + j];", "v[j] *= tiles[1][j];", "one row gates all"),
]

FLOATS = [
    ("(bits + 0x7fff + (bits >> 16 & 1)) >> 16", "bits >> 16", "bfloat16 cut off, not rounded"),
    ("0xc8000fff + (size >> 13 & 1)", "0xc8001000", "float16 rounded half up"),
    ("sign | (rounded - 0x3f000000)", "sign", "subnormal float16 flushed to zero"),
    ("size >= 0x477ff000", "size >= 0x477fe000", "the largest float16 becomes infinity"),
]

ACTIVATE = [
    ("v[i] < 0 ? 0.0f : v[i]", "v[i] > 0 ? v[i] : 0.0f", "relu turns NaN into 0"),
    ("float e = 1.0f / 720;", "float e = 0;", "e^x without its last term"),
    ("0.044715f", "0.0447f", "a constant of gelu_tanh rounded"),
    ("7.97884548e-01f", "7.9788e-01f", "a constant of erf rounded"),
    ("q = V::fma(q, t, 7.21607757e-05f);", "q = V::fma(q, t, 0.0f);",
     "erf without one of its terms"),
    ("(v[i] > 0 ? 1.0f : 0.0f)", "(v[i] > 0 ? 0.0f : 1.0f)", "gelu's two sides swapped far out"),
    ("std::fabs(v[i]) > kFar ? far : near", "near", "gelu far below zero is not zero"),
]

NORM = [
    ("lanes[i] += lanes[i + width];", "lanes[i] = lanes[i + width];", "half of the lanes are lost"),
    ("each(i + 48, 16, 3);", "", "every fourth vector is left out"),
    ("static_cast<int>(k - i) : 16, 0);", "static_cast<int>(k - i) - 1 : 16, 0);",
     "the last number is left out"),
    ("i < count ? p[i] : rest;", "i < count ? p[i] : 0;", "lanes behind the row are off the mean"),
    ("F v = V::mulf(V::subf(load_some(s + i, lanes), centre), scale);",
     "F v = V::mulf(load_some(s + i, lanes), scale);", "the mean is not taken off"),
    ("sum_lanes(sums) / k + row.eps", "sum_lanes(sums) / k", "a row of zeros becomes NaN"),
    ("for (F &sum : sums) sum = V::zerof();", "", "sums of squares start from sums"),
    ("    s = row.sum;\n", "", "the norm is of x alone"),
    ("load_some(row.weight + i, lanes)", "load_some(row.weight, lanes)",
     "the first weights for all"),
    ("x[half + i] * cos[half + i] + x[i]", "x[half + i] * cos[i] + x[i]",
     "the first half's angles for both"),
    ("- x[half + i] * sin[i]", "+ x[half + i] * sin[i]", "turned the other way"),
]

NORM_ROWS = [
    ("sum ? sum : room(k)", "room(k)", "the sum is not kept"),
    ("return p ? p + row * k : nullptr;", "return p ? p : nullptr;", "the first row for all"),
    ("      read(x, call.sum, i * k, k, call.type);\n", "", "the norm is of an exact sum"),
    ("if (call.bias) read(bias, call.bias, 0, k,", "if (call.bias) read(bias, call.weight, 0, k,",
     "weights for biases"),
    ("call.m * (t + 1) / tasks);\n  });", "call.m * (t + 1) / tasks - 1);\n  });",
     "the last row of a share is left out"),
    ("if (call.residual && !call.sum && call.type != SFX_F32)", "if (false)",
     "a rounded sum has no place"),
]

ROTARY = [
    ("b = i / size[2] % size[1]", "b = i / size[2]", "heads beyond the first batch are missed"),
    ("offset(call.sin_stride, a, b, c)", "offset(call.x_stride, a, b, c)", "angles of another row"),
    ("rows * (t + 1) / tasks);", "rows * (t + 1) / tasks - 1);",
     "the last row of a share is left out"),
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
AMX = [
    ("_tile_dpbssd(3, 5, 7)", "_tile_dpbssd(3, 4, 7)", "int8: rows of another tile"),
    ("_tile_dpbf16ps(2, 5, 6)", "_tile_dpbf16ps(2, 5, 7)", "bfloat16: another panel"),
    ("_tile_loadd(5, x + next_rows, 64)", "_tile_loadd(5, x, 64)", "the first 16 rows twice"),
    ("V::setf(x_scales[r * x_scales_stride])", "V::setf(x_scales[0])",
     "the first row's activation scale for all"),
    ("(kInt ? 1 : b.x.slices)", "1", "only the first slice of x counts"),
    ("if (kRowTiles == 2 && kPanels == 2) _tile_zero(3);", "", "a tile of sums is not emptied"),
    ("rows - 16 * h < 16 ? rows - 16 * h : 16,", "rows - 16 * h < 16 ? rows - 16 * h - 1 : 16,",
     "the last row is dropped"),
    ("b.scales += 2 * kStretch;", "b.scales += kStretch;", "scales of another panel"),
    ("if (first) cursor.restore(reader);", "", "each stretch begins with the panel's first code"),
    ("codes ? segment.scale : 0};", "0};", "the first activation scale for all segments"),
    ("(segment.word - w.segments[first].word)", "segment.word", "x of another stretch"),
    ("return w.bits < 8 || (!w.zero_points && w.zero == 128);", "return true;",
     "8-bit codes that no signed byte holds"),
    ("x_type == SFX_F16 ? 2 : 3", "x_type == SFX_F16 ? 1 : 2", "a slice of x is missing"),
    ("_mm512_maskz_sub_ps(finite, rest,", "_mm512_sub_ps(rest,", "infinity becomes NaN"),
    ("row % kTileRows * 64", "row % 8 * 64", "rows of x overwrite each other"),
    ("(segment.columns + 63) / 64;", "segment.columns / 64;", "the last columns stay away"),
    ("    b.tile += 2 * kRows;\n", "    b.tile += kRows;\n", "panels change places"),
    ("b.x_scales + 16 * h * b.x_scales_stride", "b.x_scales",
     "activation scales of the first 16 rows for the next"),
]

AMX_PACK = [
    ("(exponent == 0 && (v & 0x7f))", "false", "subnormal weights pass for plain"),
    ("exponent == 0xff ||", "", "infinite weights pass for plain"),
]

AMX_UNITS = [
    ("_mm512_sub_epi8(reader.unit(j), offset)", "reader.unit(j)", "zero points not subtracted"),
    ("(1 << (i % 4)) - 1));", "(2 << (i % 4)) - 1));", "kept columns spread one too far"),
    ("V::set(8 * (column % 4))", "V::set(8 * (column % 2))", "columns of a lane start too early"),
    ("static_cast<unsigned>(mask & 15)", "static_cast<unsigned>(mask & 7)",
     "every fourth column is not counted"),
    ("24 - 16 * half", "24 - 8 * half", "the wrong byte becomes bfloat16"),
    ("V::set(static_cast<int32_t>(0xffff0000)), h, V",
     "V::set(static_cast<int32_t>(0x0000ffff)), h, V", "halves of a lane not put together"),
    ("widen(dense, words * 16, units)", "widen(dense, words * 16 - 16, units)",
     "the last 64 columns are not widened"),
    ("w.masks_at + segment.start / 8", "w.masks_at", "the first segment's columns for all"),
    ("if (i + 1 < columns) {", "if (true) {", "an odd last column is put together with the next"),
    ("V::select(upper, high, low)", "V::select(upper, low, high)", "pairs of columns swapped"),
]

AVXVNNI = [
    ("vpdpbusd %2, %1, %0", "vpdpbusd %1, %2, %0", "the signs of codes and activations swapped"),
    ("__asm__(\"%{vex%}", "acc = _mm256_setzero_si256();\n    __asm__(\"%{vex%}",
     "sums of one step alone"),
]

AVX2 = [
    ("w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));", "", "128 is not taken off wide codes"),
    ("x = _mm256_sign_epi8(x, w);", "", "the sign of wide codes is lost"),
    ("w = _mm256_abs_epi8(w);", "", "negative codes pass for large ones"),
    ("_mm_srli_si128(v, 8)", "_mm_srli_si128(v, 4)", "zero points of other rows"),
    ("half_at(bytes(p) + 16)}", "half_at(bytes(p))}", "the first eight float16 twice"),
    ("bytes(p) + size * __builtin_popcount(low(mask))",
     "bytes(p) + size * __builtin_popcount(low(mask) >> 1)", "lanes of the upper half off by one"),
    ("_mm256_blendv_ps(_mm256_permutevar8x32_ps(v, from), rest, _mm256_castsi256_ps(from))",
     "_mm256_permutevar8x32_ps(v, from)", "lanes that are not stored decode from another"),
    ("half_at(behind(p, mask, 2))", "half_at(behind(p, mask, 4))", "kept float16 too far apart"),
    ("p += __builtin_popcount(mask & 0xffff);", "p += __builtin_popcount(mask & 0x7fff);",
     "kept bytes: each 16th is not counted"),
    ("bytes(p) + __builtin_popcount(low))", "bytes(p))", "the first half's bytes for both"),
    ("_mm256_blendv_epi8(kept, rest, from)", "kept", "bytes that are not stored decode from 0"),
    ("_mm256_set_m128i(d, c)};", "_mm256_set_m128i(d, b)};", "sum of kept codes: parts mistaken"),
    ("out += 4 * __builtin_popcount(part);", "out += 32;", "kept floats are left apart"),
    ("_mm_shuffle_epi32(sum, 0xb1)", "_mm_shuffle_epi32(sum, 0x4e)", "sum of half the lanes"),
    ("_mm256_andnot_si256(mask.b, y.b)", "_mm256_and_si256(mask.b, y.b)",
     "3-bit codes of the upper rows lose their low bits"),
]

PORTABLE = [
    ("pairs(w >> 8 & low, x >> 8)", "pairs(w >> 8 & low, x)", "every other column of x twice"),
    ("(((Short)x << 8) >> 8)", "((Short)x & 255)", "activations without sign"),
    ("((p << 16) >> 16)", "(p & 0xffff)", "products without sign"),
    ("mask &= mask - 1, from += 4)", "mask &= mask - 1, from += 2)", "kept lanes overlap"),
    ("half_at(p, i++)", "half_at(p, i)", "the first kept value for all"),
    ("= *from++;", "= *from;", "the first kept byte for all"),
    ("kept[count++]", "kept[count ? count++ : ++count]", "kept activations one too far"),
    ("x + 4 * __builtin_ctzll(mask), 4)", "x + 4 * (63 - __builtin_clzll(mask)), 4)",
     "the last kept activation for all"),
    ("for (int i = 0; i < 16; ++i) sum += v[i];", "for (int i = 1; i < 16; ++i) sum += v[i];",
     "sum without the first lane"),
    ("(mask & a) | (~mask & b)", "(mask & a) | b", "3-bit codes: bits of neighbours"),
]

NEON = [
    ("kWide ? veorq_u8(codes, vdupq_n_u8(128)) : codes", "codes",
     "128 is not taken off wide codes"),
    ("to & 0x80 ? 0x80 : 4 * to + i % 4", "to & 0x80 ? 0x80 : 4 * to + i % 2",
     "half of a kept lane twice"),
    ("from & 0x80 ? 0x80 : 4 * from + i % 4", "from & 0x80 ? 0x80 : 4 * from + 3 - i % 4",
     "kept floats reversed"),
    ("vmovl_u16(vget_high_u16(low)),", "vmovl_u16(vget_low_u16(low)),",
     "zero points of other rows"),
    ("vshll_n_u16(read<uint16x4_t>(p), 16)", "vshll_n_u16(read<uint16x4_t>(p), 15)",
     "bfloat16 shifted too little"),
    ("at += 4 * kBitTables.ones[part(mask, i)];\n      return expand(rest.v[i]",
     "at += 2 * kBitTables.ones[part(mask, i)];\n      return expand(rest.v[i]",
     "kept lanes overlap"),
    ("at += kBitTables.ones[low] + kBitTables.ones[high];", "at += kBitTables.ones[low];",
     "kept bytes: every other eight are not counted"),
    ("out += kBitTables.ones[part];", "out += 8;", "kept codes are left apart"),
    ("vaddq_u32(a.v[2], a.v[3])", "vaddq_u32(a.v[2], a.v[2])", "sum: the last lanes left out"),
    ("vfmaq_f32(c.v[i], a.v[i], b.v[i])", "vfmaq_f32(c.v[0], a.v[i], b.v[i])",
     "sums of the first four rows for all"),
]

TABLES = [
    ("low[mask][i] = ones[mask];", "low[mask][i] = 0;", "bits above the eighth take from 0 again"),
    ("compress[mask][ones[mask]++] = static_cast<uint8_t>(i);",
     "compress[mask][ones[mask]++] = static_cast<uint8_t>(7 - i);", "positions in reverse order"),
]

BIAS = [
    ("w->kind == kCode8 ? V::kBias : 0", "0", "what dot took off wide codes is not put back"),
    ("kCodes && V::kBias && Reader::kColumnsPerStep == step_columns(kCode8);", "false;",
     "wide codes overflow 16 bits"),
]

UNPACKED = [
    ("kFamily == kBytes && !V::kExpandsMemory;", "kFamily == kBytes;",
     "bytes in memory: the zero point is not repeated"),
    ("field(Vec::expand_bytes(rest, mask_of(j - kUnits), shared), j)",
     "Vec::expand_bytes(rest, mask_of(j - kUnits), shared)", "bits of the other units stay"),
    ("if constexpr (V::kExpandsMemory) shared = codes;",
     "if constexpr (V::kExpandsMemory) shared = codes + 1;", "kept bytes off by one"),
]

BLOCKS = [
    ("run(Constant<1>());", "", "rows left over from blocks are dropped"),
    ("units + q * panel_bytes", "units", "the first panel's codes for both"),
    ("x.scale(r, scale)));", "x.scale(0, scale)));",
     "blocks: the first row's activation scale for all"),
]

ISA = [
    ("!std::strcmp(name, isa->name)", "!std::strncmp(name, isa->name, 1)",
     "a set that only begins alike is chosen"),
]

THREADS = [
    ("i < count; ++i) body(context, i);", "i + 1 < count; ++i) body(context, i);",
     "without threads, the last share of work is left out"),
]
# fmt: on


def _of(file: str, texts: list[tuple[str, str, str]], isa: str = "") -> list[Mutation]:
    return [Mutation(file, *text, isa) for text in texts]


MUTATIONS = [
    *_of("pack.cpp", PACK),
    *_of("linear.cpp", LINEAR),
    *_of("floats.h", FLOATS),
    *_of("activate.h", ACTIVATE),
    *_of("norm.h", NORM),
    *_of("norm.cpp", NORM_ROWS),
    *_of("rotary.cpp", ROTARY),
    *_of("isa.cpp", ISA),
    *_of("threads.cpp", THREADS),
    *_of("kernels.h", KERNELS),
    *_of("kernels.h", BIAS, "avx2"),
    *_of("kernels.h", BLOCKS, "portable"),
    *_of("multiply.h", MULTIPLY),
    *_of("multiply.h", EIGHTS, "avx512"),
    *_of("readers.h", READERS),
    *_of("readers.h", UNPACKED, "portable"),
    *_of("tables.h", TABLES, "avx2"),
    *_of("pack.cpp", AMX_PACK, "amx"),
    *_of("amx.cpp", AMX, "amx"),
    *_of("amx_units.h", AMX_UNITS, "amx"),
    *_of("vec_avx512.h", AVX512, "avx512"),
    *_of("vec_avx2.h", AVX2, "avx2"),
    *_of("vec_avx2.h", AVXVNNI, "avxvnni"),
    *_of("vec_portable.h", PORTABLE, "portable"),
    *_of("vec_neon.h", NEON, "neon"),
]
