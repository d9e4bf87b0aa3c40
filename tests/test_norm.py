"""`sparsefx::norm` and `sparsefx::rotary`: bounds against float64, where the engine is not used,
training, tracing, and an engine that is too old.
"""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_kernels import needs_engine
from test_op import UNIT
from torch import Tensor, nn

from sparsefx.codegen import native
from sparsefx.codegen import norm as _norm  # noqa: F401  (registers the kernel)
from sparsefx.codegen import rotary as _rotary  # noqa: F401
from sparsefx.ir import norm as meaning
from sparsefx.ir import rotary as rotary_meaning
from sparsefx.ir.norm import NORM
from sparsefx.ir.rotary import ROTARY, rotary

torch.set_num_threads(1)
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def made(m: int, k: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """x, residual (m, k), weight and bias (k,)."""
    torch.manual_seed(m * 1000 + k)
    rows = [scale * torch.randn(m, k), scale * torch.randn(m, k)]
    return [t.to(dtype) for t in (*rows, torch.randn(k), torch.randn(k))]


def assert_norm(args: list[Any], eps: float, centred: bool) -> None:
    x, residual, weight, bias = args
    y, s = NORM(x, residual, weight, bias, eps, centred, True)
    assert torch.equal(s, x + residual)
    assert_normalised(y, s, weight, bias, eps, centred)


def assert_normalised(
    y: Tensor, s: Tensor, weight: Tensor, bias: Tensor, eps: float, centred: bool
) -> None:
    """Within what rounding explains of float64: a mean and a sum of squares of k numbers, each
    rounded once per number at most, the root and four operations.
    """
    exact = s.double()
    k, u = max(s.shape[-1], 1), 2.0**-24
    centre = exact.mean(-1, keepdim=True) if centred else torch.zeros(s.shape[0], 1).double()
    root = (exact.sub(centre).square().mean(-1, keepdim=True) + eps).sqrt()
    straight = (exact - centre) / root
    want = straight * weight.double() + bias.double()
    off = (k + 2) * u * exact.abs().mean(-1, keepdim=True) if centred else 0.0
    far = off / root * (1 + straight.abs())
    limit = (k + 8) * u * (straight * weight).abs() + 2 * far * weight.double().abs()
    limit = UNIT[s.dtype] * want.abs() + 2 * (limit + u * bias.double().abs()) + 1e-7
    assert ((y.double() - want).abs() <= limit).all()


@needs_engine
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 63, 64, 65, 127, 1009])
def test_bounds(k: int, dtype: torch.dtype) -> None:
    for m, centred, scale in product((0, 1, 2, 7), (False, True), (1.0, 100.0)):
        assert_norm(made(m, k, dtype, scale), 1e-5, centred)


@needs_engine
@pytest.mark.parametrize("isa", (native.engine().isas if native.engine() else []))  # type: ignore[union-attr]
def test_every_instruction_set(isa: str) -> None:
    engine = native.engine()
    assert engine is not None
    try:
        engine.use(isa)
        for k, centred in product((5, 64, 100), (False, True)):
            assert_norm(made(3, k, torch.float32), 1e-6, centred)
    finally:
        engine.use("auto")


@needs_engine
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.5])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15])
def test_small_and_large(eps: float, scale: float) -> None:
    """Squares below float32's least are 0 as in torch, those above are infinite and y is 0."""
    x = scale * torch.randn(3, 40)
    got, want = NORM(x, None, None, None, eps, False, False)[0], meaning.norm(
        x, None, None, None, eps, False, False
    )[0]  # fmt: skip
    torch.testing.assert_close(got, want, rtol=2 * 48 * 2.0**-24, atol=0, equal_nan=True)


@needs_engine
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(bad: float, centred: bool) -> None:
    x, _, weight, bias = made(3, 40, torch.float32)
    x[1, 7] = bad
    args = (x, None, weight, bias if centred else None, 1e-5, centred, False)
    got, want = NORM(*args)[0], meaning.norm(*args)[0]
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got[::2], want[::2], rtol=1e-5, atol=1e-5)


@needs_engine
def test_strides_and_views() -> None:
    x = torch.randn(4, 6, 10).transpose(0, 1)
    half = torch.randn(6, 4, 20)[..., ::2]
    got = NORM(x, half, torch.randn(20)[::2].contiguous(), None, 1e-5, False, True)
    assert [t.is_contiguous() for t in got] == [True, True]
    assert torch.equal(got[1], x + half)


CASES: list[tuple[str, list[Any]]] = [
    ("double", [torch.randn(3, 8).double(), None, torch.randn(8).double(), None]),
    ("another type of weight", [torch.randn(3, 8), None, torch.randn(8).double(), None]),
    ("weight apart", [torch.randn(3, 8), None, torch.randn(16)[::2], None]),
    ("residual broadcast", [torch.randn(3, 8), torch.randn(1, 8), torch.randn(8), None]),
    ("residual of another type", [torch.randn(3, 8), torch.randn(3, 8).half(), None, None]),
]


@pytest.mark.parametrize(("name", "args"), CASES, ids=[name for name, _ in CASES])
def test_otherwise_the_meaning_serves(name: str, args: list[Any]) -> None:
    given: list[Any] = [*args, 1e-5, False, False]
    assert torch.equal(NORM(*given)[0], meaning.norm(*given)[0])


def test_without_the_engine() -> None:
    x, residual, weight, bias = made(3, 20, torch.float32)
    with patch.object(native, "engine", lambda: None):
        got = NORM(x, residual, weight, bias, 1e-5, True, True)
        turned = ROTARY([x[None, None]], x[None, None], x[None, None])
    for a, b in zip(got, meaning.norm(x, residual, weight, bias, 1e-5, True, True), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(turned[0], rotary([x[None, None]], x[None, None], x[None, None])[0])


@needs_engine
def test_the_engine_is_used() -> None:
    x = torch.randn(1, 2, 3, 8)
    with patch.object(meaning, "norm", None), patch.object(rotary_meaning, "rotary", None):
        NORM(x, None, None, None, 1e-5, False, False)
        ROTARY([x, x[:, :1]], x[:, :1], x[:, :1])


@needs_engine
@pytest.mark.parametrize("shape", [(2, 3, 5, 2), (1, 9, 1, 64), (2, 1, 7, 34), (0, 3, 5, 4)])
def test_rotary_is_bitwise_its_meaning(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    b, h, m, d = shape
    x = torch.randn(b, m, h, d).transpose(1, 2)
    keys = torch.randn(b, 1, m, 2 * d)[..., :d]
    for side in (1, b):
        cos, sin = torch.randn(side, 1, m, d), torch.randn(side, m, 1, d).transpose(1, 2)
        want = rotary([x, keys], cos, sin)
        for got, exact in zip(ROTARY([x, keys], cos, sin), want, strict=True):
            assert torch.equal(got, exact)


@needs_engine
def test_rotary_lies_as_x_does() -> None:
    x, angles = torch.randn(2, 5, 3, 4).transpose(1, 2), torch.randn(1, 1, 5, 4)
    assert ROTARY([x], angles, angles)[0].stride() == x.stride()


def test_rotary_of_other_shapes() -> None:
    x, angles = torch.randn(3, 5, 4), torch.randn(5, 4)
    assert torch.equal(ROTARY([x], angles, angles)[0], rotary([x], angles, angles)[0])
    wide = torch.randn(2, 3, 5, 4)
    assert torch.equal(ROTARY([wide[:1, :1]], wide, wide)[0], rotary([wide[:1, :1]], wide, wide)[0])


def test_gradients() -> None:
    args: list[Any] = [t.requires_grad_() for t in made(3, 20, torch.float32)]
    for centred in (False, True):
        found = []
        given: list[Any] = [*args, 1e-5, centred, True]
        for run in (NORM, meaning.norm):
            y, kept = run(*given)
            found.append(torch.autograd.grad(y.square().sum() + kept.sum(), args))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


class Both(nn.Module):
    def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, s = NORM(x, residual, weight, None, 1e-5, False, True)
        out: Tensor = ROTARY([y[:, None]], s[:, None], s[:, None])[0]
        return out + 1


def test_compilers_see_what_they_mean() -> None:
    """Inductor and others fuse the operations with what surrounds them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    args = [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)]
    graph = make_fx(lambda *given: Both()(*given))(*args).graph
    assert not [n for n in graph.nodes if "sparsefx" in str(n.target)]
    exported = torch.export.export(Both(), tuple(args)).module()
    torch.testing.assert_close(exported(*args), Both()(*args), rtol=1e-6, atol=1e-6)
    with torch.device("meta"):
        assert NORM(torch.empty(3, 8), None, None, None, 1e-5, False, False)[0].shape == (3, 8)


def test_an_engine_of_before_is_named() -> None:
    class Old:
        def __init__(self, path: object) -> None:
            raise AttributeError("_native.so: undefined symbol: sfx_norm")

    native._load.cache_clear()
    try:
        with patch.object(native, "Engine", Old), patch.dict("os.environ", SPARSEFX_NATIVE="a.so"):
            assert native.engine() is None
            assert "sfx_norm; build it again" in native.why_missing()
    finally:
        native._load.cache_clear()
