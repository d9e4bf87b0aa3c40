"""Codecs: how stored values are written. A new one is one file and one line here.

Other packages add theirs through the entry points `sparsefx.codecs`.
"""

from __future__ import annotations

from sparsefx.ir.codecs.base import Codec, Grid
from sparsefx.ir.codecs.floats import Float
from sparsefx.ir.codecs.fp8 import Fp8
from sparsefx.ir.codecs.ints import Int
from sparsefx.ir.plugins import Plugged, spelling

_OURS: tuple[type[Codec], ...] = (Float, Fp8, Int)
CODECS: Plugged[type[Codec]] = Plugged("sparsefx.codecs", spelling(Codec, _OURS), _OURS)

__all__ = ["CODECS", "Codec", "Float", "Fp8", "Grid", "Int"]
