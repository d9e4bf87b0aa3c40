"""A stored weight as something that trains: the pattern stays, values and scales move.

Rounding is passed through in the backward direction (straight-through estimator, Bengio et al.,
arXiv 1308.3432), so gradients reach the values behind the codes; removed positions get none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsefx.ir.codecs import Grid
from sparsefx.passes.compress_site import Result, Step


class Latent:
    """The float32 values behind one Result, and its branch.

    `train("values")` moves what is rounded, `train("scales")` the scales of fixed codes.
    """

    def __init__(self, result: Result) -> None:
        packed = result.packed
        self.result, self.codec, self.k = result, packed.format.codec, packed.k
        _, mask, grid = packed.read()
        self.mask = mask
        self.values = nn.Parameter(packed.unpack())
        self.scales = None if grid.scales is None else nn.Parameter(grid.scales.clone())
        self.zero_points = grid.zero_points
        self.branch = [nn.Parameter(t.float()) for t in result.branch[:2]]
        self.stage = "values"
        self._fixed: Tensor | None = None
        self._wide: Grid | None = None

    @property
    def grid(self) -> Grid:
        scales = None if self.scales is None else self.scales.detach()
        return Grid(scales, self.zero_points)

    def train(self, stage: str) -> Iterator[tuple[nn.Parameter, float]]:
        """Switch to a stage; yields what trains in it, each with the size its steps go by."""
        self.stage, self._fixed, self._wide = stage, None, None
        for tensor in self.branch:
            yield tensor, _rms(tensor)
        if stage == "values":
            if self.scales is not None:
                self._wide = self.grid.columns(0, self.k, self.codec.group(self.k))
            yield self.values, _rms(self.values.detach(), self.mask)
        elif self.scales is not None:
            self._fixed = self._units()
            yield self.scales, _rms(self.scales)
        else:
            yield self.values, _rms(self.values.detach(), self.mask)

    def weight(self) -> Tensor:
        """The weight (N, K) as it is now, differentiable in what trains."""
        if self._fixed is not None:
            assert self.scales is not None
            wide = self.scales.repeat_interleave(self.codec.group(self.k), 1)[:, : self.k]
            out = self._fixed * wide
        else:
            out = self._rounded()
        if self.branch:
            down, up = self.branch
            out = out + (up * self.result.branch[2].float()) @ down
        return out

    def _rounded(self) -> Tensor:
        values: Tensor = self.values
        if self._wide is not None:
            with torch.no_grad():
                moved = self.codec.decode(self.codec.encode(values, self._wide), self._wide)
                moved -= values
            values = values + moved
        return values if self.mask is None else values * self.mask

    def _units(self) -> Tensor:
        """Codes less their zero points (N, K), zeros where nothing is stored."""
        assert self.scales is not None
        wide = self.grid.columns(0, self.k, self.codec.group(self.k))
        assert wide.scales is not None
        units = (self._stored(wide) / wide.scales).round()
        return units if self.mask is None else units * self.mask

    def _stored(self, wide: Grid) -> Tensor:
        return self.codec.decode(self.codec.encode(self.values.detach(), wide), wide)

    def done(self, steps: tuple[Step, ...]) -> Result:
        """The Result of what was trained, with `steps` added to its history."""
        packed = self.result.packed
        grid = self.grid
        if self._fixed is not None and grid.scales is not None:
            old = packed.read()[2].scales
            assert old is not None
            grid = Grid(self.codec.store_scales(grid.scales, old), grid.zero_points)
            wide = grid.columns(0, self.k, self.codec.group(self.k))
            assert wide.scales is not None
            values = self._fixed * wide.scales
        else:
            values = self.values.detach()
        branch = [
            new.detach().to(old.dtype)
            for new, old in zip(self.branch, self.result.branch, strict=False)
        ]
        return replace(
            self.result,
            packed=packed.format.pack(values, self.mask, grid if grid.scales is not None else None),
            branch=(*branch, *self.result.branch[2:]),
            steps=(*self.result.steps, *steps),
        )


def _rms(tensor: Tensor, mask: Tensor | None = None) -> float:
    """Root mean square of the kept values, never zero."""
    count = tensor.numel() if mask is None else int(mask.sum())
    values = tensor.detach() if mask is None else tensor.detach() * mask
    size: float = float(values.norm()) / math.sqrt(max(count, 1))
    return max(size, 1e-8)
