"""`torch.compile(model, backend="sparsefx", options={"spec": …, "inner": "inductor" | "eager"})`.

Dense weights are compressed at compile time (magnitude, round to nearest: no data is at hand), a
sparsified model is lowered as it is. The rest of the graph goes to `inner`; on GPUs Inductor gets
our Triton kernels as part of it (`triton_graph`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.guards import GuardBuilder
from torch.utils.weak import WeakIdKeyDictionary

from sparsefx.codegen import fused, kernels  # noqa: F401  (kernels of the ops)
from sparsefx.ir.capture import placeholder_weights
from sparsefx.ir.errors import FrozenWeightError, SpecError, StaleWeightError, nearest
from sparsefx.ir.sites import ChosenFormat, Traced, group_sites
from sparsefx.passes.manager import run_passes
from sparsefx.passes.pipeline import PASSES
from sparsefx.passes.plan import Choice, asked_for, check, low_rank_bases, low_rank_reason
from sparsefx.passes.spec import Spec
from sparsefx.runtime.report import Row
from sparsefx.runtime.triton_graph import triton_ops

COMPILED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Weight → Row of the last compilation that met it; `explain` reads it."""

INNER: Mapping[str, Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]] = {
    "eager": lambda gm, inputs: gm.forward,
    "inductor": lambda gm, inputs: _inductor(gm, inputs),
}
OPTIONS = ("spec", "inner")


def sparsefx(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    **other: Any,
) -> Callable[..., Any]:
    """The dynamo backend. `options["spec"]` is anything `sparsify` takes, "int8" by default;
    `options["inner"]` compiles what is not ours, "inductor" by default.

    With graph breaks each part is compiled alone, so a filter need not match in every part.
    """
    options = dict(options or {})
    for key in (*options, *other):
        if key not in OPTIONS:
            raise SpecError(f"backend 'sparsefx' has no option {key!r}{nearest(key, OPTIONS)}")
    inner = options.get("inner", "inductor")
    if inner not in INNER:
        raise SpecError(f"option inner={inner!r}{nearest(str(inner), INNER)}")
    spec = Spec.read(options.get("spec", "int8"))
    traced = Traced(gm.graph, placeholder_weights(gm, inputs))
    _choose(traced, spec)
    chosen = list(traced.chosen)  # folding puts others in their place
    read = {node: tensor for node, tensor in traced.weights.items() if node.users}
    packed = {c.site.name: traced.weights[node] for node, c in traced.chosen.items()}
    run_passes(traced, (*PASSES, triton_ops) if inner == "inductor" else PASSES)
    gm.recompile()
    for result in traced.results.values():
        COMPILED[packed[result.site.name]].compressed(result, {})
    unread = {node: tensor for node, tensor in read.items() if not node.users}
    frozen = unread | traced.frozen
    for node in (*chosen, *frozen):
        _only_for(node)
    by_name = {weight_name(node): tensor for node, tensor in frozen.items()}
    return _guarded(INNER[inner](gm, inputs), by_name)


def _inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    # Dynamo lists where each attribute of its graph came from; packed buffers came from nowhere it
    # knows, and AOTAutograd insists on a complete list or none.
    if hasattr(gm, "_param_name_to_source"):
        del gm._param_name_to_source
    return compile_fx(gm, list(inputs))  # type: ignore[return-value]


def _choose(traced: Traced, spec: Spec) -> None:
    """Fill `traced.chosen`, and remember every Site's Row for `explain`."""
    names = {id(t): (weight_name(node),) for node, t in traced.weights.items()}
    nodes = {id(t): node for node, t in traced.weights.items()}
    tensors = {id(t): t for t in traced.weights.values()}
    keys = {n[0]: key for key, n in names.items()}
    bases = low_rank_bases([traced], names)
    choices: list[Choice] = []
    for site in group_sites(names, [traced]):
        node, base = nodes[keys[site.name]], bases.get(site.name, "")
        classes = module_classes(node)
        fmt, reason = spec.format_for(site.names, classes)
        own = (site.names, classes)
        if site.kind in ("refused", "opaque"):
            fmt, reason = type(fmt)(), site.reason
        elif base and not asked_for(spec, own, ((base,), module_classes(nodes[keys[base]]))):
            fmt, reason = type(fmt)(), low_rank_reason(base)
        choices.append(Choice(site, fmt, reason))
    check([(c, tensors[keys[c.site.name]]) for c in choices if not c.dense])
    for choice in choices:
        key = keys[choice.site.name]
        COMPILED[tensors[key]] = Row.planned(choice)
        if not choice.dense:
            traced.chosen[nodes[key]] = ChosenFormat(choice.site, choice.format)


def weight_name(node: fx.Node) -> str:
    """The parameter's name in the model, from where dynamo found it; the node's name otherwise."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    text = source.name if source is not None else ""
    text = text() if callable(text) else text
    parts = re.findall(r"\['([^']+)'\]|\.([A-Za-z_]\w*)", text)
    path = [a for a, b in parts if a][1 if text.startswith(("L[", "G[")) else 0 :]
    return ".".join(path) if path else str(node.target if node.op == "get_attr" else node.name)


def _only_for(weight: fx.Node) -> None:
    """Let dynamo recompile where another weight takes this one's place.

    After a graph break dynamo reuses one graph for every layer of the same code, with the weights
    as inputs; what is packed here belongs to this weight alone.
    """
    context = torch._guards.TracingContext.try_get()
    source = getattr(weight.meta.get("grapharg"), "source", None)
    if context is not None and source is not None:
        guard = source.make_guard(GuardBuilder.ID_MATCH)
        context.guards_context.dynamo_guards.add(guard)


def module_classes(weight: fx.Node) -> tuple[str, ...]:
    """Class names of the innermost module around the weight's first product."""
    for user in weight.users:
        stack = user.meta.get("nn_module_stack") or {}
        for _, kind in reversed(list(stack.values())):
            return (kind if isinstance(kind, str) else kind.__name__,)
    return ()


class _NoWeightGradient(torch.autograd.Function):
    """Identity over outputs whose backward says that packed weights have no gradient."""

    @staticmethod
    def forward(ctx: Any, names: list[str], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.names = names
        return tuple(t.view_as(t) for t in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise FrozenWeightError(
            f"gradient of packed weights asked for: {', '.join(ctx.names[:5])}. Call "
            "requires_grad_(False) on them to train what is around, or compile without sparsefx"
        )


def _guarded(run: Callable[..., Any], frozen: Mapping[str, Tensor]) -> Callable[..., Any]:
    """`run`, refusing to use weights edited since they were packed, or to train them."""
    if not frozen:
        return run
    versions = {name: weight._version for name, weight in frozen.items()}

    def call(*args: Any) -> Any:
        for name, weight in frozen.items():
            if weight._version != versions[name]:
                raise StaleWeightError(
                    f"{name} was edited after it was packed at compile time; call "
                    "torch._dynamo.reset() (or torch.compile again) to pack the new values"
                )
        outputs = run(*args)
        trained = [n for n, w in frozen.items() if w.requires_grad]
        if trained and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return _refuse_training(trained, [frozen[n] for n in trained], outputs)
        return outputs

    return call


def _refuse_training(names: list[str], weights: list[Tensor], outputs: Any) -> Any:
    values = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    where = [i for i, o in enumerate(values) if isinstance(o, Tensor) and o.is_floating_point()]
    apply: Any = _NoWeightGradient.apply
    guarded = apply(names, len(weights), *weights, *(values[i] for i in where))
    for i, tensor in zip(where, guarded, strict=True):
        values[i] = tensor
    return type(outputs)(values) if isinstance(outputs, (tuple, list)) else values[0]
