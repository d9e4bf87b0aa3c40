"""What an engine of the end-to-end benchmark is: a model that a process holds and can time."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROMPT, NEW = 128, 64
WINDOWS = 6
"""Held-out windows of PROMPT + NEW tokens; the last NEW of each are predicted for the quality."""


@dataclass(frozen=True)
class Settings:
    """What the parent process asks of a worker."""

    engine: str
    threads: int
    calibrate: int = 0
    """Calibration inputs; 0: magnitude pruning and rounding to nearest."""
    folder: str = ""
    """Where compressed models are kept between workers of a run."""

    def keep(self, name: str) -> Path:
        """A file or folder of this run."""
        return Path(self.folder) / name.translate(str.maketrans("@%:+", "----"))


class Session(ABC):
    """A loaded model."""

    bytes: int = 0
    """Bytes of its weights as stored, embeddings included."""
    note: str = ""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Seconds of each part, run once."""

    @abstractmethod
    def quality(self) -> float:
        """Perplexity or MRR."""


@dataclass(frozen=True)
class Engine:
    """A row of a table. `build` raises where the engine cannot run; the message is the reason."""

    name: str
    model: str
    build: Callable[[Settings], Session]


class Language(Session):
    """A causal language model that decodes greedily, one sequence at a time."""

    @abstractmethod
    def prefill(self, ids: Tensor) -> Any:
        """Start anew with a prompt (T,); the likeliest next token in the engine's own form."""

    @abstractmethod
    def step(self, token: Any) -> Any:
        """Append a token; the likeliest next."""

    @abstractmethod
    def logits(self) -> Tensor:
        """Of the last call, (V,)."""

    def token(self, number: int) -> Any:
        """A token in the engine's own form."""
        return torch.tensor([[number]])

    def measure(self) -> dict[str, float]:
        prompt = held_out()[0, :PROMPT]
        start = time.perf_counter()
        token = self.prefill(prompt)
        middle = time.perf_counter()
        for _ in range(NEW):
            token = self.step(token)
        return {"prefill": middle - start, "decode": (time.perf_counter() - middle) / NEW}

    def quality(self) -> float:
        """Perplexity of the last NEW tokens of every window, fed one by one."""
        loss, windows = 0.0, held_out()
        for window in windows:
            self.prefill(window[:PROMPT])
            for number in window[PROMPT:].tolist():
                loss -= float(F.log_softmax(self.logits().double(), -1)[number])
                self.step(self.token(number))
        return math.exp(loss / (len(windows) * NEW))


@lru_cache(maxsize=1)
def held_out() -> Tensor:
    """Tokens (WINDOWS, PROMPT + NEW) of Python's help topics."""
    from sparsefx.models.smollm2 import spread, tokenizer
    from sparsefx.models.text import python_topics

    ids = torch.tensor(tokenizer()(python_topics()[1], verbose=False)["input_ids"])
    return spread(ids, WINDOWS, PROMPT + NEW)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all that `model` stores, shared storage once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values()):
            for tensor in _plain(value):
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
        packed = getattr(module, "_packed_params", None)
        if packed is not None:  # torch's own quantised linear
            weight, bias = packed.unpack() if hasattr(packed, "unpack") else packed._weight_bias()
            seen[id(module)] = sum(
                t.numel() * t.element_size() for t in (weight, bias) if t is not None
            )
    return sum(seen.values())


def _plain(tensor: Any) -> list[Tensor]:
    """The tensors that a (possibly wrapped) tensor is made of."""
    if tensor is None:
        return []
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [inner for name in names for inner in _plain(getattr(tensor, name))]
    return [tensor]
