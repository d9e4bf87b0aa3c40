"""ONNX in, ONNX out: what is packed or refused, hostile files, and outputs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.ir.errors import ExportError, SpecError, WeightError
from sparsefx.ir.format import Format
from sparsefx.runtime import from_onnx, from_onnx_put
from sparsefx.runtime.from_onnx import OnnxReport, compress_onnx

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
h: Any = onnx.helper
SPEC = "bitmap@50%+int4g32"
FLOAT, HALF = 1, 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(
    path: Path, nodes: list[Any], constants: dict[str, Any], x: Any = ("n", 64), opset: int = 18,
    dtype: int = FLOAT, ir_version: int = 10, y: Any = ("n", "m"),
) -> Path:  # fmt: skip
    """A model with input x, output y and these constants."""
    graph = h.make_graph(
        nodes, "g", [h.make_tensor_value_info("x", dtype, x)],
        [h.make_tensor_value_info("y", dtype, y)],
        [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()],
    )  # fmt: skip
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", opset)], ir_version=ir_version)
    h.set_model_props(model, {"author": "somebody"})
    onnx.save(model, path)
    return path


def mlp(path: Path, opset: int = 18, ir_version: int = 10) -> Path:
    nodes = [
        h.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        h.make_node("Add", ["a", "b1"], ["b"]),
        h.make_node("Relu", ["b"], ["c"]),
        h.make_node("Gemm", ["c", "w2", "b2"], ["y"], transB=1, name="second"),
    ]
    constants = {"w1": noise(64, 96), "b1": noise(96), "w2": noise(32, 96, seed=1), "b2": noise(32)}
    return write(path, nodes, constants, opset=opset, ir_version=ir_version)


def run(path: Path, feeds: dict[str, Any], full: bool = True) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if full else level.ORT_DISABLE_ALL
    made = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(made.run(None, feeds))


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def decoded(weight: Any, spec: str = SPEC) -> Any:
    """What magnitude and rounding make of a (K, N) matrix."""
    return Format.parse(spec).pack(torch.from_numpy(weight.T.copy())).unpack().numpy().T


def assert_checked(report: OnnxReport) -> None:
    assert {d.runtime.rpartition(" ")[2] for d in report.differences} == {"off", "full"}
    assert report.worst is not None
    assert report.worst.difference <= report.worst.tolerance


# --- right outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21, 23])
def test_products_agree_with_the_decoded_weights(tmp_path: Path, opset: int) -> None:
    source = mlp(tmp_path / "in.onnx", opset, 8)
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert_checked(report)
    assert bool(report.notes) >= (opset < 18)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    x = noise(5, 64, seed=3)
    hidden = np.maximum(x @ decoded(values["w1"]) + values["b1"], 0)
    want = hidden @ decoded(values["w2"].T) + values["b2"]
    for full in (False, True):
        (got,) = run(report.path, {"x": x}, full)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert ops(report.path).count("Linear") == 2


def test_everything_else_stays(tmp_path: Path) -> None:
    source = mlp(tmp_path / "in.onnx", 21)
    before = onnx.load(source)
    after = onnx.load(compress_onnx(source, tmp_path / "out.onnx", SPEC).path)
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert after.metadata_props == before.metadata_props
    kept = {n.SerializeToString() for n in before.graph.node if n.op_type in ("Add", "Relu")}
    assert kept <= {n.SerializeToString() for n in after.graph.node}
    assert not {"w1", "w2"} & {t.name for t in after.graph.initializer}


@pytest.mark.parametrize("spec", ["int8+a8", "2:4+int8+r4", "bitmap@50%", "tile16x1@50%+int4g32"])
def test_formats(tmp_path: Path, spec: str) -> None:
    report = compress_onnx(mlp(tmp_path / "in.onnx"), tmp_path / "out.onnx", spec)
    assert_checked(report)
    assert [row.format for row in report.rows] == [spec, spec]


def test_file_is_as_small_as_what_is_stored(tmp_path: Path) -> None:
    nodes = [h.make_node("MatMul", ["x", "w"], ["y"], name="big")]
    source = write(tmp_path / "in.onnx", nodes, {"w": noise(512, 1024)}, ("n", 512))
    report = compress_onnx(source, tmp_path / "out.onnx", "bitmap@50%+int4g128")
    # Beside the weight there is its body, of the same size for every weight of this shape.
    body = sum(f.ByteSize() for f in onnx.load(report.path).functions)
    assert report.bytes - body <= 1.05 * report.rows[0].stored_bytes
    assert report.rows[0].stored_bytes == 512 * 1024 * 3.125 / 8
    assert report.bytes_before == source.stat().st_size


def test_half_precision(tmp_path: Path) -> None:
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("Add", ["a", "b"], ["y"])
    ]  # fmt: skip
    constants = {"w": noise(64, 32).astype(np.float16), "b": noise(32).astype(np.float16)}
    source = write(tmp_path / "in.onnx", nodes, constants, dtype=HALF)
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert_checked(report)
    x = noise(4, 64).astype(np.float16)
    want = x.astype(np.float32) @ decoded(constants["w"]) + constants["b"]
    assert np.abs(run(report.path, {"x": x})[0] - want).max() <= 2**-9 * np.abs(want).max()


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_over_channels(tmp_path: Path, stride: int) -> None:
    node = h.make_node(
        "Conv", ["x", "w", "b"], ["y"], strides=[stride, stride], kernel_shape=[1, 1]
    )
    constants = {"w": noise(24, 64, 1, 1), "b": noise(24)}
    shape = ("n", 64, 7, 6)
    source = write(tmp_path / "in.onnx", [node], constants, shape, y=("n", 24, "h", "w"))
    batches = [{"x": noise(2, 64, 7, 6, seed=i)} for i in range(2)]
    for calibration in (None, batches):
        report = compress_onnx(source, tmp_path / "out.onnx", SPEC, calibration=calibration)
        assert_checked(report)
        assert report.rows[0].calls == 1
        assert "Conv" not in ops(report.path)


def test_gemm_with_factors_and_shared_weights(tmp_path: Path) -> None:
    nodes = [
        h.make_node("Gemm", ["x", "w", "b"], ["a"], alpha=0.5, beta=2.0),
        h.make_node("Identity", ["w"], ["same"]),
        h.make_node("MatMul", ["a", "same"], ["c"]),
        h.make_node("Transpose", ["t"], ["turned"], perm=[1, 0]),
        h.make_node("MatMul", ["c", "turned"], ["y"]),
    ]
    constants = {"w": noise(64, 64), "b": noise(64), "t": noise(32, 64)}
    source = write(tmp_path / "in.onnx", nodes, constants)
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert [row.calls for row in report.rows] == [2, 1]
    x = noise(3, 64, seed=5)
    w, t = decoded(constants["w"]), decoded(constants["t"].T)
    want = (0.5 * (x @ w) + 2 * constants["b"]) @ w @ t
    assert np.abs(run(report.path, {"x": x})[0] - want).max() <= 1e-5 * np.abs(want).max()
    assert {"Identity", "Transpose"}.isdisjoint(ops(report.path))


def test_model_of_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32)).eval()
    x = torch.randn(2, 5, 32)
    source = tmp_path / "in.onnx"
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(source)
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert_checked(report)
    assert len(report.operators) == 2
    assert "SQNR" in str(report)


# --- what stays dense, and why -------------------------------------------------------------------


def test_tied_embedding_stays_dense_with_the_reason(tmp_path: Path) -> None:
    nodes = [
        h.make_node("Gather", ["table", "zero"], ["row"], name="look"),
        h.make_node("Add", ["x", "row"], ["a"]),
        h.make_node("MatMul", ["a", "w"], ["b"]),
        h.make_node("Gemm", ["b", "table"], ["y"], transB=1),
    ]
    constants = {"table": noise(96, 64), "zero": np.array(0), "w": noise(64, 64)}
    source = write(tmp_path / "in.onnx", nodes, constants)
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    reasons = {row.name: row.reason for row in report.rows}
    assert "also read by Gather 'look' (tied weight)" in reasons["table"]
    assert reasons["w"] == ""


@pytest.mark.parametrize(
    ("node", "weight", "reason"),
    [
        (("Gemm", ["x", "w"], {"transA": 1}), (64, 64), "transposes the activations"),
        (("MatMul", ["w", "x"], {}), (64, 64), "left of the activations"),
        (("MatMul", ["x", "w"], {}), (3, 64, 8), "stack of matrices"),
    ],
)
def test_other_products_are_refused(
    tmp_path: Path, node: Any, weight: tuple[int, ...], reason: str
) -> None:
    kind, inputs, attributes = node
    nodes = [
        h.make_node("MatMul", ["x", "v"], ["s"]), h.make_node(kind, inputs, ["a"], **attributes),
        h.make_node("ReduceSum", ["a"], ["t"]), h.make_node("Add", ["s", "t"], ["y"]),
    ]  # fmt: skip
    constants = {"w": noise(*weight), "v": noise(64, 64)}
    source = write(tmp_path / "in.onnx", nodes, constants, (64, 64))
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert reason in next(row.reason for row in report.rows if row.name == "w")
    assert len(report.operators) == 1


def test_body_of_if_is_not_touched(tmp_path: Path) -> None:
    def branch(name: str) -> Any:
        out = h.make_tensor_value_info(name, FLOAT, None)
        w = onnx.numpy_helper.from_array(noise(64, 64), f"w_{name}")
        nodes = [h.make_node("MatMul", ["a", f"w_{name}"], [name])]
        return h.make_graph(nodes, name, [], [out], [w])

    nodes = [
        h.make_node("MatMul", ["x", "w"], ["a"]),
        h.make_node("If", ["yes"], ["y"], then_branch=branch("p"), else_branch=branch("q")),
    ]
    constants = {"w": noise(64, 64), "yes": np.array(True)}
    source = write(tmp_path / "in.onnx", nodes, constants)
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC)
    assert sum("inside the body" in row.reason for row in report.rows) == 2
    assert_checked(report)


def test_spec_filters_and_errors(tmp_path: Path) -> None:
    source, target = mlp(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    report = compress_onnx(source, target, {"format": SPEC, "overrides": {"second": "int8"},
                                            "ignore": ["MatMul"]})  # fmt: skip
    assert [row.format for row in report.rows] == ["dense", "int8"]
    target.unlink()
    with pytest.raises(SpecError, match="did you mean"):
        compress_onnx(source, target, {"format": SPEC, "ignore": ["secnd"]})
    with pytest.raises(SpecError, match="unknown token"):
        compress_onnx(source, target, "bitmop@50%")
    with pytest.raises(WeightError, match="nothing was changed"):
        compress_onnx(source, target, "5:7+int8")
    with pytest.raises(SpecError, match="no input 'z'"):
        compress_onnx(source, target, SPEC, calibration=[{"z": noise(2, 64)}])
    with pytest.raises(WeightError, match="needs calibration"):
        compress_onnx(source, target, {"format": SPEC, "solver": "sweep"})
    assert not target.exists()


# --- calibration ---------------------------------------------------------------------------------


def test_calibration_lowers_the_output_error(tmp_path: Path) -> None:
    source = mlp(tmp_path / "in.onnx")
    mix = noise(8, 64, seed=7)
    batches = [
        {"x": noise(256, 8, seed=i) @ mix + 0.1 * noise(256, 64, seed=50 + i)} for i in range(4)
    ]
    errors = []
    for calibration in (None, batches[:3]):
        report = compress_onnx(source, tmp_path / "out.onnx", SPEC, calibration=calibration)
        (want,), (got,) = run(source, batches[3]), run(report.path, batches[3])
        errors.append(float(np.square(got - want).mean() / np.square(want).mean()))
    assert errors[1] < 0.5 * errors[0]
    assert {row.algorithm for row in report.rows} == {"obs+sweep"}


def test_outlier_probe(tmp_path: Path) -> None:
    """A great column that the output does not depend on leaves no codes for the others."""
    x, w = noise(256, 64), noise(64, 32)
    x[:, 5] *= 3000
    w[5] = 0
    nodes = [h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("MatMul", ["a", "v"], ["y"])]
    constants = {"w": w, "v": noise(32, 32)}
    source = write(tmp_path / "in.onnx", nodes, constants)
    report = compress_onnx(source, tmp_path / "out.onnx", "int8+a8", calibration=[{"x": x}])
    assert [row.format for row in report.rows] == ["int8", "int8+a8"]
    assert "outlier in column 5" in report.rows[0].fallbacks[0]


# --- the gate ------------------------------------------------------------------------------------


def test_a_wrong_file_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = mlp(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    target.write_bytes(b"older")
    put = from_onnx_put.replace_weights

    def wrong(model: Any, done: Any, ranks: Any) -> Any:
        rows = put(model, done, ranks)
        bias = model.graph.initializers["b2"].const_value.numpy() + np.float32(0.5)
        import onnx_ir

        model.graph.initializers["b2"].const_value = onnx_ir.tensor(bias, name="b2")
        return rows

    monkeypatch.setattr(from_onnx, "replace_weights", wrong)
    with pytest.raises(ExportError, match="differs between the decoded weights and"):
        compress_onnx(source, target, SPEC)
    assert target.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_zero_outputs_cannot_be_checked(tmp_path: Path) -> None:
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("Mul", ["a", "zero"], ["y"])
    ]  # fmt: skip
    constants = {"w": noise(64, 32), "zero": np.zeros(1, np.float32)}
    source = write(tmp_path / "in.onnx", nodes, constants)
    with pytest.raises(ExportError, match="is zero"):
        compress_onnx(source, tmp_path / "out.onnx", SPEC)
    report = compress_onnx(source, tmp_path / "out.onnx", SPEC, verify=False)
    assert report.differences == ()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from sparsefx.cli import app

    source, target = mlp(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    np.savez(tmp_path / "batch.npz", x=noise(64, 64))
    arguments = ["compress", str(source), "--spec", SPEC, "--out", str(target)]
    done = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "batch.npz")])
    assert done.exit_code == 0, done.output
    assert target.exists()
    refused = CliRunner().invoke(app, [*arguments, "--calibrate", "2"])
    assert isinstance(refused.exception, SpecError)


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    """Exported dense, then compressed from the file alone."""
    from sparsefx.models import MODELS

    bundle = MODELS["minilm"]()
    dense = tmp_path / "dense.onnx"
    sparsefx.export_onnx(bundle.model, dense, bundle.example_inputs, bundle.dynamic_shapes)
    for spec in ("int4g128", "bitmap@50%+int4g128"):
        report = compress_onnx(dense, tmp_path / "out.onnx", spec)
        assert_checked(report)
        print(spec, report)
        assert len(report.operators) >= 36
        assert report.bytes < 0.65 * report.bytes_before
