"""Rewrites of a finished graph: what they must change, and what they must leave."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")

from sparsefx.codegen.onnx_fusions import rewrite

Array = np.ndarray[Any, Any]
X = "float[2, 3, 4] x"
SWAP = (
    "s = Shape({x}) a = Slice(s, m2, m1) b = Slice(s, m1, far) l = Slice(s, near, m2) "
    "f = Concat<axis=0>(m1, {sizes}) r = Reshape({x}, f) t = Transpose<perm=[{order}]>(r) "
    "g = Concat<axis=0>(l, b, a) z = Reshape(t, g) y = Neg(z)"
)
"""As torch.onnx transposes the last two axes of keys, of sizes a and b."""
SWAPPING = ["Shape", *["Slice"] * 3, *["Concat", "Reshape"] * 2, "Transpose", "Neg"]
CASES = {
    "a norm": ("r = Sqrt(x) i = Reciprocal(r) y = Mul(x, i)", ["Sqrt", "Div"]),
    "the other way round": ("r = Sqrt(x) i = Reciprocal(r) y = Mul(i, x)", ["Sqrt", "Div"]),
    "an inverse of no root": ("i = Reciprocal(x) y = Mul(x, i)", ["Reciprocal", "Mul"]),
    "an inverse of another": (
        "r = Exp(x) i = Reciprocal(r) y = Mul(x, i)", ["Exp", "Reciprocal", "Mul"],
    ),
    "there and back": (
        "a = Transpose<perm=[1, 2, 0]>(x) b = Transpose<perm=[2, 0, 1]>(a) y = Neg(b)", ["Neg"],
    ),
    "twice the same way": (
        "a = Transpose<perm=[1, 2, 0]>(x) b = Transpose<perm=[1, 2, 0]>(a) y = Neg(b)",
        ["Transpose", "Transpose", "Neg"],
    ),
    "reversed twice": ("a = Transpose(x) b = Transpose(a) y = Neg(b)", ["Neg"]),
    "reversed and turned": (
        "a = Transpose(x) b = Transpose<perm=[2, 1, 0]>(a) y = Neg(b)",
        ["Transpose", "Transpose", "Neg"],
    ),
    "a result that is its input": (
        "a = Transpose<perm=[1, 0, 2]>(x) y = Transpose<perm=[1, 0, 2]>(a)",
        ["Transpose", "Transpose"],
    ),
    "reshaped twice": ("a = Reshape(x, six) b = Reshape(a, flat) y = Neg(b)", ["Reshape", "Neg"]),
    "sizes of what was reshaped": (
        "a = Reshape(x, six) b = Reshape(a, copy) y = Neg(b)", ["Reshape", "Reshape", "Neg"],
    ),
    "GELU": (
        "e = Erf(x) a = Add(one, e) b = Add(e, one) h = Mul(half, b) y = Mul(x, h)",
        ["Erf", "Add", "Mul", "Mul"],
    ),
    "GELU the other way round": (
        "e = Erf(x) b = Add(e, one) h = Mul(b, half) y = Mul(h, x)", ["Erf", "Add", "Mul", "Mul"],
    ),
    "last axes swapped by way of three": (
        SWAP.format(x="x", sizes="a, b", order="0, 2, 1"), ["Transpose", "Neg"],
    ),
    "swapped behind another order": (
        "u = Transpose<perm=[1, 2, 0]>(x) " + SWAP.format(x="u", sizes="a, b", order="0, 2, 1"),
        ["Transpose", "Neg"],
    ),
    "all axes turned": (SWAP.format(x="x", sizes="a, b", order="2, 1, 0"), SWAPPING),
    "sizes the other way round": (SWAP.format(x="x", sizes="b, a", order="0, 2, 1"), SWAPPING),
    "reshaped back": ("a = Reshape(x, six) b = Reshape(a, shape) y = Neg(b)", ["Neg"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_graph_computes_the_same_in_fewer_nodes(case: str) -> None:
    body, want = CASES[case]
    constants = (
        "int64[2] six = {6, 4}, int64[1] flat = {24}, int64[3] copy = {0, 2, 2}, "
        "int64[3] shape = {2, 3, 4}, float one = {1}, float half = {0.5}, int64[1] m1 = {-1}, "
        "int64[1] m2 = {-2}, int64[1] far = {9223372036854775807}, "
        "int64[1] near = {-9223372036854775808}"
    )
    text = (
        f'<ir_version: 10, opset_import: ["" : 18]> g ({X}) => (float y) <{constants}> {{{body}}}'
    )
    model = onnx.parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model = onnx.shape_inference.infer_shapes(model)
    changed = onnx_ir.from_proto(model)
    rewrite(changed, ())
    assert Counter(node.op_type for node in changed.graph) == Counter(want)
    x = np.random.default_rng(0).random((2, 3, 4), np.float32) + 1
    before, after = _run(model, x), _run(onnx_ir.to_proto(changed), x)
    # 1/√v rounded, times x, rounded: at most 3 · 2⁻²⁴ from x/√v.
    np.testing.assert_allclose(after, before, rtol=3 * 2.0**-24, atol=0)


def test_sizes_that_are_unknown_are_not_equal() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 18]> g (float[?, ?] x, int64[2] s) '
        "=> (float[?, ?] y) { a = Reshape(x, s) y = Neg(a) }"
    )
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    reshape = model.graph[0]
    reshape.inputs[0].shape = reshape.outputs[0].shape = onnx_ir.Shape([None, None])
    rewrite(model, ())
    assert [node.op_type for node in model.graph] == ["Reshape", "Neg"]


def test_values_to_keep_are_kept() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 18]> g (float[2, 3] x) => (float y) '
        "<int64[1] flat = {6}> { a = Transpose(x) b = Transpose(a) c = Reshape(b, flat) "
        "d = Reshape(c, flat) y = Neg(d) }"
    )
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    rewrite(model, ("b", "c", "d"))
    assert [node.op_type for node in model.graph] == [*["Transpose"] * 2, *["Reshape"] * 2, "Neg"]


def _run(model: Any, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    out: Array = session.run(None, {"x": x})[0]
    return out
