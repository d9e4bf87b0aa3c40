"""Text from an exported language model: a plain loop over an ONNX Runtime session."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsefx.ir.errors import ArtifactError, MissingPackageError

Array = np.ndarray[Any, Any]
Prompts = Sequence[Sequence[int]] | Array
"""Token ids of several prompts, of one length or of several."""
CALL = ("input_ids", "attention_mask", "position_ids")


def generate(model: Any, input_ids: Prompts, max_new_tokens: int = 64, **options: Any) -> Array:
    """The tokens (batch, new) that follow each prompt; a finished row is filled with its last one.

    `model` and `options` are those of `stream`.
    """
    steps = list(stream(model, input_ids, max_new_tokens, **options))
    return np.stack(steps, 1) if steps else np.zeros((len(input_ids), 0), np.int64)


def stream(
    model: Any,
    input_ids: Prompts,
    max_new_tokens: int = 64,
    *,
    eos: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[Array]:
    """Yield the next token (batch,) of every prompt until all have ended or `max_new_tokens` came.

    `model` is a file of `export_causal_lm`, or a session over one. Without `temperature` it is the
    likeliest token; with it one drawn from the `top_k` likeliest (0: from all). `eos` are tokens
    that end a text; None takes those named in the file.
    """
    session = model if hasattr(model, "run_with_ort_values") else open_session(model)
    ends = _ends(session) if eos is None else list(eos)
    choose = _Chooser(temperature, top_k, seed)
    cache = Cache(session)
    tokens, mask = left_padded(input_ids)
    last: Array | None = None
    for _ in range(max_new_tokens):
        logits = cache.advance(tokens, mask)
        new = choose(logits[:, -1])
        if last is not None:
            new = np.where(np.isin(last, ends), last, new)
        yield new
        if np.isin(new, ends).all():
            return
        last, tokens = new, new[:, None]
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)


class Cache:
    """Keys and values of what a session has read so far; they stay in the runtime's memory."""

    def __init__(self, session: Any) -> None:
        inputs = {value.name: value for value in session.get_inputs()}
        self.past = [name for name in inputs if name.startswith("past_key_values.")]
        self.present = [name.replace("past_key_values.", "present.") for name in self.past]
        found = {"logits", *self.present} <= {value.name for value in session.get_outputs()}
        if not (self.past and found and {*CALL} <= {*inputs}):
            raise ArtifactError(
                "the ONNX model has no key/value cache: write it with sparsefx.export_causal_lm"
            )
        self.session = session
        self.values: list[Any] = []
        self._empty = [inputs[name] for name in self.past]

    def advance(self, tokens: Array, mask: Array) -> Array:
        """Read `tokens` (batch, new): logits (batch, new, vocabulary).

        `mask` (batch, past + new) is 0 where a prompt is padded.
        """
        from onnxruntime import OrtValue

        if not self.values:
            self.values = [_empty(value, len(tokens)) for value in self._empty]
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        feeds = dict(zip(self.past, self.values, strict=True))
        for name, value in zip(CALL, (tokens, mask, positions), strict=True):
            feeds[name] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value, np.int64))
        logits, *self.values = self.session.run_with_ort_values(["logits", *self.present], feeds)
        out: Array = logits.numpy()
        return out


def _empty(value: Any, batch: int) -> Any:
    """A past of no tokens."""
    from onnxruntime import OrtValue

    _, heads, _, size = value.shape
    dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
    return OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, 0, size), dtype))


def left_padded(input_ids: Prompts) -> tuple[Array, Array]:
    """Tokens (batch, longest) that all end at the right, and 1 where there is one."""
    rows = [np.asarray(row, np.int64) for row in input_ids]
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        raise ValueError("input_ids must hold one or more prompts of at least one token each")
    longest = max(len(row) for row in rows)
    tokens = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    lengths = np.array([len(row) for row in rows])
    return tokens, (np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)


class _Chooser:
    """Picks a token per row of logits (batch, vocabulary)."""

    def __init__(self, temperature: float, top_k: int, seed: int) -> None:
        if temperature < 0 or top_k < 0:
            raise ValueError("temperature and top_k must not be negative")
        self.temperature, self.top_k = temperature, top_k
        self.random = np.random.default_rng(seed)

    def __call__(self, logits: Array) -> Array:
        picked: Array
        if not self.temperature:
            picked = logits.argmax(-1)
            return picked
        scores = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            least = np.partition(scores, -self.top_k, -1)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        # The greatest of the scores plus Gumbel noise is a draw from their softmax.
        picked = (scores + self.random.gumbel(size=scores.shape)).argmax(-1)
        return picked


def open_session(path: str | os.PathLike[str], threads: int = 0) -> Any:
    """A session over the model at `path`, with our kernels where they were built.

    Where they were not, a warning says so. `threads` 0 leaves their number to ONNX Runtime.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackageError('onnxruntime is missing: pip install "sparsefx[onnx]"') from None
    from sparsefx.runtime.ort import ort_session

    if not os.path.isfile(path):
        raise ArtifactError(f"there is no file '{os.fspath(path)}'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return ort_session(path, options)
    except MissingPackageError as error:
        warnings.warn(f"the file's own operators run, slower: {error}", stacklevel=2)
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=providers)


def _ends(session: Any) -> list[int]:
    text = session.get_modelmeta().custom_metadata_map.get("eos_token_id", "")
    return [int(part) for part in text.split(",") if part]
