"""Watch a model run and write down what it does with its weights: for Python no tracer follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsefx.ir.products import TRANSPOSES, VIEWS, op_name


class Watch(TorchFunctionMode):
    """While active, every call that takes a weight (or a view of one) becomes a node of `graph`.

    `weights` maps the nodes that stand for parameters to them; other tensors are placeholders.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = Graph()
        self.weights: dict[Node, Tensor] = {}
        self._known: dict[int, tuple[Tensor, Node]] = {}
        for i, parameter in enumerate(model.parameters()):
            node = self.graph.placeholder(f"p{i}")
            self.weights[node] = parameter
            self._known[id(parameter)] = (parameter, node)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        reads = any(id(a) in self._known for a in tree_leaves((tuple(args), kwargs)))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if reads and made:
            self._record(func, tuple(args), kwargs, out)
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if getattr(func, "__name__", "") == "__get__":  # x.T, x.mT
            func, args = getattr, (*args[:1], func.__self__.__name__)
        node = self.graph.call_function(func, *tree_map(self._node, (args, kwargs)))
        name = op_name(node)
        if name not in VIEWS and name not in TRANSPOSES:
            return
        if isinstance(out, Tensor):
            self._known.setdefault(id(out), (out, node))
        else:
            for i, part in enumerate(out):
                item = self.graph.call_function(torch.ops.aten.select.int, (node, 0, i))
                self._known.setdefault(id(part), (part, item))

    def _node(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, (int, float, bool, str, type(None))) else None
        if id(leaf) in self._known:
            return self._known[id(leaf)][1]
        node = self.graph.placeholder("x")
        node.meta["val"] = torch.empty(leaf.shape, device="meta")
        return node
