"""Coupled dimensions of a model: which channels, heads and features go or move together.

A `Group` is a set of interchangeable units (a hidden channel with its row in one weight and its
column in the next; a head with its block of columns; a key/value head with all its query heads).
Found in the exported graph by rules per op (coupled_rules.py); what no rule proves is refused with
a reason that names the op.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx
import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.errors import CaptureError
from sparsefx.ir.products import value
from sparsefx.passes.coupled_axes import Axes, Axis, Index
from sparsefx.passes.coupled_rules import apply
from sparsefx.passes.coupled_solve import Atoms, solve

Kind = Literal["ffn", "heads", "head_width", "channels", "residual"]
"""head_width: the same column of every head."""
Role = Literal["in", "out", "scale", "beside"]
"""in: a product sums over the axis. out: a product makes it. scale: batch norm's weight."""


@dataclass(frozen=True)
class Member:
    """Where a group's units lie along one axis of one parameter or buffer."""

    name: str
    axis: int
    index: Index
    """(size, width): row i holds the positions of unit i, ascending."""
    role: Role

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(offset, length) of every contiguous run of positions, units in order."""
        flat = np.sort(self.index.reshape(-1))
        starts = np.flatnonzero(np.diff(flat, prepend=-2) != 1)
        ends = np.append(starts[1:], len(flat))
        return [(int(flat[a]), int(b - a)) for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one or moved among each other, if no reason says otherwise.

    `unit` is the number of columns of the widest member that one unit takes (head_dim for a head).
    """

    name: str
    size: int
    members: tuple[Member, ...]
    unit: int
    kind: Kind
    reason: str
    """Why no unit may be removed, "" when they may."""
    fixed: str
    """Why units may not even change places, "" when they may."""
    atoms: Index
    """The atom (coupled_solve.py) of each unit."""

    def of_role(self, *roles: Role) -> tuple[Member, ...]:
        return tuple(m for m in self.members if m.role in roles)


@dataclass
class Couplings:
    """The exported graph of a model, its solved axes and its groups in graph order."""

    module: fx.GraphModule
    """As exported: parameters are attributes under the model's own names."""
    atoms: Atoms
    groups: list[Group]
    leaves: dict[fx.Node, str] = field(default_factory=dict)
    """First node that reads a parameter or buffer → its name in the model."""

    def group(self, name: str) -> Group:
        """The group of that name. Raises KeyError that lists the names there are."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group {name!r}; groups: {[g.name for g in self.groups]}")


def couple(model: nn.Module, example_inputs: Any) -> Couplings:
    """Find the coupled dimensions of `model` in eval mode.

    Raises CaptureError when torch.export gives no whole graph. The model is not changed.
    """
    gm = _whole_graph(model, example_inputs)
    axes, leaves = Axes(), _leaves(model, gm)
    first: dict[int, fx.Node] = {}
    for node, name in leaves.items():
        axes.alias[node] = first.setdefault(id(_named(model, name)), node)
    for node in gm.graph.nodes:
        inputs = node.all_input_nodes
        if node in leaves or (inputs and all(n in axes.constant for n in inputs)):
            axes.constant.add(node)
        if isinstance(value(node), Tensor):
            axes.axes(node)
        elif node.op == "get_attr":
            continue
        apply(axes, node)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node not in leaves:
            axes.fix_node(node, f"constant {node.target}")
    atoms = solve(axes)
    own = {n: name for n, name in leaves.items() if axes.alias[n] is n}
    return Couplings(gm, atoms, _groups(atoms, own), own)


def _whole_graph(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    args, kwargs = split_inputs(example_inputs)
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False)
            found = program.module(check_guards=False)
    except Exception as error:  # whatever the tracer raises
        first = (str(error).strip() or "no message").splitlines()[0][:200]
        raise CaptureError(
            f"{type(model).__name__}: coupled dimensions need one whole graph, and torch.export "
            f"says {type(error).__name__}: {first}"
        ) from error
    finally:
        for module in training:
            module.training = True
    assert isinstance(found, fx.GraphModule)
    return found


def _named(model: nn.Module, name: str) -> Any:
    owner, _, attribute = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), attribute, None)
    except AttributeError:
        return None


def _leaves(model: nn.Module, gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Nodes that read a parameter or registered buffer of the model."""
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    known |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
    return {
        node: str(node.target)
        for node in gm.graph.nodes
        if node.op == "get_attr" and str(node.target) in known
    }


def _groups(atoms: Atoms, leaves: dict[fx.Node, str]) -> list[Group]:
    """Atoms that lie in the same classes equally often, and for the same reasons, are one group."""
    held: dict[int, list[tuple[int, int]]] = {}
    for c, labels in enumerate(atoms.label):
        for atom, times in zip(*np.unique(labels, return_counts=True), strict=True):
            held.setdefault(int(atom), []).append((c, int(times)))
    wanted = {
        int(a) for node in leaves for i in range(value(node).dim()) for a in atoms.of((node, i))
    }
    found: dict[Any, list[int]] = {}
    for atom in sorted(wanted):
        why = (int(atoms.keep[atom]), int(atoms.order[atom]))
        found.setdefault((tuple(held[atom]), why), []).append(atom)
    roles, out, names = _roles(atoms, leaves), [], dict[str, int]()
    for members in found.values():
        classes = {c for c, _ in held[members[0]]}
        group = _group(atoms, leaves, roles, np.array(members), classes, names)
        if group is not None:
            out.append(group)
    return out


def _roles(atoms: Atoms, leaves: dict[fx.Node, str]) -> dict[Axis, str]:
    """What products do with each parameter's axes, also through views of the parameter."""
    axes = atoms.axes
    graph = axes.joined.subgraph(
        a for a in axes.joined if a[0] in axes.constant or a[0] in axes.alias
    ).copy()
    graph = nx.Graph(graph)
    for link in atoms.links:
        if link.left in graph and link.right in graph and link.left[1] >= 0 <= link.right[1]:
            graph.add_edge(link.left, link.right)
    out: dict[Axis, str] = {}
    for part in nx.connected_components(graph):
        roles = {axes.roles[a] for a in part if a in axes.roles}
        role = next((r for r in ("in", "scale", "out") if r in roles), "beside")
        out |= {a: role for a in part if a[0] in leaves}
    return out


def _group(
    atoms: Atoms,
    leaves: dict[fx.Node, str],
    roles: dict[Axis, str],
    units: Index,
    classes: set[int],
    names: dict[str, int],
) -> Group | None:
    members = list(_members(atoms, leaves, roles, units))
    outs = [m for m in members if m.role == "out"]
    if not outs or len(units) < 2:
        return None
    unit = max(m.index.shape[1] for m in members)
    kind = _kind(atoms, classes, unit, len({m.name for m in outs}))
    reason = atoms.reasons[int(atoms.keep[units[0]])]
    if not reason and not any(m.role == "in" for m in members):
        reason = "no product reads it"
    base = outs[0].name.rpartition(".")[0] or outs[0].name
    names[base] = names.get(base, 0) + 1
    name = base if names[base] == 1 else f"{base}#{names[base]}"
    fixed = atoms.reasons[int(atoms.order[units[0]])]
    return Group(name, len(units), tuple(members), unit, kind, reason, fixed, units)


def _kind(atoms: Atoms, classes: set[int], unit: int, makers: int) -> Kind:
    """What the units of these classes are; `makers` is how many parameters make them."""
    axes = atoms.axes
    kinds = {k for a, found in axes.kinds.items() if atoms.klass[a] in classes for k in found}
    layouts = {atoms.blocks[c] for c in classes if c in atoms.blocks}
    if "channels" not in kinds and unit > 1 and layouts:
        return "heads" if "outer" in layouts else "head_width"
    if "residual" in kinds and makers > 1:
        return "residual"
    return "channels" if "channels" in kinds else "ffn"


def _members(
    atoms: Atoms, leaves: dict[fx.Node, str], roles: dict[Axis, str], units: Index
) -> Iterator[Member]:
    unit = np.full(len(atoms.keep), -1)
    unit[units] = np.arange(len(units))
    for node, name in leaves.items():
        for i in range(value(node).dim()):
            at = unit[atoms.of((node, i))]
            where = np.flatnonzero(at >= 0)
            if len(where):
                order = np.argsort(at[where], kind="stable")
                index = where[order].reshape(len(units), -1)
                role: Any = roles.get((node, i), "beside")
                yield Member(name, i, index, role)
