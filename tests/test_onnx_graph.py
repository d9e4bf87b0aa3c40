"""What the gate sees in ONNX Runtime's optimised graph, and that the CPU engine takes part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sparsefx
from sparsefx.codegen import native, onnx_decode
from sparsefx.ir.errors import ExportError
from sparsefx.runtime.gate import ENGINE
from sparsefx.runtime.gate_graph import check_graph


def saved(path: Path, nodes: list[Any], **constants: Any) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 8])]
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph), path)
    return path


def blocks(bits: int = 4, size: int = 32, zeros: Any = None, g_idx: bool = False, **other: Any) -> (
    tuple[list[Any], dict[str, Any]]
):  # fmt: skip
    constants: dict[str, Any] = {
        "b": np.zeros((8, 64 // size, size * bits // 8), np.uint8),
        "s": np.ones((8, 64 // size), np.float32),
    }
    names = ["x", "b", "s", "", ""]
    if zeros is not None:
        constants["z"], names[3] = zeros, "z"
    if g_idx:
        constants["g"], names[4] = np.zeros(64, np.int32), "g"
    node = helper.make_node(
        "MatMulNBits", names, ["y"], name="fc", domain="com.microsoft",
        N=8, K=64, bits=bits, block_size=size, **other,
    )  # fmt: skip
    return [node], constants


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"bits": 8, "accuracy_level": 1}, "dequantises 8-bit codes: they need accuracy_level 4"),
        ({"bits": 2, "accuracy_level": 1}, "dequantises 2-bit codes: they need accuracy_level 4"),
        ({}, "has no accuracy_level"),
        ({"size": 8, "accuracy_level": 4}, "has blocks of 8"),
        ({"zeros": np.ones((8, 2), np.float32), "accuracy_level": 4}, "zero points that are not"),
        ({"g_idx": True, "accuracy_level": 4}, "has g_idx"),
    ],
)
def test_slow_forms_of_matmulnbits(how: dict[str, Any], why: str, tmp_path: Path) -> None:
    nodes, constants = blocks(**how)
    with pytest.raises(ExportError, match=rf"slow: node 'fc' \(MatMulNBits\).*{why}"):
        check_graph(saved(tmp_path / "m.onnx", nodes, **constants))


@pytest.mark.parametrize("how", [{"accuracy_level": 1}, {"bits": 8, "accuracy_level": 4}])
def test_fast_forms_pass(how: dict[str, Any], tmp_path: Path) -> None:
    nodes, constants = blocks(**how)
    check_graph(saved(tmp_path / "m.onnx", nodes, **constants))


@pytest.mark.parametrize("kind", ["DequantizeLinear", "CumSum"])
def test_decoding_at_every_run_is_named(kind: str, tmp_path: Path) -> None:
    second = np.float32(0.5) if kind == "DequantizeLinear" else np.int64(0)
    first = np.ones((64, 8), np.int8 if kind == "DequantizeLinear" else np.int32)
    nodes = [
        helper.make_node(kind, ["q", "s"], ["w"], name="decode"),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    with pytest.raises(ExportError, match=r"node 'decode'.*every run"):
        check_graph(saved(tmp_path / "m.onnx", nodes, q=first, s=second))


def test_a_body_that_does_not_fold_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A decoder that needs NonZero would run at every call: 100 times slower, yet right."""
    real = onnx_decode.kept

    def kept(w: Any, source: Any) -> Any:
        flat = w.op("NonZero", w.cast(real(w, source), w.types.UINT8))
        count = source.n * source.k
        zeros = w.op("ConstantOfShape", w.ints(count))
        where = w.op("Transpose", flat, perm=[1, 0])
        ones = w.op("Expand", w.number(1.0), w.op("Shape", w.op("Squeeze", where, w.ints(1))))
        return w.cast(w.op("ScatterND", zeros, where, ones), w.types.BOOL)

    monkeypatch.setattr(onnx_decode, "kept", kept)
    model = sparsefx.sparsify(
        nn.Sequential(nn.Linear(64, 32)), "bitmap@50%+int4g32", example_inputs=torch.randn(2, 64)
    )
    with pytest.raises(ExportError, match="onnxruntime would be slow"):
        sparsefx.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 64))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(native.engine() is None, reason="no CPU engine")
def test_the_gate_runs_the_file_with_and_without_the_engine(tmp_path: Path) -> None:
    model = sparsefx.sparsify(
        nn.Sequential(nn.Linear(64, 32)), "2:4+int4g32", example_inputs=torch.randn(2, 64)
    )
    report = sparsefx.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 64))
    runtimes = {d.runtime for d in report.differences}
    assert runtimes == {f"onnxruntime, optimisation {how}" for how in ("off", "full", ENGINE)}


@pytest.mark.parametrize("spec", ["int4g32+a8", "bitmap@50%+int3g32+r4"])
def test_inlined_files_hold_plain_operators_only(tmp_path: Path, spec: str) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    packed = sparsefx.sparsify(model, spec)
    files = [tmp_path / name for name in ("calls.onnx", "plain.onnx")]
    x = torch.randn(3, 64)
    for file in files:
        sparsefx.export_onnx(packed, file, x, inline=file.name == "plain.onnx")
    calls, plain = (onnx.load(file) for file in files)
    assert {n.domain for n in calls.graph.node} == {"", "sparsefx"}
    assert {n.domain for n in plain.graph.node} == {"", "com.microsoft"}
    assert not plain.functions
    assert "sparsefx" not in {entry.domain for entry in plain.opset_import}
    feeds = {calls.graph.input[0].name: x.numpy()}
    y, z = (onnxruntime.InferenceSession(str(f)).run(None, feeds)[0] for f in files)
    np.testing.assert_array_equal(y, z)
