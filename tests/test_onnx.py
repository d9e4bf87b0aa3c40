"""ONNX lowering and export: right weights, operators and products in stock ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsefx.codegen import onnx as codegen
from sparsefx.codegen.onnx import DOMAIN, IR_VERSION, Lowered, lower
from sparsefx.codegen.onnx_lower import Blocks, Problem, plan_blocks
from sparsefx.codegen.onnx_read import inlined, written_weight
from sparsefx.ir.errors import ExportError, MissingPackageError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.op import reference
from sparsefx.runtime import export
from sparsefx.runtime.export import export_onnx
from sparsefx.runtime.install import install

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

LAYOUTS = ("", "2:4+", "bitmap@50%+", "tile16x1@50%+", "tile1x16@50%+")
CODECS = (
    "fp32", "fp16", "bf16", "int4g128", "int4g32", "uint4g16", "int2g16", "int3g64", "uint3g512",
    "int5g32", "uint6g24", "int8", "uint8g128", "int4", "uint2", "uint4g24",
)  # fmt: skip
SHAPES = ((40, 576), (37, 100))
ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.float64: 11}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products in several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def single(
    packed: Packed, bias: Tensor | None = None, branch: tuple[Tensor, ...] = (),
    rank: int = 2, dtype: torch.dtype = torch.float32,
) -> tuple[Any, Lowered]:  # fmt: skip
    """An ONNX model of one product, lowered as an export would."""
    extra = (*branch, *(() if bias is None else (bias,)))
    tensors = {f"fc.{i}": t for i, t in enumerate((*packed.buffers, *extra))}
    tape = ir.tape.Tape()
    inputs = [
        tape.initializer(ir.tensor_adapters.TorchTensor(t, name=n)) for n, t in tensors.items()
    ]
    kind = ir.TensorType(ir.DataType(ONNX_TYPES[dtype]))
    lead = [f"d{i}" for i in range(rank - 1)]
    x = ir.Value(name="x", type=kind, shape=ir.Shape([*lead, packed.k]))
    attributes = {
        "format": str(packed.format), "n": packed.n,
        "weights": len(packed.buffers), "biased": int(bias is not None),
    }  # fmt: skip
    y = tape.op("linear", [x, *inputs], attributes, domain=DOMAIN)
    y.name, y.type, y.shape = "y", kind, ir.Shape([*lead, packed.n])
    graph = ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=inputs, opset_imports={"": 18}, name="g"
    )
    model = ir.Model(graph, ir_version=IR_VERSION)
    (row,) = lower(model, tensors)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return model, row


def session(model: Any, full: bool = True, dump: Path | None = None) -> Any:
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if full else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    data = proto.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def bound(x: Tensor, packed: Packed, y: Tensor) -> Tensor:
    """|y−r| ≤ u|r| + 2√K·2⁻²⁴·(|x||w|ᵀ); with int8 activations half a step of a block's maximum."""
    weight = packed.unpack(torch.float64).abs()
    rows = x.double().abs()
    out: Tensor = 2.0**-24 * y.abs() + 2 * packed.k**0.5 * 2.0**-24 * (rows @ weight.T)
    if packed.format.a8:
        out += rows.amax(-1, keepdim=True) / 127 / 2 * 1.01 * weight.sum(1)
        # The kernel subtracts the zero point's share in float32: what is masked leaves rounding.
        out += 2 * packed.k**0.5 * 2.0**-24 * rows.sum(-1, keepdim=True) * weight.max()
    return out


def exact(x: Tensor, packed: Packed) -> Tensor:
    out: Tensor = x.double() @ packed.unpack(torch.float64).T
    return out


@pytest.mark.parametrize("a8", ["", "+a8"])
@pytest.mark.parametrize("codec", CODECS)
def test_every_format_holds_its_weight_and_multiplies_right(codec: str, a8: str) -> None:
    torch.manual_seed(0)
    for layout in LAYOUTS:
        for n, k in SHAPES:
            fmt = Format.parse(layout + codec + a8)
            packed = fmt.pack(torch.randn(n, k))
            model, row = single(packed)
            copy = ir.from_proto(ir.to_proto(model))
            found = written_weight(inlined(copy), row.output).astype(np.float32)
            np.testing.assert_array_equal(found, packed.unpack().numpy())
            x = torch.randn(5, k)
            want = exact(x, packed)
            for full in (False, True):
                (y,) = session(model, full).run(None, {"x": x.numpy()})
                assert ((torch.from_numpy(y) - want).abs() <= bound(x, packed, want)).all(), fmt


@pytest.mark.parametrize("fmt", ["int4g32", "int8", "bf16", "uint4g32+a8"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_bias_branch_rank_and_dtype(fmt: str, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = Format.parse(fmt).pack(torch.randn(24, 64))
    bias, branch = torch.randn(24), (torch.randn(4, 64), torch.randn(24, 4), torch.randn(4))
    model, _ = single(packed, bias, branch, rank, dtype)
    x = torch.randn(*(3, 2)[: rank - 1], 64, dtype=dtype)
    want = reference(x.double(), packed, bias, branch)
    share = {torch.float32: 1e-6, torch.float16: 1e-3, torch.float64: 1e-12}[dtype]
    share = 3e-2 if packed.format.a8 else share
    for full in (False, True):
        (y,) = session(model, full).run(None, {"x": x.numpy()})
        assert y.dtype == x.numpy().dtype
        assert y.shape == tuple(want.shape)
        assert np.abs(y - want.numpy()).max() <= share * want.abs().max()


@pytest.mark.parametrize(
    ("fmt", "operators"),
    [
        ("int4g32", ["MatMulNBits"]),
        ("bitmap@50%+uint3g32", ["MatMulNBits"]),
        ("int8+a8", ["MatMulNBits"]),
        ("2:4+int2g64+a8", ["MatMulNBits"]),
        ("int8", ["MatMul"]),
        ("uint8g48", ["MatMul"]),
        ("tile16x1@50%+bf16", ["MatMul"]),
    ],
)
def test_onnxruntime_folds_everything_but_the_product(
    fmt: str, operators: list[str], tmp_path: Path
) -> None:
    assert left_at_run_time(fmt, tmp_path) == operators


def left_at_run_time(fmt: str, folder: Path) -> list[str]:
    """The operators of a product that ONNX Runtime's optimiser leaves."""
    model, _ = single(Format.parse(fmt).pack(torch.randn(32, 192)))
    session(model, dump=folder / "optimised.onnx")
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize(
    ("fmt", "k", "plan"),
    [
        ("int4g128", 576, (4, 128, 1)),
        ("int4g512", 4096, (4, 256, 1)),
        ("int4g48", 4096, (4, 16, 1)),
        ("int4", 576, (4, 64, 1)),
        ("int4", 101, (4, 32, 1)),
        ("uint2g64", 128, (4, 64, 1)),
        ("int2g64+a8", 128, (2, 64, 4)),
        ("int2g16+a8", 128, (4, 16, 4)),
        ("int5g64+a8", 128, (8, 64, 4)),
    ],
)
def test_blocks_avoid_the_slow_kernels(fmt: str, k: int, plan: tuple[int, int, int]) -> None:
    found = plan_blocks(Problem(Format.parse(fmt), 64, k))
    assert isinstance(found, Blocks)
    assert (found.bits, found.size, found.accuracy) == plan
    assert found.accuracy == 4 or found.bits == 4  # 2 and 8 bits are 30 times slower at level 1
    bits = Format.parse(fmt).codec.bits  # type: ignore[attr-defined]
    assert bool(found.note) == (bits != found.bits)


@pytest.mark.parametrize("fmt", ["int8", "int8+a8", "int4g24", "uint4g24"])
def test_refusals_of_matmulnbits_are_reported(fmt: str) -> None:
    _, row = single(Format.parse(fmt).pack(torch.randn(8, 48)))
    assert (row.op == "MatMulNBits") == (row.note == "")


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (1, 1)])
def test_empty_and_tiny_weights(n: int, k: int) -> None:
    packed = Format.parse("int4g32").pack(torch.randn(n, k))
    model, _ = single(packed)
    for rows in (0, 3):
        (y,) = session(model).run(None, {"x": np.ones((rows, k), np.float32)})
        np.testing.assert_allclose(y, packed.unpack().sum(1).expand(rows, n), rtol=1e-6)


# --- whole models --------------------------------------------------------------------------------


class Everything(nn.Module):
    """A packed linear called twice, a tied one, a branch, a 1×1 convolution, an opaque owner."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 32)
        self.twin = nn.Linear(24, 32, bias=False)
        self.twin.weight = self.first.weight
        self.back = nn.Linear(32, 24)
        self.attend = nn.MultiheadAttention(24, 2, batch_first=True)
        self.conv = nn.Conv1d(24, 16, 1, stride=2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        y = self.back(torch.tanh(self.first(x)) + self.twin(x))
        y = self.back(torch.tanh(self.first(y)))
        y = self.attend(y, y, y, need_weights=False)[0]
        if mask is not None:
            y = y * mask[..., None]
        return {"sequence": y, "features": self.conv(y.movedim(1, 2))}


def everything() -> Everything:
    torch.manual_seed(0)
    model = Everything().eval()

    def put(names: list[str], fmt: str, weight: Tensor, branch: tuple[Tensor, ...] = ()) -> None:
        install(model, names, Format.parse(fmt).pack(weight.detach()), branch)

    put(["first.weight", "twin.weight"], "bitmap@50%+int4g16", model.first.weight)
    branch = (torch.randn(3, 32) / 8, torch.randn(24, 3), torch.randn(3))
    put(["back.weight"], "uint5g24+r3", model.back.weight, branch)
    put(["attend.in_proj_weight"], "int8", model.attend.in_proj_weight)
    put(["conv.weight"], "tile16x1@50%+bf16", model.conv.weight.detach().flatten(1))
    return model


def test_everything_at_once_with_dynamic_axes(tmp_path: Path) -> None:
    model = everything().train()
    x = torch.randn(2, 6, 24)
    report = export_onnx(
        model,
        tmp_path / "model.onnx",
        {"mask": torch.ones(2, 6), "x": x},
        {"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", -1: torch.export.Dim("seq", min=2)}},
    )
    assert model.training
    names = [row.name for row in report.layers]
    first = "first"
    assert names.count("back") == 2
    assert names.count(first) + names.count("twin") == 3
    assert len({row.stored for row in report.layers if row.name in (first, "twin")}) == 1
    assert {row.op for row in report.layers} == {
        "MatMulNBits", "MatMul, codes folded at load", "MatMul"
    }  # fmt: skip
    assert not any("dense weight" in row.note for row in report.layers)  # passes multiply by it
    sizes = {d.sizes for d in report.differences}
    assert "batch=3, seq=7" in sizes
    assert len(sizes) == 3  # Dim(min=2) rules out 1, three others remain
    assert report.worst is not None
    assert report.worst.difference < report.worst.tolerance
    proto = onnx.load(report.path)
    assert proto.ir_version == IR_VERSION
    assert {entry.domain for entry in proto.opset_import} == {"", "sparsefx"}
    assert [i.name for i in proto.graph.input] == ["x", "mask"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert report.bytes == report.path.stat().st_size


def mlp(*formats: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).eval()
    for index, fmt in zip((0, 2), formats, strict=False):
        weight = model.get_parameter(f"{index}.weight").detach()
        install(model, [f"{index}.weight"], Format.parse(fmt).pack(weight))
    return model


def test_external_data_replaces_older_data_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SINGLE_FILE", 0)
    monkeypatch.setattr(export, "SMALL", 64)
    path, other = tmp_path / "m.onnx", tmp_path / "m.onnx.other.data"
    other.write_bytes(b"not ours")
    x = torch.randn(2, 32)
    old = export_onnx(mlp("int4g32", "int8"), path, x)
    new = export_onnx(mlp("int4g32+a8", "int8+a8"), path, x)
    assert old.data is not None
    assert new.data is not None
    assert sorted(os.listdir(tmp_path)) == sorted(["m.onnx", new.data.name, other.name])
    assert new.bytes == path.stat().st_size + new.data.stat().st_size
    assert {d.measure for d in new.differences} == {"rms"}
    assert {file.stat().st_mode for file in (path, new.data)} == {other.stat().st_mode}
    ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(codegen, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(MissingPackageError, match=r"onnxscript; .*sparsefx\[onnx\]"):
        export_onnx(mlp(), tmp_path / "m.onnx", torch.ones(2, 32))


@pytest.mark.parametrize("kind", ["symlink", "directory", "no folder"])
def test_bad_paths_are_refused_before_anything_happens(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if kind == "symlink":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "directory":
        path.mkdir()
    else:
        path = tmp_path / "missing" / "m.onnx"
    before = os.listdir(tmp_path)
    with pytest.raises(ExportError, match=r"symbolic link|regular file|does not exist"):
        export_onnx(nn.Identity(), path, None)
    assert os.listdir(tmp_path) == before


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(model: Any, draft: Path, **rest: Any) -> None:
        draft.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(mlp("int4g32"), path, torch.randn(2, 32))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize(
    ("inputs", "shapes", "message"),
    [
        (torch.ones(1, 32), {"input": {0: "batch"}}, "example size of 2 or more"),
        (torch.ones(2, 32), {"x": {0: "batch"}}, "names \\['x'\\].*inputs are: input"),
        (torch.ones(2, 32), {"input": {5: "batch"}}, "axis 5"),
        (torch.ones(2, 32), {"input": {0: 3}}, "axis names"),
        (torch.ones(2, 32), {"input": {1: "width"}}, "fixed|cannot trace"),
        ((torch.ones(2, 32), 1), None, "do not fit"),
    ],
)
def test_bad_inputs_are_named(inputs: Any, shapes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(mlp(), tmp_path / "m.onnx", inputs, shapes)
    assert os.listdir(tmp_path) == []
