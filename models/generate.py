"""Greedy decoding of transformers' causal language models with a static key/value cache.

A few layers become one graph that the other layers share, with weights and cache as arguments:
short to compile, no Python between its kernels, no guards and no recompilation per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from sparsefx.ir.errors import CaptureError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose forward pass is embedding, rotary layers, norm and head, and no more."""
OPTIONS = {
    "cpp_wrapper": True,
    "cpp.min_chunk_size": 2048,
    "cpp.enable_floating_point_contract_flag": "fast",
}
"""For inductor: kernels are called from C++; loops shorter than a fork of threads stay serial."""
_ATTENTION = "sparsefx_static"

Run = Callable[..., Any]


def greedy(model: nn.Module, input_ids: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """The `new_tokens` likeliest tokens (B, new_tokens) after prompts (B, T) of one length.

    `options` are those of `Decoder`; keep a Decoder to compile once for many prompts.
    """
    batch, prompt = input_ids.shape
    return Decoder(model, prompt + new_tokens, batch, **options).generate(input_ids, new_tokens)


def untie(model: nn.Module, table: torch.dtype = torch.float16) -> nn.Module:
    """Give the head of `model` a weight of its own, so that it can be packed; in place.

    The embedding is only looked up, a row per token, and keeps its values as `table`.
    """
    causal: Any = model
    head, embed = causal.get_output_embeddings(), causal.get_input_embeddings()
    if head.weight is embed.weight:
        causal.set_input_embeddings(_Table(embed, table))
        causal.config.get_text_config().tie_word_embeddings = False
        causal.config.tie_word_embeddings = False
    return model


class _Table(nn.Embedding):
    """An embedding stored as one data type and read as another."""

    def __init__(self, embed: nn.Embedding, stored: torch.dtype) -> None:
        weight = embed.weight.detach().to(stored)
        rows, columns = weight.shape
        super().__init__(rows, columns, embed.padding_idx, _weight=weight, _freeze=True)
        self.read_as = embed.weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> _Table:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.read_as = fn(torch.empty(0, dtype=self.read_as)).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.read_as)


class Decoder:
    """A causal language model with a cache of `length` positions for `batch` sequences.

    `dtype` holds keys and values, and is what prompts attend in. Every length of prompt compiles
    its own graph, for the threads that torch has then; `compiled=False` runs the same functions
    without inductor. Weights are read when this is made: edit the model and make another.
    Raises CaptureError for an architecture that is not one of `ARCHITECTURES`.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        batch: int = 1,
        *,
        dtype: torch.dtype = torch.bfloat16,
        layers_per_graph: int = 5,
        compiled: bool = True,
    ) -> None:
        config = _supported(model)
        body: Any = model.get_submodule("model")
        layers = list(body.layers)
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        keys = (batch, config.num_key_value_heads, size, length)
        self.device = body.embed_tokens.weight.device
        with torch.inference_mode():
            self.cache = [
                (torch.zeros(keys, dtype=dtype, device=self.device),
                 torch.zeros(keys, dtype=dtype, device=self.device).mT.contiguous())
                for _ in layers
            ]  # fmt: skip
        self.length, self.position, self._compiled = length, 0, compiled
        self._embed = _Embed(body.embed_tokens, body.rotary_emb, length)
        self._head = _Head(body.norm, model.get_submodule("lm_head"))
        starts = range(0, len(layers), max(1, layers_per_graph))
        self._groups = [
            (_Layers(layers[i : i + starts.step], config), sum(self.cache[i : i + starts.step], ()))
            for i in starts
        ]
        self._runs: dict[int, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}

    def generate(self, input_ids: Tensor, new_tokens: int) -> Tensor:
        """The tokens (B, new_tokens) that follow prompts (B, T)."""
        tokens = [self.prefill(input_ids)[0]]
        while len(tokens) < new_tokens:
            tokens.append(self.step(tokens[-1])[0])
        return torch.cat(tokens[:new_tokens], 1)

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Start anew with prompts (B, T): next tokens (B, 1), and logits (B, 1, V)."""
        self.position = 0
        return self._advance(input_ids)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token (B, 1) to each sequence: next tokens (B, 1), and logits (B, 1, V)."""
        return self._advance(tokens.view(-1, 1))

    @torch.inference_mode()
    def _advance(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        count = ids.shape[1]
        if self.position + count > self.length:
            raise ValueError(f"the cache has {self.length} positions: make a longer Decoder")
        positions = torch.arange(self.position, self.position + count, device=self.device)
        if count not in self._runs:
            self._runs[count] = self._build(ids, positions)
        out = self._runs[count](ids, positions)
        self.position += count
        return out

    def _build(self, ids: Tensor, positions: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        """The forward pass over inputs of these shapes."""
        graphs: dict[Any, Run] | None = {} if self._compiled else None
        embed = _bind(self._embed, (ids, positions), (), graphs)
        x, *rest = embed(ids, positions)
        layers = [_bind(g, (x, *rest, positions), cache, graphs) for g, cache in self._groups]
        head = _bind(self._head, (x,), (), graphs)

        def run(ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            x, *rest = embed(ids, positions)
            for layer in layers:
                (x,) = layer(x, *rest, positions)
            token, logits = head(x)
            return token, logits

        return run


class _Embed(nn.Module):
    """Tokens (B, T) at positions (T,): their vectors, cosines and sines, and the decoding mask."""

    def __init__(self, table: nn.Module, rotary: nn.Module, length: int) -> None:
        super().__init__()
        self.table, self.rotary, self.length = table, rotary, length

    def forward(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x = self.table(ids)
        cos, sin = self.rotary(x, positions[None])
        if ids.shape[1] > 1:
            return x, cos, sin
        past = torch.arange(self.length, device=ids.device) <= positions
        return x, cos, sin, torch.where(past, 0.0, -torch.inf)


class _Layers(nn.Module):
    """Consecutive layers; `rest`: the decoding mask if any, positions, keys and values by turns."""

    def __init__(self, layers: Sequence[nn.Module], config: Any) -> None:
        super().__init__()
        self.layers, self.config = nn.ModuleList(layers), config

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> tuple[Tensor]:
        split = len(rest) - 2 * len(self.layers)
        *mask, positions = rest[:split]
        with _attention(self.config):
            for i, layer in enumerate(self.layers):
                cache = _Cache(positions, *rest[split + 2 * i : split + 2 * i + 2])
                out = layer(
                    x, attention_mask=mask[0] if mask else None, past_key_values=cache,
                    position_embeddings=(cos, sin),
                )  # fmt: skip
                x = out[0] if isinstance(out, tuple) else out
        return (x,)


class _Head(nn.Module):
    """The likeliest next token (B, 1) and the logits (B, 1, V) after the last position."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.norm(x[:, -1:]))
        return _likeliest(logits[:, 0]), logits


def _likeliest(logits: Tensor, width: int = 256) -> Tensor:
    """argmax of (B, V) as (B, 1): maxima of rows vectorise, an argmax does not."""
    padded = F.pad(logits, (0, -logits.shape[1] % width), value=-torch.inf)
    rows = padded.view(len(logits), -1, width)
    row = rows.amax(-1).argmax(-1, keepdim=True)
    inside = rows.gather(1, row[..., None].expand(-1, 1, width)).argmax(-1)
    token: Tensor = row * width + inside
    return token


class _Cache:
    """What a layer of transformers asks of a cache, over one pair of buffers.

    Keys lie (B, heads, D, length): their products with a query then vectorise along positions.
    """

    def __init__(self, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        self.positions, self.keys, self.values = positions, keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        self.keys.index_copy_(3, self.positions, keys.mT)
        self.values.index_copy_(2, self.positions, values)
        return (self.keys, self.values) if keys.shape[2] == 1 else (keys, values)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one query (B, H, 1, D) to the cache, or of a prompt to itself: (B, T, H, D)."""
    scale = options.get("scaling") or q.shape[-1] ** -0.5
    if mask is None:
        y = F.scaled_dot_product_attention(
            q.to(k.dtype), k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return y.transpose(1, 2).to(q.dtype), None
    batch, heads, _, size = q.shape
    groups = k.shape[1]
    rows = (q.float() * scale).reshape(batch, groups, heads // groups, size, 1)
    scores = (rows * k[:, :, None].float()).sum(-2) + mask
    shares = (scores - scores.amax(-1, keepdim=True)).exp()  # a softmax that divides at the end
    y = (shares[..., None] * v[:, :, None].float()).sum(-2) / shares.sum(-1, keepdim=True)
    return y.to(q.dtype).view(batch, 1, heads, size), None


@contextlib.contextmanager
def _attention(config: Any) -> Iterator[None]:
    """Let the layers of a model with this configuration use `_attend`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attend)
    before, config._attn_implementation = config._attn_implementation, _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _supported(model: nn.Module) -> Any:
    """The configuration of `model`; CaptureError when decoding it needs more than is done here."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise CaptureError(f"{kind} is not one of {', '.join(ARCHITECTURES)}: use model.generate")
    windows = [t for t in getattr(config, "layer_types", None) or () if t != "full_attention"]
    if windows or (kind == "mistral" and config.sliding_window):
        raise CaptureError(f"{kind} with sliding windows: use model.generate")
    return config


def _bind(
    module: nn.Module,
    inputs: Sequence[Tensor],
    state: Sequence[Tensor],
    graphs: dict[Any, Run] | None,
) -> Run:
    """`module` as a function of `inputs`, with `state` appended and its own tensors read now.

    Modules with equal graphs share one compiled function; `graphs` None: nothing is compiled.
    """
    named = dict([*module.named_parameters(), *module.named_buffers()])
    tensors = [*state, *(t.detach() if t.requires_grad else t for t in named.values())]
    first, split = len(inputs), len(inputs) + len(state)

    def pure(*values: Tensor) -> Any:
        held = dict(zip(named, values[split:], strict=True))
        return torch.func.functional_call(module, held, values[:split])

    if graphs is None:
        return lambda *values: pure(*values, *tensors)
    examples: list[Any] = [*inputs, *tensors]
    gm = make_fx(pure, tracing_mode="fake")(*examples)
    fixed = any(node.op == "get_attr" for node in gm.graph.nodes)
    key = (gm.code, *((t.shape, t.stride(), t.dtype) for t in examples), id(gm) if fixed else 0)
    if key not in graphs:
        graphs[key] = torch._inductor.standalone_compile(
            gm, examples, dynamic_shapes="from_example_inputs",
            options={"config_patches": OPTIONS},
        )  # fmt: skip
    run, rest = graphs[key], examples[first:]
    return lambda *values: run(*values, *rest)
