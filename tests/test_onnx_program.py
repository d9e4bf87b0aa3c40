"""Exported programs edited in place: nothing is traced twice, and nothing else comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny_transformers import IDS, tiny
from torch import Tensor, nn
from torch.export import ExportedProgram

import sparsefx
from sparsefx.codegen.onnx_program import Program, closed, opened
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import run_passes
from sparsefx.passes.pipeline import PASSES
from sparsefx.runtime.export import SPELLED

K = 32


def counted(calls: list[str], name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, its name noted at every call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return run(*args, **kwargs)

    return call


class Block(nn.Module):
    """Two siblings and a gate; a tied weight, a buffer of each kind and a constant."""

    kept: Tensor
    passing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, K), nn.Linear(K, K, bias=False)
        self.down = nn.Linear(K, K)
        self.tied = nn.Linear(K, K)
        self.tied.weight = self.down.weight
        self.register_buffer("kept", torch.randn(K))
        self.register_buffer("passing", torch.randn(K), persistent=False)
        self.constant = torch.randn(K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(nn.functional.silu(self.gate(x)) * self.up(x)).to(x.dtype)
        y = nn.functional.dropout(y, 0.5, self.training) + torch.diff(x, prepend=x[..., :1])
        return self.tied(y + self.kept).reshape(-1, K) * self.passing, y + self.constant


class InPlace(nn.Module):
    """Writes into a part of its input's double."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = self.inner(y[:, 1])
        return y.add_(1)


def packed(model: nn.Module, example: Any) -> nn.Module:
    return sparsefx.sparsify(model.eval(), "int4g8", example_inputs=example, progress=False)


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, K, 3, padding=1), nn.BatchNorm2d(K), nn.ReLU(), nn.Conv2d(K, K, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(K, K),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "block": (Block, (torch.randn(2, 5, K),)),
    "conv": (conv, (torch.randn(2, 3, 8, 8),)),
    "bert": (lambda: tiny("bert", torch.float32), IDS),
    "gqa": (lambda: tiny("gqa", torch.float32), IDS),
}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", CASES)
def test_nodes_spelled_one_by_one_are_those_of_a_second_trace(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, example = CASES[name]
    model, calls = packed(build(), example), list[str]()
    for owner, what in ((torch.export, "export"), (ExportedProgram, "run_decompositions")):
        monkeypatch.setattr(owner, what, counted(calls, what, getattr(owner, what)))
    sparsefx.export_onnx(model, tmp_path / "once.onnx", example)
    assert calls == ["export"]
    monkeypatch.delattr(Program, "run_decompositions")
    sparsefx.export_onnx(model, tmp_path / "twice.onnx", example, verify=False)
    assert calls == ["export", "export", "run_decompositions"]
    assert operators(tmp_path / "once.onnx") == operators(tmp_path / "twice.onnx")


def test_models_that_write_in_place_are_traced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = packed(InPlace(), torch.randn(2, 3, K)), torch.randn(2, 3, K)
    calls, what = list[str](), "run_decompositions"
    monkeypatch.setattr(ExportedProgram, what, counted(calls, what, getattr(ExportedProgram, what)))
    report = sparsefx.export_onnx(model, tmp_path / "m.onnx", example)
    assert calls == [what]
    assert report.differences


@pytest.mark.parametrize("edited", [False, True])
def test_a_program_opened_and_closed_computes_the_same(edited: bool) -> None:
    model, x = packed(Block(), torch.randn(2, 5, K)), torch.randn(2, 5, K)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        wanted = program.module()(x)
        gm = opened(program)
        if edited:
            run_passes(Traced(gm.graph, {}), PASSES)
        back = closed(program, gm, SPELLED)
        found = back.module()(x)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    targets = {node.target for node in back.graph.nodes}
    assert not targets & set(SPELLED)
    assert [s.kind for s in back.graph_signature.output_specs] == [
        s.kind for s in program.graph_signature.output_specs
    ]
    assert set(back.constants) == {"passing", "constant"}  # what no state dict holds


class Sizes(nn.Module):
    """Asks for a length that its input has too, first itself, then inside of `diff`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(K, K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.inner(x)
        return y.view(x.shape[0] * x.shape[1], K), torch.diff(y, dim=1)


def test_sizes_that_are_known_are_not_asked_of_what_a_node_made(tmp_path: Path) -> None:
    model, x = packed(Sizes(), torch.randn(2, 5, K)), torch.randn(2, 5, K)
    sparsefx.export_onnx(model, tmp_path / "m.onnx", x, {"x": {0: "batch", 1: "rows"}})
    sizes = [n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "Shape"]
    assert {name for node in sizes for name in node.input} == {"x"}
