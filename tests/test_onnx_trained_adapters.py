"""Two adapters trained for two tasks on one compressed encoder, exchanged inside ONNX Runtime."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import sparsefx
from sparsefx.codegen import native
from sparsefx.codegen.onnx_inputs import Inputs
from sparsefx.models.text import python_topics
from sparsefx.runtime.gate import _reference, gap

ort: Any = pytest.importorskip("onnxruntime")
LIBRARY = [False, *([True] if native.engine() is not None else [])]
RANK, ALPHA, STEPS, TOKENS = 4, 8, 24, 16

Batch = dict[str, Tensor]
Adapter = dict[str, tuple[Tensor, Tensor]]
"""A (r, K) and B (N, r) of every adapted module."""
Task = Callable[[Callable[[Batch], Tensor]], Tensor]
"""The loss of a function from token ids to sentence vectors (texts, width)."""


# --- two tasks -----------------------------------------------------------------------------------


def sentence_vectors(hidden: Tensor, batch: Batch) -> Tensor:
    """The mean over the real tokens of (texts, tokens, width)."""
    kept = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1)


def tasks(count: int) -> dict[str, Task]:
    """Tell which opening belongs to which paragraph; tell openings from what follows them."""
    from transformers import AutoTokenizer

    from sparsefx.models.minilm import WEIGHTS, _encode, cloze_pairs

    encode = AutoTokenizer.from_pretrained(str(WEIGHTS.locate().parent))
    pairs = cloze_pairs(python_topics()[0])[:count]
    openings, rests = (
        {
            name: ids[:, :TOKENS]
            for name, ids in _encode(encode, [pair[i] for pair in pairs]).items()
        }
        for i in (0, 1)
    )
    direction = torch.randn(384, generator=torch.Generator().manual_seed(5))

    def match(vectors: Callable[[Batch], Tensor]) -> Tensor:
        a, b = (F.normalize(vectors(batch)) for batch in (openings, rests))
        return F.cross_entropy(a @ b.T / 0.05, torch.arange(count))

    def which(vectors: Callable[[Batch], Tensor]) -> Tensor:
        scores = torch.cat([vectors(openings), vectors(rests)]) @ direction
        labels = torch.cat([torch.ones(count), torch.zeros(count)])
        return F.binary_cross_entropy_with_logits(scores, labels)

    return {"match": match, "which": which}


# --- training ------------------------------------------------------------------------------------


@contextlib.contextmanager
def adapted(model: nn.Module, adapter: Adapter) -> Iterator[nn.Module]:
    """`model` with y + (x · Aᵀ) · Bᵀ · alpha / r in place of y."""

    def hook(a: Tensor, b: Tensor) -> Any:
        return lambda module, args, y: y + args[0] @ a.T @ b.T * (ALPHA / RANK)

    handles = [
        model.get_submodule(name).register_forward_hook(hook(a, b))
        for name, (a, b) in adapter.items()
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def eager_vectors(model: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: sentence_vectors(model(**batch).last_hidden_state, batch)


def trained(model: nn.Module, names: list[str], task: Task, seed: int) -> Adapter:
    """LoRA as PEFT starts it (A random, B zero) after `STEPS` steps of Adam; the base is frozen."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {
        name: (
            (torch.randn(RANK, 384, generator=generator) / 384**0.5).requires_grad_(),
            torch.zeros(384, RANK, requires_grad=True),
        )
        for name in names
    }
    parameters = [t for pair in adapter.values() for t in pair]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    with adapted(model, adapter):
        for _ in range(STEPS):
            optimizer.zero_grad()
            task(eager_vectors(model)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    return {name: (a.detach(), b.detach()) for name, (a, b) in adapter.items()}


def peft_folder(folder: Path, adapter: Adapter) -> Path:
    folder.mkdir()
    state = {
        f"base_model.model.{name}.lora_{part}.weight": tensor.contiguous()
        for name, pair in adapter.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# --- ONNX Runtime --------------------------------------------------------------------------------


def opened(path: Path, library: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if library:
        options.register_custom_ops_library(sparsefx.ort_library())
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, batch: Batch, adapter: Path | None) -> Tensor:
    """(texts, tokens, width) of one run with this adapter."""
    options = ort.RunOptions()
    if adapter is not None:
        held = ort.LoraAdapter()
        held.Load(str(adapter))
        options.add_active_adapter(held)
    feeds = {value.name: batch[value.name].numpy() for value in session.get_inputs()}
    return torch.from_numpy(session.run(None, feeds, options)[0])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_two_trained_adapters_on_one_compressed_encoder(tmp_path: Path) -> None:
    from sparsefx.models.minilm import load

    torch.manual_seed(0)
    bundle = load()
    model, example = bundle.model, bundle.example_inputs
    sparsefx.sparsify(model, "bitmap@50%+int4g32", example_inputs=example, progress=False)
    base = tmp_path / "base.onnx"
    report = sparsefx.export_onnx(
        model, base, example, bundle.dynamic_shapes, adapters=["*.query", "*.value"]
    )
    names = [row.name for row in report.layers if row.name.endswith((".query", ".value"))]
    assert len(names) == 12
    plain = tmp_path / "plain.onnx"
    sparsefx.export_onnx(model, plain, example, bundle.dynamic_shapes, verify=False)
    before, losses = digest(base), tasks(12)
    adapters = {
        name: trained(model, names, task, seed) for seed, (name, task) in enumerate(losses.items())
    }
    files: dict[str, Path | None] = {"": None}
    for name, adapter in adapters.items():
        files[name] = path = tmp_path / f"{name}.onnx_adapter"
        folder = peft_folder(tmp_path / name, adapter)
        assert len(sparsefx.export_adapter(folder, base, path)) == 2 * len(names)
        assert digest(base) == before
    for library in LIBRARY:
        session = opened(base, library)
        assert torch.equal(run(session, example, None), run(opened(plain, library), example, None))
        check_outputs(model, session, example, adapters, files)
        check_losses(session, losses, files)
    assert digest(base) == before


def check_outputs(
    model: nn.Module, session: Any, example: Batch, adapters: dict[str, Adapter],
    files: dict[str, Path | None],
) -> None:  # fmt: skip
    """Adapters by turns: always what eager gives with that adapter, within the gate's tolerance."""
    seen: dict[str, Tensor] = {}
    for name in ("match", "", "which", "match", ""):
        with adapted(model, adapters.get(name, {})):
            wanted, tolerances = _reference(model, Inputs.of(model, example), "max")
        got = run(session, example, files[name])
        assert gap(wanted[0], got, "max") <= tolerances[0]
        assert name not in seen or torch.equal(seen[name], got)
        seen[name] = got
        others = [gap(y, got, "max") for other, y in seen.items() if other != name]
        assert all(apart > 100 * tolerances[0] for apart in others)


def check_losses(session: Any, losses: dict[str, Task], files: dict[str, Path | None]) -> None:
    """Each adapter lowers the loss of its own task, computed from ONNX Runtime's outputs."""
    found: dict[tuple[str, str], float] = {}
    for name, file in files.items():

        def vectors(batch: Batch, file: Path | None = file) -> Tensor:
            return sentence_vectors(run(session, batch, file), batch)

        found |= {(task, name): float(loss(vectors)) for task, loss in losses.items()}
    print({f"{task} with {name or 'no adapter'}": round(x, 4) for (task, name), x in found.items()})
    for task in losses:
        assert found[task, task] < 0.5 * found[task, ""], found
        assert all(found[task, task] < found[task, other] for other in files if other != task)
