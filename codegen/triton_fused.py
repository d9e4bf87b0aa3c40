"""`sparsefx::linears` and `sparsefx::fused` on GPUs: epilogues inside the Triton kernels.

A gated pair is two products: the second multiplies by the first's result as it is written, so
nothing of a result's size is read or written for the gate alone. Weights that the kernel table
gives to no Triton kernel (`explain` names the reason), and operands of another type or shape, are
left to the op's meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsefx.codegen import triton
from sparsefx.codegen.kernels import Problem, choose
from sparsefx.ir import fused as meaning
from sparsefx.ir.format import Packed
from sparsefx.ir.fused import Part, parts_of
from sparsefx.ir.op import stored

KERNELS = {f"triton_{order}": order for order in triton.ORDERS}
"""The order of weights that each row of the kernel table reads."""


@dataclass(frozen=True)
class Ready:
    """One part, its weight and the order in which a Triton kernel reads it."""

    part: Part
    packed: Packed
    order: str

    def run(
        self, x: Tensor, activation: str = "none", multiply: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """act(x · Wᵀ + bias + branch) ⊙ multiply + residual, rounded once."""
        rest = self.part.bias, self.part.branch, activation, multiply, residual
        return triton.run(self.order, x, self.packed, *rest)


def ready(x: Tensor, parts: Sequence[Part]) -> list[Ready] | None:
    """`parts` as Triton's kernels serve them, None where they do not serve one."""
    out = []
    for part in parts:
        packed = stored(x, part.weight, part.format, part.n)
        m = x.numel() // max(packed.k, 1)
        kernel = choose(packed.format, Problem(m, part.n, packed.k, x.dtype, "cuda")).kernel
        if kernel.name not in KERNELS:
            return None
        out.append(Ready(part, packed, KERNELS[kernel.name]))
    return out


def _fits(x: Tensor, n: int, operand: Tensor | None) -> bool:
    """Whether a kernel can read `operand` where it writes its result."""
    return operand is None or (operand.dtype == x.dtype and operand.shape == (*x.shape[:-1], n))


def linears(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], branch: list[Tensor | None],
    format: str, n: list[int],
) -> list[Tensor]:  # fmt: skip
    """`sparsefx::linears` on GPUs."""
    parts = ready(x, parts_of(weight, bias, branch, format, n))
    if parts is None:
        return meaning.linears(x, weight, bias, branch, format, n)
    return [part.run(x) for part in parts]


def fused(
    x: Tensor, weight: list[Tensor], bias: list[Tensor | None], branch: list[Tensor | None],
    format: str, n: list[int], activation: str, multiply: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`sparsefx::fused` on GPUs."""
    fits = all(_fits(x, n[0], operand) for operand in (multiply, residual))
    parts = ready(x, parts_of(weight, bias, branch, format, n)) if fits else None
    if parts is None:
        return meaning.fused(x, weight, bias, branch, format, n, activation, multiply, residual)
    first, *gate = parts
    if not gate:
        return first.run(x, activation, multiply, residual)
    return gate[0].run(x, "none", first.run(x, activation, multiply), residual)


meaning.LIBRARY.impl("linears", linears, "CUDA")
meaning.LIBRARY.impl("fused", fused, "CUDA")
