"""`export_causal_lm`: a whole language model becomes an ONNX file with its key/value cache.

Names and shapes are those of optimum, transformers.js and onnxruntime-genai: `input_ids`,
`attention_mask`, `position_ids` and `past_key_values.{i}.key|value` in, `logits` and
`present.{i}.key|value` out. The past may be empty.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsefx.codegen.onnx import require_packages
from sparsefx.codegen.onnx_inputs import PLUS, Inputs
from sparsefx.ir.errors import ExportError
from sparsefx.models.generate import ARCHITECTURES
from sparsefx.runtime.export import ExportReport, export_call

if TYPE_CHECKING:
    import onnx_ir as ir

BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
EXAMPLE = (2, 5, 3)
"""Sizes of these three at which the model is traced."""
GROUPED = "sparsefx_grouped"

KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values (batch, heads, length, size) of every layer."""


def export_causal_lm(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    adapters: Sequence[str] = (),
) -> ExportReport:
    """Write a transformers causal language model with its cache to `path`, as `export_onnx` does.

    Batch, sequence and past are dynamic; prompts are padded on the left, with zeros in
    `attention_mask`. `sparsefx.runtime.ort_generate` and others' loops run the file. `adapters` is
    as in `export_onnx`. Raises
    ExportError where the cache does not simply grow by one position per token: sliding windows,
    recurrent states, encoders.
    """
    require_packages()
    if why := refusal(model):
        raise ExportError(f"{type(model).__name__} cannot be exported with its cache: {why}")
    wrapped = _WithCache(model).train(model.training)
    with _attention(model):
        inputs = replace(_inputs(wrapped), also=({PAST: 0},))
        report = export_call(
            wrapped, path, inputs, verify, lambda graph: _finish(graph, model), adapters, "model."
        )
    rows = [replace(row, name=row.name.removeprefix("model.")) for row in report.layers]
    return replace(report, layers=tuple(rows))


def is_causal_lm(model: nn.Module) -> bool:
    """Whether `model` is one of transformers' language models that generate from left to right."""
    config, generates = getattr(model, "config", None), getattr(model, "can_generate", None)
    if config is None or generates is None or not generates():
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    return type(model).__name__ in known.values() and not config.is_encoder_decoder


def refusal(model: nn.Module) -> str | None:
    """Why `export_causal_lm` does not take `model`; None when it does."""
    if not is_causal_lm(model):
        return "it is none of transformers' causal language models"
    from transformers.cache_utils import DynamicCache, DynamicLayer

    text: Any = model.config
    kinds = {type(layer) for layer in DynamicCache(config=text).layers} - {DynamicLayer}
    if kinds:
        return f"its cache has layers of type {', '.join(sorted(k.__name__ for k in kinds))}"
    missing = {"position_ids", "past_key_values", "attention_mask"} - _parameters(model)
    if missing:
        return f"its forward takes no {', '.join(sorted(missing))}"
    return None


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


class _WithCache(nn.Module):
    """The model as a function from a past to a longer one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: KeyValues,
    ) -> tuple[Tensor, KeyValues]:
        from transformers.cache_utils import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        for layer, (key, value) in zip(cache.layers, past_key_values, strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return out.logits, [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def _inputs(wrapped: _WithCache) -> Inputs:
    """A call that continues a past that the model itself computed, the first row padded."""
    batch, past, sequence = EXAMPLE
    model: Any = wrapped.model
    embed = model.get_input_embeddings()
    device = embed.weight.device
    total = past + sequence
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embed.num_embeddings, (batch, total), generator=seed).to(device)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        pairs = _first(model, ids[:, :past], mask[:, :past], positions[:, :past])
    except Exception as error:  # the model's own code
        raise ExportError(f"{type(model).__name__} does not run with a cache: {error}") from error
    call = {
        "input_ids": ids[:, past:], "attention_mask": mask, "position_ids": positions[:, past:],
        "past_key_values": pairs,
    }  # fmt: skip
    rows, grown = {0: BATCH, 1: SEQUENCE}, {0: BATCH, 2: PAST}
    return Inputs.of(wrapped, call, {
        "input_ids": rows, "attention_mask": {0: BATCH, 1: PAST + PLUS + SEQUENCE},
        "position_ids": rows, "past_key_values": [(grown, grown) for _ in pairs],
    })  # fmt: skip


def _first(model: Any, ids: Tensor, mask: Tensor, positions: Tensor) -> KeyValues:
    """What the model keeps of its first tokens."""
    from transformers.cache_utils import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    training = model.training
    model.eval()(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
        use_cache=True,
    )  # fmt: skip
    model.train(training)
    return [(layer.keys, layer.values) for layer in cache.layers]


def names(layers: int) -> tuple[list[str], list[str]]:
    """Names of the file's inputs and outputs."""
    kinds = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    return (
        inputs + [f"past_key_values.{kind}" for kind in kinds],
        ["logits"] + [f"present.{kind}" for kind in kinds],
    )


def _finish(graph: ir.Model, model: nn.Module) -> None:
    """Give inputs and outputs their names; note which tokens end a text."""
    values = graph.graph
    for found, wanted in zip(
        (values.inputs, values.outputs), names(len(values.outputs) // 2), strict=True
    ):
        for value, name in zip(found, wanted, strict=True):
            value.name = name
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    graph.metadata_props["eos_token_id"] = ",".join(map(str, ends))


@contextlib.contextmanager
def _attention(model: nn.Module) -> Iterator[None]:
    """Let `model` attend in plain products: fewer nodes than torch.onnx makes of sdpa."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(GROUPED, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, eager_mask)
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = GROUPED if config.model_type in ARCHITECTURES else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    """transformers' `eager` without its copy of keys and values for every query head."""
    batch, heads, rows, size = q.shape
    groups = k.shape[1]
    scores = q.reshape(batch, groups, heads // groups * rows, size) @ k.mT * scaling
    scores = scores.view(batch, heads, rows, k.shape[2]) + mask
    shares = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    y = shares.view(batch, groups, heads // groups * rows, k.shape[2]) @ v
    return y.view(batch, heads, rows, size).transpose(1, 2).contiguous(), None
