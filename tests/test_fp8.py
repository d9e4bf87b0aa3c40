"""The `fp8` codec: text form, bits on the stored grid, zeros, ranges, files and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.codegen.kernels import UNPACK, Problem, choose
from sparsefx.ir.codecs import Fp8
from sparsefx.ir.codecs.base import fp16_scales
from sparsefx.ir.errors import SpecError, WeightError
from sparsefx.ir.format import Format

TEXTS = ["fp8", "fp8g16", "2:4+fp8g16", "bitmap@50%+fp8", "tile16x1@50%+fp8g32"]


def slow_e4m3(code: int) -> float:
    """As "OCP 8-bit Floating Point Specification" (2023) reads eight bits, NaN left out."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if code >> 7 else size


@pytest.mark.parametrize("text", TEXTS)
def test_packing_is_exact_on_the_stored_grid(text: str) -> None:
    fmt = Format.parse(text)
    assert str(fmt) == text
    torch.manual_seed(0)
    weight = torch.randn(35, 80)
    weight[3], weight[5, :16] = 0, 0
    packed = fmt.pack(weight)
    values = packed.unpack()
    again = fmt.pack(values, packed.mask(), packed.read()[2])
    assert all(torch.equal(a, b) for a, b in zip(packed.buffers, again.buffers, strict=True))
    assert torch.equal(again.unpack(), values)


def test_each_value_is_rounded_to_the_nearest() -> None:
    """A rounding to 4 significant bits is off by 2⁻⁴ of a normal number at most."""
    weight = torch.rand(16, 64) * 3 + 1
    off = (Format.parse("fp8g32").pack(weight).unpack() - weight).abs() / weight
    assert float(off.max()) <= 2**-4


def test_zeros_stay_zeros() -> None:
    """A group of zeros has no range to divide by (pytorch/ao#4713)."""
    weight = torch.zeros(8, 64)
    weight[0, :32] = 1
    packed = Format.parse("fp8g32").pack(weight)
    assert torch.equal(packed.unpack(), weight)
    assert not packed.unpack().signbit().any()
    assert Format.parse("fp8").pack(torch.zeros(0, 64)).unpack().shape == (0, 64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-9, 1e9])
def test_what_cannot_be_stored_is_refused(value: float) -> None:
    weight = torch.full((2, 16), value)
    with pytest.raises(WeightError):
        Format.parse("fp8").pack(weight)


def test_values_beyond_a_given_grid_are_cut_off_and_never_nan() -> None:
    fmt = Format.parse("fp8")
    grid = fmt.pack(torch.ones(1, 16)).read()[2]
    assert float(fmt.pack(torch.full((1, 16), 99.0), None, grid).unpack().max()) < 2


@pytest.mark.parametrize("text", ["fp8g0", "fp8g4", "fp8g70000", "fp9"])
def test_misspelt_texts_are_refused(text: str) -> None:
    with pytest.raises(SpecError):
        Format.parse(text)


def test_files_keep_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(64, 32)), "2:4+fp8g16")
    sparsefx.save(model, tmp_path / "model")
    loaded = sparsefx.load(tmp_path / "model", nn.Sequential(nn.Linear(64, 32)))
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(model.half().state_dict()["0.values"], loaded.state_dict()["0.values"])


def test_processors_unpack_it_and_say_so() -> None:
    fmt = Format.parse("2:4+fp8g16")
    choice = choose(fmt, Problem(4, 16, 32, torch.float32, "cpu"))
    assert choice.kernel is UNPACK
    assert "holds integer codes and plain floats, not 'fp8g16'" in choice.refused[0]
    refused = choose(Format.parse("fp8g16+a8"), Problem(4, 16, 32, torch.float16, "cuda")).refused
    assert "'+a8' needs integer codes, not 'fp8g16'" in refused[0]


@pytest.mark.parametrize("text", [*TEXTS, "fp8g16+a8", "tile1x16@50%+fp8g24+a8g32"])
def test_files_of_onnx_hold_the_weight_and_multiply_right(text: str) -> None:
    """By ordinary operators, which stock ONNX Runtime folds at load: the weight bit for bit."""
    case = pytest.importorskip("test_onnx", reason="onnx and onnxruntime are not installed")
    torch.manual_seed(0)
    packed = Format.parse(text).pack(torch.randn(35, 80))
    model, row = case.single(packed)
    found = torch.from_numpy(case.written_weight(case.inlined(model), row.output)).float()
    assert torch.equal(found, packed.unpack())
    x = torch.randn(5, 80)
    want = case.exact(x, packed)
    (y,) = case.session(model).run(None, {"x": x.numpy()})
    assert bool(((torch.from_numpy(y) - want).abs() <= case.bound(x, packed, want)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_exported_products_have_the_type_of_x(dtype: torch.dtype) -> None:
    case = pytest.importorskip("test_onnx", reason="onnx and onnxruntime are not installed")
    packed = Format.parse("fp8g16").pack(torch.randn(8, 32))
    model, _ = case.single(packed, torch.randn(8), rank=1, dtype=dtype)
    (y,) = case.session(model).run(None, {"x": torch.randn(32).to(dtype).numpy()})
    assert torch.from_numpy(y).dtype == dtype


def test_scales_below_fp16_s_least_beside_greater_ones() -> None:
    """2⁻²⁴ stands for them where a scale is 16 times that; what is negligible is 0."""
    found = fp16_scales(torch.tensor([2.0**-20, 2.0**-26, -(2.0**-26), 0.0, 2.0**-37, 2.0**-24]))
    assert found.tolist() == [2.0**-20, 2.0**-24, -(2.0**-24), 1.0, 1.0, 2.0**-24]
    with pytest.raises(WeightError, match="leaves the range of fp16"):
        fp16_scales(torch.tensor([2.0**-21, 2.0**-26]))
    w = torch.tensor([[1.0], [2.0**-6]]) * 2.0**-20 * 448
    assert torch.equal(Format(codec=Fp8(128)).pack(w).unpack(), w)
