"""Exported programs that are edited where they are: nothing is traced a second time.

`torch.export.export` and `ExportedProgram.run_decompositions` both trace a whole model to change a
few of its nodes: half of the time that an export takes. Here each such node is traced alone, and
nodes that are alike once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx

from sparsefx.ir.errors import ExportError

LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
"""Inputs of a program's graph that are tensors of the model."""
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
PLACE = ("nn_module_stack", "stack_trace")
"""What tells where in a model a node is from."""
STAY = ("_operator", "math", "builtins", "torch._C")
STAYING = ("torch.amp.", "torch.autograd.", "torch.export.", "torch.fx.", "torch._functorch.")
"""Modules, and what their names begin with, of functions in programs that compute no tensors:
arithmetic on sizes, parts of lists, changes of torch's state."""

Function = Callable[..., Any]
Meaning = Callable[[Any], Function | None]
"""What a node's target is to be spelled as, a function of the same arguments; None: it stays."""


class Program(torch.export.ExportedProgram):
    """An exported program that decomposes node by node."""

    def run_decompositions(
        self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False
    ) -> torch.export.ExportedProgram:
        """This program, changed, with the operators of `decomp_table` spelled out.

        Programs with in-place operators or control flow are traced again, as torch does.
        """
        if decomp_table is not None and all(_plain(node) for node in self.graph.nodes):
            try:
                meaning = partial(_decomposed, decomp_table)
                Speller(self.graph, self.graph_signature, meaning).spell()
            except Untraceable:
                pass  # every node spelled so far means what it did
            else:
                return self
        again: torch.export.ExportedProgram = super().run_decompositions(
            decomp_table, decompose_custom_triton_ops
        )
        return again


def opened(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program's own graph, its lifted tensors attributes (`get_attr`); `closed` undoes that.

    The program itself is of no use afterwards, but for `closed`.
    """
    graph, children = program.graph, dict(program.graph_module.named_children())
    specs = program.graph_signature.input_specs
    targets = {spec.arg.name: str(spec.target) for spec in specs if spec.kind in LIFTED}
    for node in list(graph.find_nodes(op="placeholder")):
        if node.name in targets:
            with graph.inserting_before(node):
                new = graph.create_node("get_attr", targets[node.name])
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    return fx.GraphModule({**children, **program.state_dict, **program.constants}, graph)


def closed(
    program: torch.export.ExportedProgram, gm: fx.GraphModule, spelled: Mapping[Any, Function]
) -> torch.export.ExportedProgram:
    """`program` with the graph of `gm`: what `opened` gave, edited.

    Operators in `spelled`, and functions that are no operators, become what they compute. Values
    recorded on nodes (`meta["val"]`) must be right where there are any.
    """
    graph = gm.graph
    _record(gm)
    signature = program.graph_signature
    specs, read = _lift(gm, {s.target: s for s in signature.input_specs})
    constants = {name: v for name, v in program.constants.items() if not isinstance(v, Tensor)}
    constants |= {name: v for name, v in read.items() if name not in program.state_dict}
    specs += [s for s in signature.input_specs if s.kind not in LIFTED]
    outputs: Any = graph.output_node().args[0]
    results = [_output(*pair) for pair in zip(signature.output_specs, outputs, strict=True)]
    new = ExportGraphSignature(specs, results)
    Speller(graph, new, partial(_spelled, spelled)).spell()
    return Program(
        gm, graph, new, program.state_dict, program.range_constraints, program.module_call_graph,
        program.example_inputs, constants, verifiers=program.verifiers,
    )  # fmt: skip


def _lift(
    gm: fx.GraphModule, known: Mapping[str | None, InputSpec]
) -> tuple[list[InputSpec], dict[str, Tensor]]:
    """Make the tensors that `gm` reads inputs of its graph; these, and the tensors by name.

    A tensor that is not `known` is a constant.
    """
    graph, specs, made = gm.graph, list[InputSpec](), dict[str, fx.Node]()
    tensors: dict[str, Tensor] = {}
    first = next(node for node in graph.nodes if node.op != "get_attr")
    for node in list(graph.find_nodes(op="get_attr")):
        target, tensor = str(node.target), operator.attrgetter(str(node.target))(gm)
        if not isinstance(tensor, Tensor):
            continue
        if target not in made:
            old = known.get(target)
            with graph.inserting_before(first):
                made[target] = graph.placeholder("c_" + target if old is None else old.arg.name)
            made[target].meta = dict(node.meta)
            kind, tensors[target] = InputKind.CONSTANT_TENSOR if old is None else old.kind, tensor
            arg = TensorArgument(made[target].name)
            specs.append(InputSpec(kind, arg, target, None if old is None else old.persistent))
        node.replace_all_uses_with(made[target])
        graph.erase_node(node)
    return specs, tensors


def _output(spec: OutputSpec, node: Any) -> OutputSpec:
    constant = isinstance(spec.arg, ConstantArgument)
    arg = spec.arg if constant else type(spec.arg)(node.name)  # type: ignore[call-arg]
    return OutputSpec(spec.kind, arg, spec.target)


def _record(gm: fx.GraphModule) -> None:
    """Record what nodes without a record compute, as fake tensors."""
    mode = _mode(gm.graph)
    for node in gm.graph.nodes:
        node.meta.setdefault("nn_module_stack", {})
        if "val" in node.meta:
            continue
        if node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(gm)
            if isinstance(tensor, Tensor):
                node.meta["val"] = mode.from_tensor(tensor)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode, torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)


def _mode(graph: fx.Graph) -> Any:
    """The mode in which the recorded values are fake."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next(v.fake_mode for v in values if hasattr(v, "fake_mode"))


# --- spelling out --------------------------------------------------------------------------------


class Untraceable(ExportError):
    """A node's meaning does not fit into a graph in its place."""


def _plain(node: fx.Node) -> bool:
    """Whether `node` has a meaning of its own: it changes no tensor and holds no graph."""
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        higher = isinstance(node.target, torch._ops.HigherOrderOperator)
        return not higher and (schema is None or not schema.is_mutable)
    return node.op in ("placeholder", "output")


def _spelled(table: Mapping[Any, Function], target: Any) -> Function | None:
    """The entry of `table`; a function that is no operator stands for itself."""
    if target in table or isinstance(target, torch._ops.OperatorBase):
        return table.get(target)
    place = str(target.__module__)
    stays = place in STAY or place.startswith(STAYING)
    return None if stays or target.__name__.startswith("sym_") else target


def _decomposed(table: Mapping[Any, Function], target: Any) -> Function | None:
    """As `run_decompositions`: the entry of `table`; composites that may give views never stay."""
    if target in table or not isinstance(target, torch._ops.OpOverload):
        return table.get(target)
    schema = target._schema
    views = any(a.alias_info for a in schema.arguments)
    views = views or torch.Tag.maybe_aliasing_or_mutating in target.tags
    tensors = all("Tensor" in str(r.type) for r in schema.returns)
    if not (views and tensors) or schema.is_mutable:
        return None
    name = str(schema.name) + f".{schema.overload_name}" * bool(schema.overload_name)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, COMPOSITE)
    return target if composite else None  # traced below where composites are taken apart


TRACES: tuple[Callable[[Function], Function], ...] = (
    partial(make_fx, pre_dispatch=True),  # as a model is traced: composites stay
    make_fx,
)


class Speller:
    """Replaces operators of one graph by the operators that they mean."""

    def __init__(self, graph: fx.Graph, signature: ExportGraphSignature, meaning: Meaning) -> None:
        self.graph, self.signature, self.meaning = graph, signature, meaning
        self.mode = _mode(graph)
        self.traced: dict[str, fx.Graph] = {}
        self.sizes: dict[str, fx.Node] = {}
        """The first node of each symbolic size, of those that came so far."""

    def spell(self) -> None:
        """Raises Untraceable where a node cannot be: the graph then means what it did."""
        pending = list(self.graph.nodes)[::-1]
        while pending:
            node = pending.pop()
            self._note_size(node)
            meaning = self.meaning(node.target) if node.op == "call_function" else None
            if meaning is not None:
                pending += self._inline(node, meaning)[::-1]
        self.graph.eliminate_dead_code()

    def _note_size(self, node: fx.Node) -> None:
        size = node.meta.get("val")
        if isinstance(size, torch.SymInt):
            self.sizes.setdefault(str(size), node)

    def _inline(self, node: fx.Node, meaning: Function) -> list[fx.Node]:
        """Put what `meaning` computes in the place of `node`; the new nodes."""
        body = self._body(node, meaning)
        known = dict(zip(body.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
        result, made = body.output_node().args[0], list[fx.Node]()
        getters = [user.target is operator.getitem for user in node.users]
        if not isinstance(result, fx.Node) and not (
            isinstance(result, (list, tuple)) and all(getters)
        ):
            raise Untraceable
        with self.graph.inserting_before(node):
            for inner in body.nodes:
                if (size := self.sizes.get(str(inner.meta.get("val")))) is not None:
                    known[inner] = size
                elif inner.op == "call_function":
                    known[inner] = self.graph.node_copy(inner, known.__getitem__)
                    place = {k: node.meta[k] for k in PLACE if k in node.meta}
                    known[inner].meta = {"val": inner.meta["val"], **place}
                    self._note_size(known[inner])
                    made.append(known[inner])
        if isinstance(result, fx.Node):
            self._replace(node, known[result])
        else:
            for user in list(node.users):
                self._replace(user, known[result[_index(user)]])
            self.graph.erase_node(node)
        return made

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)
        self.signature.replace_all_uses(old.name, new.name)
        self.graph.erase_node(old)

    def _body(self, node: fx.Node, meaning: Function) -> fx.Graph:
        """`meaning` of the arguments of `node` as a graph of its input nodes, in their order."""
        inputs = node.all_input_nodes
        values = [n.meta["val"] for n in inputs]
        if not all(isinstance(v, (Tensor, torch.SymInt)) for v in values):
            raise Untraceable(f"{node.target} takes {values}, not only tensors and sizes")
        spoken = {
            n: f"%{i} {_spoken(v)}" for i, (n, v) in enumerate(zip(inputs, values, strict=True))
        }
        key = f"{node.target} {fx.map_arg((node.args, node.kwargs), spoken.__getitem__)}"
        if key not in self.traced:
            self.traced[key] = self._trace(node, inputs, values, meaning)
        return self.traced[key]

    def _trace(
        self, node: fx.Node, inputs: list[fx.Node], values: list[Any], meaning: Function
    ) -> fx.Graph:
        def run(*given: Any) -> Any:
            known = dict(zip(inputs, given, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            return meaning(*args, **kwargs)

        for trace in TRACES:
            with self.mode, torch.no_grad():
                body = _functional(trace(run)(*values).graph)
            if all(_plain(inner) and inner.target != node.target for inner in body.nodes):
                return body
        raise Untraceable(f"{node.target} is made of operators that are not plain")


def _index(getter: fx.Node) -> int:
    index = getter.args[1]
    assert isinstance(index, int)
    return index


def _functional(body: fx.Graph) -> fx.Graph:
    """`body` with in-place operators on tensors that nothing else has seen as the usual ones."""
    for node in body.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or len(schema.returns) != 1:
            continue
        changed, name = node.args[0], node.target.overloadpacket.__name__
        made = getattr(changed.target, "_schema", None)
        fresh = made is not None and not any(a.alias_info for a in made.arguments)
        usual = getattr(torch.ops.aten, name.removesuffix("_"), None)
        if fresh and list(changed.users) == [node] and name.endswith("_") and usual is not None:
            node.target = getattr(usual, node.target._overloadname)
    return body


def _spoken(value: Any) -> str:
    """All that a trace may depend on."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
    return str(value)
