"""M-FAC: Optimal Brain Surgeon with the empirical Fisher matrix, which is never formed.

Source: Frantar, Kurtic & Alistarh, arXiv 2107.03356. Its recursion over gradients and Woodbury's
identity, used here, are the same inverse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.passes.criteria.base import DAMPING, given_gradients
from sparsefx.passes.gradients import Gradients
from sparsefx.passes.statistics import Statistics

SAMPLES = 32
"""Gradients collected for this criterion."""
BLOCK = 1 << 10
"""Most weights of a block of rows; the Fisher matrix is taken as block-diagonal beyond. Few
gradients tell little of many weights: with 32, blocks of a row or two choose best (MiniLM)."""


class Fisher:
    """F = damping·I + (1/m)·Σ g·gᵀ of m gradients of d weights, inverted in O(d·m) float64 numbers.

    With S = m·damping·I + G·Gᵀ = L·Lᵀ and A = L⁻¹·G, F⁻¹ = (I − Aᵀ·A) / damping.
    """

    def __init__(self, gradients: Tensor, damping: float) -> None:
        """`gradients` is (m, d); `damping` > 0."""
        self.damping, self._gradients = damping, gradients.to(torch.float64, copy=True)
        self._gram = self._gradients @ self._gradients.T
        self._invert()

    def _invert(self) -> None:
        count = len(self._gram)
        ridge = count * self.damping * torch.eye(count, dtype=torch.float64).to(self._gram.device)
        lower = torch.linalg.cholesky(self._gram + ridge)
        self._a = torch.linalg.solve_triangular(lower, self._gradients, upper=False)

    def solve(self, vector: Tensor) -> Tensor:
        """F⁻¹·v (d,) in O(d·m)."""
        vector = vector.double()
        return vector.sub(self._a.T @ (self._a @ vector)).div(self.damping)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal (d,) of F⁻¹, all positive."""
        # 1 − leverage: at least damping / (damping + what the gradients add), so never really 0.
        left: Tensor = 1 - self._a.square().sum(0)
        return left.clamp(min=torch.finfo(torch.float64).eps) / self.damping

    def inverse_element(self, row: int, column: int) -> float:
        """[F⁻¹] at one place in O(m)."""
        product = float(self._a[:, row] @ self._a[:, column])
        return (float(row == column) - product) / self.damping

    def replace(self, index: int, gradient: Tensor) -> None:
        """Let `gradient` (d,) take the place of the index-th one in O(d·m² + m³)."""
        self._gradients[index] = gradient
        products = self._gradients @ self._gradients[index]
        self._gram[index], self._gram[:, index] = products, products
        self._invert()


def mfac(
    weight: Tensor, statistics: Statistics | None, gradients: Gradients | None, seed: int
) -> Tensor:
    """w² / [F⁻¹]ᵢᵢ (N, K), F block-diagonal over blocks of whole rows of up to `BLOCK` weights.

    Without any gradient it is w², by damping 1.
    """
    samples = given_gradients(gradients, "mfac").samples
    n, k = weight.shape
    size = float(torch.linalg.vector_norm(samples))
    damping = DAMPING * size**2 / samples.numel() or 1.0
    out = weight.float().square()
    rows = max(1, BLOCK // max(k, 1))
    for start in range(0, n, rows):
        block = samples[:, start : start + rows]
        diagonal = Fisher(block.flatten(1), damping).inverse_diagonal()
        out[start : start + rows] /= diagonal.view(-1, k)
    return out
