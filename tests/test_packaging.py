"""The layout of the project: links, one-way imports, and an import that costs next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("ir", "passes", "codegen", "runtime", "models")
MAY_IMPORT = {
    "ir": {"ir"},
    "passes": {"ir", "passes"},
    "codegen": {"ir", "codegen"},
    "runtime": {"ir", "passes", "codegen", "runtime"},
    "models": {"ir", "passes", "codegen", "runtime", "models"},
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_lead_to_the_root_folders(folder: str) -> None:
    assert (ROOT / "src" / "sparsefx" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsefx."):
                target = str(node.module).split(".")[1]
                assert target in MAY_IMPORT[folder], f"{path.relative_to(ROOT)} imports {target}"


def test_every_pass_is_in_the_pipeline() -> None:
    from sparsefx.passes.pipeline import PASSES

    declared = {
        p.stem for p in (ROOT / "passes").glob("*.py") if "@graph_pass(" in p.read_text()
    } - {"manager"}
    assert declared == {p.name for p in PASSES.ours}


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    heavy = "triton onnx onnxruntime onnxscript transformers rich typer pydantic networkx sympy"
    code = (
        "import torch, sys, time; loaded = set(sys.modules); start = time.perf_counter()\n"
        "import sparsefx; seconds = time.perf_counter() - start\n"
        f"new = set({heavy.split()!r}) & (set(sys.modules) - loaded)\n"
        "print(seconds, *sorted(new))"
    )
    seconds, *loaded = python(code).split()
    assert loaded == []
    assert float(seconds) < 1


def test_works_without_the_optional_packages() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'onnx', 'onnxruntime', 'onnxscript', 'onnx_ir', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "import torch, sparsefx\n"
        "m = sparsefx.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8)).eval(), '2:4+int8', "
        "example_inputs=torch.ones(1, 16))\n"
        "m(torch.ones(1, 16)); sparsefx.explain(m)\n"
        "try: sparsefx.export_onnx(m, 'x.onnx', torch.ones(1, 16))\n"
        "except ImportError as error: print(error)"
    )
    assert 'pip install "sparsefx[onnx]"' in python(code)
