"""Follow the dense model: a layer makes up for a share of what the layers before it lost.

Where the compressed model has rows x and adds a layer's output to a residual r, the dense one has
x̄ and r̄. The layer stands for W' with the least error of x·W'ᵀ against
x·Wᵀ + s·((x̄ − x)·Wᵀ + r̄ − r); ridge regression gives

    W' = W + s·(W·Σ(x̄ − x)ᵀx + Σ(r̄ − r)ᵀx)·(Σxᵀx + λ)⁻¹.

Without r, s = 1 is GPTAQ's asymmetric calibration (Li et al., arXiv 2504.02692). The whole way
follows the noise of few sequences too: over eight blocks of SmolLM2, 50 % zeros at 4 bits, s = ½
took a quarter off the rise of the log perplexity, while s = 1 for r made it greater.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsefx.ir.products import PRODUCTS
from sparsefx.ir.sites import Site
from sparsefx.passes.collector import Run
from sparsefx.passes.padding import Kept, without_padding
from sparsefx.passes.statistics import energy

SUMS = {"add", "iadd", "radd"}


@dataclass
class Rows:
    """One product in one run of a block."""

    x: Tensor
    """Its input (…, K)."""
    residual: Tensor | None = None
    """What its output is added to (…, N), if anything."""

    def counted(self, kept: Kept) -> Rows:
        """Without padding."""
        residual = None if self.residual is None else without_padding(self.residual, kept)
        return Rows(without_padding(self.x, kept), residual)


class _Watch(TorchFunctionMode):
    """While active, remembers the Rows of every product with one of `weights`."""

    def __init__(self, weights: Mapping[str, tuple[Site, Tensor]]) -> None:
        super().__init__()
        self.sites = {id(w): (name, site) for name, (site, w) in weights.items()}
        self.rows: dict[str, Rows] = {}
        self.repeated: set[str] = set()
        self._outputs: dict[int, tuple[Tensor, str, bool]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        full = getattr(func, "__name__", "")
        name = full.strip("_")
        if name in SUMS and len(args) > 1:
            self._added(args[0], args[1], name == "iadd" or full.endswith("add_"))
            self._added(args[1], args[0], False)
        out = func(*args, **kwargs)
        if name in PRODUCTS:
            given = [*args, *kwargs.values()]
            for found in (self.sites[id(arg)] for arg in given if id(arg) in self.sites):
                self._product(*found, given[1] if name == "addmm" else given[0], out)
        return out

    def _product(self, name: str, site: Site, x: Tensor, out: Tensor) -> None:
        if name in self.rows:
            self.repeated.add(name)
        conv = site.kind == "conv1x1"
        self.rows[name] = Rows(x.movedim(1, -1) if conv else x)
        self._outputs[id(out)] = (out, name, conv)

    def _added(self, other: Any, output: Any, edited: bool) -> None:
        """`other` + `output`; with `edited`, `other` holds the sum afterwards."""
        found = self._outputs.get(id(output))
        if found is None or id(other) in self._outputs or not isinstance(other, Tensor):
            return
        if other.shape == output.shape:
            residual = other.clone() if edited else other
            self.rows[found[1]].residual = residual.movedim(1, -1) if found[2] else residual


class Drift:
    """What a block's products read and add to, dense minus compressed, summed over batches."""

    def __init__(
        self,
        weights: Mapping[str, tuple[Site, Tensor]],
        dense: Run,
        run: Run,
        kept: Sequence[Kept] = (),
    ) -> None:
        """`dense` and `run` take the dense and the compressed model's inputs through the block; of
        each batch, `kept` tells which tokens count."""
        self.weights, self._run, self._kept = weights, run, iter(kept)
        self._dense = iter(dense())
        self._ahead: _Watch | None = None
        self.cross: dict[str, Tensor] = {}
        """Σ (x̄ − x)ᵀx (K, K)."""
        self.residual: dict[str, Tensor] = {}
        """Σ (r̄ − r)ᵀx (N, K)."""
        self.power: dict[str, float] = {}
        """Σ ‖(x̄ − x)·Wᵀ + r̄ − r‖²."""
        self.refused: set[str] = set()

    def before(self) -> None:
        """Take the next batch of the dense model through the block."""
        self._ahead = _Watch(self.weights)
        with self._ahead:
            next(self._dense, None)

    def run(self) -> Iterator[None]:
        """`run`, one batch after each call of `before`."""
        batches = iter(self._run())
        while True:
            mine = _Watch(self.weights)
            with mine:
                if next(batches, self) is self:
                    return
            assert self._ahead is not None
            self._add(self._ahead, mine, next(self._kept, None))
            yield

    def _add(self, dense: _Watch, mine: _Watch, kept: Kept) -> None:
        self.refused |= mine.repeated
        for name, now in mine.rows.items():
            then = dense.rows.get(name)
            # Rows of (tokens, K) are what experts get: not the same tokens in both runs.
            if then is None or then.x.shape != now.x.shape or now.x.dim() < 3:
                self.refused.add(name)
            else:
                self._sum(name, then.counted(kept), now.counted(kept))

    def _sum(self, name: str, then: Rows, now: Rows) -> None:
        site, weight = self.weights[name]
        x = now.x.reshape(-1, site.k).float()
        moved = then.x.reshape(-1, site.k).float() - x
        off = moved @ site.matrix(weight).float().T
        if then.residual is not None and now.residual is not None:
            apart = (then.residual - now.residual).reshape(-1, site.n).float()
            _accumulate(self.residual, name, apart.T @ x)
            off += apart
        _accumulate(self.cross, name, moved.T @ x)
        self.power[name] = self.power.get(name, 0.0) + float(off.square().sum())

    def rescale(self, name: str, scales: Tensor) -> None:
        """The inputs of this product are x/s from now on, its weight W·diag(s)."""
        s = scales.to(self.cross[name]) if name in self.cross else scales
        if name in self.cross:
            self.cross[name] = self.cross[name] / s[:, None] / s
        if name in self.residual:
            self.residual[name] = self.residual[name] / s

    def shift(
        self, name: str, weight: Tensor, moments: Tensor, share: float, damping: float
    ) -> tuple[Tensor, float, float] | None:
        """W' (N, K) for W, and the error before and after, relative to the outputs x·Wᵀ.

        `moments` Σxᵀx (K, K). None where rows of the two models do not correspond, and where
        nothing was lost yet.
        """
        if name in self.refused or not self.power.get(name):
            return None
        wanted = weight @ self.cross[name]
        if name in self.residual:
            wanted += self.residual[name]
        diagonal = torch.eye(len(moments), device=moments.device) * moments.diagonal().mean()
        change = torch.linalg.solve(moments + damping * diagonal, share * wanted.T).T
        had = energy(weight, moments)
        left = self.power[name] - 2 * float((change * wanted).sum(dtype=torch.float64))
        left += energy(change, moments)
        if not had or not bool(change.isfinite().all()):
            return None
        return weight + change, (self.power[name] / had) ** 0.5, (max(left, 0.0) / had) ** 0.5


def _accumulate(sums: dict[str, Tensor], name: str, more: Tensor) -> None:
    sums[name] = sums[name] + more if name in sums else more
