"""ONNX with int8 activations: rounded exactly as eager does, or in blocks that are no coarser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_onnx import session, single
from torch import Tensor, nn

from sparsefx.codegen import onnx_writer
from sparsefx.codegen.onnx_lower import Blocks, Problem, plan_blocks
from sparsefx.ir.errors import ExportError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import round_activations
from sparsefx.runtime.export import export_onnx
from sparsefx.runtime.gate_probe import Probe
from sparsefx.runtime.install import install

EXACT = [
    "int8+a8g24", "int4g32+a8g8", "bitmap@50%+uint4g24+a8g40", "int5g24+a8", "fp16+a8",
    "tile16x1@50%+bf16+a8g16", "2:4+fp32+a8g64",
]  # fmt: skip
"""Lowered to a matrix: the rounding is written out."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products in several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rounded_product(x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Q(x)·Wᵀ in float64, and what a float32 product may be off by.

    That is 2√K·2⁻²⁴·|Q(x)||W|ᵀ, and among denormal numbers one step for each product and sum.
    """
    rows = round_activations(x, packed.format.a8_group).double()
    weight = packed.unpack(torch.float64)
    y = rows @ weight.T
    relative = y.abs() + 2 * packed.k**0.5 * (rows.abs() @ weight.abs().T)
    return y, 2.0**-24 * relative + 2 * packed.k * 2.0**-149


def odd_rows(k: int) -> Tensor:
    """Rows with an outlier, zeros, denormal numbers, NaN and infinity."""
    torch.manual_seed(0)
    x = torch.randn(8, k)
    x[2, 3], x[3], x[4], x[5, 1], x[6, 0] = 300, 0, x[4] * 1e-42, torch.nan, torch.inf
    return x


@pytest.mark.parametrize("text", EXACT)
@pytest.mark.parametrize("k", [64, 96, 100])
@pytest.mark.parametrize("full", [False, True])
def test_written_out_rounding_is_exact(text: str, k: int, full: bool) -> None:
    packed = Format.parse(text).pack(torch.randn(20, k))
    model, row = single(packed)
    assert row.op != "MatMulNBits"
    x = odd_rows(k)
    want, bound = rounded_product(x, packed)
    (y,) = session(model, full).run(None, {"x": x.numpy()})
    got = torch.from_numpy(y)
    sound = [0, 1, 2, 3, 4, 7]
    assert bool(((got - want).abs() <= bound)[sound].all())
    assert not bool(got[[5, 6]].isfinite().any())


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("group", [16, 24])
def test_any_rank_and_dtype(rank: int, dtype: torch.dtype, group: int) -> None:
    torch.manual_seed(0)
    packed = Format.parse(f"fp16+a8g{group}").pack(torch.randn(8, 32))
    model, _ = single(packed, rank=rank, dtype=dtype)
    x = torch.randn(*(3, 1, 2)[: rank - 1], 32).to(dtype)
    want, bound = rounded_product(x.float(), packed)
    (y,) = session(model).run(None, {"x": x.numpy()})
    assert y.dtype == x.numpy().dtype
    last = 2.0**-11 * want.abs() if dtype == torch.float16 else 0.0
    assert bool(((torch.from_numpy(y) - want).abs() <= bound + last).all())


def test_no_rows_at_all() -> None:
    for text in ("fp16+a8g16", "int8+a8g24", "fp16+a8"):
        model, _ = single(Format.parse(text).pack(torch.randn(8, 40)), rank=3)
        (y,) = session(model).run(None, {"x": np.ones((2, 0, 40), np.float32)})
        assert y.shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("text", "k", "size"),
    [
        ("int4g128+a8g128", 512, 128), ("int4g128+a8g32", 512, 32), ("int4g32+a8g128", 512, 32),
        ("int8+a8g64", 384, 64), ("int8+a8g64", 100, 32), ("int8+a8g4096", 384, 128),
        ("int8+a8g48", 384, 16), ("int8+a8g24", 384, None), ("int8+a8g48", 100, None),
        ("int4g48+a8g40", 480, None),
    ],
)  # fmt: skip
def test_blocks_cross_no_activation_group(text: str, k: int, size: int | None) -> None:
    found = plan_blocks(Problem(Format.parse(text), 8, k))
    if size is None:
        assert isinstance(found, str)
        assert "the activation group of" in found
    else:
        assert isinstance(found, Blocks)
        assert found.size == size


@pytest.mark.parametrize("text", ["int4g128+a8g128", "2:4+uint4g64+a8g64", "int8+a8g32"])
def test_blocks_of_the_group_round_as_eager_does(text: str) -> None:
    torch.manual_seed(0)
    packed = Format.parse(text).pack(torch.randn(20, 512))
    model, row = single(packed)
    assert row.op == "MatMulNBits"
    x = torch.randn(6, 512)
    x[:, 5] *= 300
    want, bound = rounded_product(x, packed)
    off = (x.double() - round_activations(x, packed.format.a8_group)) @ packed.unpack().double().T
    (y,) = session(model).run(None, {"x": x.numpy()})
    # It divides by the scale in another order, so a tie may fall to the other side: a step each.
    assert float((torch.from_numpy(y) - want).norm()) <= float(bound.norm() + 1e-2 * off.norm())


class Mixed(nn.Module):
    """One layer per way to lower int8 activations."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in texts)
        for index, text in enumerate(texts):
            weight = self.get_parameter(f"layers.{index}.weight").detach()
            install(self, [f"layers.{index}.weight"], Format.parse(text).pack(weight))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        # A weight that is used twice is written once.
        out: Tensor = self.layers[0](x)
        return out


def test_the_gate_passes_every_lowering(tmp_path: Path) -> None:
    texts = ["int8+a8g24", "int4g16+a8g16", "fp16+a8", "int8+a8g64", "int4g32"]
    report = export_onnx(
        Mixed(*texts).eval(), tmp_path / "m.onnx", torch.randn(4, 7, 64),
        {"x": {0: "batch", 1: "length"}},
    )  # fmt: skip
    ops = [row.op for row in report.layers]
    folded = "MatMul, codes folded at load"
    assert ops == [folded, "MatMulNBits", "MatMul", "MatMulNBits", "MatMulNBits", folded]
    assert {d.measure for d in report.differences} == {"rms"}
    assert len({d.sizes for d in report.differences}) >= 4


def test_the_gate_knows_groups_as_rounded_activations(tmp_path: Path) -> None:
    report = export_onnx(Mixed("int4g32+a8g64").eval(), tmp_path / "m.onnx", torch.randn(9, 64))
    assert {d.measure for d in report.differences} == {"rms"}


def test_the_gates_noise_is_as_large_as_the_rounding() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 64)
    x[:, 3] *= 300
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    install(model, ["0.weight"], Format.parse("fp32+a8g16").pack(torch.eye(64)))
    rounded, exact, dithered = (
        Probe(activations=kind).run(model, (x,), {}) for kind in ("as asked", "exact", "dither")
    )
    assert torch.equal(exact, x)
    for columns in (slice(0, 16), slice(16, 64)):
        noise, error = ((y - x)[:, columns].square().mean().sqrt() for y in (dithered, rounded))
        assert float(noise / error) == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("wrong", ["a tenth of the scale", "cut at 12"])
def test_the_gate_stops_wrong_rounding(
    wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = onnx_writer.Writer.number

    def number(self: Any, value: float) -> Any:
        if wrong == "cut at 12":
            return real(self, {127.0: 127.0, -127.0: -12.0}.get(value, value))
        return real(self, value * 10 if value == 127.0 else value)

    monkeypatch.setattr(onnx_writer.Writer, "number", number)
    with pytest.raises(ExportError, match=r"First differing layer: 'layers\.0'"):
        export_onnx(Mixed("int8+a8g24").eval(), tmp_path / "m.onnx", torch.randn(40, 64))
