"""Compiles kernels in several processes before anything is timed.

Triton compiles one kernel at a time and takes seconds for it; its cache on disk is shared. What is
compiled are the first configurations that tuning will try, over narrow weights: a kernel depends on
N only by whether sums are split.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
from benchmarks.gpu_timing import DEVICE, first_line

from sparsefx.codegen import triton, triton_tune
from sparsefx.codegen.kernels import Problem, choose
from sparsefx.codegen.triton_launch import Config, Product
from sparsefx.ir.format import Format

NARROW = 256
SPLIT = 1 << 20
"""Tasks that no weight has: every sum is split."""


@dataclass(frozen=True)
class Job:
    """Kernels of one product: Format, M, N and K."""

    format: str
    m: int
    n: int
    k: int


def limit_tuning(count: int, seconds: float) -> None:
    """Let tuning try `count` configurations for at most `seconds`, and forget them afterwards.

    Others would have to be compiled first; what so short a search found is not for the user.
    """
    os.environ["SPARSEFX_CACHE"] = tempfile.mkdtemp(prefix="sparsefx-bench-")
    triton_tune.BUDGET = seconds
    every = triton_tune.candidates
    triton_tune.candidates = lambda work: every(work)[:count]


def compile_all(
    jobs: Sequence[Job], count: int, seconds: float, dtype: torch.dtype
) -> tuple[int, set[str]]:
    """Compile `count` configurations of every job within `seconds`.

    Returns the number of jobs done, and what went wrong in others.
    """
    workers = max(min((os.cpu_count() or 1) - 1, 14, len(jobs)), 1)
    until = time.time() + seconds
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        waiting = {pool.submit(compile_job, job, count, until, dtype): job for job in jobs}
        failed = {f"{waiting[one].format}: {first_line(why)}" for one in waiting
                  if (why := one.exception()) is not None}  # fmt: skip
        return sum(one.exception() is None and one.result() for one in waiting), failed


def compile_job(job: Job, count: int, until: float, dtype: torch.dtype) -> bool:
    """Compile one job's kernels; False if time ended before."""
    if time.time() > until:
        return False
    torch.set_num_threads(1)
    fmt = Format.parse(job.format)
    name = choose(fmt, Problem(job.m, job.n, job.k, dtype, "cuda")).kernel.name
    if not name.startswith("triton_"):
        return True
    torch.manual_seed(0)
    rows = min(NARROW, job.n)
    packed = fmt.pack(torch.randn(rows, job.k, device=DEVICE))
    x = torch.randn(job.m, job.k, device=DEVICE).to(dtype)
    shapes = ((fmt.rank, job.k), (rows, fmt.rank), (fmt.rank,))
    branch = [torch.randn(s, device=DEVICE).to(dtype) for s in shapes] if fmt.rank else []
    product = triton.prepared(name.removeprefix("triton_"), packed)
    for config in _configs(product, job, fmt.a8, count):
        if time.time() > until:
            return False
        for parts in ([], branch) if branch else ([],):
            try:
                product.linear(x, config, None, parts)
            except Exception as error:  # what the device has no room for, tuning leaves out too
                if not triton_tune._too_large(error):
                    raise
    return True


def _configs(product: Product, job: Job, a8: bool, count: int) -> list[Config]:
    """The first `count` candidates, as they split sums at `job.n` rows."""
    processors = triton._processors(str(product.weight.planes[0].device))
    work = triton_tune.Work(product.weight, triton_tune.bucket(job.m), a8, processors)
    out = []
    for config in triton_tune.candidates(work)[:count]:
        blocks = len(product.weight.row_blocks(config.block_n)) * job.n // product.weight.n
        out.append(replace(config, tasks=SPLIT if blocks < config.tasks else 0))
    return list(dict.fromkeys(out))
