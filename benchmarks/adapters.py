"""What adapters cost and how fast they switch, on layers and a model of SmolLM2-135M's shapes.

    python -m benchmarks.adapters                      # all of it: some ten minutes on 2 cores
    python -m benchmarks.adapters --only switch --threads 1

Weights are random: time does not depend on them. `decode` is one greedy step of transformers'
eager forward after 128 tokens; `rows` the same with a batch of 8 after 16. Engines take turns in
random order within one process; figures are medians and quartiles. PEFT's layers run unfused over
the same dense float32 base. A run without --only writes `results/adapters-<CPU>.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import machine
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsefx
from sparsefx.models.torchvision import usable_torchvision
from sparsefx.runtime.adapters import Adapters, adapters

RESULTS = Path(__file__).parent / "results"
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
"""(N, K) of one block: q, k, v, o, gate, up, down."""
BLOCKS, RANK, PROMPT = 30, 32, 128
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Calls = Mapping[str, Callable[[], Any]]
Timed = dict[str, dict[str, float]]


def turns(calls: Calls, rounds: int) -> Timed:
    """Milliseconds of each, one call per round in random order, after one untimed call.

    With one thread it is the thread's CPU time: other programs take turns with it and count not.
    """
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in order.sample(list(calls), len(calls)):
            start = clock()
            calls[name]()
            if turn:
                times[name].append((clock() - start) * 1e-6)
    return {name: quartiles(got) for name, got in times.items()}


def quartiles(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "low": low, "high": high, "calls": len(times)}


# --- models and adapters -------------------------------------------------------------------------


def llama() -> nn.Module:
    """SmolLM2-135M's architecture, random weights, head tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=BLOCKS, vocab_size=49152,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False).uniform_(-0.05, 0.05)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    ready: nn.Module = model.eval()
    return ready


def packed(model: nn.Module, spec: str) -> nn.Module:
    ids = torch.ones(1, 4, dtype=torch.int64)
    return sparsefx.sparsify(model, spec, example_inputs={"input_ids": ids}, progress=False)


def sharing(model: nn.Module) -> nn.Module:
    """A copy over the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def linears(model: nn.Module, wanted: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(N, K) by name of the blocks' linears."""
    sizes = dict(zip(ALL, SHAPES, strict=True))
    return {
        name: sizes[name.rpartition(".")[2]] for name, _ in model.named_modules()
        if name.rpartition(".")[2] in wanted
    }  # fmt: skip


def lora(folder: Path, sizes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Path:
    """A LoRA file of random matrices."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (n, k) in sizes.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator) / k**0.5
        state[f"{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator) / rank
    path = folder / f"lora{rank}-{seed}.safetensors"
    save_file(state, path, {"lora_alpha": str(rank)})
    return path


def shira(folder: Path, sizes: Mapping[str, tuple[int, int]], share: float, seed: int) -> Path:
    """A sparse delta on `share` of every weight."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, (n, k) in sizes.items():
        count = int(share * n * k)
        state[f"{name}.weight.indices"] = torch.randperm(n * k, generator=generator)[:count]
        state[f"{name}.weight.values"] = torch.randn(count, generator=generator) * 0.01
    path = folder / f"shira{share}-{seed}.safetensors"
    save_file(state, path)
    return path


class Step:
    """One decoding step after a prompt; the cache is as long at every call."""

    def __init__(self, model: nn.Module, batch: int = 1) -> None:
        self.model: Any = model
        length = PROMPT // batch
        ids = torch.arange(batch * length).view(batch, length) % 997
        with torch.inference_mode():
            self.cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        self.token = torch.ones(batch, 1, dtype=torch.int64)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        out = self.model(
            input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.cache.crop(-1)
        logits: Tensor = out.logits
        return logits


def peft_model(model: nn.Module, wanted: list[str]) -> nn.Module:
    """The dense model under PEFT's own layers, not merged."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=wanted)
    wrapped: nn.Module = peft.get_peft_model(sharing(model), config).eval()
    return wrapped


# --- what is measured ----------------------------------------------------------------------------


def decode(folder: Path, rounds: int, spec: str) -> dict[str, Any]:
    """A rank-32 adapter against none, here and with PEFT's unfused layers."""
    dense = llama()
    base = packed(sharing(dense), spec)
    calls: dict[str, Callable[[], Any]] = {"none": Step(base), "torch fp32": Step(dense)}
    for label, wanted in (("all", ALL), ("q, v", ["q_proj", "v_proj"])):
        file = lora(folder, linears(dense, wanted), RANK, 1)
        for dtype in (torch.float32, torch.float16):
            model = sharing(base)
            manager = adapters(model, RANK, dtype=dtype)
            manager.load(file, "a")
            if label == "all" and dtype is torch.float32:
                calls["slots, none on"] = Step(sharing(model))
            manager.set("a")
            calls[f"rank 32, {label}, {str(dtype)[6:]}"] = Step(model)
        calls[f"PEFT unfused, {label}"] = Step(peft_model(dense, wanted))
    times = turns(calls, rounds)
    for name in times:
        own = "torch fp32" if name.startswith(("PEFT", "torch")) else "none"
        times[name]["over its base"] = times[name]["ms"] / times[own]["ms"] - 1
    return times


def rows(folder: Path, rounds: int, spec: str) -> dict[str, Any]:
    """A batch of 8 with one adapter, and with 8 mixed; ids change at every step."""
    base = packed(llama(), spec)
    found: dict[str, Any] = {}
    for rank, label, wanted, dtype in (
        (16, "all", ALL, torch.float32), (RANK, "all", ALL, torch.float32),
        (RANK, "all, float16", ALL, torch.float16),
        (RANK, "q, v", ["q_proj", "v_proj"], torch.float32),
    ):  # fmt: skip
        names = [f"a{i}" for i in range(8)]
        one, many = sharing(base), sharing(base)
        sizes = linears(base, wanted)
        for model, count in ((one, 1), (many, 8)):
            modules = [f"*.{name}" for name in wanted]
            manager = adapters(model, count * rank, modules=modules, dtype=dtype)
            for i, name in enumerate(names[:count]):
                manager.load(lora(folder, sizes, rank, i), name)
        adapters(one).set("a0")
        calls: dict[str, Callable[[], Any]] = {"none": Step(base, 8), "one": Step(one, 8),
                 "8 mixed": mixed(Step(many, 8), adapters(many), names)}  # fmt: skip
        times = turns(calls, rounds)
        times["8 mixed"]["over one"] = times["8 mixed"]["ms"] / times["one"]["ms"]
        found |= {f"rank {rank}, {label}: {name}": row for name, row in times.items()}
    return found


def mixed(step: Step, manager: Adapters, names: list[str]) -> Callable[[], Any]:
    order = random.Random(1)

    def run() -> Any:
        manager.rows(order.sample(names, len(names)))
        return step()

    return run


class Layers(nn.Module):
    """8 blocks' linears: 56 layers, 113 MB of float32, more than the last cache."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList(nn.Linear(k, n, bias=False) for n, k in SHAPES * 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x[..., : layer.in_features]) for layer in self.items]


def switch(folder: Path, rounds: int, spec: str) -> dict[str, Any]:
    """Changing adapters: LoRA on packed weights, SHiRA in dense ones, and fusing LoRA instead."""
    dense = Layers().requires_grad_(False)
    x = torch.randn(1, 1536)
    small = sparsefx.sparsify(copy.deepcopy(dense), spec, example_inputs=x, progress=False)
    sizes = {f"items.{i}": shape for i, shape in enumerate(SHAPES * 8)}
    switched = sharing(small)
    loras = adapters(switched, 2 * RANK)
    on_packed = adapters(small, 2 * RANK, max_density=0.021)
    on_dense = adapters(dense, 1)
    for i, name in enumerate("ab"):
        for manager in (loras, on_packed):
            manager.load(lora(folder, sizes, RANK, i), name)
        for percent in (1, 2):
            file = shira(folder, sizes, percent / 100, i)
            on_dense.load(file, f"{percent}%{name}")
            on_packed.load(file, f"{percent}%{name}")
    pairs = [
        tuple(torch.randn(shape) * 0.01 for shape in ((RANK, k), (n, RANK))) for n, k in SHAPES * 8
    ]
    items: Any = dense.items
    targets = [nn.Parameter(layer.weight.clone(), requires_grad=False) for layer in items]

    def fuse() -> None:
        for weight, (a, b) in zip(targets, pairs, strict=True):
            weight.addmm_(b, a, alpha=0.5)

    wrapped = peft_model(copy.deepcopy(dense), ["items." + str(i) for i in range(len(sizes))])

    def peft_fuse() -> None:
        for layer in layers:
            (layer.unmerge if layer.merged else layer.merge)()

    layers: list[Any] = [m for m in wrapped.modules() if hasattr(m, "lora_A")]

    def forward() -> list[Tensor]:
        result: list[Tensor] = small(x)
        return result

    def forward_lora() -> list[Tensor]:
        result: list[Tensor] = switched(x)
        return result

    def turn_and_run() -> None:
        loras.set(next(turn))
        switched(x)

    turn = between("a", "b")
    calls: dict[str, Callable[[], Any]] = {
        "fuse rank-32 LoRA: PEFT's merge": peft_fuse,
        "fuse rank-32 LoRA: one addmm_": fuse,
        "LoRA switch: a to b": switcher(loras, "a", "b"),
        "SHiRA 2%, packed: a to b": switcher(on_packed, "2%a", "2%b"),
    }
    with torch.inference_mode():
        times = turns(calls, rounds)
        for percent in (1, 2):
            for names in ((f"{percent}%a", None), (f"{percent}%a", f"{percent}%b")):
                what = f"SHiRA {percent}%, dense: " + ("a to b" if names[1] else "on or off")
                times |= turns({what: switcher(on_dense, *names)}, rounds)
        loras.set("a")
        times |= turns({"forward, LoRA on": forward_lora}, rounds)
        times |= turns({"LoRA switch and forward": turn_and_run}, rounds)
        on_packed.set("2%a")
        times |= turns({"forward, SHiRA 2% beside packed": forward}, rounds)
        on_packed.set(None)
        times |= turns({"forward, none on": forward}, rounds)
    for name, row in times.items():
        row["ms per 100 layers"] = row["ms"] / len(sizes) * 100
        fusions = 2 if "a to b" in name else 1  # take one out, put one in
        for column, fused in (("PEFT", "PEFT's merge"), ("addmm_", "one addmm_")):
            fusing = times[f"fuse rank-32 LoRA: {fused}"]["ms"]
            row[f"{column}'s fusing ÷ this"] = fusions * fusing / row["ms"]
    return times


def between(*names: str | None) -> Any:
    while True:
        yield from names


def switcher(manager: Adapters, *names: str | None) -> Callable[[], None]:
    turn = between(*names)
    return lambda: manager.set(next(turn))


PARTS = {"switch": switch, "decode": decode, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--spec", default="int4g32")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    usable_torchvision()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    result = {"machine": machine.facts(), "spec": args.spec, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, part in PARTS.items():
            if args.only in (None, name):
                result[name] = part(Path(folder), args.rounds, args.spec)
                show(name, result[name])
    if args.only is None or args.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"adapters-{machine.slug()}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **result}, indent=1) + "\n")


def show(title: str, rows: Timed) -> None:
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    table = Table("", *keys, title=title)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3g}" if key in row else "" for key in keys))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
