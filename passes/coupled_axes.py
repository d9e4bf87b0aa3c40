"""Axes of tensors, and which of their elements have the same index meaning: the coupling graph.

A node of the graph is one axis of one tensor (or of a parameter). `same` says that two axes carry
the same index, `link` that single elements do (an offset, a block), `factor` that an axis is
several axes laid out in one (reshape). `fix` says which elements may not be removed or moved, and
why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.fx import Node

from sparsefx.ir.products import op_name, value

Axis = tuple[Node, int]
"""A tensor (fx node) and one of its axes, counted from 0; below 0 are axes a rule made up."""
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Link:
    """Elements `left_at[i]` and `right_at[i]` mean the same; `place[i]` tells the i-th apart among
    those that meet one right element (the column inside a head)."""

    left: Axis
    left_at: Index
    right: Axis
    right_at: Index
    place: Index


@dataclass(frozen=True)
class Factor:
    """`whole` holds `parts` laid out row by row."""

    whole: Axis
    parts: tuple[Axis, ...]
    reason: str


@dataclass
class Axes:
    """What rules write; `solve` (coupled_solve.py) reads it."""

    constant: set[Node] = field(default_factory=set)
    """Nodes that depend on parameters and buffers only."""
    joined: nx.Graph = field(default_factory=nx.Graph)
    links: list[Link] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    fixed: list[tuple[Axis, Index | None, str, bool]] = field(default_factory=list)
    """(axis, elements or all, reason, whether they may not even be moved)."""
    roles: dict[Axis, str] = field(default_factory=dict)
    """"in": products sum over it; "out": products make it; "scale": batch norm's weight."""
    kinds: dict[Axis, set[str]] = field(default_factory=dict)
    made_up: dict[Axis, int] = field(default_factory=dict)
    alias: dict[Node, Node] = field(default_factory=dict)
    """Nodes that read a parameter again → the first node that read it."""

    def axis(self, node: Node, position: int) -> Axis:
        """The axis, counted from the end when below 0; registers it."""
        first = self.alias.get(node, node)
        out = (first, position % rank(node))
        self.joined.add_node(out)
        return out

    def axes(self, node: Node) -> list[Axis]:
        return [self.axis(node, i) for i in range(rank(node))]

    def size(self, axis: Axis) -> int:
        known = self.made_up.get(axis)
        return int(value(axis[0]).shape[axis[1]]) if known is None else known

    def invent(self, node: Node, size: int) -> Axis:
        """A new axis that no tensor has: convolution groups, factors of a reshape."""
        out = (node, -1 - sum(a[0] is node for a in self.made_up))
        self.made_up[out] = size
        self.joined.add_node(out)
        return out

    def same(self, left: Axis, right: Axis) -> None:
        """One index for both; axes of size 1 broadcast and couple nothing."""
        if self.size(left) == self.size(right) > 1:
            self.joined.add_edge(left, right)

    def link(self, left: Axis, left_at: Index, right: Axis, right_at: Index) -> None:
        order = np.lexsort((left_at, right_at))
        where = np.zeros(len(order), np.int64)
        starts = np.flatnonzero(np.diff(right_at[order], prepend=-1))
        runs = np.diff(np.append(starts, len(order)))
        where[order] = np.arange(len(order)) - np.repeat(starts, runs)
        self.links.append(Link(left, left_at, right, right_at, where))

    def factor(self, whole: Axis, parts: Sequence[Axis], node: Node) -> None:
        kept = tuple(p for p in parts if self.size(p) > 1)
        if len(kept) == 1:
            self.same(whole, kept[0])
        elif kept:
            self.factors.append(Factor(whole, kept, shown(node)))

    def fix(self, axis: Axis, why: str, at: Index | None = None, order: bool = True) -> None:
        if self.size(axis) > 1:
            self.fixed.append((axis, at, why, order))

    def fix_node(self, node: Any, why: str) -> None:
        """Fix every axis of a tensor; of a list of tensors nothing (its getitems are fixed)."""
        if isinstance(node, Node) and isinstance(value(node), Tensor):
            for axis in self.axes(node):
                self.fix(axis, why)

    def kind(self, axis: Axis, kind: str) -> None:
        self.kinds.setdefault(axis, set()).add(kind)


def rank(node: Node) -> int:
    return int(value(node).dim())


def shape(node: Node) -> tuple[int, ...]:
    return tuple(int(side) for side in value(node).shape)


def shown(node: Node) -> str:
    """`op (node)`, what reasons name."""
    name = op_name(node) or node.op
    return name if name == node.name else f"{name} ({node.name})"


def count(size: int) -> Index:
    return np.arange(size, dtype=np.int64)
