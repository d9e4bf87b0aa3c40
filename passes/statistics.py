"""What calibration tells of one weight's inputs and gradients: the one thing algorithms read."""

from __future__ import annotations

import torch
from torch import Tensor


class Statistics:
    """Running sums over the rows x (K,) that met a weight (N, K), all float32.

    Products that read the same tensor (q, k, v) share one object, summed once.
    """

    def __init__(self, k: int, device: torch.device, moments: bool = True) -> None:
        """Without `moments` the K×K second moments are left out (Wanda, AWQ need only sums)."""
        self.rows = 0
        self.second: Tensor | None = torch.zeros(k, k, device=device) if moments else None
        """Sum of xᵀx (K, K): the Hessian of the layer's squared output error, up to a factor."""
        self._batches, self._power = 0, 0.0
        """How many sums were added to `second`, and Σ of their squared Frobenius norms."""
        self.squares = torch.zeros(k, device=device)
        """Sum of x² (K,)."""
        self.total = torch.zeros(k, device=device)
        """Sum of x (K,)."""
        self.peak = torch.zeros(k, device=device)
        """Greatest |x| (K,)."""

    def add(self, x: Tensor) -> None:
        """Count the rows of x (…, K)."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(flat):
            return
        self.rows += len(flat)
        self.squares += flat.square().sum(0)
        self.total += flat.sum(0)
        self.peak = torch.maximum(self.peak, flat.abs().amax(0))
        if self.second is not None:
            own = flat.T @ flat
            self.second += own
            self._batches += 1
            self._power += float(own.square().sum(dtype=torch.float64))

    def shrink(self) -> float:
        """Move `second` towards a multiple of the identity as far as its batches disagree.

        The share that minimises the expected squared error of the sum, with batches for samples:
        Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices",
        J. Multivariate Analysis 88 (2004). Returns the share: 0 with a single batch.
        """
        count, moments = self._batches, self.second
        if moments is None or count < 2:
            return 0.0
        total = float(moments.square().sum(dtype=torch.float64))
        mean = float(moments.diagonal().mean())
        away = total - len(moments) * mean * mean
        variance = (self._power - total / count) * count / (count - 1)
        share = min(max(variance / away, 0.0), 1.0) if away > 0 else 0.0
        moments.mul_(1 - share).diagonal().add_(share * mean)
        return share

    @property
    def mean(self) -> Tensor:
        """Mean of x (K,)."""
        return self.total / max(self.rows, 1)

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of every column of x (K,)."""
        return self.squares.sqrt()


def shrunk(found: dict[str, Statistics]) -> dict[str, Statistics]:
    """`found` once no batch is to come: every object in it is shrunk, once."""
    for statistics in {id(s): s for s in found.values()}.values():
        statistics.shrink()
    return found


def output_error(weight: Tensor, stored: Tensor, statistics: Statistics | None) -> float:
    """‖x·(W − Ŵ)ᵀ‖ / ‖x·Wᵀ‖ over the calibration rows, ‖W − Ŵ‖ / ‖W‖ without second moments.

    Both weights are (N, K); 0 where W is all zeros and Ŵ too, infinite where only W is.
    """
    weight, stored = weight.detach().float(), stored.float()
    moments = None if statistics is None else statistics.second
    lost, had = energy(weight - stored, moments), energy(weight, moments)
    if had == 0.0:
        return 0.0 if lost == 0.0 else float("inf")
    return float((max(lost, 0.0) / had) ** 0.5)


def energy(weight: Tensor, moments: Tensor | None) -> float:
    """tr(W · M · Wᵀ): the squared output that `weight` (N, K) makes of inputs with moments M."""
    product = weight if moments is None else weight @ moments
    return float((product * weight).sum(dtype=torch.float64))
