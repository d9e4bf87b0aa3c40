"""Small kernels whose instructions can be counted by hand, compiled for every target.

`python -m triton_samples` prints as JSON: {"missing": why} without Triton's tools, else what
`compile_for` says of each and how it refuses wrong arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import triton
import triton.language as tl

from sparsefx.codegen.triton_aot import TARGETS, compile_for, signature_of
from sparsefx.ir.errors import MissingPackageError, SpecError

BLOCK_M, BLOCK_N, BLOCK_K, WARPS, STAGES = 64, 128, 64, 4, 3


def _product(
    x: tl.tensor, w: tl.tensor, y: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SUM: tl.constexpr,
) -> None:  # fmt: skip
    """y (M, N) = x (M, K) · w (N, K)ᵀ, without edges."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    columns = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), SUM)
    for k in range(0, K, BK):
        left = tl.load(x + m[:, None] * K + (k + columns)[None, :])
        right = tl.load(w + n[None, :] * K + (k + columns)[:, None])
        sums = tl.dot(left, right, sums, out_dtype=SUM)
    tl.store(y + m[:, None] * N + n[None, :], sums)


def _twice(x: tl.tensor, y: tl.tensor, SIZE: tl.constexpr) -> None:
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i) * 2)


product, twice = triton.jit(_product), triton.jit(_twice)


def sample(dtype: str, sums: str, target: str, m: int, n: int, k: int, warps: int) -> Any:
    """`product` of `dtype` with blocks of m × n × k."""
    signature = {"x": f"*{dtype}:16", "w": f"*{dtype}:16", "y": f"*{sums}:16", "M": "i32"}
    signature |= {"N": "i32:16", "K": "i32:16"}
    constants = {"BM": m, "BN": n, "BK": k, "SUM": tl.float32 if sums == "fp32" else tl.int32}
    stages = STAGES if warps > 1 else 1
    return asdict(compile_for(product, signature, constants, target, warps, stages))


def refusal(run: Callable[[], object]) -> str:
    """The message of the SpecError that `run` raises."""
    try:
        run()
    except SpecError as error:
        return str(error)
    return "nothing was refused"


def results() -> dict[str, Any]:
    """All that `main` prints."""
    block = (BLOCK_M, BLOCK_N, BLOCK_K, WARPS)
    said: dict[str, Any] = {}
    said["fp16"] = {target: sample("fp16", "fp32", target, *block) for target in TARGETS}
    said["i8"] = {target: sample("i8", "i32", target, *block) for target in TARGETS}
    # One warp: 64·128 sums are 256 a thread, of 255 registers; 128·256 on AMD 512, of 512.
    said["spill"] = {
        "sm_80": sample("fp16", "fp32", "sm_80", 64, 128, 16, 1),
        "gfx942": sample("fp16", "fp32", "gfx942", 128, 256, 16, 1),
    }
    triton.knobs.compilation.always_compile = True
    said["again"] = sample("fp16", "fp32", "sm_80", *block)
    pointers = {"x": "*fp32:16", "y": "*fp32:16"}
    said["no loop"] = asdict(compile_for(twice, pointers, {"SIZE": 1024}, "sm_80", 4, 1))
    values = {"x": torch.zeros(64).half(), "w": torch.zeros(64)[1:], "y": torch.zeros(9), "M": 1}
    said["signature"] = signature_of(product, values | {"N": 2**31, "K": 7, "BM": 16})
    said["refused"] = {
        "missing": refusal(lambda: compile_for(twice, {"x": "*fp32"}, {"SIZE": 4}, "sm_80", 4, 1)),
        "unknown": refusal(
            lambda: compile_for(twice, {**pointers, "z": "i32"}, {"SIZE": 4}, "sm_80", 4, 1)
        ),
        "hint": refusal(
            lambda: compile_for(twice, {**pointers, "x": "*fp32:8"}, {"SIZE": 4}, "sm_80", 4, 1)
        ),
        "value": refusal(lambda: signature_of(twice, {"x": "text"})),
    }
    return said


if __name__ == "__main__":
    try:
        print(json.dumps(results()))
    except MissingPackageError as error:
        print(json.dumps({"missing": str(error)}))
