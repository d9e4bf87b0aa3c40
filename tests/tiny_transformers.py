"""Tiny random transformers for tests of exact rewrites, every vector parameter random."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 50
IDS = {"input_ids": torch.arange(2 * 7).reshape(2, 7) * 3 % VOCABULARY}


def _llama(heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=heads, use_cache=False,
    ))  # fmt: skip


def _gemma() -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=4, use_cache=False,
    ))  # fmt: skip


def _bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4,
    ))  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, use_cache=False,
        bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(4), "gqa": lambda: _llama(2), "gemma": _gemma, "bert": _bert,
    "gpt2": _gpt2,
}  # fmt: skip


def _norm(self: nn.Module, x: Tensor, offset: float) -> Tensor:
    rsqrt = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rsqrt * (offset + self.weight)  # type: ignore[operator]


def tiny(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The architecture in eval mode; norms and biases are far from ones and zeros.

    In float64 RMS norms compute in float64: transformers' own ones round to float32 inside.
    """
    torch.manual_seed(0)
    model = BUILD[name]().to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.rand_like(parameter) - 0.4)
    for module in model.modules():
        if dtype is torch.float64 and "RMSNorm" in type(module).__name__:
            offset = 1.0 if name == "gemma" else 0.0
            module.forward = partial(_norm, module, offset=offset)
    return model


def output(model: nn.Module) -> Tensor:
    """Logits or hidden states of IDS."""
    with torch.no_grad():
        return model(**IDS)[0]  # type: ignore[no-any-return]


def then(value: Tensor, use: Callable[[Tensor], Tensor]) -> Tensor:
    """use(value): a name for a tensor inside a lambda."""
    return use(value)


def moved(got: Tensor, want: Tensor) -> float:
    """Greatest difference, relative to the greatest value."""
    return float((got - want).abs().max() / want.abs().max())
