"""`sparsefx::add_rows`: every row's own branch, by the CPU engine and by its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import NAMES, WIDTH, lora_file, sparse_and_twin
from native_cases import DTYPES, ENGINE, EPS, FLOOR, UNIT, each_isa, seeded
from torch import Tensor

import sparsefx
from sparsefx.codegen import native
from sparsefx.ir.errors import AdapterError
from sparsefx.runtime.adapter_add_rows import add_rows, meaning

torch.set_num_threads(1)

isa = each_isa
engine_built = pytest.mark.skipif(ENGINE is None, reason="needs the CPU engine")
K, N, RANK = 70, 50, 4
"""Of three adapters, behind BASE ranks of the base's own."""
BASE, ADAPTERS = 2, 3


def case(t: int, which: list[int | None], seed: int = 0) -> tuple[Tensor, ...]:
    """y, x, down, up and the scales of rows: adapter i occupies ranks i · RANK … of its own."""
    rng = seeded(seed)
    rows = torch.zeros(len(which), ADAPTERS * RANK)
    for row, i in zip(rows, which, strict=True):
        if i is not None:
            row[i * RANK : (i + 1) * RANK] = 0.5 + i
    total = BASE + ADAPTERS * RANK
    return (
        torch.randn(len(which), t, N, generator=rng), torch.randn(len(which), t, K, generator=rng),
        torch.randn(total, K, generator=rng), torch.randn(N, total, generator=rng), rows,
    )  # fmt: skip


def expected(y: Tensor, x: Tensor, down: Tensor, up: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The exact result and how far from it the engine may be.

    Two sums in float32, which err by 2√K and 2√R units of 2⁻²⁴ of |x||down|ᵀ|up|ᵀ; products without
    fused multiply-add, the scale, and adding to y round once more each; then to y's type.
    """
    scale = rows.double()[:, None]
    a, b = down[BASE:].double(), up[:, BASE:].double()
    exact = y.double() + ((x.double() @ a.T) * scale) @ b.T
    part = ((x.double().abs() @ a.abs().T) * scale.abs()) @ b.abs().T
    depth = 2 * K**0.5 + 2 * RANK**0.5 + 9
    limit = depth * EPS * part + EPS * exact.abs()
    u = UNIT[y.dtype]
    return exact, u * exact.abs() + (1 + u) * limit + FLOOR[y.dtype]


MIXES: list[list[int | None]] = [[0, 1, 2], [2, None, 2, 2], [None, None], [1], [0, 0, None, 1, 0]]


@engine_built
@pytest.mark.parametrize("which", MIXES, ids=str)
@pytest.mark.parametrize("t", [1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_gets_its_own_branch(
    isa: str, which: list[int | None], t: int, dtype: torch.dtype
) -> None:
    y, x, down, up, rows = case(t, which)
    y, x = y.to(dtype), x.to(dtype)
    for kind in (torch.float32, torch.float16):
        matrices = down.to(kind), up.to(kind)
        got = add_rows(y, x, *matrices, rows)
        exact, limit = expected(y, x, *matrices, rows)
        assert (got.shape, got.dtype) == (y.shape, y.dtype)
        assert bool(((got.double() - exact).abs() <= limit).all())
        for i, own in enumerate(which):
            assert own is not None or torch.equal(got[i], y[i])


@engine_built
def test_threads_change_no_bit(isa: str) -> None:
    for which in MIXES:
        given = case(5, which)
        once = add_rows(*given)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(add_rows(*given), once)
            finally:
                torch.set_num_threads(1)


@engine_built
def test_other_rows_and_edited_matrices_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    y, x, down, up, rows = case(2, [0, 1, 2])
    packed: list[int] = []
    real = native.branch_weights

    def counted(*given: Any) -> Any:
        packed.append(1)
        return real(*given)

    monkeypatch.setattr(native, "branch_weights", counted)

    def agrees() -> None:
        exact, limit = expected(y, x, down, up, rows)
        assert bool(((add_rows(y, x, down, up, rows).double() - exact).abs() <= limit).all())

    agrees()
    for order in ([2, 1, 0], [0, 0, 1]):
        rows.copy_(rows[order].clone())
        agrees()
    assert len(packed) == ADAPTERS  # other rows pack nothing
    down.mul_(2)
    agrees()
    with torch.inference_mode():
        rows = rows.clone()  # whose edits torch does not count
        agrees()
        rows.mul_(2)
        agrees()


def test_another_batch_is_refused() -> None:
    y, x, down, up, rows = case(1, [0, 1])
    with pytest.raises(AdapterError, match="x has 3 rows"):
        add_rows(y[:1].expand(3, 1, N), x[:1].expand(3, 1, K), down, up, rows)


def test_its_meaning_and_gradient() -> None:
    exact, _ = expected(*case(2, [0, None, 2]))
    y, x, down, up, rows = (t.double() for t in case(2, [0, None, 2]))
    torch.testing.assert_close(meaning(y, x, down, up, rows), exact)
    inputs = (y.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda *given: add_rows(*given, down, up, rows), inputs)
    torch.library.opcheck(add_rows, (y, x, down, up, rows))


def test_a_model_with_rows_is_exported_as_operators_that_a_file_has(tmp_path: Path) -> None:
    """The gate compares the file with the model as it is: every row with its own adapter."""
    model, _ = sparse_and_twin("int8")
    manager, x = sparsefx.adapters(model), torch.randn(2, 5, WIDTH)
    plain = model(x)[0]
    for seed, name in enumerate("ab"):
        manager.load(lora_file(tmp_path / f"{name}.safetensors", NAMES, 4, seed), name)
    manager.rows(["a", "b"])
    assert not torch.equal(model(x)[0], plain)
    assert sparsefx.export_onnx(model, tmp_path / "rows.onnx", x).worst is not None
