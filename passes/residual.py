"""The residual stream of a graph: everything that writes it and reads it, or why it has none.

The stream is what embeddings and products add up to and what norms and products read. It may be
rotated when every op on it commutes with an orthogonal matrix on the last axis: sums, factors per
row, moves that keep the axis, and RMS norms (whose own factors are moved into their readers first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from sparsefx.ir.products import Use, argument, op_name, uses, value
from sparsefx.ir.sites import Capture, Site, Traced
from sparsefx.passes.channels import CASTS, IGNORED, LIKE, MOVES, SCALES, run_on
from sparsefx.passes.feeds import Feed, Owners, flowing
from sparsefx.passes.normalise import operands

SQUARES = {"pow", "square"}
SUMS = {"mean", "sum"}


@dataclass
class Stream:
    """What to rotate; `reason` is why nothing may be, "" where all is proven."""

    reason: str = ""
    hidden: int = 0
    readers: dict[str, Site] = field(default_factory=dict)
    writers: dict[str, Site | None] = field(default_factory=dict)
    """Sites, and None for embedding tables."""
    biases: list[str] = field(default_factory=list)
    """Of writers."""
    gains: list[Feed] = field(default_factory=list)
    """Norms whose factors have to move into their readers."""


def find_stream(model: nn.Module, captured: Capture, feeds: Sequence[Feed]) -> Stream:
    """The stream that the embeddings of the one captured graph begin."""
    graphs = flowing(captured)
    if len(graphs) != 1:
        return Stream(f"the model was captured in {len(graphs)} graphs; the stream needs one")
    walk = _Walk(graphs[0], captured.sites, Owners.of(model, captured), feeds)
    try:
        walk.run()
    except _Refused as refused:
        return Stream(str(refused))
    return walk.stream


class _Refused(Exception):
    """Why the stream may not be rotated."""


class _Walk:
    """From the embeddings to every reader, and from every sum back to its writers."""

    def __init__(
        self, traced: Traced, sites: Sequence[Site], owners: Owners, feeds: Sequence[Feed]
    ) -> None:
        self.traced, self.owners = traced, owners
        self.sites = {s.name: s for s in sites if s.kind == "linear"}
        found = uses(traced.graph, traced.weights)
        self.products: Mapping[Node, Use] = {u.node: u for u in found if u.kind == "linear"}
        self.gains = {f.parameters[0]: f for f in feeds if f.source == "norm"}
        self.stream = Stream()
        self.reads: dict[str, int] = {}
        self.seen: dict[Node, bool] = {}
        """Node → it is behind a norm's factors."""
        self.pending: list[Node] = []

    def run(self) -> None:
        tables = [n for n in self.traced.graph.nodes if op_name(n) == "embedding"]
        widths = {int(value(n).shape[-1]) for n in tables if isinstance(value(n), Tensor)}
        if len(widths) != 1:
            raise _Refused(f"embeddings of widths {sorted(widths)}: no single stream")
        self.stream.hidden = widths.pop()
        for node in tables:
            self._mark(node, False)
        while self.pending:
            node = self.pending.pop()
            if not self.seen[node]:
                self._made(node)
            for user in node.users:
                self._read(node, user)
        for name, count in self.reads.items():
            weight = next(t for t in self.traced.weights.values() if self.owners.name(t) == name)
            self._private(weight, count)

    def _mark(self, node: Any, gained: bool = False) -> None:
        if not isinstance(node, Node):
            raise _Refused("a constant is added to the residual stream")
        if node not in self.seen:
            self.seen[node] = gained
            self.pending.append(node)
        elif self.seen[node] != gained:
            raise _Refused(f"{op_name(node)} mixes the residual stream with a norm's output")

    # --- what makes a tensor of the stream -----------------------------------------------------

    def _made(self, node: Node) -> None:
        name = op_name(node)
        if node in self.products:
            return self._writer(self.products[node])
        if name == "embedding":
            return self._table(node)
        if name == "add" and not node.kwargs and len(node.args) == 2:
            self._mark(node.args[0])
            return self._mark(node.args[1])
        source = node.args[0] if node.args else None
        if name in SCALES:
            source = self._scaled(node)
        elif name in CASTS or name == "dropout" or self._bare_norm(node):
            pass
        elif name in MOVES and isinstance(source, Node):
            self._keeps_axis(source, node)
        else:
            raise _Refused(f"{name or node.name} writes to the residual stream")
        return self._mark(source)

    def _table(self, node: Node) -> None:
        weight = argument(node, 0 if node.args[0] in self.traced.weights else 1, "weight")
        name = self._private(self._parameter(weight), 1)
        self.stream.writers[name] = None

    def _writer(self, use: Use) -> None:
        name, bias = self._private(self._parameter(use.weight), 1), operands(use)[1]
        if name not in self.sites:
            raise _Refused(f"{name} writes to the residual stream, and is no plain product")
        self.stream.writers[name] = self.sites[name]
        if bias is not None:
            self.stream.biases.append(self._private(self._parameter(bias), 1))

    def _parameter(self, node: Any) -> Tensor:
        if node not in self.traced.weights:
            raise _Refused(f"{node} writes to the residual stream, and is not a parameter")
        return self.traced.weights[node]

    def _private(self, tensor: Tensor, reads: int) -> str:
        if why := self.owners.shared(tensor, reads):
            raise _Refused(why)
        return self.owners.name(tensor)

    # --- what reads it -------------------------------------------------------------------------

    def _read(self, node: Node, user: Node) -> None:
        name, gained = op_name(user), self.seen[node]
        first = bool(user.args) and user.args[0] is node
        what = "a norm's output" if gained else "the residual stream"
        if name in IGNORED or (name in LIKE and not first):
            return
        if user in self.products and operands(self.products[user])[0] is node:
            self._reader(self.products[user])
        elif name in CASTS or name == "dropout":
            self._mark(user, gained)
        elif name in MOVES and first:
            self._keeps_axis(node, user)
            self._mark(user, gained)
        elif name in SCALES and self._scaled(user, quiet=True) is node:
            self._mark(user, gained)
        elif gained or user.op == "output":
            raise _Refused(f"{what} is read by {name or 'the graph itself'}")
        elif name == "add":
            self._mark(user)
        elif name == "mul" and (gain := self._gain(node, user)):
            self.stream.gains.append(gain)
            self._mark(user, True)
        elif name == "rms_norm" and first:
            self._rms_norm(node, user)
        elif not (name in SQUARES and self._norm_only(user)):
            raise _Refused(_why(name))

    def _reader(self, use: Use) -> None:
        name = self.owners.name(self._parameter(use.weight))
        if name not in self.sites:
            raise _Refused(f"{name} reads the residual stream, and is no plain product")
        self.stream.readers[name] = self.sites[name]
        self.reads[name] = self.reads.get(name, 0) + 1

    def _gain(self, node: Node, user: Node) -> Feed | None:
        """The Feed of the parameter, if only cast or added to, that multiplies in `user`."""
        other: Any = user.args[1] if user.args[0] is node else user.args[0]
        while isinstance(other, Node) and (op_name(other) in CASTS or op_name(other) == "add"):
            other = next(iter(other.all_input_nodes), None)
        return self._factors(other) if other in self.traced.weights else None

    def _factors(self, weight: Node) -> Feed:
        name = self.owners.name(self._parameter(weight))
        feed = self.gains.get(name)
        if feed is None or feed.rows != tuple(range(self.stream.hidden)):
            raise _Refused(f"{name} cannot move into what reads the norm: {self._reason(weight)}")
        if len(feed.parameters) > 1:
            raise _Refused(f"{feed.parameters[1]} is added to a norm's output")
        return feed

    def _reason(self, weight: Node) -> str:
        return self.owners.shared(self._parameter(weight), 1) or "more than products read it"

    def _rms_norm(self, node: Node, user: Node) -> None:
        weight = argument(user, 2, "weight")
        if list(argument(user, 1, "normalized_shape")) != [self.stream.hidden]:
            raise _Refused("rms_norm over another axis")
        if weight is not None:
            self.stream.gains.append(self._factors(weight))
        self._mark(user, weight is not None)

    @staticmethod
    def _bare_norm(node: Node) -> bool:
        """An RMS norm without factors of its own: x times a number per row."""
        return op_name(node) == "rms_norm" and argument(node, 2, "weight") is None

    def _norm_only(self, square: Node) -> bool:
        """Whether a square is only summed over the last axis: a rotation keeps that."""
        power = argument(square, 1, "exponent") if op_name(square) == "pow" else 2
        sums = [u for u in square.users if op_name(u) not in IGNORED]
        return power == 2 and all(
            op_name(u) in SUMS and argument(u, 1, "dim") in (-1, [-1], (-1,)) for u in sums
        )

    def _scaled(self, node: Node, quiet: bool = False) -> Node | None:
        """The operand that keeps the hidden axis where the other is one factor per row."""
        a, b = node.args[:2]
        per_row = [_per_row(operand) for operand in (a, b)]
        if per_row[1] and not per_row[0] and isinstance(a, Node):
            return a
        if op_name(node) == "mul" and per_row[0] and not per_row[1] and isinstance(b, Node):
            return b
        if quiet:
            return None
        raise _Refused(f"{op_name(node)} scales channels of the residual stream")

    def _keeps_axis(self, source: Node, node: Node) -> None:
        """Refuse moves that do not leave every vector of the last axis as it is."""
        channels = torch.arange(self.stream.hidden)
        try:
            moved = run_on(node, source, channels.expand(tuple(value(source).shape)))
            kept = torch.equal(moved, channels.expand(tuple(moved.shape)))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            kept = False
        if not kept:
            raise _Refused(f"{op_name(node)} moves channels of the residual stream")


def _per_row(operand: Any) -> bool:
    if isinstance(operand, (int, float)):
        return True
    tensor = value(operand)
    return isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[-1] == 1)


def _why(name: str) -> str:
    if name == "layer_norm":
        return "layer_norm subtracts the mean of the channels, which a rotation moves"
    return f"{name} reads the residual stream"
