"""The models that `benchmarks.ort` runs: exported dense, with feeds to time and a quality."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.models import MODELS

Feed = dict[str, np.ndarray[Any, Any]]
Call = Callable[[Feed], list[np.ndarray[Any, Any]]]
"""One run: feeds to outputs."""


@dataclass(frozen=True)
class Case:
    """A model: what is timed, and how well an engine keeps its meaning."""

    name: str
    make: Callable[[], nn.Module]
    export: Callable[[nn.Module, Path], object]
    feeds: Mapping[str, Feed]
    quality: Callable[[Call], float]
    measure: str
    """What `quality` is."""
    specs: tuple[str, ...]
    example: Any
    overrides: Mapping[str, str]
    """Formats of single weights, for every spec."""


def mlp(width: int = 4096, depth: int = 4) -> Case:
    """Linear and ReLU by turns, random weights: the products alone; 268 MB in float32.

    Inputs are (1, rows, width): of two axes it would be Gemm, which ONNX Runtime's quantiser skips.
    """
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(depth)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
    model.eval().requires_grad_(False)
    x = torch.randn(1, 128, width)
    want = model(x).numpy()

    def error(call: Call) -> float:
        return float(np.linalg.norm(call({"input": x.numpy()})[0] - want) / np.linalg.norm(want))

    def export(model: nn.Module, path: Path) -> object:
        axes = {"input": {1: "rows"}}
        return sparsefx.export_onnx(model, path, torch.randn(1, 4, width), axes, verify=False)

    return Case(
        "mlp", lambda: copy.deepcopy(model), export,
        {f"M={m}": {"input": x[:, :m].numpy()} for m in (1, 128)}, error, "relative error",
        ("int4g128", "int4g128+a8", "bitmap@50%+int4g128+a8", "tile16x1@50%+int4g128+a8",
         "tile2048x16@75%+int4g128+a8", "int8+a8"),
        x[:, :2], {},
    )  # fmt: skip


def minilm() -> Case:
    """The sentence encoder: one short sentence, and 32 of 64 tokens."""
    bundle = MODELS["minilm"]()
    ids = bundle.calibration(2)[0]["input_ids"]

    def feed(batch: int, length: int) -> Feed:
        shape = (batch, length)
        return {
            "input_ids": ids.flatten()[: batch * length].reshape(shape).numpy(),
            "token_type_ids": np.zeros(shape, np.int64), "attention_mask": np.ones(shape, np.int64),
        }  # fmt: skip

    def quality(call: Call) -> float:
        names = list(bundle.example_inputs)

        def forward(**inputs: Tensor) -> Any:
            out = call({name: inputs[name].numpy() for name in names})[0]
            return SimpleNamespace(last_hidden_state=torch.from_numpy(np.array(out)))

        return float(bundle.metric(_Module(forward))[bundle.headline])

    def export(model: nn.Module, path: Path) -> object:
        return sparsefx.export_onnx(
            model, path, bundle.example_inputs, bundle.dynamic_shapes, verify=False
        )

    return Case(
        "minilm", lambda: copy.deepcopy(bundle.model), export,
        {"1×16": feed(1, 16), "32×64": feed(32, 64)}, quality, bundle.headline,
        ("int4g128+a8", "bitmap@50%+int4g128+a8", "tile16x1@25%+int8+a8", "int8+a8"),
        bundle.example_inputs, {},
    )  # fmt: skip


def smollm2(past: int = 128) -> Case:
    """The language model with its cache: one token after `past`, and a prompt of 128."""
    from sparsefx.models.generate import untie

    bundle = MODELS["smollm2"]()
    config: Any = bundle.model.config
    ids = bundle.example_inputs["input_ids"].flatten()

    def feed(count: int, before: int) -> Feed:
        tokens = ids.repeat(1 + count // len(ids))[:count]
        head = config.hidden_size // config.num_attention_heads
        cache = np.zeros((1, config.num_key_value_heads, before, head), np.float32)
        return {
            "input_ids": tokens[None].numpy(),
            "attention_mask": np.ones((1, before + count), np.int64),
            "position_ids": np.arange(before, before + count)[None],
            **{f"past_key_values.{i}.{part}": cache
               for i in range(config.num_hidden_layers) for part in ("key", "value")},
        }  # fmt: skip

    def quality(call: Call) -> float:
        def forward(input_ids: Tensor) -> Any:
            inputs = feed(input_ids.shape[1], 0) | {"input_ids": input_ids.numpy()}
            return SimpleNamespace(logits=torch.from_numpy(np.array(call(inputs)[0])))

        return float(bundle.metric(_Module(forward))["perplexity"])

    def export(model: nn.Module, path: Path) -> object:
        return sparsefx.export_causal_lm(model, path, verify=False)

    return Case(
        "smollm2", lambda: untie(copy.deepcopy(bundle.model), torch.float32), export,
        {"decode": feed(1, past), "prefill 128": feed(128, 0)}, quality, "perplexity",
        ("int4g128+a8", "bitmap@50%+int4g128+a8"),
        bundle.example_inputs, {"lm_head": "int8+a8"},
    )  # fmt: skip


class _Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


CASES: Mapping[str, Callable[[], Case]] = {"mlp": mlp, "minilm": minilm, "smollm2": smollm2}
