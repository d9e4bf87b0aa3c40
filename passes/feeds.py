"""Feeds: what makes the tensor that a group of Sites reads, proven from the graph.

A factor per channel may move from the readers' columns to what makes the tensor: a parameter that
multiplies it (the weight of a norm), or the rows of another product, through whatever commutes with
positive factors (`passes.channels`). A tensor that anything else reads is refused with its reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from sparsefx.ir.products import READS_SHAPE, TRANSPOSES, VIEWS, Use, op_name, uses, value
from sparsefx.ir.sites import Capture, Site, Traced, parameter_names
from sparsefx.passes.channels import MOVES, State, Walk, entries, follow, rows
from sparsefx.passes.normalise import operands


@dataclass(frozen=True)
class Feed:
    """Sites that read one tensor (…, K), and what makes it.

    Entry (row) `rows[k]` of `parameters` scales channel k, alone and as a factor; several channels
    may share a row (a key/value head that is repeated). `source` "norm": the parameters are
    (weight,) or (weight, bias) vectors and the factor is `offset` + weight. "linear": they are
    (weight,) or (weight, bias) of the Site `producer`. "none": `reason` says why.
    """

    sites: tuple[Site, ...]
    source: Literal["norm", "linear", "none"]
    parameters: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    offset: float = 0.0
    producer: Site | None = None
    head: int = 0
    """Size of the attention heads between producer and readers, within which channels may also be
    mixed by any matrix; 0 when there are none."""
    reason: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the Sites."""
        return tuple(site.name for site in self.sites)


def find_feeds(model: nn.Module, captured: Capture) -> list[Feed]:
    """Every Site of kind "linear" or "conv1x1" in exactly one Feed, in call order.

    `captured` must be a capture of `model` with example inputs (doors "export" or "dynamo"): the
    proof needs shapes, and holds for the control flow that those inputs took.
    """
    sites = {s.name: s for s in captured.sites if s.kind in ("linear", "conv1x1")}
    owners = Owners.of(model, captured)
    found = [f for traced in flowing(captured) for f in _Graph.of(traced, sites, owners).feeds()]
    return _once(found, list(sites.values()))


def _once(found: Sequence[Feed], sites: Sequence[Site]) -> list[Feed]:
    """One Feed per Site: the first that can be folded, else the first reason."""
    chosen: dict[str, Feed] = {}
    for feed in sorted(found, key=lambda f: f.source == "none"):
        fresh = tuple(s for s in feed.sites if s.name not in chosen)
        if fresh and (feed.source == "none" or fresh == feed.sites):
            mine = feed if fresh == feed.sites else Feed(fresh, "none", reason=feed.reason)
            chosen |= {s.name: mine for s in fresh}
    unknown = "no graph with shapes shows its input"
    every = [chosen.get(s.name) or Feed((s,), "none", reason=unknown) for s in sites]
    return list({id(f): f for f in every}.values())


def flowing(captured: Capture) -> list[Traced]:
    """The graphs with data flow: dynamo's last one is a list of calls that it could not trace."""
    return captured.graphs[:-1] if captured.door == "dynamo" else captured.graphs


# --- who else reads a parameter ----------------------------------------------------------------


@dataclass
class Owners:
    """Names of parameters, and how often each is read, in all graphs together."""

    names: Mapping[int, tuple[str, ...]]
    reads: Mapping[int, int]
    watched: Mapping[int, int]
    """The same counted while the model ran, for parameters that no traced product reads."""
    storages: Mapping[int, int]

    @staticmethod
    def of(model: nn.Module, captured: Capture) -> Owners:
        storages: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            key = tensor.untyped_storage().data_ptr()
            storages[key] = storages.get(key, 0) + 1
        rest = captured.graphs[len(flowing(captured)) :]
        return Owners(parameter_names(model), _counts(flowing(captured)), _counts(rest), storages)

    def name(self, tensor: Tensor) -> str:
        return self.names.get(id(tensor), ("",))[0]

    def shared(self, tensor: Tensor, reads: int) -> str:
        """Why the parameter may not be edited, "" when only these `reads` see it."""
        names = self.names.get(id(tensor), ())
        if not names:
            return "a computed tensor takes part"
        if len(names) > 1:
            return f"{names[0]} is tied to {names[1]}"
        if self.storages[tensor.untyped_storage().data_ptr()] > 1:
            return f"{names[0]} shares memory with another parameter"
        count = self.reads.get(id(tensor), 0)
        if count != reads or self.watched.get(id(tensor), count) != count:
            return f"{names[0]} is read {max(count, self.watched.get(id(tensor), 0))} times"
        return ""


def _counts(graphs: Sequence[Traced]) -> dict[int, int]:
    out: dict[int, int] = {}
    for traced in graphs:
        for node, tensor in traced.weights.items():
            out[id(tensor)] = out.get(id(tensor), 0) + len(list(_readers(node)))
    return out


def _readers(node: Node) -> Iterator[Node]:
    """Nodes that compute with a parameter, if only through views."""
    for user in node.users:
        if op_name(user) in VIEWS | TRANSPOSES:
            yield from _readers(user)
        elif op_name(user) not in READS_SHAPE:
            yield user


_Taken = tuple[tuple[int, ...], float]
"""The source's entry behind each channel, and the offset added to it."""


# --- one graph ---------------------------------------------------------------------------------


@dataclass
class _Graph:
    """One graph's products with Sites."""

    traced: Traced
    products: dict[Node, Use]
    sites: dict[Node, Site]
    """By weight node."""
    owners: Owners

    @staticmethod
    def of(traced: Traced, sites: Mapping[str, Site], owners: Owners) -> _Graph:
        named = ((node, owners.name(tensor)) for node, tensor in traced.weights.items())
        mine = {node: sites[name] for node, name in named if name in sites}
        found = uses(traced.graph, traced.weights)
        return _Graph(traced, {u.node: u for u in found if u.weight in mine}, mine, owners)

    def feeds(self) -> list[Feed]:
        """Candidates, several for a Site where there are, and a refusal for every Site."""
        out: list[Feed] = []
        for node, tensor in self.traced.weights.items():
            if tensor.dim() == 1:
                walk = follow(node, torch.arange(len(tensor)), self.products)
                out += self._groups(walk, self._norm(node, walk))
        for use in self.products.values():
            made = value(use.node)
            if isinstance(made, Tensor) and all(isinstance(n, int) for n in made.shape):
                channels = torch.arange(self.sites[use.weight].n)
                if use.kind == "conv1x1":
                    channels = channels.view(-1, *[1] * (made.dim() - 2))
                walk = follow(use.node, channels.expand(made.shape), self.products)
                out += self._groups(walk, self._linear(use))
        return out + self._unfed()

    def _norm(self, weight: Node, walk: Walk) -> Feed:
        """What all Feeds of a norm's weight have in common."""
        nodes = [weight] if walk.bias is None else [weight, walk.bias]
        names, why = self._parameters(nodes)
        return Feed((), "norm", names, reason=why)

    def _linear(self, use: Use) -> Feed:
        site, bias = self.sites[use.weight], operands(use)[1]
        nodes = [use.weight] if bias is None else [use.weight, bias]
        names, why = self._parameters(nodes)
        return Feed((), "linear", names, producer=site, reason=why)

    def _parameters(self, nodes: Sequence[Node]) -> tuple[tuple[str, ...], str]:
        """Names of the parameters behind `nodes`, and why they may not be edited."""
        tensors = [self.traced.weights.get(node) for node in nodes]
        known = [t for t in tensors if t is not None]
        if len(known) < len(nodes) or any(t.dim() != 1 for t in known[1:]):
            return (), "its bias is not a parameter of one dimension"
        whys = (self.owners.shared(t, 1) for t in known)
        return tuple(self.owners.name(t) for t in known), next(filter(None, whys), "")

    def _groups(self, walk: Walk, source: Feed) -> list[Feed]:
        """One Feed per choice of channels that readers take from the source."""
        groups: dict[_Taken, list[tuple[Use, State]]] = {}
        for use, state in walk.reads:
            channels = rows(use, state.index)
            if channels is None:
                walk.blocked.append((f"{op_name(use.node)} along another axis", state.index))
            else:
                groups.setdefault((channels, state.offset), []).append((use, state))
        return [self._group(walk, source, taken, groups) for taken in groups]

    def _group(
        self,
        walk: Walk,
        source: Feed,
        taken: _Taken,
        groups: Mapping[_Taken, list[tuple[Use, State]]],
    ) -> Feed:
        reads = groups[taken]
        weights = list(dict.fromkeys(use.weight for use, _ in reads))
        sites = tuple(self.sites[w] for w in weights)
        why = source.reason or _blocked(taken[0], walk)
        for other in groups:
            if other != taken and not set(taken[0]).isdisjoint(other[0]):
                why = why or f"{op_name(groups[other][0][0].node)} reads other channels of it"
        for weight in weights:
            count = sum(use.weight is weight for use, _ in reads)
            why = why or self.owners.shared(self.traced.weights[weight], count)
        if why:
            return Feed(sites, "none", reason=why)
        head = reads[0][1].head if all(state.plain for _, state in reads) else 0
        return replace(source, sites=sites, rows=taken[0], offset=taken[1], head=head)

    def _unfed(self) -> list[Feed]:
        """A refusal per tensor that is read, kept where no source was found."""
        out: dict[Node, dict[str, Site]] = {}
        for use in self.products.values():
            x = operands(use)[0]
            while op_name(x) in MOVES and isinstance(x.args[0], Node):
                x = x.args[0]
            site = self.sites[use.weight]
            out.setdefault(x, {})[site.name] = site
        why = "made by {}, which has no factors to take"
        return [
            Feed(tuple(sites.values()), "none", reason=why.format(op_name(x) or x.name))
            for x, sites in out.items()
        ]


def _blocked(taken: Sequence[int], walk: Walk) -> str:
    mine = set(taken)
    for reader, index in walk.blocked:
        if not mine.isdisjoint(entries(index)):
            return f"also read by {reader}"
    return ""
