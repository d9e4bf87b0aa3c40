"""`export_causal_lm`: a whole language model becomes an ONNX file with its key/value cache.

Names and shapes are those of optimum, transformers.js and onnxruntime-genai: `input_ids`,
`attention_mask`, `position_ids` and `past_key_values.{i}.key|value` in, `logits` and
`present.{i}.key|value` out. The past may be empty.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
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
ROTATE = "apply_rotary_pos_emb"
"""What transformers' models call their rotation of queries and keys."""

KeyValues = list[tuple[Tensor, Tensor]]
"""Keys and values (batch, heads, length, size) of every layer."""


def export_causal_lm(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    adapters: Sequence[str] = (),
    inline: bool = False,
) -> ExportReport:
    """Write a transformers causal language model with its cache to `path`, as `export_onnx` does.

    Batch, sequence and past are dynamic; prompts are padded on the left, with zeros in
    `attention_mask`. `sparsefx.runtime.ort_generate` and others' loops run the file. `adapters` and
    `inline` are as in `export_onnx`.

    A head that shares the embedding's weight stays dense, and every token reads all of it. Before
    `sparsify`, `sparsefx.models.generate.untie(model, torch.float32)` gives it a weight of its own,
    which then takes the spec's format, or one of an override such as {"lm_head": "int8+a8"}.

    Raises ExportError where the cache does not simply grow by one position per token: sliding
    windows, recurrent states, encoders.
    """
    require_packages()
    if why := refusal(model):
        raise ExportError(f"{type(model).__name__} cannot be exported with its cache: {why}")
    wrapped = _WithCache(model).train(model.training)
    inputs = replace(_inputs(wrapped), also=({PAST: 0},))
    with _attention(model):
        report = export_call(
            wrapped,
            path,
            inputs,
            verify,
            lambda graph: _finish(graph, model),
            adapters,
            "model.",
            inline,
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

        model: Any = self.model
        cache: Any = DynamicCache(config=model.config)
        for layer, (key, value) in zip(cache.layers, past_key_values, strict=True):
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            if model.config._attn_implementation == GROUPED:
                layer.update = functools.partial(_step, layer)
        out = model(
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


# --- attention -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _attention(model: nn.Module) -> Iterator[None]:
    """Let `model` attend, and turn queries and keys, in few nodes: `_attend` and `_rotate`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(GROUPED, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, eager_mask)
    config: Any = model.config
    known = config.model_type in ARCHITECTURES
    code = vars(import_module(type(model).__module__))
    before = config._attn_implementation, code.get(ROTATE)
    config._attn_implementation = GROUPED if known else "eager"
    if known and before[1]:
        code[ROTATE] = functools.partial(_rotate, before[1])
    try:
        yield
    finally:
        config._attn_implementation = before[0]
        if before[1]:
            code[ROTATE] = before[1]


@dataclass(frozen=True)
class _Step:
    """New keys and values (batch, groups, rows, size) of a layer, next to the past that it has."""

    layer: Any
    keys: Tensor
    values: Tensor

    def grow(self) -> tuple[Tensor, Tensor]:
        """Past and new in one; the layer keeps them."""
        self.layer.keys = torch.cat([self.layer.keys, self.keys], 2)
        self.layer.values = torch.cat([self.layer.values, self.values], 2)
        return self.layer.keys, self.layer.values


def _step(layer: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[_Step, _Step]:
    """In place of a cache layer's `update`: what it returns goes to `_attend` as it is."""
    step = _Step(layer, keys, values)
    return step, step


def _attend(
    module: nn.Module, q: Tensor, step: _Step, _: _Step, mask: Tensor, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    """transformers' `eager` without its copy of keys and values for every query head."""
    if _fuses(q):
        return _fused(q, step, mask, scaling), None
    k, v = step.grow()
    batch, heads, rows, size = q.shape
    groups = k.shape[1]
    scores = q.reshape(batch, groups, heads // groups * rows, size) @ k.mT * scaling
    scores = scores.view(batch, heads, rows, k.shape[2]) + mask
    shares = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    y = shares.view(batch, groups, heads // groups * rows, k.shape[2]) @ v
    return y.view(batch, heads, rows, size).transpose(1, 2).contiguous(), None


def _fuses(x: Tensor) -> bool:
    """Whether ONNX Runtime's fused operators are written: its CPU kernels are for float32."""
    return torch.compiler.is_exporting() and x.dtype == torch.float32


def _fused(q: Tensor, step: _Step, mask: Tensor, scaling: float) -> Tensor:
    """Attention as one MultiHeadAttention with a head per group, whose queries are rows of it.

    GroupQueryAttention would need no such regrouping, but refuses a batch that continues a past by
    more than one token, and is slower on long pasts.
    """
    batch, heads, rows, size = q.shape
    groups, past = step.keys.shape[1], step.layer.keys
    share, grown = heads // groups, (batch, groups, past.shape[2] + rows, size)
    query = q.transpose(1, 2)
    if share > 1:
        query = query.reshape(batch, rows, groups, share, size).permute(0, 3, 1, 2, 4)
        mask = mask.expand(batch, share, rows, mask.shape[3])
        mask = mask.reshape(batch, 1, share * rows, mask.shape[3])
    query = query.reshape(batch, share * rows, groups * size)
    new = [x.transpose(1, 2).flatten(2) for x in (step.keys, step.values)]
    y, step.layer.keys, step.layer.values = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::MultiHeadAttention",
        (query, *new, None, None, mask, past, step.layer.values),
        {"num_heads": groups, "scale": scaling},
        dtypes=[q.dtype] * 3, shapes=[query.shape, grown, grown], version=1,
    )  # fmt: skip
    if share > 1:
        y = y.view(batch, share, rows, groups, size).permute(0, 2, 3, 1, 4)
    return y.reshape(batch, rows, heads, size)


def _rotate(
    plain: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' `apply_rotary_pos_emb` of (batch, heads, rows, size), one node per tensor.

    The operator looks rows of a table up; the table is what the model computed for these positions,
    so that its length bounds no text.
    """
    batch, rows, size = cos.shape
    if not _fuses(q) or unsqueeze_dim != 1 or size != q.shape[-1]:
        return plain(q, k, cos, sin, unsqueeze_dim)
    places = torch.arange(batch * rows, device=q.device).view(batch, rows)
    tables = [table[..., : size // 2].reshape(batch * rows, size // 2) for table in (cos, sin)]

    def turn(x: Tensor) -> Tensor:
        flat = x.transpose(1, 2).flatten(2)
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding", (flat, places, *tables),
            {"num_heads": x.shape[1]}, dtype=x.dtype, shape=flat.shape, version=1,
        )  # fmt: skip
        return y.view(batch, rows, x.shape[1], size).transpose(1, 2)

    return turn(q), turn(k)
