"""ONNX: an exported program becomes an ONNX graph in which every packed weight is lowered.

torch.onnx first writes each `sparsefx::linear` and `sparsefx::unpack` as one placeholder node of
our own domain; `lower` then replaces the placeholders by what `onnx_lower`'s table says.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefx.codegen.onnx_lower import ORT_DOMAIN, Lowering, Problem, Stored, Writer, choose
from sparsefx.ir.errors import ExportError, MissingPackageError
from sparsefx.ir.format import Format, Packed

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "sparsefx"
OPSET = 18
"""What torch.onnx's operator library is written in: no version conversion takes place."""
OPAQUE = "its owner computes with the dense weight"
IR_VERSION = 10
"""onnx writes 14 by default; ONNX Runtime 1.31 reads at most 13, 1.20 at most 10."""


@dataclass(frozen=True)
class Lowered:
    """What became of one product by a packed weight, or of one unpacking."""

    name: str
    """Module that holds the packed weight."""
    format: str
    op: str
    note: str
    """Why this is not the preferred operator, and what was stored wider; empty when neither."""
    weight: str
    """Graph value of the stored weight: MatMulNBits's codes or a (K, N) matrix."""
    output: str
    """Graph value of the product, bias and branch included, or of the unpacked weight."""


def require_packages() -> None:
    """Raises MissingPackageError unless the packages of the `onnx` extra are there."""
    missing = [p for p in ("onnx", "onnx_ir", "onnxscript", "onnxruntime") if find_spec(p) is None]
    if missing:
        raise MissingPackageError(
            f"exporting to ONNX needs {', '.join(missing)}; "
            'install with: pip install "sparsefx[onnx]"'
        )


def to_onnx(
    program: torch.export.ExportedProgram, axis_names: Sequence[Mapping[int, str]]
) -> tuple[ir.Model, list[Lowered]]:
    """The ONNX model of `program` and one row per use of a packed weight, in execution order.

    `axis_names` names the dynamic axes of every tensor input, in order.
    """
    # Its table of torchvision's operators warns about each one when torchvision is absent.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=[dict(axes) for axes in axis_names],
            custom_translation_table=_translations(),
            verbose=False,
            optimize=False,
        )
    assert exported is not None
    model = exported.model
    model.ir_version = IR_VERSION
    _tidy(model)
    return model, lower(model, {**program.state_dict, **program.constants})


def _tidy(model: ir.Model) -> None:
    """Fold constants, share what is equal, drop what is unused.

    torch.onnx's own `optimize` also tries rewrite rules whose matching walks the whole graph for
    every node (minutes for 30 layers); ONNX Runtime does those rewrites when it loads.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    common.InlinePass()(model)
    fold_constants_ir(model, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch.onnx writes our two ops: as nodes of our own domain that `lower` replaces."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    def node(kind: str, attributes: str) -> Any:
        many = OpSchema.FormalParameterOption.Variadic
        formal = OpSchema.FormalParameter
        ints = [OpSchema.Attribute(a, OpSchema.AttrType.INT, "") for a in attributes.split()]
        schema = OpSchema(
            kind, DOMAIN, 1, type_constraints=[("T", ["tensor(float)"], "")],
            inputs=[formal("inputs", "T", param_option=many, is_homogeneous=False)],
            outputs=[formal("output", "T")],
            attributes=[OpSchema.Attribute("format", OpSchema.AttrType.STRING, ""), *ints],
        )  # fmt: skip
        return Op(Opset(DOMAIN, 1), kind, schema)

    product, dense = node("linear", "n weights biased"), node("unpack", "n k to")

    def linear(x: Any, weight: Any, bias: Any, branch: Any, format: str, n: int) -> Any:
        last = [] if bias is None else [bias]
        counts = {"weights": len(weight), "biased": len(last)}
        return product(x, *weight, *branch, *last, format=format, n=n, **counts)

    def unpack(weight: Any, format: str, n: int, k: int, dtype: int) -> Any:
        return dense(*weight, format=format, n=n, k=k, to=dtype)

    ops = torch.ops.sparsefx
    return {ops.linear.default: linear, ops.unpack.default: unpack}


def lower(model: ir.Model, tensors: Mapping[str, Tensor]) -> list[Lowered]:
    """Replace every placeholder node of `model`; `tensors` holds initializers' values by name."""
    import onnx_ir.passes.common as passes

    lowerer = _Lowerer(model.graph, tensors)
    rows = [lowerer.replace(node) for node in list(model.graph) if node.domain == DOMAIN]
    passes.RemoveUnusedNodesPass()(model)
    left = [node.name for node in model.graph.all_nodes() if node.domain == DOMAIN]
    left += [node.name for f in model.functions.values() for node in f if node.domain == DOMAIN]
    if left:
        raise ExportError(f"packed weights inside control flow cannot be exported: {left[:3]}")
    model.graph.opset_imports.pop(DOMAIN, None)
    if any(node.domain == ORT_DOMAIN for node in model.graph):
        model.graph.opset_imports[ORT_DOMAIN] = 1
    return rows


Emitted = tuple[tuple[str, str, str, str, str], Sequence["ir.Node"], "ir.Value"]
"""The first five fields of Lowered, the new nodes and their result."""


class _Lowerer:
    """Replaces placeholders of one graph; a weight that several of them use is written once."""

    def __init__(self, graph: ir.Graph, tensors: Mapping[str, Tensor]) -> None:
        self.graph, self.tensors = graph, tensors
        self.written: dict[tuple[object, ...], Stored] = {}
        self.zero: ir.Value | None = None

    def replace(self, node: ir.Node) -> Lowered:
        from onnx_ir.convenience import replace_nodes_and_values

        emit = self._linear if node.op_type == "linear" else self._unpack
        row, nodes, value = emit(node)
        old = node.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        replace_nodes_and_values(self.graph, node, [node], nodes, [old], [value])
        assert value.name is not None
        return Lowered(*row, output=value.name)

    def _linear(self, node: ir.Node) -> Emitted:
        x, *rest = node.inputs
        assert x is not None
        assert x.shape is not None
        assert x.dtype is not None
        bias = rest.pop() if node.attributes["biased"].as_int() else None
        count = node.attributes["weights"].as_int()
        k = x.shape[-1]
        assert isinstance(k, int)
        packed, name = self._packed(node, rest[:count], node.attributes["n"].as_int(), k)
        writer = Writer(name)
        double = x.dtype == writer.types.DOUBLE
        row, why = choose(Problem(packed.format, packed.n, k, double))
        stored, first = self._stored(row, packed, name, rest[:count])
        # Half-precision products run in float32, as ONNX Runtime has no CPU kernels for bfloat16
        # and emulates float16; the weight is then not rounded to half precision either.
        compute = writer.types.DOUBLE if double else writer.types.FLOAT
        wide = writer.cast(x, compute)
        if x.shape.rank() == 1:
            wide = writer.op("Unsqueeze", wide, self._axis(writer))
            wide.dtype = compute
        y = row.product(writer, wide, stored)
        if bias is not None:
            y = writer.op("Add", y, writer.cast(bias, compute))
        y = _add_branch(writer, y, wide, rest[count:], compute)
        if x.shape.rank() == 1:
            y = writer.op("Squeeze", y, self._axis(writer))
        y.dtype = compute
        y = writer.cast(y, x.dtype)
        self._register(writer)
        return _describe(name, packed, row, why, stored), (*first, *writer.tape.nodes), y

    def _axis(self, writer: Writer) -> ir.Value:
        """The constant [0], written once."""
        if self.zero is None:
            self.zero = writer.constant("axis", torch.tensor([0]))
        return self.zero

    def _unpack(self, node: ir.Node) -> Emitted:
        n, k = node.attributes["n"].as_int(), node.attributes["k"].as_int()
        packed, name = self._packed(node, node.inputs, n, k)
        writer = Writer(name)
        row, _ = choose(Problem(packed.format, n, k), dense=True)
        stored, first = self._stored(row, packed, name, node.inputs)
        to = writer.types(node.attributes["to"].as_int())
        y = writer.op("Transpose", writer.cast(stored.inputs[0], to), perm=[1, 0])
        y.dtype = to
        described = _describe(name, packed, row, OPAQUE, stored)
        return described, (*first, *writer.tape.nodes), y

    def _packed(self, node: ir.Node, values: Sequence[Any], n: int, k: int) -> tuple[Packed, str]:
        """The stored weight behind a placeholder, and the name of the module that holds it."""
        names = [value.name for value in values]
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise ExportError(f"packed buffers {missing} are not constants of the exported program")
        fmt = Format.parse(node.attributes["format"].as_string())
        packed = Packed(fmt, n, k, tuple(self.tensors[name].detach().cpu() for name in names))
        return packed, names[0].rpartition(".")[0]

    def _stored(
        self, row: Lowering, packed: Packed, name: str, values: Sequence[Any]
    ) -> tuple[Stored, Sequence[ir.Node]]:
        """The weight in the graph, and the nodes to insert when it is new there."""
        # Addresses of the model's own tensors: those of copies from a GPU may be used again.
        places = (self.tensors[value.name].data_ptr() for value in values)
        key = (row.op, str(packed.format), packed.n, packed.k, *places)
        if key in self.written:
            return self.written[key], ()
        # A weight may be in the file twice: in blocks for its products and as a matrix to unpack.
        writer = Writer(f"{name}/{row.suffix}")
        stored = row.store(writer, packed)
        for index, value in enumerate(stored.inputs):
            value.name = value.name or f"{writer.name}/input{index}"
        self._register(writer)
        self.written[key] = stored
        return stored, writer.tape.nodes

    def _register(self, writer: Writer) -> None:
        for value in writer.tape.initializers:
            self.graph.register_initializer(value)


def _describe(
    name: str, packed: Packed, row: Lowering, why: str, stored: Stored
) -> tuple[str, str, str, str, str]:
    note = "; ".join(part for part in (why, stored.note) if part)
    assert stored.inputs[0].name is not None
    return name, str(packed.format), row.op, note, stored.inputs[0].name


def _add_branch(
    writer: Writer, y: ir.Value, x: ir.Value, branch: Sequence[Any], compute: ir.DataType
) -> ir.Value:
    """y + ((x · downᵀ) · scale) · upᵀ; the three stay initializers that a user can replace."""
    if not branch:
        return y
    down, up, scale = (writer.cast(value, compute) for value in branch)
    low = writer.op("MatMul", x, writer.op("Transpose", down, perm=[1, 0]))
    scaled = writer.op("Mul", low, scale)
    return writer.op("Add", y, writer.op("MatMul", scaled, writer.op("Transpose", up, perm=[1, 0])))
