"""DSnoT: prune and grow a given mask without training. Source: Zhang et al., arXiv 2310.08915.

Every output row has an expected error E[x·(W − Ŵ)]. While it is large, the dropped weight that
lowers it most for its input's variance comes back, and the kept weight of least |W|·‖x‖ among
those whose loss lowers it too goes. N:M swaps within a run; tiles move whole, with the expected
errors of their rows as one vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefx.ir.errors import WeightError
from sparsefx.ir.layouts import NM, Layout, Tile
from sparsefx.passes.refit import row_energies
from sparsefx.passes.statistics import Statistics

BUDGET = 64 << 20
"""Bytes of moments gathered at once."""


@dataclass(frozen=True)
class _Shape:
    """Units that move: tiles of rows×cols, swapped within runs of `run` units of a tile row."""

    rows: int
    cols: int
    run: int

    def units(self, values: Tensor) -> Tensor:
        """(N, K) → (groups, rows, units, cols), zeros beyond a ragged edge."""
        n, k = values.shape
        padded = F.pad(values, (0, -k % self.cols, 0, -n % self.rows))
        return padded.view(-1, self.rows, padded.shape[1] // self.cols, self.cols)


def dsnot(
    weight: Tensor,
    mask: Tensor,
    statistics: Statistics,
    layout: Layout,
    cycles: int = 50,
    threshold: float = 0.01,
) -> Tensor:
    """A mask (N, K) of the same pattern with at most `cycles` swaps per row (of tiles).

    A row whose expected error is under `threshold` times the root mean square of its output is
    left. No row's calibration output error is above what it was: swaps that raise it are undone.
    Raises WeightError when the mask is not `layout`'s or there are no second moments.
    """
    shape = _shape(layout, weight.shape[1])
    if shape is None or not weight.numel():
        return mask
    if statistics.second is None or not statistics.rows:
        raise WeightError("dsnot needs second moments of the inputs; calibrate with moments")
    _check(mask, layout)
    weight, out = weight.detach().float(), mask.clone()
    per_group = 4 * weight.shape[1] * (2 * shape.cols + 4 * shape.rows)
    rows = shape.rows * max(1, BUDGET // per_group)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        out[part] = _Search(weight[part], mask[part], statistics, shape).run(cycles, threshold)
    return out


def _shape(layout: Layout, k: int) -> _Shape | None:
    """How the layout's units move, None when nothing can."""
    if isinstance(layout, NM):
        return _Shape(1, 1, layout.m)
    if isinstance(layout, Tile):
        return _Shape(layout.rows, layout.cols, -(-k // layout.cols))
    return None


def _check(mask: Tensor, layout: Layout) -> None:
    why = layout.violation(mask)
    whole = layout.mask(layout.index(mask), *mask.shape)
    if why is None and isinstance(layout, Tile) and whole is not None and not whole.equal(mask):
        why = "it keeps part of a tile"
    if why:
        raise WeightError(f"the mask is not {layout}: {why}; make it with layout.select")


class _Search:
    """The swaps of whole tile rows (G groups of R rows, U units of C columns)."""

    def __init__(self, weight: Tensor, mask: Tensor, statistics: Statistics, shape: _Shape) -> None:
        assert statistics.second is not None
        self.n, self.k, self.shape = *weight.shape, shape
        self.mask, self.moments = mask, statistics.second
        self.weight = shape.units(weight)
        self.kept = shape.units(mask.float()).sum((1, 3)) > 0
        self.worth = shape.units(weight.abs() * statistics.norms).sum((1, 3))
        self.gives = shape.units(weight * statistics.mean).sum(3)
        """What every unit adds to its rows' expected outputs (G, R, U)."""
        self.variance = self._variance(statistics)
        lost = torch.where(mask, 0, weight)
        self.error = (self.gives * ~self.kept[:, None]).sum(2)
        """Expected error of every row (G, R)."""
        self.slopes = self._rows(lost @ self.moments)
        """Lost weights times moments (G, R, K), kept up to date: half the gradient of energies."""
        self.small = self._rows((weight @ self.moments * weight).sum(1, keepdim=True))
        """Squared output over the calibration rows (G,), summed over a group's rows."""
        self.small = self.small.sum((1, 2)) / statistics.rows

    def _rows(self, values: Tensor) -> Tensor:
        """(N, X) → (G, R, X), zeros beyond a ragged edge."""
        padded = F.pad(values, (0, 0, 0, -self.n % self.shape.rows))
        return padded.view(-1, self.shape.rows, values.shape[1])

    def _variance(self, statistics: Statistics) -> Tensor:
        """Mean variance of every unit's inputs (U,), above 0."""
        variance = statistics.squares / statistics.rows - statistics.mean.square()
        floor = 1e-6 * statistics.squares.mean() / statistics.rows + 1e-30
        tall = _Shape(1, self.shape.cols, 1)
        sums, sizes = (tall.units(v[None]).sum(3) for v in (variance, torch.ones_like(variance)))
        return (sums / sizes).flatten().clamp(min=float(floor))

    def run(self, cycles: int, threshold: float) -> Tensor:
        """The best mask (N, K) met within `cycles` swaps a group."""
        best, energy = self.kept.clone(), torch.zeros_like(self.small)
        lowest = energy.clone()
        limit = threshold**2 * self.small
        for _ in range(cycles):
            grow, drop, ok = self._choose(limit)
            if not bool(ok.any()):
                break
            energy += self._swap(grow, drop, ok)
            better = energy < lowest
            best[better] = self.kept[better]
            lowest = torch.minimum(lowest, energy)
        wide = best[:, None, :, None].expand_as(self.weight)
        found = wide.reshape(len(best) * self.shape.rows, -1)[: self.n, : self.k]
        return self._not_above(found)

    def _choose(self, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Units to grow and to drop per group (G,), and where that lowers the expected error."""
        size = self.error.square().sum(1)
        direction = self.error / size.sqrt().clamp(min=1e-30)[:, None]
        gain = torch.einsum("gr,gru->gu", direction, self.gives)
        can_drop = self.kept & (gain < 0)
        runs = self._in_runs(can_drop).any(2, keepdim=True).expand(-1, -1, self.shape.run)
        can_grow = ~self.kept & (gain > 0) & runs.reshape(can_drop.shape)
        grow = (gain / self.variance).masked_fill(~can_grow, -torch.inf).argmax(1)
        units = torch.arange(gain.shape[1], device=gain.device)
        same = (units // self.shape.run) == (grow // self.shape.run)[:, None]
        drop = self.worth.masked_fill(~(can_drop & same), torch.inf).argmin(1)
        each = torch.arange(len(grow), device=gain.device)
        after = self.error - self.gives[each, :, grow] + self.gives[each, :, drop]
        ok = can_grow[each, grow] & (size > limit) & (after.square().sum(1) < size)
        return grow, drop, ok

    def _in_runs(self, values: Tensor) -> Tensor:
        return values.view(len(values), -1, self.shape.run)

    def _swap(self, grow: Tensor, drop: Tensor, ok: Tensor) -> Tensor:
        """Swap where `ok` and return how much that adds to every group's energy (G,)."""
        each = ok.nonzero().flatten()
        grow, drop = grow[each], drop[each]
        self.kept[each, grow], self.kept[each, drop] = True, False
        self.error[each] += self.gives[each, :, drop] - self.gives[each, :, grow]
        change = torch.cat((-self.weight[each, :, grow], self.weight[each, :, drop]), 2)
        within = torch.arange(self.shape.cols, device=ok.device)
        columns = torch.stack((grow, drop), 1)[:, :, None] * self.shape.cols + within
        columns = columns.flatten(1).clamp(max=self.k - 1)  # beyond the edge the change is 0
        moved = change @ self.moments[columns]
        there = columns[:, None].expand_as(change)
        slopes = self.slopes[each]
        added = change * (2 * slopes.gather(2, there) + moved.gather(2, there))
        self.slopes[each] = slopes + moved
        return torch.zeros_like(self.small).index_add(0, each, added.sum((1, 2)))

    def _not_above(self, found: Tensor) -> Tensor:
        """`found` with groups whose energy, computed anew, is not below the old mask's undone."""
        weight = self.weight.flatten(2).flatten(0, 1)[: self.n, : self.k]
        old, new = (
            self._rows(row_energies(torch.where(m, 0, weight), self.moments)[:, None]).sum((1, 2))
            for m in (self.mask, found)
        )
        good = (new < old).repeat_interleave(self.shape.rows)[: self.n, None]
        return torch.where(good, found, self.mask)
