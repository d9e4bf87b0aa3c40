"""Weights, activations and exact answers for the tests of the CPU engine.

Two kinds of case. Integers: codes, scales and activations whose products and partial sums are all
multiples of 1/2 below 2^23, so that float32 adds them without error and equality is demanded.
Reals: anything, within the bound that `expected` derives.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.codegen.native import TYPES, Call, Weight, branch_weights, engine
from sparsefx.ir.codecs import Grid, Int
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import NM
from sparsefx.ir.op import per_column, quantize_rows

ENGINE = engine()
ISAS = os.environ.get("SPARSEFX_ISA", "").split() or (ENGINE.isas if ENGINE else [])


@pytest.fixture(scope="module", params=ISAS)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that runs here, one after the other."""
    assert ENGINE is not None
    before = ENGINE.isa
    ENGINE.use(request.param)
    assert ENGINE.isa == request.param
    yield request.param
    ENGINE.use(before)


LAYOUTS = [
    "dense", "1:4", "2:4", "4:8", "1:16", "tile16x1@50%", "tile1x16@50%", "tile32x64@75%",
    "tile4x1@50%", "tile1x3@50%", "tile1x4@50%", "tile64x64@50%", "tile3x5@37.5%",
    "bitmap@30%", "bitmap@50%", "bitmap@90%", "bitmap@99%",
]  # fmt: skip
INTS = [f"{sign}int{bits}" for bits in range(2, 9) for sign in ("", "u")]
FLOATS = ["fp32", "fp16", "bf16"]
GROUPS = ["", "g8", "g32", "g64", "g100", "g128"]
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257]
SIDES = [0, 1, 2, 7, 13, 15, 16, 17, 31, 32, 33, 61, 63, 64, 65, 97, 127, 128, 129]
LONG = [1009, 1023, 1024, 1025, 2049]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

FAMILIES = ["dense", "tile1x16@50%", "bitmap@50%", "tile64x64@50%"]
"""A layout for every way the engine lays weights out."""
KINDS = ["int2g64", "uint3g32", "int4g100", "uint8", "fp32", "fp16", "bf16"]
PAIRS = [f"{layout}+{codec}" for layout in FAMILIES for codec in KINDS]

EPS = 2.0**-24
UNIT = {torch.float32: EPS, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half the distance from 1 to the next number."""
FLOOR = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
"""The least positive number."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fitting(fmt: Format, k: int) -> int:
    """The nearest K that the format's layout can have."""
    return -(-k // fmt.layout.m) * fmt.layout.m if isinstance(fmt.layout, NM) else k


@dataclass(frozen=True)
class Case:
    """A weight in both forms and activations (m, K) for it."""

    packed: Packed
    weight: Weight
    x: Tensor

    def y(
        self, m: int, dtype: torch.dtype = torch.float32, a8: bool = False, **more: Any
    ) -> Tensor:
        """The engine's product with the first `m` rows."""
        return self.weight.linear(self.x[:m].to(dtype), a8=a8, **more)

    @cached_property
    def exact(self) -> Tensor:
        """x · Wᵀ in float64."""
        return self.x.double() @ self.packed.unpack(torch.float64).T

    @property
    def modes(self) -> tuple[bool, ...]:
        """With and without int8 activations, where the weight can have them."""
        return (False, True) if isinstance(self.packed.format.codec, Int) else (False,)


def packed_into(packed: Packed, x: Tensor) -> Case:
    assert ENGINE is not None
    return Case(packed, ENGINE.pack(packed), x)


# --- integers ------------------------------------------------------------------------------------


def integer_weight(
    text: str, n: int, k: int, seed: int = 0, mask: Tensor | None = None, extreme: bool = False
) -> Packed:
    """A weight of small integers, or codes at either end, times scales of ±1/2, ±1 and ±2."""
    fmt, rng = Format.parse(text), seeded(seed)
    if mask is None:
        mask = fmt.layout.select(torch.rand(n, k, generator=rng))
    codec = fmt.codec
    if not isinstance(codec, Int):
        return fmt.pack(torch.randint(-8, 9, (n, k), generator=rng).float(), mask)

    def draw(shape: tuple[int, ...], low: int, high: int) -> Tensor:
        if extreme:
            return torch.tensor([low, high])[torch.randint(0, 2, shape, generator=rng)].float()
        return torch.randint(low, high + 1, shape, generator=rng).float()

    shape = (n, codec.groups(k))
    choice = torch.tensor([1.0] if extreme else [0.5, 1.0, 2.0, -0.5, -1.0, -2.0])
    scales = choice[torch.randint(0, len(choice), shape, generator=rng)]
    zeros = None if codec.symmetric else draw(shape, 0, codec.high)
    grid = Grid(scales, zeros)
    codes = draw((n, k), codec.low, codec.high)
    return fmt.pack(codec.decode(codes, grid.columns(0, k, codec.group(k))), mask, grid)


def integer_rows(m: int, k: int, group: int = 0, seed: int = 0, extreme: bool = False) -> Tensor:
    """Integers whose int8 scale is exactly 1: every group holds 127 or −127; some rows are 0."""
    rng = seeded(seed + 1)
    x = torch.randint(-9, 10, (m, k), generator=rng).float()
    if extreme:
        return 127.0 * (1 - 2 * torch.randint(0, 2, (m, k), generator=rng)).float()
    for start in range(0, k, group or max(k, 1)):
        size = min(group or k, k - start)
        at = start + torch.randint(0, size, (m, 1), generator=rng)
        x.scatter_(1, at, 127.0 * (1 - 2 * torch.randint(0, 2, (m, 1), generator=rng)).float())
    x[6::16] = 0
    return x


def masked_integers(text: str, m: int, n: int, k: int, mask: Tensor | None, seed: int = 0) -> Case:
    fmt = Format.parse(text)
    k = fitting(fmt, k)
    packed = integer_weight(text, n, k, seed, mask)
    case = packed_into(packed, integer_rows(m, k, fmt.a8_group, seed))
    size = case.x.abs().double() @ packed.unpack(torch.float64).abs().T
    assert not size.numel() or float(size.max()) < 2**23, "the case itself is not exact"
    return case


def masks(n: int, k: int) -> dict[str, Tensor]:
    """Patterns that leave tiles, panels, segments or everything empty."""
    rng = seeded(5)
    out = {"all": torch.ones(n, k, dtype=torch.bool), "none": torch.zeros(n, k, dtype=torch.bool)}
    for name in ("last", "row", "column", "panel", "segment", "panel segment"):
        out[name] = out["none"].clone()
    out["last"][-1, -1] = True
    out["row"][16] = True
    out["column"][:, 70] = True
    out["panel"][16:32] = torch.rand(k, generator=rng) < 0.5
    out["segment"][:, 64:128] = torch.rand(n, 64, generator=rng) < 0.5
    out["panel segment"][:16, 64:128] = True
    out["all but one"] = ~out["last"]
    out["ends"] = out["column"].roll(-70, 1) | out["column"].roll(k - 71, 1)
    return out


@cache
def integers(text: str, m: int, n: int, k: int, seed: int = 0) -> Case:
    """Kept, as packing takes longer than multiplying: every instruction set has the same cases."""
    return masked_integers(text, m, n, k, None, seed)


def assert_exact(case: Case, m: int, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """y is the exact integer product, rounded once to `dtype`, in every mode."""
    exact = case.exact[:m].to(dtype)
    for a8 in case.modes:
        got = case.y(m, dtype, a8, **more)
        assert got.shape == exact.shape
        assert got.dtype == dtype
        if not torch.equal(got, exact):
            bad = (got != exact).nonzero()
            at = tuple(bad[0].tolist())
            raise AssertionError(
                f"{case.packed.format} ({case.weight.family}) x {tuple(case.x[:m].shape)} {dtype} "
                f"a8={a8}: {len(bad)} wrong, first y{list(at)} = {got[at]}, not {exact[at]}"
            )


# --- reals ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extras:
    """What is done to a product besides adding it up."""

    bias: Tensor | None = None
    branch: Sequence[Tensor] = ()
    activation: str = "none"
    multiply: Tensor | None = None
    residual: Tensor | None = None

    def linear(self, weight: Weight, x: Tensor, **more: Any) -> Tensor:
        branch = branch_weights(weight.engine, self.branch) if self.branch else None
        return weight.linear(
            x, self.bias, branch=branch, activation=self.activation, multiply=self.multiply,
            residual=self.residual, **more,
        )  # fmt: skip


def exact_rows(x: Tensor, packed: Packed, a8: bool) -> Tensor:
    """What the weight is multiplied by, in float64."""
    if not a8:
        return x.double()
    group = packed.format.a8_group
    codes, scales = quantize_rows(x, group)
    return codes.double() * per_column(scales.double(), group, packed.k)


def expected(
    packed: Packed, x: Tensor, a8: bool = False, extras: Extras | None = None
) -> tuple[Tensor, Tensor]:
    """The exact result in float64 and how far from it the engine may be.

    A sum of K products in float32: each of K additions errs by at most 2⁻²⁴ of a partial sum, and
    no partial sum exceeds S = |x||W|ᵀ. Errors of either sign add up like √K, of which twice is
    allowed (up to K = 4 that is the worst case). Four roundings do not grow with K: the product
    without fused multiply-add, int32 to float, scale times activation scale, and times the sum.
    Below the normal range, 2⁻¹²⁶, matrix units take x and sums for 0, and the product of the two
    scales errs by 2⁻¹⁵⁰ whatever it is then multiplied by.
    """
    extras = extras or Extras()
    dense, rows = packed.unpack(torch.float64), exact_rows(x, packed, a8)
    value, size = rows @ dense.T, rows.abs() @ dense.abs().T
    tiny = 127 * 255 * packed.k * 2.0**-150 if a8 else 2.0**-126 * (1 + dense.abs().sum(1))
    limit = (2 * packed.k**0.5 + 4) * EPS * size + tiny
    if extras.branch:
        # Two sums; the scale, and adding the branch to the rest, round once more each.
        down, up, scale = (t.double() for t in extras.branch)
        value = value + ((x.double() @ down.T) * scale) @ up.T
        part = ((x.double().abs() @ down.abs().T) * scale.abs()) @ up.abs().T
        depth = 2 * packed.k**0.5 + 2 * len(down) ** 0.5 + 9
        limit = limit + depth * EPS * part + EPS * (size + part)
    if extras.bias is not None:
        value = value + extras.bias.to(x.dtype).double()
        limit = limit + EPS * value.abs()
    value, limit = _activated(extras.activation, value, limit)
    if extras.multiply is not None:
        factor = extras.multiply.to(x.dtype).double()
        value = value * factor
        limit = limit * factor.abs() + EPS * value.abs()
    if extras.residual is not None:
        value = value + extras.residual.to(x.dtype).double()
        limit = limit + EPS * value.abs()
    u = UNIT[x.dtype]
    return value, u * value.abs() + (1 + u) * limit + FLOOR[x.dtype]


def _activated(name: str, v: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The activation of v ± limit: slope times limit, and its own error.

    e^x is right to 2 ulp (4 · 2⁻²⁴) and clamped at x = ±87: silu = v / (1 + e) rounds twice more.
    gelu: erf to 1 ulp, its argument rounded twice, one addition: 4 · 2⁻²⁴ of |v| / 2.
    gelu_tanh = v / (1 + e^(−2u)): u rounds 7 times, which moves e by 14|u| · 2⁻²⁴ of itself.
    """
    least = v.abs() * 2.0**-126
    if name == "relu":
        return v.relu(), limit
    if name == "silu":
        r = F.silu(v)
        return r, 1.1 * limit + 6 * EPS * r.abs() + least
    if name == "gelu":
        r = F.gelu(v)
        return r, 1.13 * limit + EPS * (2 * v.abs() + r.abs())
    if name == "gelu_tanh":
        r = F.gelu(v, approximate="tanh")
        u = 0.7978845608028654 * (v + 0.044715 * v**3)
        return r, 1.13 * limit + (6 + 14 * u.abs()) * EPS * r.abs() + least
    return v, limit


def assert_close(case: Case, x: Tensor, a8: bool = False, extras: Extras | None = None) -> None:
    """The engine's result for x is within the derived bound of the exact one."""
    extras = extras or Extras()
    got = extras.linear(case.weight, x, a8=a8)
    exact, limit = expected(case.packed, x, a8, extras)
    assert got.shape == exact.shape
    assert got.dtype == x.dtype
    wrong = ~((got.double() - exact).abs() <= limit)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{case.packed.format} ({case.weight.family}) x {tuple(x.shape)} {x.dtype} a8={a8} "
            f"{extras.activation}: {int(wrong.sum())} wrong, first at {at}: {got[at]}, not "
            f"{exact[at]} ± {limit[at]}"
        )


@cache
def reals(text: str, m: int, n: int, k: int, seed: int = 0) -> Case:
    fmt, rng = Format.parse(text), seeded(seed)
    k = fitting(fmt, k)
    packed = fmt.pack(torch.randn(n, k, generator=rng))
    return packed_into(packed, torch.randn(m, k, generator=rng))


def random_branch(n: int, k: int, rank: int, seed: int = 0) -> list[Tensor]:
    rng = seeded(seed + 2)
    return [
        torch.randn(rank, k, generator=rng), torch.randn(n, rank, generator=rng),
        torch.randn(rank, generator=rng),
    ]  # fmt: skip


# --- the C interface, for what the wrapper never does ---------------------------------------------

BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, BODY, ctypes.c_void_p, ctypes.c_int64)
Pool = Callable[[Callable[[int], None], int], None]
"""Called with body and count: runs body(i) for i in 0 … count-1."""


def raw(weight: Weight, x: Tensor, y: Tensor, pool: Pool | None = None, **fields: Any) -> None:
    """One sfx_linear over x (m, k) and y (m, n) as they lie in memory, rows any distance apart."""
    call = Call(
        x=x.data_ptr(), y=y.data_ptr(), m=x.shape[0], x_stride=x.stride(0), y_stride=y.stride(0),
        x_type=TYPES[x.dtype], threads=1,
    )  # fmt: skip
    for name, value in fields.items():
        setattr(call, name, value.data_ptr() if isinstance(value, Tensor) else value)

    def run(_: Any, body: Any, context: Any, count: int) -> None:
        assert pool is not None
        pool(lambda i: body(context, i), count)

    callback = PARALLEL(run)
    if pool is not None:
        call.parallel = ctypes.cast(callback, ctypes.c_void_p)
    failed = weight.engine._lib.sfx_linear(weight.handle, ctypes.byref(call), weight.engine.error)
    assert not failed, weight.engine.error.value


def shared_out(case: Case, threads: int) -> tuple[Tensor, Tensor]:
    """How many pieces of the parallel loops write each column of y, and y put together of them."""
    y, n = case.x.new_empty(case.x.shape[0], case.packed.n), case.packed.n
    whole, writers = torch.empty_like(y), torch.zeros(n, dtype=torch.int64)

    def pool(body: Callable[[int], None], count: int) -> None:
        for i in reversed(range(count)):
            y.fill_(torch.nan)
            body(i)
            wrote = ~y.isnan().any(0)
            writers.add_(wrote)
            whole[:, wrote] = y[:, wrote]

    raw(case.weight, case.x, y, pool, threads=threads)
    return writers, whole


def guarded(t: Tensor) -> Tensor:
    """A copy of `t`; behind its last byte begins memory that must not be touched."""
    size = t.numel() * t.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    area = torch.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), dtype=torch.uint8)
    beyond = ctypes.c_void_p(area.data_ptr() + room)
    assert ctypes.CDLL(None).mprotect(beyond, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return area[room - size : room].view(t.dtype).view(t.shape).copy_(t)
