"""`sparsefx::linear`: every kernel row against exact arithmetic; what PyTorch expects of an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.codegen.kernels import KERNELS, Kernel, Problem
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import LAYOUTS
from sparsefx.ir.op import per_column, quantize_rows, reference, round_activations

torch.set_num_threads(1)

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FLOOR = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
CODECS = ["", "bf16", "int8", "int4g16", "uint4g16", "int3"]
FORMATS = [f"{layout.example}+{codec}".rstrip("+") for layout, codec in product(LAYOUTS, CODECS)]
FORMATS = [text + tail for text in FORMATS for tail in ("", "+a8")]
FORMATS += ["int8+a8g8", "dense+a8g16", "2:4+int4g16+a8g24", "tile16x1@50%+uint4g16+a8g16"]
A8 = [text for text in FORMATS if text.endswith("a8")]
SHAPES = [(1, 1, 4), (1, 16, 64), (3, 17, 36), (5, 1, 8), (16, 31, 124), (2, 64, 256), (33, 65, 20)]

Run = Callable[[Tensor, Packed, Tensor | None, Sequence[Tensor]], Tensor]


def made(
    text: str, m: int, n: int, k: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Packed]:
    """Seeded activations (m, k) and a packed (n, k) weight."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    weight = torch.randn(n, k, generator=generator)
    return torch.randn(m, k, generator=generator).to(dtype), Format.parse(text).pack(weight)


def accepting(packed: Packed, x: Tensor) -> list[Kernel]:
    """Every row of the table that would take this product on its own."""
    fmt = packed.format
    problem = Problem(x.shape[0], packed.n, packed.k, x.dtype, x.device.type)
    return [
        kernel
        for kernel in KERNELS
        if isinstance(fmt.layout, kernel.layout)
        and isinstance(fmt.codec, kernel.codec)
        and kernel.device in ("*", problem.device)
        and kernel.rejects(fmt, problem) is None
    ]


def check(
    run: Run, x: Tensor, packed: Packed, bias: Tensor | None = None, branch: Sequence[Tensor] = ()
) -> None:
    """Fail unless `run` is within the derived bound of the exact product.

    Main product: u|r| for the last rounding + 2√K·2⁻²⁴(|x||w|ᵀ) for the sum in float32; the weight,
    and the rows where activations are int8, may be rounded once more to x's type: u(|x||w|ᵀ) each.
    A branch is three products and a sum in x's type.
    """
    got, u = run(x, packed, bias, branch), UNIT[x.dtype]
    a8 = packed.format.a8
    weight = packed.unpack().double()
    rows = x.double()
    if a8:
        group = packed.format.a8_group
        codes, scales = quantize_rows(x, group)
        rows = codes.double() * per_column(scales, group, packed.k).double()
    exact, size = rows @ weight.T, rows.abs() @ weight.abs().T
    if bias is not None:
        exact, size = exact + bias.to(x.dtype), size + bias.abs()
    slack = (2 * packed.k**0.5 + 2) * 2.0**-24 + u * (1 + a8)
    limit = slack * size
    if branch:
        down, up, scale = (t.to(x.dtype).double() for t in branch)
        limit = limit + u * exact.abs()
        exact = exact + ((x.double() @ down.T) * scale) @ up.T
        depth = 2 * (packed.k**0.5 + len(down) ** 0.5) * 2.0**-24
        limit = limit + (4 * u + depth) * (
            ((x.double().abs() @ down.abs().T) * scale.abs()) @ up.abs().T
        )
    limit = limit + u * exact.abs() + FLOOR[x.dtype]
    assert got.shape == (*x.shape[:-1], packed.n)
    assert got.dtype == x.dtype
    assert bool(((got.double() - exact).abs() <= limit).all()), f"{packed.format} {tuple(x.shape)}"


def random_branch(n: int, k: int, rank: int = 3) -> list[Tensor]:
    return [torch.randn(rank, k), torch.randn(n, rank), torch.rand(rank)]


# --- exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_every_accepting_kernel_is_within_the_bound(text: str, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        x, packed = made(text, m, n, k, dtype)
        kernels = accepting(packed, x)
        assert kernels[-1].name == "unpack_then_dense"
        for kernel in kernels:
            check(kernel.run, x, packed)
            check(kernel.run, x, packed, torch.randn(n), random_branch(n, k))


@pytest.mark.parametrize("text", [t for t in FORMATS if not t.startswith(("2:4", "bitmap"))])
def test_primes(text: str) -> None:
    for m, n, k in ((7, 13, 31), (1, 2, 1), (3, 1, 2), (2, 127, 97)):
        x, packed = made(text, m, n, k)
        for kernel in accepting(packed, x):
            check(kernel.run, x, packed, torch.randn(n))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(0, 4, 8), (0, 0, 8), (3, 0, 8), (3, 4, 0), (0, 4, 0), (1, 0, 0), (1, 1, 4), (2, 1, 8)],
)
def test_empty_and_single_sides(text: str, m: int, n: int, k: int) -> None:
    x, packed = made(text, m, n, k)
    bias = torch.randn(n)
    check(
        lambda *args: torch.ops.sparsefx.linear(x, list(args[1].buffers), bias, [], text, n),
        x,
        packed,
        bias,
    )
    for kernel in accepting(packed, x):
        check(kernel.run, x, packed, bias)


@pytest.mark.parametrize("text", ["int8+a8", "tile16x1@50%+int4g16", "2:4+a8"])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3)])
def test_any_rank_of_input(text: str, lead: tuple[int, ...]) -> None:
    _, packed = made(text, 1, 6, 16)
    x = torch.randn(*lead, 16)
    y = torch.ops.sparsefx.linear(x, list(packed.buffers), None, [], text, 6)
    assert y.shape == (*lead, 6)
    flat = torch.ops.sparsefx.linear(x.reshape(-1, 16), list(packed.buffers), None, [], text, 6)
    check(lambda *args: flat, x.reshape(-1, 16), packed)
    check(lambda *args: y.reshape(-1, 6), x.reshape(-1, 16), packed)


@pytest.mark.parametrize("text", ["int8+a8", "tile16x1@50%+int4g16", "2:4+a8", "bf16"])
def test_strided_offset_and_expanded_inputs(text: str) -> None:
    _, packed = made(text, 1, 6, 16)
    whole = torch.randn(8, 40)
    for x in (
        whole[::2, 3:35:2],
        whole[1:, 4:20],
        whole.T[:16].T,
        torch.randn(1, 16).expand(4, 16),
    ):
        assert x.shape[-1] == 16
        got = torch.ops.sparsefx.linear(x, list(packed.buffers), None, [], text, 6)
        want = torch.ops.sparsefx.linear(x.contiguous(), list(packed.buffers), None, [], text, 6)
        check(lambda *args, got=got: got, x, packed)
        check(lambda *args, want=want: want, x, packed)


# --- int8 activations ----------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (4, 31, 1000), (3, 5, 7), (17, 1, 1)])
def test_int8_sums_are_exact(m: int, n: int, k: int) -> None:
    """Scales of 1 on both sides leave the integer sum itself (below 2²⁴, so exact in float32)."""
    codes = torch.randint(-127, 128, (m, k))
    codes[:, 0] = 127
    weight = torch.randint(-127, 128, (n, k))
    weight[:, -1] = 127
    packed = Format.parse("int8+a8").pack(weight.float())
    assert packed.buffers[1].eq(1).all()
    want = (codes.to(torch.int64) @ weight.to(torch.int64).T).float()
    for kernel in accepting(packed, codes.float()):
        assert torch.equal(kernel.run(codes.float(), packed, None, []), want), kernel.name


def test_activation_codes() -> None:
    x = torch.randn(64, 33) * torch.logspace(-6, 6, 64)[:, None]
    codes, scales = quantize_rows(x)
    assert codes.abs().amax(-1).eq(127).all()
    assert torch.equal(scales, x.abs().amax(-1, keepdim=True) / 127)
    assert ((codes * scales - x).abs() <= scales * (0.5 + 1e-4)).all()
    assert torch.equal(quantize_rows(-x)[0], -codes)
    assert torch.equal(quantize_rows(2 * x)[0], codes)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-38, 3e38])
def test_rows_of_odd_values_stay_finite(value: float) -> None:
    x = torch.full((2, 16), value)
    x[1] = torch.randn(16)
    rows = round_activations(x)
    assert rows.isfinite().all()
    assert (rows[0] - x[0]).abs().max() <= max(value * 2**-20, 1e-38)
    assert torch.equal(rows[1], round_activations(x[1:])[0])


# --- NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_row_spoils_only_itself(text: str, bad: float) -> None:
    x, packed = made(text, 5, 8, 16)
    branch = random_branch(8, 16)
    spoilt = x.clone()
    spoilt[2, 3] = bad
    rest = [0, 1, 3, 4]
    for kernel in accepting(packed, x):
        clean, got = (kernel.run(v, packed, torch.ones(8), branch) for v in (x, spoilt))
        assert torch.equal(got[rest], clean[rest]), kernel.name
        assert not got[2].isfinite().any(), kernel.name


# --- the comparison notices broken kernels -------------------------------------------------------


def with_buffers(change: Callable[[str, Tensor], Tensor]) -> Run:
    def run(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
        named = zip(packed.format.buffers, packed.buffers, strict=True)
        changed = tuple(change(name, buffer) for name, buffer in named)
        return reference(x, Packed(packed.format, packed.n, packed.k, changed), bias, branch)

    return run


def only(key: str, change: Callable[[Tensor], Tensor]) -> Run:
    return with_buffers(lambda name, buffer: change(buffer) if name == key else buffer)


def swap_nibbles(values: Tensor) -> Tensor:
    return ((values & 15) << 4) | (values >> 4)


def shift_index(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
    """Gathers activations one column further on: an index that is off by one."""
    return reference(x.roll(-1, -1), packed, bias, branch)


def drop_tail(x: Tensor, packed: Packed, bias: Tensor | None, branch: Sequence[Tensor]) -> Tensor:
    x = x.clone()
    x[..., -1] = 0
    return reference(x, packed, bias, branch)


MUTANTS: dict[str, Run] = {
    "scale of the next row": only("scales", lambda s: s.roll(1, 0)),
    "scale of the next group": only("scales", lambda s: s.roll(1, 1)),
    "scale one step of fp16 off": only(
        "scales", lambda s: (s.view(torch.int16) + 4).view(torch.float16)
    ),
    "swapped nibbles": only("values", swap_nibbles),
    "values one byte on": only("values", lambda v: v.roll(1)),
    "one wrong code": only("values", lambda v: torch.cat([v[:1] ^ 8, v[1:]])),
    "index one column on": shift_index,
    "zero points forgotten": only("zero_points", torch.zeros_like),
    "last column lost": drop_tail,
    "bias forgotten": lambda x, packed, bias, branch: reference(x, packed, None, branch),
    "branch forgotten": lambda x, packed, bias, branch: reference(x, packed, bias, []),
    "activations not rounded": lambda x, packed, bias, branch: F.linear(x, packed.unpack(), bias),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_fails_for_broken_kernels(name: str) -> None:
    text = {"zero points forgotten": "tile16x1@50%+uint4g16", "activations not rounded": "int8+a8"}
    x, packed = made(text.get(name, "tile16x1@50%+int4g16"), 4, 32, 64)
    bias = torch.randn(32)
    branch = random_branch(32, 64) if name == "branch forgotten" else []
    check(reference, x, packed, bias, branch)
    with pytest.raises(AssertionError):
        check(MUTANTS[name], x, packed, bias, branch)


def test_a_broken_index_is_noticed() -> None:
    x, packed = made("bitmap@50%+int4g16", 4, 32, 64)
    with pytest.raises(AssertionError):
        check(only("index", lambda index: index.roll(1)), x, packed)


# --- what PyTorch expects of an op ---------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int8+a8", "tile16x1@50%+int4g16", "2:4+uint4g16", "bitmap@50%", "dense"]
)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(text: str, full: bool) -> None:
    x, packed = made(text, 3, 6, 16)
    bias = torch.randn(6, requires_grad=True) if full else None
    branch = [t.requires_grad_() for t in random_branch(6, 16)] if full else []
    args = (x.requires_grad_(), list(packed.buffers), bias, branch, text, 6)
    torch.library.opcheck(torch.ops.sparsefx.linear.default, args)
    torch.library.opcheck(
        torch.ops.sparsefx.unpack.default, (list(packed.buffers), text, 6, 16, torch.float32)
    )


@pytest.mark.parametrize("text", [t for t in FORMATS if "+a8" not in t])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_gradients_are_those_of_the_dense_product(text: str, lead: tuple[int, ...]) -> None:
    _, packed = made(text, 1, 6, 16)
    dense = packed.unpack()

    def leaves() -> list[Tensor]:
        torch.manual_seed(0)
        tensors = [torch.randn(*lead, 16), torch.randn(6), *random_branch(6, 16)]
        return [t.requires_grad_() for t in tensors]

    got, want = leaves(), leaves()
    y = torch.ops.sparsefx.linear(got[0], list(packed.buffers), got[1], got[2:], text, 6)
    x, bias, down, up, scale = want
    r = F.linear(x, dense, bias) + ((x @ down.T) * scale) @ up.T
    (y * y.detach().cos()).sum().backward()
    (r * y.detach().cos()).sum().backward()
    for a, b in zip(got, want, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_their_tensors_dtype(dtype: torch.dtype) -> None:
    x, packed = made("int4g16", 3, 6, 16, dtype)
    x.requires_grad_()
    bias, branch = torch.randn(6, requires_grad=True), random_branch(6, 16)
    for tensor in branch:
        tensor.requires_grad_()
    torch.ops.sparsefx.linear(x, list(packed.buffers), bias, branch, "int4g16", 6).sum().backward()
    assert [t.grad.dtype for t in (x, bias, *branch) if t.grad is not None] == [dtype] + [
        torch.float32
    ] * 4


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, packed = made("int4g16", 3, 6, 16)
    bias = torch.randn(6, requires_grad=True)
    torch.ops.sparsefx.linear(x, list(packed.buffers), bias, [], "int4g16", 6).sum().backward()
    assert x.grad is None
    assert bias.grad is not None
    assert bias.grad.tolist() == [3.0] * 6


def test_rounding_is_passed_through_in_the_backward() -> None:
    x, packed = made("int8+a8", 3, 6, 16)
    x.requires_grad_()
    torch.ops.sparsefx.linear(x, list(packed.buffers), None, [], "int8+a8", 6).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, packed.unpack().sum(0).expand(3, 16), atol=1e-5)


def test_results_are_deterministic_and_new() -> None:
    for text in FORMATS:
        x, packed = made(text, 4, 8, 16)
        a, b = (
            torch.ops.sparsefx.linear(x, list(packed.buffers), None, [], text, 8) for _ in range(2)
        )
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        w = torch.ops.sparsefx.unpack(list(packed.buffers), text, 8, 16, torch.float32)
        w.zero_()
        assert torch.equal(torch.ops.sparsefx.linear(x, list(packed.buffers), None, [], text, 8), a)
