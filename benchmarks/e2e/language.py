"""SmolLM2 through PyTorch: as it is, quantised by others, and sparsified here."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from benchmarks.e2e.base import NEW, PROMPT, Language, Settings, weight_bytes
from torch import Tensor, nn

from sparsefx.models.smollm2 import causal_lm


class Eager(Language):
    """transformers' own forward pass with its growing cache."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.bytes = model, weight_bytes(model)

    @torch.inference_mode()
    def _call(self, ids: Tensor, cache: Any) -> Any:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._cache, self._logits = out.past_key_values, out.logits[:, -1]
        return self._logits.argmax(-1, keepdim=True)

    def prefill(self, ids: Tensor) -> Any:
        return self._call(ids[None], None)

    def step(self, token: Any) -> Any:
        return self._call(token, self._cache)

    def logits(self) -> Tensor:
        last: Tensor = self._logits[0]
        return last.float()


class Compiled(Language):
    """transformers with its static cache; the single-token step through `torch.compile`, weights
    frozen into the graph. Prompts run eagerly, as transformers' own `generate` does it."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import StaticCache

        torch._inductor.config.freezing = True
        torch._inductor.config.cpp_wrapper = True
        config: Any = model.config
        self.model, self.bytes = model, weight_bytes(model)
        self.cache = StaticCache(config=config, max_cache_len=PROMPT + NEW)
        self.compiled = torch.compile(self._next, fullgraph=True)

    def _next(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits = out.logits[:, -1]
        return logits.argmax(-1, keepdim=True), logits

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Any:
        self.cache.reset()
        self.positions = torch.tensor([[len(ids)]])
        token, self._logits = self._next(ids[None], torch.arange(len(ids))[None])
        return token

    @torch.no_grad()
    def step(self, token: Any) -> Any:
        token, self._logits = self.compiled(token, self.positions)
        self.positions += 1
        return token

    def logits(self) -> Tensor:
        return self._logits[0].float()


class Static(Language):
    """`sparsefx.models.generate.Decoder`."""

    def __init__(self, model: nn.Module) -> None:
        from sparsefx.models.generate import Decoder

        self.decoder, self.bytes = Decoder(model, PROMPT + NEW), weight_bytes(model)
        self.note = "keys and values in bf16"

    def prefill(self, ids: Tensor) -> Any:
        token, self._logits = self.decoder.prefill(ids[None])
        return token

    def step(self, token: Any) -> Any:
        token, self._logits = self.decoder.step(token)
        return token

    def logits(self) -> Tensor:
        return self._logits[0, -1].float()


def fp32(settings: Settings) -> Language:
    return Eager(causal_lm())


def bf16(settings: Settings) -> Language:
    return Eager(causal_lm().bfloat16())


def compiled_fp32(settings: Settings) -> Language:
    return Compiled(causal_lm())


def static_fp32(settings: Settings) -> Language:
    return Static(causal_lm())


def static_bf16(settings: Settings) -> Language:
    return Static(causal_lm().bfloat16())


def dynamic_int8(settings: Settings) -> Language:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    return Eager(quantize(causal_lm(), {nn.Linear}))


def torchao_int8(settings: Settings) -> Language:
    """Weights and activations in int8, head included."""
    return _torchao("Int8DynamicActivationInt8WeightConfig")


def torchao_int8_weights(settings: Settings) -> Language:
    return _torchao("Int8WeightOnlyConfig")


def _torchao(config: str) -> Language:
    ao: Any = import_module("torchao.quantization")
    model = causal_lm().bfloat16()  # torchao's integer kernels for CPUs take bf16 activations
    ao.quantize_(model, getattr(ao, config)())
    session = Compiled(model)
    session.note = "around it bf16"
    return session


def ours(settings: Settings, spec: str, static: bool) -> Language:
    """Sparsified once per run, then loaded; the head is a copy of its own in int8."""
    import sparsefx
    from sparsefx.models.generate import untie

    model, folder = untie(causal_lm()), settings.keep(f"smollm2-{spec}")
    if not folder.exists():
        head = "int8+a8" if spec.endswith("+a8") else "int8"
        sparsefx.sparsify(
            model, {"format": spec, "overrides": {"lm_head": head}}, progress=False,
            example_inputs={"input_ids": torch.arange(32)[None]},
            calibration=_calibration(settings.calibrate) if settings.calibrate else None,
        )  # fmt: skip
        sparsefx.save(model, folder)
        model = untie(causal_lm())
    model = sparsefx.load(folder, model)
    return Static(model) if static else Eager(model)


def _calibration(count: int) -> list[dict[str, Tensor]]:
    from sparsefx.models.smollm2 import SEQ_LEN, spread, tokenizer
    from sparsefx.models.text import python_topics

    ids = torch.tensor(tokenizer()(python_topics()[0], verbose=False)["input_ids"])
    return [{"input_ids": row[None]} for row in spread(ids, count, SEQ_LEN)]
