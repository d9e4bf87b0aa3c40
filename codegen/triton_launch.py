"""Launching the Triton kernels: tasks, buffers, and one call per product.

Nothing here asks the device anything once a configuration was run, so a product can be part of a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsefx.codegen.triton_pack import Columns, Masked, Task, power
from sparsefx.ir.codecs import Fp8, Int

ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


@dataclass(frozen=True)
class Config:
    """How a kernel is run: sizes of its blocks of results, tasks wanted, warps and stages."""

    block_m: int
    block_n: int
    vector: bool = False
    """Products of vectors, a row of x at a time (`block_m` 1), instead of tensor cores."""
    tasks: int = 0
    """Tasks to cut the work into; 0 leaves every block of results to one task."""
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        kind = "vector " if self.vector else ""
        split = f", {self.tasks} tasks" if self.tasks else ""
        return f"{kind}{self.block_m}×{self.block_n}{split}, {self.warps} warps"


@dataclass(frozen=True)
class Tasks:
    """The flat list of tasks and which of them each block of results adds up."""

    tasks: Tensor
    """(tasks, 4) int32 as `triton_pack.Task`."""
    blocks: Tensor
    """(row blocks, 4) int32: strip, first row, first task, the one after the last."""
    split: bool


def cut(row_blocks: Sequence[Task], wanted: int) -> list[list[Task]]:
    """Every row block's work in equal parts, such that `wanted` tasks or a few more share it.

    No task has more than one block of columns above the mean: uneven rows do not hold others up
    (the task-centric idea of GQSA, arXiv 2412.17560).
    """
    total = sum(last - first for *_, first, last in row_blocks)
    most = max(-(-total // wanted), 1) if wanted else max(total, 1)
    out = []
    for strip, row, first, last in row_blocks:
        count = max(-(-(last - first) // most), 1)
        edges = [first + (last - first) * i // count for i in range(count + 1)]
        out.append([(strip, row, a, b) for a, b in pairwise(edges)])
    return out


def plan(prepared: Columns | Masked, config: Config) -> Tasks:
    """The tasks of one product."""
    row_blocks = prepared.row_blocks(config.block_n)
    parts = cut(row_blocks, config.tasks)
    blocks, done = [], 0
    for (strip, row, *_), part in zip(row_blocks, parts, strict=True):
        blocks.append((strip, row, done, done + len(part)))
        done += len(part)
    device = prepared.planes[0].device
    flat = [task for part in parts for task in part]
    return Tasks(
        torch.tensor(flat, dtype=torch.int32).view(-1, 4).to(device),
        torch.tensor(blocks, dtype=torch.int32).view(-1, 4).to(device),
        done > len(blocks),
    )


@dataclass
class Product:
    """One weight on a GPU, ready to multiply."""

    weight: Columns | Masked
    kernels: ModuleType
    plans: dict[Config, Tasks] = field(default_factory=dict)
    configs: dict[tuple[int, torch.dtype], Config | None] = field(default_factory=dict)
    """What was chosen per number of rows; None stands for unpacking and a dense product."""

    def linear(
        self,
        x: Tensor,
        config: Config,
        bias: Tensor | None = None,
        branch: Sequence[Tensor] = (),
        activation: str = "none",
        multiply: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """act(x · Wᵀ + bias + ((x · downᵀ) ⊙ scale) · upᵀ) ⊙ multiply + residual.

        x (…, K) float16 or bfloat16; bias (N,); multiply and residual (…, N) in x's type; branch
        is (down (r, K), up (N, r), scale (r,)).
        """
        w = self.weight
        if not x.numel() or not w.n:
            return x.new_empty((*x.shape[:-1], w.n))
        if config not in self.plans:
            self.plans[config] = plan(w, config)
        rest = bias, branch, activation, multiply, residual
        return self.launch(x, config, self.plans[config], *rest)

    def launch(
        self, x: Tensor, config: Config, tasks: Tasks, bias: Tensor | None,
        branch: Sequence[Tensor], activation: str, multiply: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`linear` of one row or more. Nothing here asks how many an open number of rows is."""
        w = self.weight
        rows = x.reshape(-1, w.k).contiguous()
        m = rows.shape[0]
        y = x.new_empty((*x.shape[:-1], w.n))
        codes, row_scales, low, up = self._rows(rows, m, branch)
        rank = low.shape[1] if low is not None else 0
        tail = (row_scales, bias, low, up, rank, *map(_flat, (multiply, residual), (w.n, w.n)))
        self._multiply(codes, y, m, tasks, config, tail, ACTIVATIONS[activation])
        return y

    def _rows(
        self, x: Tensor, m: int, branch: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The activation pass: x or its int8 codes, their scales, the branch's x · down and up."""
        w, fmt = self.weight, self.weight.format
        a8 = fmt.a8 and isinstance(fmt.codec, Int)
        if not a8 and not branch:
            return x, None, None, None
        codes = torch.empty_like(x, dtype=torch.int8) if a8 else None
        scales = x.new_empty(m, dtype=torch.float32) if a8 else None
        low = down = up = strength = None
        rank = 0
        if branch:
            down, up, strength = (t.to(x.dtype).contiguous() for t in branch)
            rank = down.shape[0]
            low = x.new_empty(m, rank)
        # An open number of rows (a SymInt) is no int: comparing it would fix it.
        size = 1 if isinstance(m, int) and m <= 4 and not rank else 16
        self.kernels.rows_kernel[(-(-m // size),)](
            x, codes, scales, low, down, strength, m, w.k, rank,
            BLOCK_M=size, BLOCK_K=64 if rank else 1024 // size, 
            RANK=max(power(rank), 16) if rank else 0, num_warps=4,
        )  # fmt: skip
        return (x if codes is None else codes), scales, low, up

    def _multiply(
        self, x: Tensor, y: Tensor, m: int, tasks: Tasks, config: Config, tail: tuple[Any, ...],
        activation: int,
    ) -> None:  # fmt: skip
        w, split = self.weight, tasks.split
        partial = None
        if split:
            shape = (tasks.tasks.shape[0], m, config.block_n)
            partial = torch.empty(shape, dtype=torch.float32, device=y.device)
        rank = -(-tail[4] // 16) * 16
        kernel, head, last, constants = self._arguments(config, x, y, m, tasks)
        rows = -(-m // config.block_m)
        kernel[(tasks.tasks.shape[0], rows)](
            *head, *tail, partial, *last,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            SPLIT=split, RANK=rank, ACTIVATION=activation, **constants,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if split:
            strip, order = (w.rows, w.order) if isinstance(w, Columns) else (w.n, None)
            self.kernels.reduce_kernel[(tasks.blocks.shape[0], rows)](
                partial, y, m, w.n, strip, tasks.blocks, order, *tail,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, RANK=rank, ACTIVATION=activation,
                num_warps=config.warps,
            )  # fmt: skip

    def _arguments(
        self, config: Config, x: Tensor, y: Tensor, m: int, tasks: Tasks
    ) -> tuple[Any, list[Any], tuple[int, ...], dict[str, Any]]:
        """The kernel, its arguments before and behind the common ones, and its constants."""
        w = self.weight
        codec = w.format.codec
        widths = dict(zip(("WIDTH0", "WIDTH1", "WIDTH2"), (*w.widths, 0, 0), strict=False))
        head: list[Any] = [x, y, m, w.n, w.k, *(*w.planes, None, None)[:3], w.scales, w.zeros]
        groups = codec.groups(w.k) if isinstance(codec, Int | Fp8) else 1
        group = codec.group(w.k) if groups > 1 else 0
        floats = isinstance(codec, Fp8)
        constants: dict[str, Any] = {**widths, "OFFSET": w.offset, "FP8": floats, "GROUP": group}
        prescale = config.block_m >= 64 and x.dtype != torch.int8
        if isinstance(w, Masked):
            head += [w.mask, w.begins, w.starts, tasks.tasks]
            constants |= {"CELL": w.cell, "WORDS": w.step_words, "PRESCALE": prescale}
            last = (groups, w.mask_rows, w.mask.shape[1], w.starts.shape[1])
            return self.kernels.mask_kernel, head, last, constants
        whole = not w.gather and group % (w.parts * w.slice) == 0
        constants |= {"PARTS": w.parts, "SLICE": w.slice, "GATHER": w.gather}
        constants["UNIFORM"] = groups == 1 or whole
        if config.vector:
            head += [w.columns, w.order, tasks.tasks]
            return self.kernels.vector_kernel, head, (w.rows, groups), constants
        head += [w.columns, tasks.tasks]
        # Large blocks of results fill the registers with one slice, small ones wait for memory.
        constants |= {"PRESCALE": prescale, "UNROLL": w.parts if config.block_m < 64 else 1}
        return self.kernels.columns_kernel, head, (w.rows, groups), constants


def _flat(t: Tensor | None, n: int) -> Tensor | None:
    return None if t is None else t.reshape(-1, n).contiguous()
