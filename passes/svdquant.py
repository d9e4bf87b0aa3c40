"""SVDQuant: keep a low-rank part of the smoothed weight in 16 bits, store only the rest coarsely.

Source: Li et al., "SVDQuant", arXiv 2411.05007, section 4.2. Branch and rounding take turns; the
branch starts as the directions of the weight that packing would lose most (outliers first), or as
those that it did lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.passes.lowrank import Branch, dtype_for, fitter, product
from sparsefx.passes.statistics import Statistics, output_error


def svdquant(
    weight: Tensor,
    statistics: Statistics | None,
    fmt: Format,
    quantise: Callable[[Tensor], Packed],
    iterations: int = 4,
    from_error: bool = False,
) -> tuple[Packed, Branch]:
    """Residual of `weight` (N, K) stored by `quantise`, and the Branch that completes it.

    `iterations` times the residual is stored and the branch fitted anew to what that leaves; the
    pair with the least output error on the rows of `statistics` is kept. The branch starts as the
    best rank-r part of the weight, or with `from_error` of what storing all of it lost. Raises
    WeightError when `fmt` has no branch.
    """
    found = turns(weight, statistics, fmt, quantise, from_error)
    pairs = [next(found) for _ in range(max(iterations, 1))]
    return min(pairs, key=lambda pair: pair[0])[1:]


def turns(
    weight: Tensor,
    statistics: Statistics | None,
    fmt: Format,
    quantise: Callable[[Tensor], Packed],
    from_error: bool,
) -> Iterator[tuple[float, Packed, Branch]]:
    """(relative output error, what is stored, branch) after each turn, without end."""
    if fmt.rank == 0:
        raise WeightError(f"format '{fmt}' has no branch: SVDQuant needs '+rRANK', e.g. '+r32'")
    full = weight.detach().float()
    moments = None if statistics is None else statistics.second
    fit = fitter(moments, fmt.rank, dtype_for(weight))
    rest = full if from_error else full - product(fit(full))
    while True:
        packed = quantise(rest)
        stored = packed.unpack()
        branch = fit(full - stored)
        yield output_error(full, stored + product(branch), statistics), packed, branch
        rest = full - product(branch)
