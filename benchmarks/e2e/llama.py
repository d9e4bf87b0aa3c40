"""SmolLM2 through llama.cpp, from the very file that the other engines' weights come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from benchmarks.e2e.base import NEW, PROMPT, Language, Settings
from torch import Tensor

from sparsefx.models.smollm2 import GGUF


class LlamaCpp(Language):
    """llama.cpp's C interface; its decoding asks for the logits of the last token only."""

    def __init__(self, settings: Settings) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._silent = silent  # the library keeps the pointer
        llama_cpp.llama_log_set(silent, None)
        llama_cpp.llama_backend_init()
        path = str(GGUF.locate()).encode()
        self.model = self.api.llama_model_load_from_file(
            path, self.api.llama_model_default_params()
        )
        params = self.api.llama_context_default_params()
        params.n_ctx = 256  # it rounds up to this
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = settings.threads
        params.no_perf = True
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.model or not self.context:
            raise RuntimeError("llama.cpp does not load the file")
        vocabulary = self.api.llama_model_get_vocab(self.model)
        self.size = self.api.llama_vocab_n_tokens(vocabulary)
        self.bytes = self.api.llama_model_size(self.model)
        self.note = self.api.llama_print_system_info().decode().strip()

    def _decode(self, tokens: Any) -> int:
        batch = self.api.llama_batch_get_one(tokens, len(tokens))
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        self._logits = np.ctypeslib.as_array(pointer, (self.size,))
        return int(self._logits.argmax())

    def prefill(self, ids: Tensor) -> Any:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self._decode((self.api.llama_token * len(ids))(*ids.tolist()))

    def step(self, token: Any) -> Any:
        return self._decode((self.api.llama_token * 1)(token))

    def logits(self) -> Tensor:
        return torch.from_numpy(self._logits.copy())

    def token(self, number: int) -> Any:
        return number


assert PROMPT + NEW <= 256
