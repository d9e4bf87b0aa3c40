"""A Site: one weight the model multiplies by, found in the graph or refused with a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from sparsefx.ir.format import Format
from sparsefx.ir.products import Kind, Use, argument, op_name, other_readers, uses, value


@dataclass
class Site:
    """One weight and every product it takes part in.

    `shape` is the parameter's own; (N, K) is `n`, `k`. `names` are all names of a tied parameter,
    the first is the Site's. `rows` are the numbers of rows seen by its products.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False
    calls: int = 0
    rows: tuple[str, ...] = ()
    reason: str = ""
    """Why the weight stays dense (kind "refused") or is unpacked on every call (kind "opaque")."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def n(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def k(self) -> int:
        rest = self.shape[:1] if self.transposed else self.shape[1:]
        out = 1
        for side in rest:
            out *= side
        return out

    def matrix(self, weight: Tensor) -> Tensor:
        """The parameter's data as (N, K); a view where it can be."""
        return weight.detach().T if self.transposed else weight.detach().reshape(self.n, self.k)

    def parameter_shape(self, matrix: Tensor) -> Tensor:
        """(N, K) data in the parameter's own shape; the inverse of `matrix`."""
        return matrix.T if self.transposed else matrix.reshape(self.shape)


@dataclass(frozen=True)
class ChosenFormat:
    """How one weight node is to be stored, and the Site it belongs to."""

    site: Site
    format: Format


@dataclass
class Traced:
    """One graph a door gave, and which of its nodes are weights: what passes work on."""

    graph: Graph
    weights: dict[Node, Tensor]
    chosen: dict[Node, ChosenFormat] = field(default_factory=dict)
    """Weights that are to be packed, and how."""
    results: dict[Node, Any] = field(default_factory=dict)
    """What packing them gave (`passes.compress.Result`)."""
    frozen: dict[Node, Tensor] = field(default_factory=dict)
    """Weights whose values passes read: editing them makes the graph wrong."""
    notes: list[str] = field(default_factory=list)
    """What passes left as it was, and why."""


@dataclass
class Capture:
    """What a door saw: graphs (several after graph breaks), Sites in call order, and notes."""

    door: str
    graphs: list[Traced]
    sites: list[Site] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parameter_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """id(parameter) → every name it has in the model, first name first."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def find_sites(model: nn.Module, graphs: Sequence[Traced]) -> list[Site]:
    """Sites of all graphs in call order, with refused ones, without weights never multiplied by.

    Linear-like modules that no graph reached are appended as refused: none is missed in silence.
    """
    names = parameter_names(model)
    sites = group_sites(names, graphs)
    return sites + _unreached(model, names, {name for site in sites for name in site.names})


def group_sites(names: Mapping[int, tuple[str, ...]], graphs: Sequence[Traced]) -> list[Site]:
    """One Site per weight of the graphs that has names under its id."""
    tensors: dict[int, Tensor] = {}
    found: dict[int, list[Use]] = {}
    readers: dict[int, list[Node]] = {}
    for traced in graphs:
        for use in uses(traced.graph, traced.weights):
            found.setdefault(id(traced.weights[use.weight]), []).append(use)
        for node, tensor in traced.weights.items():
            tensors[id(tensor)] = tensor
            readers.setdefault(id(tensor), []).extend(other_readers(node))
    return [
        _site(names[key], tensors[key], group, readers[key])
        for key, group in found.items()
        if key in names
    ]


def _site(names: tuple[str, ...], weight: Tensor, found: list[Use], readers: list[Node]) -> Site:
    kinds: list[Kind] = [use.kind for use in found]
    refused = next((use.reason for use in found if use.kind == "refused"), "")
    site = Site(names, tuple(weight.shape), kinds[0], found[0].transposed, len(found))
    site.rows = tuple(dict.fromkeys(_rows(use) for use in found))
    if readers:
        refused = f"also read by {op_name(readers[0])} (tied weight); kept tied and dense"
    elif not refused and len({(use.kind, use.transposed) for use in found}) > 1:
        site.kind, site.transposed = "opaque", False
        site.reason = f"multiplied in {len(found)} different ways"
    if refused:
        site.kind, site.reason, site.transposed = "refused", refused, False
    elif site.kind == "opaque":
        site.reason = site.reason or next(u.reason for u in found if u.kind == "opaque")
        site.transposed = False
    return site


def _rows(use: Use) -> str:
    x = value(argument(use.node, 1 if op_name(use.node) == "addmm" else 0, "input"))
    if not isinstance(x, Tensor):
        return "?"
    if use.kind == "conv1x1":
        return str(x.numel() // max(x.shape[1], 1))
    count = 1
    for side in x.shape[:-1]:
        count *= side
    return str(count)


def _unreached(
    model: nn.Module, names: Mapping[int, tuple[str, ...]], known: set[str]
) -> list[Site]:
    out: dict[int, Site] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if linear and isinstance(weight, nn.Parameter) and known.isdisjoint(names[id(weight)]):
            reason = (
                "no graph reaches it: the example inputs do not use it, or it could not be traced"
            )
            out[id(weight)] = Site(names[id(weight)], tuple(weight.shape), "refused", reason=reason)
    return list(out.values())
