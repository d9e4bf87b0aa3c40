"""What a product would launch on a card, without the card: for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from sparsefx.codegen.triton import ORDERS
from sparsefx.codegen.triton_aot import Compiled, compile_for, signature_of
from sparsefx.codegen.triton_launch import Config, Product
from sparsefx.codegen.triton_pack import Columns, Masked
from sparsefx.codegen.triton_tune import Work, default
from sparsefx.ir.format import Format


@dataclass(frozen=True)
class Launch:
    """The main kernel of a product with what it is called with."""

    weight: Columns | Masked
    config: Config
    kernel: Any
    arguments: dict[str, Any]

    def compile_for(self, target: str) -> Compiled:
        """The kernel on a target of `triton_aot.TARGETS`, with the same errors."""
        signature, constants = signature_of(self.kernel, self.arguments)
        warps, stages = self.config.warps, self.config.stages
        return compile_for(self.kernel, signature, constants, target, warps, stages)

    def per_weight(self, made: Compiled) -> dict[str, float]:
        """`made.per_weight` of the loop with the products.

        Without tensor cores, of a pass as the kernel's source has it. Large blocks load words in a
        loop around that one, which is left out.
        """
        weight, config = self.weight, self.config
        columns = weight.parts * weight.slice if isinstance(weight, Columns) else 32 * weight.cell
        found = made.weights(config.block_m, config.block_n)
        return made.per_weight(found or columns * config.block_n)


class _Recorder(ModuleType):
    """Stands for the kernels' module: notes how kernels are called and runs none."""

    def __init__(self) -> None:
        super().__init__("recorder")
        self.calls: list[tuple[Any, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        from sparsefx.codegen import triton_kernels

        kernel, calls = getattr(triton_kernels, name), self.calls

        class Called:
            def __getitem__(self, grid: object) -> Callable[..., None]:
                def run(*values: Any, **named: Any) -> None:
                    calls.append(
                        (kernel, dict(zip(kernel.arg_names, values, strict=False)) | named)
                    )

                return run

        return Called()


def record(spec: str, order: str, m: int, shape: tuple[int, int], processors: int) -> Launch:
    """The default launch for `m` rows of bfloat16 and a random weight of `shape` (N, K)."""
    fmt, (n, k) = Format.parse(spec), shape
    random = torch.Generator().manual_seed(0)
    packed = fmt.pack(torch.randn(n, k, generator=random).bfloat16())
    weight = ORDERS[order](packed)
    config = default(Work(weight, m, fmt.a8, processors))
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    branch = [x.new_zeros(s) for s in ((fmt.rank, k), (n, fmt.rank), (fmt.rank,))]
    recorder = _Recorder()
    Product(weight, recorder).linear(x, config, x.new_zeros(n), branch if fmt.rank else ())
    calls = [c for c in recorder.calls if c[0].__name__ not in ("rows_kernel", "reduce_kernel")]
    return Launch(weight, config, *calls[0])
