"""Co-permutation: units of a group change places in every parameter, the output stays.

The idea of S2FT (arXiv 2412.06289): selected heads or channels are brought to the front on both
sides of a coupled structure, so that they are one dense block of each weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx.ir.errors import PassError, SpecError
from sparsefx.passes.coupled import Couplings, Group
from sparsefx.passes.coupled_axes import Axis, Index


def permute(model: nn.Module, couplings: Couplings, group: Group, order: Sequence[int]) -> None:
    """Put unit `order[i]` at place i, in place, in every member of the group.

    The model computes the same terms; a product that sums over the units (members of role "in",
    norm statistics) adds them in another order, everything else is bitwise equal. Nothing changes
    when it raises: SpecError for an `order` that is no permutation, PassError for fixed units.
    """
    new = np.asarray(order, np.int64)
    if sorted(new.tolist()) != list(range(group.size)):
        raise SpecError(f"{group.name}: {list(order)[:8]}… is no order of {group.size} units")
    if group.fixed:
        raise PassError(f"{group.name}: units may not move: {group.fixed}")
    _prove(couplings, group, new)
    with torch.no_grad():
        for member in group.members:
            tensor = _tensor(model, member.name)
            source = np.arange(tensor.shape[member.axis])
            source[member.index] = member.index[new]
            at = torch.from_numpy(source).to(tensor.device)
            tensor.copy_(tensor.index_select(member.axis, at))


def bring_to_front(
    model: nn.Module, couplings: Couplings, group: Group, selected: Sequence[int]
) -> None:
    """Permute so that the selected units come first, in the order given, the others after them."""
    rest = [i for i in range(group.size) if i not in set(selected)]
    permute(model, couplings, group, [*selected, *rest])


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    found = getattr(model.get_submodule(owner), attribute)
    assert isinstance(found, Tensor)
    return found


def _prove(couplings: Couplings, group: Group, order: Index) -> None:
    """Every coupling of elements must hold again after the move: the same pairs, place for place.

    Raises PassError naming the parameter when units are not laid out alike.
    """
    atoms = couplings.atoms
    moves: dict[int, Index] = {}

    def move(axis: Axis) -> Index:
        c = atoms.klass[axis]
        if c not in moves:
            labels = atoms.label[c]
            moves[c] = np.arange(len(labels))
            where = np.flatnonzero(np.isin(labels, group.atoms))
            if len(where):
                unit = np.searchsorted(group.atoms, labels[where])
                index = where[np.argsort(unit, kind="stable")].reshape(group.size, -1)
                moves[c][index] = index[order]
        return moves[c]

    for link in atoms.links:
        left, right = move(link.left), move(link.right)
        before = np.stack([link.left_at, link.right_at, link.place])
        after = np.stack([left[link.left_at], right[link.right_at], link.place])
        if not np.array_equal(_sorted(before), _sorted(after)):
            name = link.left[0].name
            raise PassError(f"{group.name}: units lie differently in {name}; they may not move")


def _sorted(triples: Index) -> Index:
    return triples[:, np.lexsort(triples)]
