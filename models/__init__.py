"""Real models with metrics, found in packages, one line each; nothing heavy until called."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from sparsefx.models.bundle import Bundle

__all__ = ["MODELS", "Bundle"]


def _bundle(name: str) -> Callable[[], Bundle]:
    """Return a function that imports `sparsefx.models.<name>` and loads its model."""
    return lambda: cast(Bundle, import_module(f"sparsefx.models.{name}").load())


MODELS: dict[str, Callable[[], Bundle]] = {
    "smollm2": _bundle("smollm2"),
    "minilm": _bundle("minilm"),
    "antiberty": _bundle("antiberty"),
    "efficientnet": _bundle("efficientnet"),
}
