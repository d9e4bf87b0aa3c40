"""`sparsefx::linears` and `sparsefx::fused` by the Triton kernels, in Triton's interpreter: every
epilogue within a bound derived from that of single products, and what falls back to the meaning.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import (
    BF16,
    FP16,
    ROW,
    TINY,
    UNIT,
    Case,
    Extras,
    activated,
    expected,
    random_branch,
    reals,
    seeded,
)
from triton_interpreter import interpreted

from sparsefx.codegen import fused as _engine  # noqa: F401  (registers the kernels)
from sparsefx.codegen import triton_fused
from sparsefx.ir import fused as meaning
from sparsefx.ir.format import Format
from sparsefx.ir.fused import ACTIVATIONS, Part, arguments

torch.set_num_threads(1)
N, K = 19, 64
TEXTS = [("int4g32+r3", "columns", FP16), ("tile1x16@50%+uint3g32", "lanes", BF16),
         ("2:4+int8+a8", "masked", BF16), ("tile16x1@50%+fp8g32", "columns", FP16)]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def interpreting() -> None:
    interpreted()


@pytest.fixture
def never_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meaning may not run."""

    def refuse(*_: object) -> None:
        raise AssertionError("composed of torch's operators")

    monkeypatch.setattr(meaning, "fused", refuse)
    monkeypatch.setattr(meaning, "linears", refuse)


def made(
    text: str, family: str, dtype: torch.dtype, m: int, count: int
) -> tuple[list[Case], list[Extras], list[Part]]:
    """`count` weights of one x: as the bound is derived of them, and as the ops take them."""
    first = reals(text, family, m, N, K, dtype)
    cases, extras, parts = [], [], []
    for seed in range(count):
        case = replace(reals(text, family, m, N, K, dtype, seed), x=first.x)
        bias = torch.randn(N, generator=seeded(seed + 9)).to(dtype) if seed == 0 else None
        rank = case.packed.format.rank
        branch = tuple(t.to(dtype) for t in random_branch(N, K, rank, seed)) if rank else ()
        cases.append(case)
        extras.append(Extras(bias, branch))
        parts.append(Part(list(case.packed.buffers), bias, list(branch), text, N))
    return cases, extras, parts


def operand(m: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, N, generator=seeded(seed)).to(dtype)


def within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    over = ((got.double() - want).abs() / bound).nan_to_num(torch.inf)
    assert float(over.max()) <= 1, f"off by {float(over.max()):.3g} bounds"


@pytest.mark.usefixtures("never_composed")
@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_linears_are_single_products(case: tuple[str, str, torch.dtype]) -> None:
    cases, extras, parts = made(*case, 3, 2)
    ys = triton_fused.linears(cases[0].x, *arguments(parts))
    for y, one, more in zip(ys, cases, extras, strict=True):
        within(y, *expected(one, ROW, more))


@pytest.mark.usefixtures("never_composed")
@pytest.mark.parametrize(("activation", "ends"), list(product(ACTIVATIONS, range(4))))
def test_epilogues_of_one_product(activation: str, ends: int) -> None:
    case = TEXTS[(ends + list(ACTIVATIONS).index(activation)) % len(TEXTS)]
    m, dtype = 3, case[2]
    cases, extras, parts = made(*case, m, 1)
    multiply = operand(m, 1, dtype) if ends & 1 else None
    residual = operand(m, 2, dtype) if ends & 2 else None
    y = triton_fused.fused(cases[0].x, *arguments(parts), activation, multiply, residual)
    asked = replace(extras[0], activation=activation, multiply=multiply, residual=residual)
    within(y, *expected(cases[0], ROW, asked))


@pytest.mark.usefixtures("never_composed")
@pytest.mark.parametrize(("multiplied", "added"), list(product((False, True), repeat=2)))
@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_gates(case: tuple[str, str, torch.dtype], multiplied: bool, added: bool) -> None:
    """(a ± α)(b ± β) is off by α(|b| + β) + |a|β; two more operations round once each."""
    m, dtype = 2, case[2]
    cases, extras, parts = made(*case, m, 2)
    multiply = operand(m, 1, dtype) if multiplied else None
    residual = operand(m, 2, dtype) if added else None
    y = triton_fused.fused(cases[0].x, *arguments(parts), "silu", multiply, residual)
    asked = replace(extras[0], activation="silu", multiply=multiply)
    (gate, off), (other, wide) = expected(cases[0], ROW, asked), expected(cases[1], ROW, extras[1])
    factor = gate * other
    want = factor if residual is None else factor + residual.double()
    bound = wide * (gate.abs() + off) + other.abs() * off
    bound = bound + 2 * UNIT[torch.float32] * (factor.abs() + want.abs())
    within(y, want, bound * (1 + UNIT[dtype]) + UNIT[dtype] * want.abs() + TINY[dtype])


def test_the_activation_is_of_the_first_part() -> None:
    """Of integers: relu and products of them are exact."""
    fmt, x = Format.parse("int4"), torch.eye(16, dtype=FP16)[:5]
    weights = [torch.randint(-7, 8, (N, 16), generator=seeded(i)).float() for i in range(2)]
    for w in weights:
        w[:, 0] = 7
    parts = [Part(list(fmt.pack(w).buffers), None, [], "int4", N) for w in weights]
    a, b = (x.double() @ fmt.pack(w).unpack(torch.float64).T for w in weights)
    got = triton_fused.fused(x, *arguments(parts), "relu", None, None)
    assert torch.equal(got, (activated(a, "relu") * b).half())
    assert bool((a < 0).any())


@pytest.mark.parametrize(
    ("text", "why"), [("int4g24", "no kernel"), ("int4g32", "operand of another type")]
)
def test_what_no_kernel_takes_is_left_to_the_meaning(
    text: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(meaning, "fused", lambda *args: seen.append(args))
    cases, _, parts = made(text, "columns", FP16, 2, 1)
    other = operand(2, 1, torch.float32) if "type" in why else None
    args = (cases[0].x, *arguments(parts), "none", None, other)
    triton_fused.fused(*args)
    assert len(seen) == 1
    assert seen[0][-1] is other


def test_an_operand_of_another_shape_is_left_to_the_meaning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(meaning, "fused", lambda *args: seen.append(args))
    cases, _, parts = made("int4g32", "columns", FP16, 2, 1)
    triton_fused.fused(cases[0].x, *arguments(parts), "none", operand(1, 1, FP16), None)
    assert len(seen) == 1


@pytest.mark.parametrize("op", ["linears", "fused"])
def test_gpus_dispatch_to_the_kernels(op: str) -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"sparsefx::{op}", "CUDA")
