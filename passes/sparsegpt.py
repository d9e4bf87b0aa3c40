"""SparseGPT and GPTQ in one sweep: prune, quantise and repair column by column with one Hessian.

Sources: Frantar & Alistarh, "SparseGPT", arXiv 2301.00774 (the joint form of section 3.5);
Frantar et al., "GPTQ", arXiv 2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.ir.codecs import Grid
from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.passes.statistics import Statistics

BLOCK = 128


def sparsegpt(
    weight: Tensor, fmt: Format, given: Tensor | None, statistics: Statistics | None, damping: float
) -> Packed:
    """Pack `weight` (N, K) so that the error of its outputs on the calibration data is small.

    Every column's pruning and rounding error is spread over the columns after it through the
    inverse of the inputs' second moments. Without a `given` mask (N, K) the pattern is chosen on
    the way, by what removing each weight would cost. Raises WeightError without second moments.
    """
    if statistics is None or statistics.second is None:
        raise WeightError("solver 'sweep' needs calibration data")
    hessian = statistics.second
    work = weight.detach().float().clone()
    n, k = work.shape
    dead = hessian.diagonal() == 0
    work[:, dead] = 0
    factor = inverse_factor(hessian, dead, damping)
    mask = torch.zeros(n, k, dtype=torch.bool, device=work.device)
    grids: list[Grid] = []
    step = -(-BLOCK // fmt.layout.step) * fmt.layout.step
    for start in range(0, k, step):
        stop = min(start + step, k)
        block, inner = work[:, start:stop], factor[start:stop, start:stop]
        scores = (block / inner.diagonal()) ** 2
        chosen = fmt.layout.select(scores) if given is None else given[:, start:stop]
        mask[:, start:stop] = chosen
        grids += _fit_groups(fmt, work, mask, start, stop)
        columns = _join(grids).columns(start, stop, fmt.codec.group(k))
        errors = _sweep(fmt, block, mask[:, start:stop], inner, columns)
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return fmt.pack(work, mask, _join(grids) if grids else None)


def inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse; damping grows until it exists."""
    diagonal = torch.arange(len(hessian), device=hessian.device)
    for growth in (1, 10, 100, 1000):
        damped = hessian.float().clone()
        damped[diagonal, diagonal] += damping * growth * damped.diagonal().mean() + dead
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            upper: Tensor
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(info) == 0:
                return upper
    raise WeightError("the calibration Hessian is not positive definite; give more varied inputs")


def _fit_groups(fmt: Format, work: Tensor, mask: Tensor, start: int, stop: int) -> list[Grid]:
    """Grids of the scale groups that begin in columns start…stop, fitted to what will be kept.

    Columns of a group beyond `stop` are not masked yet; they are fitted as they are.
    """
    k = work.shape[1]
    size, out = fmt.codec.group(k), []
    for first in range(-(-start // size) * size, stop, size):
        ahead = work[:, first : first + size].clone()
        ahead[:, : stop - first] *= mask[:, first : min(stop, first + size)]
        out.append(fmt.codec.fit(ahead))
    return out


def _sweep(fmt: Format, block: Tensor, kept: Tensor, inner: Tensor, grid: Grid) -> Tensor:
    """Fix the block's columns from left to right in place; returns their scaled errors (N, block).

    Works on the transpose, where a column is contiguous: five times faster.
    """
    rows, keep = block.T.contiguous(), kept.T.contiguous()
    scales, zeros = (
        None if t is None else t.T.contiguous() for t in (grid.scales, grid.zero_points)
    )
    errors = torch.empty_like(rows)
    diagonal = inner.diagonal().tolist()
    for j, row in enumerate(rows):
        at = Grid(None if scales is None else scales[j], None if zeros is None else zeros[j])
        value = fmt.codec.decode(fmt.codec.encode(row, at), at) * keep[j]
        torch.sub(row, value, out=errors[j]).div_(diagonal[j])
        rows[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        row.copy_(value)
    block.copy_(rows.T)
    return errors.T


def _join(grids: list[Grid]) -> Grid:
    scales = [g.scales for g in grids if g.scales is not None]
    zeros = [g.zero_points for g in grids if g.zero_points is not None]
    return Grid(torch.cat(scales, 1) if scales else None, torch.cat(zeros, 1) if zeros else None)
