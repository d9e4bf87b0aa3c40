"""The frontier benchmark on a small model: a run that was cut off goes on from what it kept."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

import sparsefx
from sparsefx.passes import candidates
from sparsefx.runtime import latency
from sparsefx.runtime.frontier import Point

ROOT = Path(__file__).parent.parent
pytest.importorskip("onnxruntime")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`benchmarks.frontier`, found from the repository's root, with a small case "minilm"."""
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import frontier, ort_cases
    finally:
        sys.path.remove(str(ROOT))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = torch.randn(4, 8, 32)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.inner(x),)

    whole = Named().eval()

    def export(model: nn.Module, path: Path) -> object:
        return sparsefx.export_onnx(model, path, x, verify=False)

    def case() -> Any:
        return ort_cases.Case(
            "minilm", lambda: copy.deepcopy(whole), export, {"1×16": {"x": x.numpy()}},
            lambda call: float(np.abs(call({"x": x.numpy()})[0]).mean()), "mean", (), x, {},
        )  # fmt: skip

    monkeypatch.setattr(frontier, "CASES", {"minilm": case})
    bundle = SimpleNamespace(calibration=lambda count: [x, x])
    monkeypatch.setattr(frontier, "MODELS", {"minilm": lambda: bundle})
    monkeypatch.setattr(frontier, "SPECS", ("int8",))
    monkeypatch.setattr(candidates, "CANDIDATES", ("int8",))
    monkeypatch.setattr(latency, "TURNS", 1)
    monkeypatch.setattr(latency, "SHORTEST", 1e-4)
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "cache"))
    return frontier


def options(out: Path) -> argparse.Namespace:
    return argparse.Namespace(
        only=None, targets=["bits=10"], threads=1, rounds=2, calibrate=2, out=out
    )


def test_a_run_that_was_cut_off_goes_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def peer(name: str) -> Callable[[Any], Any]:
        def make(setup: Any) -> Any:
            made.append(name)
            if name == "killed" and made.count(name) == 1:
                raise KeyboardInterrupt
            if name == "broken":
                raise RuntimeError("no such thing\nand more")
            return bench.stock(setup.dense, 1)

        return make

    monkeypatch.setattr(bench, "PEERS", {n: peer(n) for n in ("first", "broken", "killed")})
    monkeypatch.setattr(bench, "MORE", {})
    monkeypatch.setattr(bench, "TORCH", {"torch fp32": bench.TORCH["torch fp32"]})
    what = ("minilm", "1×16", options(tmp_path / "out"))
    with Progress(disable=True) as bar:
        with pytest.raises(KeyboardInterrupt):
            bench.run(*what, bar)
        assert [*json.loads(bench.partial_of(*what).read_text())["points"]] == ["first", "broken"]
        monkeypatch.setattr(bench, "plans", None)  # its files are there
        found = bench.run(*what, bar)
    assert made == ["first", "broken", "killed", "killed"]
    auto = "auto:bits=10,rows=16"
    assert [p.name for p in found.points] == [
        "first", "broken", "killed", "torch fp32", f"{auto} in ORT", f"{auto} eager",
        "int8 in ORT", "int8 eager",
    ]  # fmt: skip
    assert [p.reason for p in found.points if p.reason] == ["RuntimeError: no such thing"]
    assert all(p.ms > 0 and p.quality > 0 and p.bytes > 0 for p in found.shown)
    assert [p.ours for p in found.points] == [False] * 4 + [True] * 4
    assert [bool(p.note) for p in found.points] == [False] * 4 + [True] * 2 + [False] * 2
    held = json.loads(bench.partial_of(*what).read_text())
    again = bench.Found.so_far(bench.partial_of(*what), held["key"])
    assert again.all() == found.points
    assert not bench.Found.so_far(bench.partial_of(*what), {**held["key"], "rounds": 3}).points


def test_times_are_least_shares(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([2.0, 4.0, 1.0, 6.0, 3.0, 5.0])  # of the engine and the float32 model by turns
    monkeypatch.setattr(bench, "clock", lambda call: next(left))
    args = argparse.Namespace(threads=1, rounds=3)
    assert bench.beside(lambda feed: [], lambda feed: [], {}, args)[:2] == (1.0, 4.0)
    found = bench.Found(tmp_path / "none", {}, base=0.004)
    found.points["a"] = [asdict(Point("a", 0.5, 0.25, 10))]
    assert found.all() == (Point("a", 0.5, 1.0, 10),)


def test_the_cache_of_a_feed_is_the_models(bench: Any) -> None:
    """Three tokens after five, whose keys and values are in the feed, beside all eight at once."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).double().eval()
    ids = torch.randint(0, 50, (1, 8))
    with torch.no_grad():
        want = model(input_ids=ids).logits[:, 5:].float().numpy()
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    feed = {"input_ids": ids[:, 5:].numpy(), "attention_mask": np.ones((1, 8), np.int64),
            "position_ids": np.arange(5, 8)[None]}  # fmt: skip
    for i, layer in enumerate(cache.layers):
        feed[f"past_key_values.{i}.key"] = layer.keys.numpy()
        feed[f"past_key_values.{i}.value"] = layer.values.numpy()
    got = bench.torch_call(model)[0](feed)[0]
    # Equal in float64 but for its last bits; then both are rounded to float32.
    np.testing.assert_allclose(got, want, rtol=2**-22)
