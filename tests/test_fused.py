"""`sparsefx::linears` and `sparsefx::fused`: bit for bit the single products, epilogues within the
derived bound, training, and what is held of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from test_kernels import held, needs_engine
from test_op import UNIT, made, random_branch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.codegen import fused  # noqa: F401  (the engine's kernels)
from sparsefx.codegen.prepared import JOINED, forget
from sparsefx.ir import fused as meaning
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.fused import ACTIVATIONS, FUSED, LINEARS, Part, arguments, parts_of
from sparsefx.ir.op import LINEAR

torch.set_num_threads(1)
TEXTS = ["int4g16", "int4g16+a8", "uint4g16+a8g24", "bitmap@50%+int4g16", "2:4+int8", "2:4+bf16",
         "tile16x1@50%+int4g16+a8", "tile4x1@25%+uint4g16+r3", "bitmap@50%+int4g16+r3+a8", "bf16",
         "2:4+bf16+a8"]  # fmt: skip
SIZES = (33, 16, 8)
K = 48


def parts(
    text: str, sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float32
) -> list[Part]:
    """Packed weights (n, K) with every other one's bias, and branches where the format has one."""
    torch.manual_seed(0)
    fmt, out = Format.parse(text), []
    for i, n in enumerate(sizes):
        packed = fmt.pack(torch.randn(n, K))
        branch = random_branch(n, K) if fmt.rank else []
        bias = torch.randn(n).to(dtype) if i % 2 else None
        out.append(Part(list(packed.buffers), bias, branch, text, n))
    return out


def single(x: Tensor, part: Part) -> Tensor:
    out: Tensor = LINEAR(x, part.weight, part.bias, part.branch, part.format, part.n)
    return out


def weight(part: Part) -> Tensor:
    """What a part multiplies by, in float64."""
    packed = Packed(Format.parse(part.format), part.n, K, tuple(part.weight))
    return packed.unpack().double()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_are_bitwise_the_products(text: str, rows: int, dtype: torch.dtype) -> None:
    some, x = parts(text, dtype=dtype), torch.randn(rows, K).to(dtype)
    for y, part in zip(LINEARS(x, *arguments(some)), some, strict=True):
        assert torch.equal(y, single(x, part))
        assert y.is_contiguous()


@needs_engine
def test_parts_may_differ_in_format_and_the_engine_takes_them_in_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ["int4g16", "int8", "bitmap@50%+int4g16", "tile16x1@25%+int3", "2:4+bf16"]
    some, x = [parts(text, (20,))[0] for text in texts], torch.randn(2, 5, K)
    want = [single(x, part) for part in some]

    def never(*_: object) -> None:
        raise AssertionError("product by product")

    monkeypatch.setattr(meaning, "linears", never)
    got = LINEARS(x, *arguments(some))
    assert all(torch.equal(y, z) for y, z in zip(got, want, strict=True))
    assert [y.shape for y in got] == [(2, 5, 20)] * 5


def bounded(y: Tensor, x: Tensor, some: Sequence[Part], *epilogue: object) -> None:
    """The meaning in float64, each of its at most five roundings in x's type and each product's
    sum in float32 counted; an activation's slope is at most 1.13, and 4 units of it are computed.
    """
    activation, multiply, residual = epilogue
    u, wide = UNIT[x.dtype], 1.13
    exact = torch.ones(()).double()
    error = torch.zeros(()).double()
    for i, part in enumerate(some):
        w, rows = weight(part), x.double()
        value = rows @ w.T + (0 if part.bias is None else part.bias.double())
        reach = rows.abs() @ w.abs().T + (0 if part.bias is None else part.bias.double().abs())
        off = (2 * K**0.5 + 2) * 2.0**-24 * reach + u * (reach + value.abs())
        if i == 0:
            value = ACTIVATIONS[str(activation)](value)
            off = wide * off + 4 * 2.0**-24 * value.abs() + 2.0**-24
        error = error * value.abs() + off * exact.abs() + error * off
        exact = exact * value
    if isinstance(multiply, Tensor):
        exact, error = exact * multiply.double(), error * multiply.double().abs()
    error = error + 3 * u * exact.abs()
    if isinstance(residual, Tensor):
        exact = exact + residual.double()
    limit = error + u * exact.abs() + 2.0**-120
    assert bool(((y.double() - exact).abs() <= limit).all()), (y.double() - exact).abs().max()


CASES = list(product(ACTIVATIONS, [False, True], [False, True], [False, True]))


@pytest.mark.parametrize(("activation", "gated", "multiply", "residual"), CASES)
@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_epilogues(
    activation: str, gated: bool, multiply: bool, residual: bool, dtype: torch.dtype, rows: int
) -> None:
    """Both the engine's and the meaning's result."""
    some = parts("bitmap@50%+int4g16", (33, 33) if gated else (33,), dtype)
    x = torch.randn(rows, K).to(dtype)
    tail = [torch.randn(rows, 33).to(dtype) if asked else None for asked in (multiply, residual)]
    for run in (FUSED, meaning.fused):
        y = run(x, *arguments(some), activation, *tail)
        assert (y.dtype, y.shape) == (dtype, (rows, 33))
        bounded(y, x, some, activation, *tail)


@needs_engine
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("text", ["int4g16+a8", "tile16x1@50%+int4g16", "int4g16+r3"])
def test_a_gate_is_its_factors_bit_for_bit(text: str, threads: int) -> None:
    """relu and products are exact steps: only where float32 factors are rounded could differ."""
    some, x = parts(text, (300, 300)), torch.randn(270, K)
    torch.set_num_threads(threads)
    try:
        tail = torch.randn(270, 300)
        got = FUSED(x, *arguments(some), "relu", None, tail)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(got, single(x, some[0]).relu() * single(x, some[1]) + tail)


@needs_engine
def test_weights_are_held_once_and_edits_are_seen() -> None:
    some, x = parts("int4g16"), torch.randn(2, K)
    LINEARS(x, *arguments(some))
    products = [held(Packed(Format.parse("int4g16"), p.n, K, tuple(p.weight))) for p in some]
    assert all(product is not None for product in products)
    FUSED(x, *arguments(some[:1]), "silu", None, None)
    single(x, some[1])
    again = [held(Packed(Format.parse("int4g16"), p.n, K, tuple(p.weight))) for p in some]
    assert [a is b for a, b in zip(again, products, strict=True)] == [True] * 3
    some[2].weight[0].copy_(parts("int4g16", (8, 16))[0].weight[0])
    for y, part in zip(LINEARS(x, *arguments(some)), some, strict=True):
        assert torch.equal(y, meaning.linears(x, *arguments([part]))[0])
    assert JOINED.find(arguments(some)[0]) is not None
    forget(some[1].weight)
    assert JOINED.find(arguments(some)[0]) is None


def test_gradients_are_those_of_single_products() -> None:
    some = parts("int4g16+r3", (16, 16))
    for part in some:
        for t in part.branch:
            t.requires_grad_()
    x = torch.randn(3, K, requires_grad=True)
    out: Tensor = FUSED(x, *arguments(some), "silu", None, None)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    got = [x.grad, *(t.grad for p in some for t in p.branch)]
    for t in (x, *(t for p in some for t in p.branch)):
        t.grad = None
    out = F.silu(single(x, some[0])) * single(x, some[1])
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    want = [x.grad, *(t.grad for p in some for t in p.branch)]
    for a, b in zip(got, want, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_autocast_computes_in_its_type() -> None:
    some, x = parts("int4g16"), torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16):
        got = LINEARS(x, *arguments(some))
        assert all(torch.equal(y, single(x, p)) for y, p in zip(got, some, strict=True))
        assert FUSED(x, *arguments(some[:1]), "silu", None, None).dtype == torch.bfloat16


def test_other_types_and_mixed_operands_follow_the_meaning() -> None:
    some = parts("int4g16", (16,))
    x, residual = torch.randn(3, K), torch.randn(3, 16, dtype=torch.float64)
    y = FUSED(x, *arguments(some), "none", None, residual)
    assert torch.equal(y, single(x, some[0]) + residual)
    assert LINEARS(x.double(), *arguments(some))[0].dtype == torch.float64
    assert LINEARS(x[:0], *arguments(some))[0].shape == (0, 16)


@needs_engine
def test_parts_that_round_x_and_parts_that_do_not() -> None:
    some, x = [parts("int4g16", (16,))[0], parts("int4g16+a8", (16,))[0]], torch.randn(3, K)
    for y, part in zip(LINEARS(x, *arguments(some)), some, strict=True):
        assert torch.equal(y, single(x, part))


def test_parts_survive_their_spelling() -> None:
    some = [parts("int4g16")[1], parts("2:4+int8+r3", (8,))[0]]
    again = parts_of(*arguments(some))
    assert [(p.n, len(p.branch)) for p in again] == [(16, 0), (8, 3)]
    for p, q in zip(some, again, strict=True):
        assert p.format == q.format
        assert all(a is b for a, b in zip(p.weight, q.weight, strict=True))


@pytest.mark.parametrize("op", [LINEARS, FUSED])
def test_the_ops_are_what_torch_expects(op: torch._ops.OpOverload) -> None:
    x, packed = made("int4g16", 3, 16, K)
    some = arguments([Part(list(packed.buffers), None, [], "int4g16", 16)])
    tail = () if op is LINEARS else ("silu", torch.randn(3, 16), None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (x, *some, *tail), test_utils=tests)
