"""Weights, activations and exact answers for the tests of the Triton kernels.

Two kinds of case, as for the CPU engine. Integers: codes, scales and activations whose products and
partial sums float32 holds, so that equality is demanded whatever the order of additions. Reals:
anything, within the bound that `expected` derives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from triton_interpreter import interpreted

from sparsefx.codegen.triton import ORDERS
from sparsefx.codegen.triton_launch import Config, Product
from sparsefx.codegen.triton_pack import Columns, Masked
from sparsefx.ir.codecs import Fp8, Grid, Int
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import quantize_rows

FP16, BF16 = torch.float16, torch.bfloat16
UNIT = {FP16: 2.0**-11, BF16: 2.0**-8, torch.float32: 2.0**-24}
"""Largest relative error of one rounding."""
TINY = {FP16: 2.0**-25, BF16: 2.0**-134}
"""Largest absolute error of one rounding to a subnormal number."""
STEEP = 1.13
"""No activation is steeper (gelu: 1.129)."""

ROW = Config(16, 16)
VECTOR = Config(1, 16, True)
WIDE = Config(64, 32)
CONFIGS = [
    ROW, Config(16, 32, tasks=7), Config(32, 16), WIDE, VECTOR,
    Config(1, 64, True), Config(1, 8, True, tasks=11),
]  # fmt: skip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def order(packed: Packed, family: str) -> Columns | Masked:
    """`packed` as the kernel of `family`, one of `ORDERS`, reads it."""
    return ORDERS[family](packed)


@dataclass(frozen=True)
class Case:
    """A weight and rows of x, in the type that is multiplied."""

    packed: Packed
    family: str
    x: Tensor


@dataclass(frozen=True)
class Extras:
    """What a product does besides multiplying."""

    bias: Tensor | None = None
    branch: tuple[Tensor, ...] = field(default=())
    activation: str = "none"
    multiply: Tensor | None = None
    residual: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Extras:
        def cast(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(dtype)

        branch = tuple(t.to(dtype) for t in self.branch)
        rest = cast(self.multiply), cast(self.residual)
        return Extras(cast(self.bias), branch, self.activation, *rest)


def run(case: Case, config: Config, extras: Extras = Extras()) -> Tensor:
    product = Product(order(case.packed, case.family), interpreted())
    e = extras
    return product.linear(case.x, config, e.bias, e.branch, e.activation, e.multiply, e.residual)


# --- weights -------------------------------------------------------------------------------------


def sides(fmt: Format, k: int) -> int:
    """`k`, or the next that the layout takes."""
    while fmt.rejects(1 + fmt.rank, max(k, fmt.rank)):
        k += 1
    return k


def integers(
    text: str, family: str, m: int, n: int, k: int, dtype: torch.dtype = FP16, seed: int = 0
) -> Case:
    """Codes over their whole range, any zero points, powers of two as scales, small integers x.

    With int8 activations every row reaches 127, so that its scale is 1 and its codes are x.
    """
    fmt, rng = Format.parse(text), seeded(seed)
    k = sides(fmt, k)
    codec, mask = fmt.codec, fmt.layout.select(torch.rand(n, k, generator=rng))
    if isinstance(codec, Int | Fp8):
        shape = (n, codec.groups(k))
        scales = 2.0 ** torch.randint(-4, -1, shape, generator=rng)
        scales *= torch.where(torch.rand(shape, generator=rng) < 0.5, 1.0, -1.0)
        zeros = None
        if isinstance(codec, Int) and not codec.symmetric:
            zeros = torch.randint(0, codec.high + 1, shape, generator=rng).float()
        grid = Grid(scales, zeros)
        codes = random_codes(codec, n, k, rng)
        weight = codec.decode(codes, grid.columns(0, k, codec.group(k)))
        packed = fmt.pack(weight, mask, grid)
    else:
        packed = fmt.pack(torch.randint(-9, 10, (n, k), generator=rng).float(), mask)
    x = torch.randint(-3, 4, (m, k), generator=rng).float()
    if fmt.a8 and k:
        x = torch.randint(-127, 128, (m, k), generator=rng).float()
        x[torch.arange(m), torch.randint(0, k, (m,), generator=rng)] = 127.0
    return Case(packed, family, x.to(dtype))


def random_codes(codec: Int | Fp8, n: int, k: int, rng: torch.Generator) -> Tensor:
    """Numbers over the codec's whole range; of e4m3 the larger and smaller ones in turn by row:
    both in one row would need more bits than a sum in float32 has.
    """
    if isinstance(codec, Int):
        return torch.randint(codec.low, codec.high + 1, (n, k), generator=rng).float()
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    some = [every[every.abs() <= 8], every[every.abs() >= 2]]
    rows = [s[torch.randint(len(s), (k,), generator=rng)] for s in (some * n)[:n]]
    return torch.stack(rows) if rows else torch.zeros(n, k)


def reals(
    text: str, family: str, m: int, n: int, k: int, dtype: torch.dtype = FP16, seed: int = 0
) -> Case:
    fmt, rng = Format.parse(text), seeded(seed)
    k = sides(fmt, k)
    weight = torch.randn(n, k, generator=rng) / max(k, 1) ** 0.5
    return Case(fmt.pack(weight), family, torch.randn(m, k, generator=rng).to(dtype))


def random_branch(n: int, k: int, rank: int, seed: int = 0) -> tuple[Tensor, ...]:
    """(down, up, strength) of a size like the product's."""
    rng = seeded(seed + 1)
    down = torch.randn(rank, k, generator=rng) / max(k, 1) ** 0.5
    up = torch.randn(n, rank, generator=rng) / max(rank, 1) ** 0.5
    return down, up, torch.rand(rank, generator=rng) + 0.5


# --- what must come out --------------------------------------------------------------------------


def exact_parts(case: Case) -> tuple[Tensor, Tensor]:
    """(x, W) in float64: the numbers that are multiplied; x times scale with int8 activations."""
    x, fmt = case.x, case.packed.format
    if fmt.a8:
        codes, scales = quantize_rows(x)
        return codes.double() * scales.double(), case.packed.unpack(torch.float64)
    return x.double(), case.packed.unpack(torch.float64)


def errors(length: int) -> float:
    """Relative to Σ|xᵢ||wᵢ|: rounding a product by its scale and adding `length` of them, float32.

    Twice the √n of Higham and Mary, "A new approach to probabilistic rounding error analysis".
    """
    return (2 * math.sqrt(length) + 2) * UNIT[torch.float32]


def expected(case: Case, config: Config, extras: Extras) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far each element may be off."""
    dtype = case.x.dtype
    unit, single, tiny = UNIT[dtype], UNIT[torch.float32], TINY[dtype]
    x, w = exact_parts(case)
    r, size = x @ w.T, x.abs() @ w.abs().T
    bound = errors(x.shape[1]) * size
    fmt = case.packed.format
    # Scales that multiply weights, and float weights of another type, are rounded to x's type.
    whole = isinstance(fmt.codec, Int | Fp8) and config.block_m < 64
    wide = config.vector and case.family != "masked"  # multiplies in float32
    if not (fmt.a8 or wide or whole or torch.equal(w, w.to(dtype).double())):
        bound = bound + unit * size + tiny * x.abs().sum(1, keepdim=True)
    if extras.bias is not None:
        r = r + extras.bias.double()
        bound = bound + single * r.abs()
    if extras.branch:
        part, off = _branch(case.x, extras.branch)
        r, bound = r + part, bound + off
        bound = bound + single * r.abs()
    before = r
    r = activated(r, extras.activation)
    if extras.activation != "none":
        # Its argument, a constant, a few operations: each rounds once, never by more than |x|.
        bound = STEEP * bound + 8 * single * before.abs()
    if extras.multiply is not None:
        r = r * extras.multiply.double()
        bound = bound * extras.multiply.double().abs() + single * r.abs()
    if extras.residual is not None:
        r = r + extras.residual.double()
        bound = bound + single * r.abs()
    return r, bound * (1 + unit) + unit * r.abs() + tiny


def _branch(x: Tensor, branch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """((x · downᵀ) · strength) · upᵀ and its bound; the middle is rounded to x's type."""
    down, up, strength = (t.to(x.dtype).double() for t in branch)
    low, size = x.double() @ down.T * strength, x.double().abs() @ down.abs().T * strength.abs()
    off = UNIT[x.dtype] * low.abs() + 1.01 * errors(x.shape[1]) * size + TINY[x.dtype]
    return low @ up.T, off @ up.abs().T + errors(len(down)) * (low.abs() @ up.abs().T)


def activated(x: Tensor, name: str) -> Tensor:
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return x if name == "none" else getattr(F, name)(x)


def assert_close(case: Case, config: Config, extras: Extras = Extras()) -> None:
    extras = extras.to(case.x.dtype)
    got = run(case, config, extras)
    want, bound = expected(case, config, extras)
    assert got.dtype == case.x.dtype
    assert got.shape == want.shape
    over = ((got.double() - want).abs() / bound).nan_to_num(torch.inf)
    assert not over.numel() or float(over.max()) <= 1, (
        f"{case.packed.format} {config}: off by {float(over.max()):.3g} bounds"
    )


def assert_exact(case: Case, config: Config) -> None:
    x, w = exact_parts(case)
    got, want = run(case, config), (x @ w.T).to(case.x.dtype)
    assert got.shape == want.shape
    wrong = got != want
    assert not wrong.any(), (
        f"{case.packed.format} {config}: {int(wrong.sum())} of {got.numel()} wrong, the first at "
        f"{wrong.nonzero()[0].tolist()}: {got[wrong][0]} for {want[wrong][0]}"
    )
