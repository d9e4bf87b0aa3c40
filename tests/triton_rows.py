"""The kernels as products launch them by default, compiled for every target.

Run without TRITON_INTERPRET, from the repository's root with PYTHONPATH=src:tests. It takes
minutes, as each kernel is compiled for five targets; Triton's cache keeps what did not change.

    python -m triton_rows --write    # records tests/data/triton_kernels.json
    python -m triton_rows            # prints as JSON what is worse than recorded
    python -m triton_rows --few      # the same of few kernels and targets
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from triton_table import compare, write

from sparsefx.codegen.triton_aot import TARGETS
from sparsefx.codegen.triton_record import Launch, record

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
    ("fp8g128", "columns", (1, 16, 512)),
    ("tile64x16@50%+int4g128", "columns", (1, 16, 512)),
    ("tile16x1@50%+int4g128", "columns", (1, 16)),
    ("tile1x16@50%+int4g128", "lanes", (1,)),
    ("tile64x16@50%+bf16", "columns", (16, 512)),
    ("2:4+bf16", "masked", (1, 16, 512)),
    ("2:4+int4g128", "masked", (1, 16)),
    ("bitmap@50%+int4g128", "masked", (1, 16, 512)),
    ("2:4+fp8g128", "masked", (16, 512)),
    ("tile1x16@50%+fp8g128", "lanes", (1,)),
    ("2:4+int8+a8", "masked", (16, 512)),
    ("tile1x16@50%+int4g128", "masked", (16,)),
)
"""Format, order, rows of x."""
FEW = (
    "int4g128 columns M=1", "int4g128 columns M=512", "int8+a8 columns M=512",
    "tile1x16@50%+int4g128 lanes M=1", "tile64x16@50%+int4g128 columns M=16",
    "2:4+bf16 masked M=16",
)  # fmt: skip
FEW_TARGETS = ("sm_80", "sm_90", "gfx942")


def launches(names: tuple[str, ...] = ()) -> dict[str, Launch]:
    """All of `CASES` by name, or those named."""
    cases = {f"{spec} {order} M={m}": (spec, order, m) for spec, order, rows in CASES for m in rows}
    return {name: record(*cases[name], (N, K), PROCESSORS) for name in names or cases}


def main(argument: str) -> None:
    """What the module's text says of each argument."""
    if argument == "--write":
        write(launches(), TABLE)
    elif argument == "--few":
        print(json.dumps(compare(launches(FEW), TABLE, FEW_TARGETS)))
    else:
        print(json.dumps(compare(launches(), TABLE, tuple(TARGETS))))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
