"""The Formats that `auto` weighs for every Site; a new one is a line of `CANDIDATES`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from sparsefx.ir.codecs import Int
from sparsefx.ir.format import Format
from sparsefx.ir.sites import Site
from sparsefx.passes.outliers import Probe
from sparsefx.passes.replaceable import reads_weight

DENSE = "dense"
CANDIDATES: tuple[str, ...] = (
    "bf16",
    "int8", "int8+a8",
    "int4g32", "int4g32+a8", "int4g128", "int4g128+a8", "int4g128+r32+a8",
    "uint4g128+a8",
    "int3g128", "int3g128+a8", "int3g128+r32+a8",
    "int2g64", "int2g64+a8", "int2g64+r32+a8",
    "bitmap@25%+int8+a8", "bitmap@25%+int4g128+a8", "bitmap@25%+int4g128+r32+a8",
    "bitmap@50%+int8+a8", "bitmap@50%+int4g128+a8", "bitmap@50%+int4g128+r32+a8",
    "2:4+int8+a8", "2:4+int4g128+a8", "2:4+int4g128+r32+a8",
    "tile16x1@25%+int8+a8", "tile16x1@50%+int8+a8",
    "tile16x1@25%+int4g128+a8", "tile16x1@25%+int4g128+r32+a8",
    "tile16x1@50%+int4g128+a8", "tile16x1@50%+int4g128+r32+a8",
    "tile16x1@75%+int4g128+a8", "tile16x1@75%+int4g128+r32+a8",
)  # fmt: skip
"""Tiles have at most 16 rows: sensitivities are measured on bands of `sensitivity.BAND` rows."""


@dataclass(frozen=True)
class Candidate:
    """A Format that a Site may have, or why it may not."""

    format: str
    refused: str = ""


def candidates(model: nn.Module, site: Site, probe: Probe, ignored: str = "") -> list[Candidate]:
    """Dense first, then `CANDIDATES` in their order; `probe` has seen the Site's activations.

    `ignored` says why the Site is to stay dense. A Format that `sparsify` would change, because
    of outlying activations, is refused: its price would not be the one that is paid.
    """
    why = ignored or (site.reason if site.kind == "refused" else "")
    reads = "" if why else _reads(model, site)
    if site.kind == "opaque":
        reads = reads or site.reason or "multiplied in a way of its own"
    why = why or (f"{reads}: it would be unpacked at every read" if reads else "")
    out = [Candidate(DENSE)]
    for text in CANDIDATES:
        fmt = Format.parse(text)
        refused = why or fmt.rejects(site.n, site.k) or ""
        if not refused and fmt.a8:
            changed, note = probe.decide(site, fmt)
            refused = note if changed != fmt else ""
        out.append(Candidate(text, refused))
    return out


def _reads(model: nn.Module, site: Site) -> str:
    return next(filter(None, (reads_weight(model, n, site.transposed) for n in site.names)), "")


def stored(text: str) -> Format:
    """What decides the stored weight: the Format without branch and int8 activations."""
    return replace(Format.parse(text), rank=0, a8=False, a8_group=0)


def family(text: str) -> str:
    """Formats whose predicted loss is corrected by one measured factor: layout, bits, branch."""
    fmt = Format.parse(text)
    codec = f"int{fmt.codec.bits}" if isinstance(fmt.codec, Int) else str(fmt.codec)
    return f"{str(fmt.layout).partition('@')[0]} {codec}" + " branch" * (fmt.rank > 0)
