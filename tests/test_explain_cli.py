"""explain and the command line: what a person reads, and the same as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsefx
from sparsefx.cli import app
from sparsefx.codegen.kernels import Problem, choose
from sparsefx.ir.format import Format

RUN = CliRunner()


def example() -> tuple[nn.Sequential, Tensor]:
    """What `sparsefx … test_explain_cli:example` loads."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.Conv1d(4, 4, 3)), torch.ones(1, 4, 32)


def test_explain_tells_formats_kernels_and_reasons() -> None:
    model, x = example()
    found = sparsefx.explain(sparsefx.sparsify(model, "int8+a8", example_inputs=x))
    packed, dense = found.lines
    kernel = choose(Format.parse("int8+a8"), Problem(None, 16, 32, torch.float32, "cpu")).kernel
    assert packed.kernel.split()[0] == kernel.name
    assert (packed.row.format, packed.row.bits) == ("int8+a8", 8.5)
    assert packed.row.sqnr_db is not None
    assert packed.row.sqnr_db > 35
    assert dense.kernel == "dense"
    assert "kernel (3,)" in dense.row.reason
    data = json.loads(found.to_json())
    assert data["lines"][0]["row"]["name"] == "0.weight"
    assert data["peak_bytes"] > 0
    assert kernel.name in str(found)
    assert "0.weight" in repr(found)


def test_explain_names_refused_kernels() -> None:
    model, x = example()
    line = sparsefx.explain(sparsefx.sparsify(model, "bf16", example_inputs=x)).lines[0]
    assert line.kernel == "unpack_then_dense"
    assert line.refused == ("cpu_native: dense floats: torch multiplies them best",)


def test_explain_reports_fallbacks() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    found = sparsefx.explain(
        sparsefx.sparsify(model[0].eval(), "int8", example_inputs=(torch.ones(3, 1, 8),) * 3)
    )
    assert any("computes with the weight itself" in text for text in found.fallbacks)


def test_explain_refuses_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="takes a module, not int"):
        sparsefx.explain(3)


@pytest.mark.parametrize("command", ["compress", "export", "explain", "demo"])
def test_help_shows_a_real_example(command: str) -> None:
    shown = RUN.invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"sparsefx {command}" in shown.output


def test_compress_and_export_a_model_of_ones_own(tmp_path: Path) -> None:
    name = f"{__name__}:example"
    done = RUN.invoke(app, ["compress", name, "--spec", "int4g16", "--out", str(tmp_path / "m")])
    assert done.exit_code == 0, done.output
    loaded = sparsefx.load(tmp_path / "m", example()[0])
    assert loaded[0].format == "int4g16"
    done = RUN.invoke(app, ["export", name, "--spec", "int4g16", "--out", str(tmp_path / "m.onnx")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "m.onnx").stat().st_size > 0
    done = RUN.invoke(app, ["explain", name, "--spec", "int4g16", "--json"])
    assert json.loads(done.output)["lines"][0]["row"]["format"] == "int4g16"


def test_mistakes_on_the_command_line() -> None:
    shown = RUN.invoke(app, ["explain", "minilmm"])
    assert "did you mean 'minilm'" in str(shown.exception)
