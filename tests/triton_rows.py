"""The kernels as products launch them by default, compiled for every target.

`python -m triton_rows PATH` checks them against the table in PATH, `--write` records it. Run it
without TRITON_INTERPRET. It takes minutes: each kernel is compiled for five targets.
"""

from __future__ import annotations

import sys
from pathlib import Path

from triton_table import Row, check, write

from sparsefx.codegen.triton_aot import signature_of
from sparsefx.codegen.triton_pack import Columns
from sparsefx.codegen.triton_record import record

TABLE = Path(__file__).parent / "data" / "triton_kernels.json"
N, K, PROCESSORS = 512, 1024, 132
CASES = (
    ("int4g128", "columns", (1, 16, 64, 512)),
    ("int4g128+a8", "columns", (16, 512)),
    ("int4g128+r32", "columns", (16, 512)),
    ("uint4g128", "columns", (1, 16)),
    ("int3g128", "columns", (1, 16)),
    ("int2g128", "columns", (1,)),
    ("int8", "columns", (1, 16)),
    ("int8+a8", "columns", (16, 512)),
    ("tile64x16@50%+int4g128", "columns", (1, 16, 512)),
    ("tile16x1@50%+int4g128", "columns", (1, 16)),
    ("tile1x16@50%+int4g128", "lanes", (1,)),
    ("tile64x16@50%+bf16", "columns", (16, 512)),
    ("2:4+bf16", "masked", (1, 16, 512)),
    ("2:4+int4g128", "masked", (1, 16)),
    ("bitmap@50%+int4g128", "masked", (1, 16, 512)),
    ("tile1x16@50%+int4g128", "masked", (16,)),
)
"""Format, order, rows of x."""


def row(spec: str, order: str, m: int) -> Row:
    """The main kernel's entry in the table."""
    made = record(spec, order, m, (N, K), PROCESSORS)
    signature, constants = signature_of(made.kernel, made.arguments)
    weight, config = made.weight, made.config
    block = weight.parts * weight.slice if isinstance(weight, Columns) else 32 * weight.cell
    return Row(
        f"{spec} {order} M={m}", made.kernel, signature, constants, block * config.block_n,
        config.warps, config.stages,
    )  # fmt: skip


def rows() -> list[Row]:
    """All of `CASES`."""
    return [row(spec, order, m) for spec, order, ms in CASES for m in ms]


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] != "--write" else TABLE
    (write if "--write" in sys.argv else check)(rows(), path)
