"""The engines of the end-to-end benchmark. A new one is a function and a line here."""

from __future__ import annotations

from functools import partial

from benchmarks.e2e import language, sentences
from benchmarks.e2e.base import Engine, Session, Settings
from benchmarks.e2e.llama import LlamaCpp

LLAMA = "llama.cpp Q4_1"
DENSE = "torch fp32"
SPECS = (
    "int4g128+a8", "int4g128", "uint4g32+a8", "int8+a8", "bitmap@50%+int4g128+a8",
    "2:4+int4g128+a8", "tile16x1@50%+int4g128+a8",
)  # fmt: skip
"""uint4g32 is as fine as the Q4_1 of the file: quality equal to llama.cpp's."""
SENTENCE_SPECS = ("int8+a8", "tile16x1@50%+int8+a8", "bitmap@50%+int4g128+a8")

_ALL = [
    Engine(DENSE, "smollm2", language.fp32),
    Engine("torch bf16", "smollm2", language.bf16),
    Engine("torch dynamic int8", "smollm2", language.dynamic_int8),
    Engine("torch.compile fp32", "smollm2", language.compiled_fp32),
    Engine("torchao int8, compiled", "smollm2", language.torchao_int8),
    Engine("torchao int8 weights, compiled", "smollm2", language.torchao_int8_weights),
    Engine("fp32, our decoder", "smollm2", language.static_fp32),
    Engine("bf16, our decoder", "smollm2", language.static_bf16),
    Engine(LLAMA, "smollm2", LlamaCpp),
    *(
        Engine(f"{spec}{', compiled' * static}", "smollm2",
               partial(language.ours, spec=spec, static=static))
        for static in (False, True) for spec in (SPECS if static else SPECS[:1])
    ),
    Engine(DENSE, "minilm", sentences.fp32),
    Engine("torch bf16", "minilm", sentences.bf16),
    Engine("torch dynamic int8", "minilm", sentences.dynamic_int8),
    Engine("torch.compile fp32", "minilm", sentences.compiled_fp32),
    Engine("torchao int8, compiled", "minilm", sentences.torchao_int8),
    Engine("ONNX Runtime fp32", "minilm", sentences.onnxruntime_fp32),
    *(
        Engine(f"{spec}{', compiled' * compiled}", "minilm",
               partial(sentences.ours, spec=spec, compiled=compiled))
        for compiled in (False, True)
        for spec in (SENTENCE_SPECS if compiled else SENTENCE_SPECS[:1])
    ),
]  # fmt: skip
ENGINES = {model: {e.name: e for e in _ALL if e.model == model} for model in ("smollm2", "minilm")}

__all__ = ["DENSE", "ENGINES", "LLAMA", "Engine", "Session", "Settings"]
