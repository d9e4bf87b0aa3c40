"""Triton kernels on tensors with more than 2³¹ elements, of which only the last are touched."""

from __future__ import annotations

import mmap
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import FP16, integers, order, seeded
from triton_interpreter import interpreted

from sparsefx.codegen.triton_launch import Config, Product, Tasks, plan
from sparsefx.codegen.triton_pack import Columns

torch.set_num_threads(1)


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written to."""
    size = torch.Size(shape).numel() * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags), dtype=dtype).view(shape)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter on CPU tensors as they are, not on copies: copies touch every page."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


HUGE = (1 << 27) + 48
"""17 rows of so many numbers are more than 2³¹."""


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("config", [Config(16, 16), Config(1, 16, True)], ids=str)
def test_rows_of_x_beyond_2_31(config: Config) -> None:
    """A strip that stores the last columns of very long rows."""
    small = order(integers("tile16x1@50%+int4", "columns", 1, 16, 128).packed, "columns")
    assert isinstance(small, Columns)
    assert small.columns is not None
    table = torch.where(small.columns < 0, -1, small.columns + HUGE - 128).to(torch.int32)
    long = replace(small, k=HUGE, columns=table)
    values = torch.randint(-3, 4, (17, 128), generator=seeded(1)).half()
    x = sparse((17, HUGE), FP16)
    x[:, -128:] = values
    assert torch.equal(
        Product(long, interpreted()).linear(x, config),
        Product(small, interpreted()).linear(values, config),
    )


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("config", [Config(16, 16), Config(16, 16, tasks=2)], ids=str)
def test_results_and_weights_beyond_2_31(config: Config) -> None:
    """The last rows of a very tall weight, of which nothing else is there."""
    case = integers("uint3g32", "columns", 17, 16, 200)
    small = order(case.packed, "columns")
    assert isinstance(small, Columns)
    assert small.scales is not None
    assert small.zeros is not None
    tall = {}
    for name, part in (("plane0", small.planes[0]), ("plane1", small.planes[1]),
                       ("scales", small.scales), ("zeros", small.zeros)):  # fmt: skip
        tall[name] = sparse((*part.shape[:-1], HUGE), part.dtype)
        tall[name][..., -16:] = part
    weight = Product(
        replace(small, n=HUGE, rows=HUGE, planes=(tall["plane0"], tall["plane1"]),
                scales=tall["scales"], zeros=tall["zeros"]),
        interpreted(),
    )  # fmt: skip
    rows, y = [0, HUGE - 16], sparse((17, HUGE), FP16)
    parts = [[*rows, 0, 1], [*rows, 1, 2]] if config.tasks else [[*rows, 0, 2]]
    tasks = Tasks(
        torch.tensor(parts, dtype=torch.int32),
        torch.tensor([[*rows, 0, len(parts)]], dtype=torch.int32), len(parts) > 1,
    )  # fmt: skip
    weight._multiply(case.x, y, 17, tasks, config, (None, None, None, None, 0, None, None), 0)
    assert torch.equal(y[:, -16:], Product(small, interpreted()).linear(case.x, Config(16, 16)))


class LastRows:
    """A kernel of which only the programs for the last block of rows of x run."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        return self.kernel[grid[0], 1]


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("config", [Config(16, 16), Config(16, 16, tasks=2)], ids=str)
def test_many_rows_beyond_2_31(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 2²⁷ rows of results, of the branch's numbers and of parts of sums."""
    from triton.runtime.interpreter import InterpreterBuilder

    case, rank, m = integers("int4", "columns", 16, 16, 200), 17, (1 << 27) + 16
    made, module = order(case.packed, "columns"), interpreted()
    low, up = torch.randint(-3, 4, (2, 16, rank), generator=seeded(1)).half()
    x, tall, y = sparse((m, case.x.shape[1]), FP16), sparse((m, rank), FP16), sparse((m, 16), FP16)
    x[-16:], tall[-16:] = case.x, low
    last = {name: LastRows(getattr(module, name)) for name in ("columns_kernel", "reduce_kernel")}
    weight = Product(made, SimpleNamespace(**last))  # type: ignore[arg-type]

    def at(self: Any, i: int, j: int, k: int) -> None:
        self.grid_idx = (i, j + m // 16 - 1, k)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", at)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: sparse(shape, dtype))
    weight._multiply(
        x, y, m, plan(made, config), config, (None, None, tall, up, rank, None, None), 0
    )
    want = case.x.double() @ case.packed.unpack(torch.float64).T + low.double() @ up.double().T
    assert torch.equal(y[-16:], want.half())
