"""The GPU benchmark without a GPU: it runs from end to end, and its goals judge rightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(find_spec("rich") is None, reason="rich is not installed"),
]


@pytest.fixture(scope="module")
def modules() -> Any:
    """`benchmarks` is found from the repository's root."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import gpu_cases, gpu_goals, gpu_peers
    finally:
        sys.path.remove(str(ROOT))
    return gpu_cases, gpu_goals, gpu_peers


def test_rehearsal(tmp_path: Path, modules: Any) -> None:
    """Every format of ours gives the right result at every M; peers run or are named."""
    _, _, peers = modules
    out = tmp_path / "run.json"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out)]
    ran = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "no time above means anything" in ran.stdout
    result = json.loads(out.read_text())
    assert result["rehearsal"]
    found = {(row["engine"], row["m"]): row for row in result["rows"]}
    missing = {engine: reason for reason, names in result["missing"].items() for engine in names}
    for engine in peers.OURS:
        for m in (1, 20):
            assert (engine, m) in found, missing.get(engine)
            row = found[engine, m]
            assert row["kernel"].startswith("triton_"), row["kernel"]
            # float16 results are off by 2⁻¹² on average at most, int8 activations by 1/254 of the
            # largest of 128 normal numbers (4 at most), uniformly: 4 / 127 / √12 relative.
            limit = 4 / 127 / 12**0.5 if "a8" in engine else 2**-11
            assert row["error"] < limit, (engine, m)
    for peer in peers.peers(None, "fast"):
        assert (peer.name, 1) in found or missing[peer.name]


@pytest.mark.parametrize(("n", "split"), [(64, True), (1 << 20, False)])
def test_kernels_are_compiled_as_large_weights_need_them(
    modules: Any, monkeypatch: pytest.MonkeyPatch, n: int, split: bool
) -> None:
    """Narrow weights stand for wide ones, whose sums are split only if they have few rows."""
    from benchmarks import gpu_warm as warm

    from sparsefx.codegen import triton_launch

    ran: list[tuple[Any, bool]] = []

    def linear(self: Any, x: Any, config: Any, bias: Any, branch: Any) -> None:
        tasks = triton_launch.plan(self.weight, config)
        ran.append((config, bool(branch)))
        assert tasks.split is split

    monkeypatch.setattr(triton_launch.Product, "linear", linear)
    job = warm.Job("int4g128+r32", 1, n, 4096)
    assert warm.compile_job(job, 3, time.time() + 60, torch.float16)
    assert len({config for config, _ in ran}) >= 1
    assert {branch for _, branch in ran} == {True, False}
    assert not warm.compile_job(job, 3, time.time() - 1, torch.float16)


def test_configuration_of_m(modules: Any) -> None:
    cases, _, _ = modules
    text = "triton_columns M≤1: a; M≤16: 16×64, 4 warps; M≤512: dense; M≤64: b"
    found = [cases.own_part(text, m).removeprefix("triton_columns ") for m in (1, 2, 64, 65, 9999)]
    assert found == ["a", "16×64, 4 warps", "b", "dense", "dense"]
    assert cases.own_part("unpack_then_dense why; not", 1) == "unpack_then_dense why; not"


def row(cases: Any, engine: str, m: int, ms: float, ours: bool = True) -> dict[str, Any]:
    (k, n) = cases.MAIN[0]
    return {
        "k": k, "n": n, "m": m, "engine": engine, "ours": ours, "ms": ms, "products": 1.0,
        "weight_bytes": n * k // 2, "unit": "bf16",
    }  # fmt: skip


def judged(modules: Any, rows: list[dict[str, Any]], text: str) -> dict[str, Any]:
    cases, goals, _ = modules
    cases.finish(rows, 3000.0, {"bf16": 8e5, "int8": 16e5})
    goal = next(goal for goal in goals.GOALS if text in goal.text)
    out: dict[str, Any] = goal.judge(goals.Results(rows))
    return out


@pytest.mark.parametrize(("ms", "met"), [(0.05, True), (0.06, False)])
def test_share_of_bandwidth(modules: Any, ms: float, met: bool) -> None:
    """8192 · 28672 / 2 bytes at 3000 GB/s take 39 µs: 70 % of that speed is 56 µs."""
    rows = [row(modules[0], "int4g128", 1, ms)]
    assert judged(modules, rows, "share of copy bandwidth")["met"] is met


@pytest.mark.parametrize(("slow", "met"), [(1.019, True), (1.021, False)])
def test_the_worst_row_counts(modules: Any, slow: float, met: bool) -> None:
    cases, _, peers = modules
    rows = [row(cases, peers.REFERENCE, m, 1.0, ours=False) for m in (1, 16)]
    rows += [row(cases, "int8", 1, 0.5), row(cases, "int8", 16, slow)]
    goal = judged(modules, rows, "any format")
    assert goal["met"] is met
    assert goal["where"].endswith("M=16")


def test_a_branch_costs(modules: Any) -> None:
    rows = [row(modules[0], name, 1, ms) for name, ms in (("int4g128", 1.0), ("int4g128+r32", 1.1))]
    goal = judged(modules, rows, "time added to int4g128")
    assert goal["figure"] == pytest.approx(10)
    assert goal["met"] is False
    assert judged(modules, rows, "int8+r32+a8")["met"] is None


def test_order_of_cells(modules: Any) -> None:
    """Every shape gets its telling M before any gets the others."""
    cases, _, _ = modules
    found = cases.order(((8, 8), (16, 8)), (4, 1, 2048, 16, 300))
    assert found[:3] == [((8, 8), 1), ((8, 8), 16), ((8, 8), 2048)]
    assert found[3][0] == (16, 8)
    assert found[6:8] == [((8, 8), 4), ((8, 8), 300)]
