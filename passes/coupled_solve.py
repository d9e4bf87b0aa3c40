"""From couplings of axes to atoms: sets of elements that can only be removed or moved together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import networkx as nx
import numpy as np

from sparsefx.passes.coupled_axes import Axes, Axis, Factor, Index, Link, count


@dataclass
class Atoms:
    """The solved coupling graph.

    Axes that carry one index form a class; `label[c][i]` is the atom of element i of class c.
    """

    axes: Axes
    klass: dict[Axis, int]
    label: list[Index]
    reasons: list[str]
    """Reason texts; 0 is "" (free)."""
    keep: Index
    """Per atom: the reason number why it may not be removed."""
    order: Index
    """Per atom: the reason number why it may not be moved."""
    links: list[Link]
    blocks: dict[int, Literal["outer", "inner"]] = field(default_factory=dict)
    """Classes laid out by a reshape → whether a unit is a block or one column of every block."""

    def of(self, axis: Axis) -> Index:
        """The atom of every element of an axis."""
        return self.label[self.klass[axis]]


class _Solver:
    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.classes = [list(c) for c in nx.connected_components(axes.joined)]
        self.klass = {axis: i for i, c in enumerate(self.classes) for axis in c}
        self.sizes = [axes.size(c[0]) for c in self.classes]
        self.start = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.reasons = [""]
        total = int(self.start[-1])
        self.keep, self.order = np.zeros(total, np.int64), np.zeros(total, np.int64)
        self.links = list(axes.links)
        self.label = count(total)
        self.selected = {self.klass[a] for a, kinds in axes.kinds.items() if "selected" in kinds}
        for axis, at, why, order in axes.fixed:
            self.fix(axis, why, at, order)

    def elements(self, axis: Axis) -> slice:
        c = self.klass[axis]
        return slice(int(self.start[c]), int(self.start[c + 1]))

    def fix(self, axis: Axis, why: str, at: Index | None = None, order: bool = True) -> None:
        """Mark elements that are not marked yet: the first reason stays."""
        self.reasons.append(why)
        for marks in (self.keep, self.order)[: 2 if order else 1]:
            part = marks[self.elements(axis)]
            where = count(len(part)) if at is None else at
            part[where[part[where] == 0]] = len(self.reasons) - 1

    def frozen(self, axis: Axis) -> bool:
        return bool((self.order[self.elements(axis)] > 0).all())

    def spread(self) -> None:
        """Give linked elements one label, and every element the reasons of its label."""
        base = {a: int(self.start[self.klass[a]]) for k in self.links for a in (k.left, k.right)}
        if self.links:
            left = np.concatenate([base[k.left] + k.left_at for k in self.links])
            right = np.concatenate([base[k.right] + k.right_at for k in self.links])
            self.label = _merge(self.label, left, right)
        for marks in (self.keep, self.order):
            first = np.full(len(marks), np.iinfo(np.int64).max)
            hit = marks > 0
            np.minimum.at(first, self.label[hit], marks[hit])
            found = first[self.label]
            marks[:] = np.where(found == np.iinfo(np.int64).max, 0, found)

    def freeze_factors(self) -> None:
        """A reshape moves a fixed axis' meaning to its parts, and all-fixed parts' to the whole."""
        changed = True
        while changed:
            changed = False
            self.spread()
            for f in self.axes.factors:
                frozen = [self.frozen(p) for p in f.parts]
                if all(frozen) and not self.frozen(f.whole):
                    self.fix(f.whole, self._why(f.parts[0]))
                    changed = True
                elif self.frozen(f.whole) and not all(frozen):
                    for part in f.parts:
                        self.fix(part, self._why(f.whole))
                    changed = True

    def _why(self, axis: Axis) -> str:
        return self.reasons[int(self.order[self.elements(axis)][0])]

    def carry(self, f: Factor) -> Literal["outer", "inner"]:
        """The outermost part that is free carries the index of the whole; the others stay."""
        sizes = [self.axes.size(p) for p in f.parts]
        chosen = next((i for i, p in enumerate(f.parts) if not self.frozen(p)), 0)
        inner = int(np.prod(sizes[chosen + 1 :], initial=1))
        whole = count(int(np.prod(sizes)))
        at = whole // inner % sizes[chosen]
        before = len(self.axes.links)
        self.axes.link(f.whole, whole, f.parts[chosen], at)
        self.links.append(self.axes.links.pop(before))
        for i, part in enumerate(f.parts):
            if i != chosen:
                self.fix(part, f"{f.reason} keeps it inside every block of {inner}")
        outer = {self.klass[p] for p in f.parts[:chosen]} - self.selected
        return "inner" if inner == 1 and outer else "outer"


def _merge(label: Index, left: Index, right: Index) -> Index:
    """The least label of every connected set, by passing minima along the edges."""
    while True:
        before = label.copy()
        least = np.minimum(label[left], label[right])
        np.minimum.at(label, label[left], least)
        np.minimum.at(label, label[right], least)
        label = label[label]
        if (label == before).all():
            return label


def solve(axes: Axes) -> Atoms:
    """Choose what carries every reshape, then join elements and reasons."""
    work = _Solver(axes)
    work.freeze_factors()
    blocks = {work.klass[f.whole]: work.carry(f) for f in axes.factors}
    work.spread()
    names, label = np.unique(work.label, return_inverse=True)
    label = label.reshape(-1)
    parts = [label[a:b] for a, b in zip(work.start, work.start[1:], strict=False)]
    keep, order = work.keep[names], work.order[names]
    return Atoms(axes, work.klass, parts, work.reasons, keep, order, work.links, blocks)
