"""What every layout answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Layout(ABC):
    """Which positions of an (N, K) weight are stored, and how that set is written down.

    Subclasses are frozen dataclasses; `str(layout)` parses back through `parse`.
    """

    example: ClassVar[str]
    """A valid token, shown when a spec is misspelt."""
    buffers: ClassVar[tuple[str, ...]] = ("index",)

    @classmethod
    @abstractmethod
    def parse(cls, token: str) -> Layout | None:
        """The layout this token spells, None if it is another's. Raises SpecError on bad sizes."""

    @abstractmethod
    def rejects(self, n: int, k: int) -> str | None:
        """Why an (n, k) weight cannot have this layout, or None."""

    @abstractmethod
    def select(self, scores: Tensor) -> Tensor:
        """Boolean (N, K) mask of the positions to keep, best scores first."""

    @abstractmethod
    def violation(self, mask: Tensor) -> str | None:
        """Why this (N, K) mask is not of this layout, or None."""

    @abstractmethod
    def index(self, mask: Tensor) -> tuple[Tensor, ...]:
        """The uint8 buffers that say which positions are stored; at least those of `mask`."""

    @abstractmethod
    def mask(self, index: tuple[Tensor, ...], n: int, k: int) -> Tensor | None:
        """Boolean (n, k) mask of the stored positions, None when all are. Inverse of `index`."""

    @abstractmethod
    def index_bits(self, n: int, k: int) -> int:
        """Bits the index needs for an (n, k) weight."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Columns that must be selected together when pruning sweeps along K."""
