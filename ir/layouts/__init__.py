"""Layouts: which positions of a weight are stored. A new one is one file and one line here.

Other packages add theirs through the entry points `sparsefx.layouts`.
"""

from __future__ import annotations

from sparsefx.ir.layouts.base import Layout
from sparsefx.ir.layouts.bitmap import Bitmap
from sparsefx.ir.layouts.dense import Dense
from sparsefx.ir.layouts.nm import NM
from sparsefx.ir.layouts.tile import Tile
from sparsefx.ir.plugins import Plugged, spelling

_OURS: tuple[type[Layout], ...] = (Dense, NM, Bitmap, Tile)
LAYOUTS: Plugged[type[Layout]] = Plugged("sparsefx.layouts", spelling(Layout, _OURS), _OURS)

__all__ = ["LAYOUTS", "NM", "Bitmap", "Dense", "Layout", "Tile"]
