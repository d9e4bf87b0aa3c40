"""Codecs: how stored values are written. A new one is one file and one line here."""

from __future__ import annotations

from sparsefx.ir.codecs.base import Codec, Grid
from sparsefx.ir.codecs.floats import Float
from sparsefx.ir.codecs.ints import Int

CODECS: tuple[type[Codec], ...] = (Float, Int)

__all__ = ["CODECS", "Codec", "Float", "Grid", "Int"]
