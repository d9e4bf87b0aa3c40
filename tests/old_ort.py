"""Exported files in old versions of ONNX Runtime: `make test-old-ort`.

    python tests/old_ort.py ENVIRONMENT…   each an environment with onnxruntime and numpy alone

Models are exported here, behind the gate; what the gate compared (inputs, eager outputs and their
tolerances, at every size) is then asked of the old versions, by this file in their interpreters.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

OLDEST_STOCK = (1, 27)
"""Before, ONNX Runtime takes the first `sparsefx::Linear` body for every overload of it."""
OLDEST_LIBRARY = (1, 21)
"""Before, MultiHeadAttention refuses a mask for all heads (1.19) or gives NaN (1.20); files without
attention run from 1.18 on. 1.17 reads no IR version 10, which overloads need."""
FORMATS = ("int4g128", "bitmap@50%+int4g32", "tile16x1@50%+uint4g32", "int8+a8", "uint4g64+r8",
           "int2g64+a8", "int7g32", "2:4+fp16", "bf16")  # fmt: skip


# --- with sparsefx -------------------------------------------------------------------------------


def write(folder: Path) -> int:
    """Export the models into `folder`, each with the gate's questions beside it; their number."""
    import torch
    from torch import nn

    import sparsefx
    from sparsefx.runtime import gate

    torch.manual_seed(0)
    for i, fmt in enumerate(FORMATS):
        model = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
        x = torch.randn(5, 256)
        sparsefx.sparsify(model, fmt, example_inputs=x, progress=False)
        path = folder / f"{i}.onnx"
        with _kept(gate, path):
            sparsefx.export_onnx(model, path, x, {"input": {0: "rows"}})
    language_model = _llama()
    example = {"input_ids": torch.arange(6)[None]}
    spec = {"format": "int4g32", "overrides": {"re:.*mlp.*": "bitmap@50%+int4g32"}}
    sparsefx.sparsify(language_model, spec, example_inputs=example, progress=False)
    path = folder / "causal.onnx"
    with _kept(gate, path):
        sparsefx.export_causal_lm(language_model, path)
    return len(FORMATS) + 1


def _llama() -> Any:
    from sparsefx.models.torchvision import usable_torchvision

    usable_torchvision()
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


class _kept:
    """Within it, the questions that the gate asks go to files beside `path`."""

    def __init__(self, gate: Any, path: Path) -> None:
        self.gate, self.path, self.real = gate, path, gate._references

    def __enter__(self) -> None:
        def references(model: Any, inputs: Any, measure: str) -> Any:
            wanted, notes = self.real(model, inputs, measure)
            for i, want in enumerate(wanted):
                tensors = {f"in{j}": t.numpy() for j, t in enumerate(want.inputs.tensors)}
                tensors |= {f"out{j}": t.numpy() for j, t in enumerate(want.outputs)}
                np.savez(
                    self.path.with_suffix(f".{i}.npz"), measure=np.array(measure),
                    tolerances=np.array(want.tolerances), **tensors,
                )  # fmt: skip
            return wanted, notes

        self.gate._references = references

    def __exit__(self, *error: object) -> None:
        self.gate._references = self.real


def main(environments: list[str]) -> int:
    """Test each environment; how many failed, at least 1 where none could be tried."""
    from sparsefx.runtime.ort import ort_library

    failed = tried = 0
    with tempfile.TemporaryDirectory() as room:
        count = write(Path(room))
        print(f"{count} models exported and checked by the gate")
        for environment in environments:
            if not any(Path(environment).glob("lib/python*/site-packages/onnxruntime")):
                print(f"{environment}: not tried, no onnxruntime in it")
                continue
            python = str(Path(environment, "bin", "python"))
            call = [python, __file__, "--ask", room, ort_library()]
            plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            failed += subprocess.run(call, env=plain, check=False).returncode != 0
            tried += 1
    return failed if tried else 1


# --- with nothing but onnxruntime and numpy ------------------------------------------------------


def ask(folder: Path, library: str) -> None:
    """Raises AssertionError unless this ONNX Runtime does what its version promises."""
    import onnxruntime as ort

    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    files = sorted(folder.glob("*.onnx"))
    if version < OLDEST_LIBRARY:
        for path in files:
            assert "nsupported model IR version" in refusal(path, None), path
        told = refusal(files[0], library)
        old = "sparsefx needs ONNX Runtime" if version < (1, 17) else "nsupported model IR version"
        assert old in told, told
        print(f"ONNX Runtime {ort.__version__}: refused with a reason: {told.splitlines()[0]}")
        return
    refused = 0
    for path in files:
        for full in (False, True):
            check(path, library, full)
            if version >= OLDEST_STOCK:
                check(path, None, full)
        if version < OLDEST_STOCK:
            refused += bool(refusal(path, None))
    if version < OLDEST_STOCK:
        assert refused, "stock operators serve these files: OLDEST_STOCK is lower"
        stock = f"stock operators refuse {refused} of them"
    else:
        stock = "stock operators agree too"
    print(f"ONNX Runtime {ort.__version__}: {len(files)} files agree with the library; {stock}")


def session(path: Path, library: str | None, full: bool) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if full else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def refusal(path: Path, library: str | None) -> str:
    """What ONNX Runtime raises when it loads the file, "" when nothing."""
    try:
        session(path, library, full=True)
    except Exception as error:  # onnxruntime's exceptions share no base class
        return str(error)
    return ""


def check(path: Path, library: str | None, full: bool) -> None:
    made = session(path, library, full)
    for feeds, wanted, tolerances, measure in questions(path, made):
        got = made.run(None, feeds)
        assert len(got) == len(wanted)
        for i, (y, z) in enumerate(zip(wanted, got, strict=True)):
            assert y.shape == z.shape, (path, i)
            apart = distance(y, z, measure)
            where = f"{path.name}, library {bool(library)}, optimised {full}, output {i}"
            assert apart <= tolerances[i], f"{where}: {measure} {apart}, allowed {tolerances[i]}"


def questions(path: Path, made: Any) -> Iterator[tuple[dict[str, Any], list[Any], Any, str]]:
    """Feeds, eager outputs, their tolerances and the measure, at every size the gate tried."""
    found = sorted(path.parent.glob(f"{path.stem}.*.npz"))
    assert found, path
    for file in found:
        with np.load(file) as kept:
            arrays = dict(kept)
        names = [value.name for value in made.get_inputs()]
        feeds = {name: arrays[f"in{i}"] for i, name in enumerate(names)}
        wanted = [arrays[f"out{i}"] for i in range(len(arrays["tolerances"]))]
        yield feeds, wanted, arrays["tolerances"], str(arrays["measure"])


def distance(y: Any, z: Any, measure: str) -> float:
    """The gate's: infinite where one is finite and the other is not."""
    if (np.isfinite(y) != np.isfinite(z)).any():
        return float("inf")
    delta = (y.astype(np.float64) - z.astype(np.float64))[np.isfinite(y)]
    if not delta.size:
        return 0.0
    return float(abs(delta).max() if measure == "max" else np.sqrt((delta**2).mean()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask(Path(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(sys.argv[1:]))
