"""Three doors from a module to graphs: `torch.export`, dynamo, `torch.fx.symbolic_trace`.

`capture` tries export first (one whole graph), then dynamo (which survives graph breaks and data-
dependent Python); without example inputs only symbolic_trace is left.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsefx.ir.errors import CaptureError
from sparsefx.ir.products import uses
from sparsefx.ir.sites import Capture, Traced, find_sites
from sparsefx.ir.watch import Watch


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) for a tensor, a tuple/list of arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def capture(model: nn.Module, example_inputs: Any = None, door: str | None = None) -> Capture:
    """Graphs and Sites of `model`. Raises CaptureError with every door's reason when none opens."""
    order = [door] if door else ["export", "dynamo"] if example_inputs is not None else ["symbolic"]
    notes: list[str] = []
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        for name in order:
            try:
                graphs = DOORS[name](model, *split_inputs(example_inputs))
            except Exception as error:  # whatever the tracer raises, the next door may open
                first = (str(error).strip() or "no message").splitlines()[0][:200]
                notes.append(f"{name}: {type(error).__name__}: {first}")
                continue
            return Capture(name, graphs, find_sites(model, graphs), notes)
    finally:
        for module in training:
            module.training = True
    hint = "" if example_inputs is not None else "; pass example_inputs so that the others can try"
    raise CaptureError(f"{type(model).__name__} could not be captured by {'; '.join(notes)}{hint}")


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Traced]:
    noise = io.StringIO()  # a failing export prints its whole graph
    with torch.no_grad(), warnings.catch_warnings(), redirect_stderr(noise), redirect_stdout(noise):
        warnings.simplefilter("ignore")
        program = torch.export.export(model, args, kwargs, strict=False)
    signature = program.graph_signature.inputs_to_parameters
    weights = {
        node: model.get_parameter(signature[node.name])
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in signature
    }
    return [Traced(program.graph, dict(weights))]


def _dynamo(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Traced]:
    graphs: list[Traced] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            # Recorded at the call: after a graph break one graph may serve many layers' weights.
            graphs.append(Traced(gm.graph, placeholder_weights(gm, args)))
            return gm(*args)

        return run

    run = torch.compile(model, backend=keep)
    limits = {
        "recompile_limit": 1 << 20,
        "accumulated_recompile_limit": 1 << 20,
        # A frame that ran with other sizes before would show symbols in their place.
        "automatic_dynamic_shapes": False,
    }
    with torch.no_grad(), warnings.catch_warnings(), torch._dynamo.config.patch(limits):
        warnings.simplefilter("ignore")
        run(*args, **kwargs)
    return [*graphs, _untraced(model, args, kwargs, graphs)]


def _untraced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], graphs: Sequence[Traced]
) -> Traced:
    """What frames that dynamo skipped (a break in a loop) do with weights, by watching a run."""
    seen = {id(t.weights[use.weight]) for t in graphs for use in uses(t.graph, t.weights)}
    with torch.no_grad(), Watch(model) as watch:
        model(*args, **kwargs)
    left = {node: w for node, w in watch.weights.items() if id(w) not in seen}
    return Traced(watch.graph, left)


def placeholder_weights(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """Nodes of a dynamo graph that stand for parameters: lifted placeholders or attributes."""
    holders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    out: dict[fx.Node, Tensor] = {
        n: t for n, t in zip(holders, inputs, strict=False) if isinstance(t, nn.Parameter)
    }
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            found = getattr(gm.get_submodule(owner), name, None)
            if isinstance(found, nn.Parameter):
                out[node] = found
    return out


class _Tracer(fx.Tracer):
    """Enters modules that own weights, so that they show as functions of get_attr nodes."""

    enter = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return not isinstance(m, self.enter) and super().is_leaf_module(m, name)


def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Traced]:
    graph = _Tracer().trace(model)
    leaves = [
        node.target
        for node in graph.nodes
        if node.op == "call_module"
        and any(p.dim() > 1 for p in model.get_submodule(str(node.target)).parameters())
    ]
    if leaves:
        raise CaptureError(f"modules {leaves[:3]} hold weights but cannot be entered")
    weights: dict[fx.Node, Tensor] = {
        node: model.get_parameter(str(node.target))
        for node in graph.nodes
        if node.op == "get_attr" and _is_parameter(model, str(node.target))
    }
    return [Traced(graph, weights)]


def _is_parameter(model: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return isinstance(getattr(model.get_submodule(owner), attribute, None), nn.Parameter)


Door = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], list[Traced]]
DOORS: dict[str, Door] = {"export": _export, "dynamo": _dynamo, "symbolic": _symbolic}
