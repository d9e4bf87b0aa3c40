"""Layouts: which positions of a weight are stored. A new one is one file and one line here."""

from __future__ import annotations

from sparsefx.ir.layouts.base import Layout
from sparsefx.ir.layouts.bitmap import Bitmap
from sparsefx.ir.layouts.dense import Dense
from sparsefx.ir.layouts.nm import NM
from sparsefx.ir.layouts.tile import Tile

LAYOUTS: tuple[type[Layout], ...] = (Dense, NM, Bitmap, Tile)

__all__ = ["LAYOUTS", "NM", "Bitmap", "Dense", "Layout", "Tile"]
