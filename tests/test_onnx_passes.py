"""The graph passes of `torch.compile` take part in exports: less nodes, the same values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.runtime import export
from sparsefx.runtime.export import ExportReport

onnx: Any = pytest.importorskip("onnx")
ort: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
K, N, RANK = 32, 64, 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products in several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Lora(nn.Module):
    """A packed product and a low-rank branch beside it, as adapters compute it."""

    def __init__(self, base: nn.Module, n: int, k: int) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(k, RANK, bias=False), nn.Linear(RANK, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x)) * 2.0
        return out


class Block(nn.Module):
    """Attention, whose owner reads dense weights, and a gated product of one x, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(K, 2, batch_first=True)
        self.gate, self.up, self.down = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, need_weights=False)[0]
        out: Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return out


def block() -> Block:
    """Packed, with a branch at each product of the gated part."""
    model = Block().eval()
    sparsefx.sparsify(model, "int4g32", example_inputs=torch.randn(1, 4, K), progress=False)
    model.gate, model.up = Lora(model.gate, N, K), Lora(model.up, N, K)  # type: ignore[assignment]
    model.down = Lora(model.down, K, N)  # type: ignore[assignment]
    return model.eval()


def write(model: nn.Module, path: Path, **options: Any) -> tuple[ExportReport, Counter[str]]:
    """The report and the number of nodes of each kind."""
    report = sparsefx.export_onnx(model, path, torch.randn(2, 5, K), **options)
    return report, Counter(node.op_type for node in onnx.load(path).graph.node)


def test_passes_remove_nodes_and_change_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = block(), torch.randn(2, 5, K)
    report, after = write(model, tmp_path / "passed.onnx")
    assert {row.op for row in report.layers} == {"MatMulNBits"}  # attention's weights too
    assert after["Linear"] == len(report.layers) == 5
    assert len(report.differences) > 0
    with monkeypatch.context() as without:
        without.setattr(export, "_after_passes", lambda program: (program, ()))
        write(model, tmp_path / "plain.onnx")
    before = Counter(n.op_type for n in onnx.load(tmp_path / "plain.onnx").graph.node)
    assert before["Linear"] == 3
    # Only the two products of attention itself are left of those with dense operands.
    assert (before["MatMul"], after["MatMul"]) == (3 + 2 * 3, 2)
    assert after.total() < before.total() / 2
    files = [tmp_path / f"{name}.onnx" for name in ("passed", "plain")]
    a, b = (ort.InferenceSession(str(f)).run(None, {"x": x.numpy()})[0] for f in files)
    allowed = min(d.tolerance for d in report.differences)  # each is so near to eager
    assert abs(a - b).max() <= 2 * allowed


def test_products_of_one_x_stay_apart_and_take_adapters(tmp_path: Path) -> None:
    """What `merge_siblings` and `fuse_epilogues` make is written as what it means."""
    model = Block().eval()
    sparsefx.sparsify(model, "int4g32", example_inputs=torch.randn(1, 4, K), progress=False)
    _, found = write(model, tmp_path / "m.onnx", adapters=("gate", "up"))
    assert not {"linears", "fused", "Split"} & set(found)
    session = ort.InferenceSession(str(tmp_path / "m.onnx"))
    names = {value.name for value in session.get_overridable_initializers()}
    assert names == {f"{m}.lora_{p}.weight" for m in ("gate", "up") for p in "AB"}


class Spread(nn.Module):
    """Takes inputs by position beyond those that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return torch.stack([self.fc(x), *(self.fc(term) for term in more)])


def test_dynamic_axes_of_spread_arguments(tmp_path: Path) -> None:
    model, x, rows = Spread().eval(), torch.randn(3, K), {0: "rows"}
    sparsefx.sparsify(model, "int4g32", example_inputs=x, progress=False)
    axes = {"x": rows, "more": [rows, rows]}
    report = sparsefx.export_onnx(model, tmp_path / "m.onnx", (x, x + 1, x - 1), axes)
    assert len({d.sizes for d in report.differences}) > 2
    assert len(report.layers) == 3
