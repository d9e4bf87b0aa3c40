"""Attention in ONNX files: which is one MultiHeadAttention, and that it computes the same."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ort_nodes import options
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsefx
from sparsefx.runtime.ort import ort_session

onnx: Any = pytest.importorskip("onnx")
ort: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
HEADS, SIZE = 4, 16
K = HEADS * SIZE


class Attend(nn.Module):
    """Self-attention of x (batch, rows, K) in the way of `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(K, K) for _ in range(4))
        self.how = how

    def heads(self, x: Tensor, size: int = SIZE) -> Tensor:
        return x.view(*x.shape[:2], -1, size).transpose(1, 2)

    def forward(self, x: Tensor, keep: Tensor) -> Any:
        q, k, v = (self.heads(part(x)) for part in (self.q, self.k, self.v))
        if self.how in BY_HAND:
            return self.out(self.by_hand(q, k, v))
        how: dict[str, Any] = {}
        if self.how == "mask":
            how["attn_mask"] = keep[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        if self.how == "narrow mask":
            how["attn_mask"] = keep[:, None, None, :]
        if self.how == "float mask":
            how["attn_mask"] = (x[..., :1] * keep[:, None].float())[:, None]
        if self.how == "scale":
            how["scale"] = 0.5
        if self.how == "causal":
            how["is_causal"] = True
        if self.how == "groups":
            k, v, how["enable_gqa"] = k[:, :2], v[:, :2], True
        y = scaled_dot_product_attention(q, k, v, **how).transpose(1, 2).flatten(2)
        return self.out(y)

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shares = (q @ k.mT * 0.25).softmax(-2 if self.how == "over queries" else -1)
        y = shares @ v
        if self.how == "shares read twice":
            y = y + shares.sum(-1, keepdim=True)
        if self.how == "heads inside":
            return y.permute(0, 2, 3, 1).flatten(2)
        return y.transpose(1, 2).flatten(2)


BY_HAND = ("over queries", "shares read twice", "heads inside")
FUSED = ("", "mask", "scale")
APART = ("narrow mask", "float mask", "causal", "over queries", "shares read twice", "heads inside")


def written(how: str, folder: Path, **given: Any) -> tuple[Attend, Counter[str]]:
    """A packed model and the operators of its file, which the export compared with it."""
    torch.manual_seed(0)
    model = sparsefx.sparsify(Attend(how).eval(), "int8", example_inputs=example())
    axes = {"x": {0: "batch", 1: "rows"}, "keep": {0: "batch", 1: "rows"}}
    sparsefx.export_onnx(model, folder / "m.onnx", example(), axes, **given)
    return model, Counter(n.op_type for n in onnx.load(folder / "m.onnx").graph.node)


def example(batch: int = 2, rows: int = 6) -> tuple[Tensor, Tensor]:
    keep = torch.ones(batch, rows, dtype=torch.bool)
    keep[0, rows // 2 + 1 :] = False
    return torch.randn(batch, rows, K), keep


def assert_same(model: Attend, path: Path, full: bool) -> None:
    for make, (batch, rows) in product(
        (ort_session, ort.InferenceSession), ((1, 1), (2, 2), (3, 17), (1, 131))
    ):
        x, keep = example(batch, rows)
        session = make(str(path), options(full=full), providers=["CPUExecutionProvider"])
        names = {i.name for i in session.get_inputs()}
        feeds = {"x": x.numpy(), "keep": keep.numpy()}
        [got] = session.run(None, {n: t for n, t in feeds.items() if n in names})
        want = model(x, keep)
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", FUSED)
def test_one_operator(how: str, tmp_path: Path) -> None:
    model, ops = written(how, tmp_path)
    assert ops["MultiHeadAttention"] == 1
    gone = {"Softmax", "MatMul", "Transpose", "Reshape", "IsNaN", "Concat"} & ops.keys()
    assert not gone - ({"Reshape", "Concat"} if how == "mask" else set())
    for full in (False, True):
        assert_same(model, tmp_path / "m.onnx", full)


@pytest.mark.parametrize("how", [*APART, "groups"])
def test_others_stay(how: str, tmp_path: Path) -> None:
    model, ops = written(how, tmp_path)
    assert ops["MultiHeadAttention"] == 0
    assert ops["Softmax"] == 1
    assert_same(model, tmp_path / "m.onnx", True)


def test_inline_and_dense_files_have_standard_operators(tmp_path: Path) -> None:
    assert written("mask", tmp_path, inline=True)[1]["MultiHeadAttention"] == 0
    axes = {"x": {0: "batch"}, "keep": {0: "batch"}}
    sparsefx.export_onnx(Attend("mask").eval(), tmp_path / "d.onnx", example(), axes)
    assert {n.domain for n in onnx.load(tmp_path / "d.onnx").graph.node} == {""}
