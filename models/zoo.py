"""Tiny models of every architecture family, randomly initialised: ways of spelling a product."""

from __future__ import annotations

from sparsefx.models import zoo_diffusers, zoo_modules, zoo_text, zoo_vision
from sparsefx.models.example import Example, Factory, seeded

__all__ = ["ZOO", "Example"]

ZOO: dict[str, Factory] = {
    name: seeded(make)
    for part in (zoo_modules, zoo_text, zoo_vision, zoo_diffusers)
    for name, make in part.EXAMPLES.items()
}
