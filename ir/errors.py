"""Every error sparsefx raises on purpose; each message names the layer or file and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparsefxError(Exception):
    """Base of all errors raised on purpose."""


class SpecError(SparsefxError, ValueError):
    """The spec's text, filters or overrides cannot be obeyed."""


class WeightError(SparsefxError, ValueError):
    """A weight cannot be stored in the format asked for."""


class ShapeError(SparsefxError, RuntimeError):
    """The activations do not have as many columns as the weight; RuntimeError, as torch raises."""


class CaptureError(SparsefxError, RuntimeError):
    """No door could turn the model into a graph."""


class PassError(SparsefxError, RuntimeError):
    """A graph pass broke its contract; the message holds the pass, the reason and the graph."""


class StaleWeightError(SparsefxError, RuntimeError):
    """A weight was edited after it had been compressed."""


class FrozenWeightError(SparsefxError, RuntimeError):
    """The gradient of a compressed weight was asked for."""


class ExportError(SparsefxError, RuntimeError):
    """The ONNX file could not be written, or disagrees with the eager model."""


class ArtifactError(SparsefxError, ValueError):
    """A saved folder is truncated, altered, hostile or of an unknown version."""


class AdapterError(ArtifactError):
    """An adapter's files are not sound, or do not fit the model; nothing was changed."""


class MissingPackageError(SparsefxError, ImportError):
    """An optional package is needed; the message holds the pip command."""


def nearest(word: str, vocabulary: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or the known words when none is close."""
    words = list(dict.fromkeys(vocabulary))
    if close := difflib.get_close_matches(word, words, n=1, cutoff=0.4):
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(words[:12]) + (", …" if len(words) > 12 else "")
    return f"; known: {shown}" if words else ""
