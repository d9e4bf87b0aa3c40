"""ONNX: an exported program becomes an ONNX graph in which every packed weight is lowered.

torch.onnx first writes each `sparsefx::linear` and `sparsefx::unpack` as one placeholder node of
our own domain. `lower` makes of each product a node `sparsefx::Linear` over the stored buffers,
with a function body in standard operators (`onnx_lower`'s table): stock ONNX Runtime runs the
body, and the CPU engine takes the node where it is registered. Equal bodies are written once.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsefx.codegen.onnx_decode import Source, attributes_of
from sparsefx.codegen.onnx_fusions import tidy
from sparsefx.codegen.onnx_gather import narrowed
from sparsefx.codegen.onnx_lower import ORT_DOMAIN, Lowering, Problem, Stored, choose, round_rows
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.codecs import Fp8, Int
from sparsefx.ir.errors import ExportError, MissingPackageError
from sparsefx.ir.format import Format, Packed

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "sparsefx"
OPSET = 18
"""What torch.onnx's operator library is written in: no version conversion takes place."""
OPAQUE = "its owner computes with the dense weight"
PRODUCT, BRANCHED, WEIGHT = "product", "product with a branch", "weight"
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
    stored: str
    """Initializer that holds the stored values."""
    output: str
    """Graph value of the product, bias and branch included, or of the unpacked weight."""
    kind: str = PRODUCT
    """What that value is: PRODUCT, BRANCHED or WEIGHT."""


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
    _own(model)
    tidy(model)
    return model, lower(model, {**program.state_dict, **program.constants})


def _own(model: ir.Model) -> None:
    """Note on every placeholder whose weight it holds: equal buffers become one later."""
    import onnx_ir as ir

    for node in model.graph:
        if _placeholder(node):
            buffer = node.inputs[1 if node.op_type == "linear" else 0]
            assert buffer is not None
            node.attributes["owner"] = ir.AttrString("owner", _owner(buffer))


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


def lower(model: ir.Model, tensors: Mapping[str, Tensor], tidy: bool = True) -> list[Lowered]:
    """Replace every placeholder node of `model`; `tensors` holds initializers' values by name.

    With `tidy` all that nothing uses is removed. The model's opset is `OPSET` or later.
    """
    import onnx_ir.passes.common as passes

    lowerer = _Lowerer(model.graph, tensors)
    rows = [lowerer.replace(node) for node in list(model.graph) if _placeholder(node)]
    if tidy:
        passes.RemoveUnusedNodesPass()(model)
    left = [node.name for node in model.graph.all_nodes() if _placeholder(node)]
    left += [node.name for f in model.functions.values() for node in f if _placeholder(node)]
    if left:
        raise ExportError(f"packed weights inside control flow cannot be exported: {left[:3]}")
    model.graph.opset_imports.pop(DOMAIN, None)
    for function in lowerer.functions.values():
        model.functions[function.identifier()] = function
        model.graph.opset_imports[DOMAIN] = 1
    if any(node.domain == ORT_DOMAIN for node in model.graph):
        model.graph.opset_imports[ORT_DOMAIN] = 1
    return rows


def _placeholder(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in ("linear", "unpack")


Emitted = tuple[tuple[str, str, str, str, str], Sequence["ir.Node"], "ir.Value"]
"""The first five fields of Lowered, the new nodes and their result."""


@dataclass(frozen=True)
class _Product:
    """The operands of one placeholder `linear`, as graph values."""

    x: ir.Value
    weight: list[ir.Value]
    branch: list[ir.Value]
    bias: ir.Value | None
    packed: Packed
    name: str
    """Module that holds the packed weight."""

    @property
    def operands(self) -> list[ir.Value]:
        return [self.x, *self.weight, *self.branch, *([] if self.bias is None else [self.bias])]

    def over(self, values: Sequence[ir.Value]) -> _Product:
        """The same with other values as operands."""
        x, rest = values[0], list(values[1:])
        bias = rest.pop() if self.bias is not None else None
        count = len(self.weight)
        return replace(self, x=x, weight=rest[:count], branch=rest[count:], bias=bias)


class _Lowerer:
    """Replaces placeholders of one graph; a body that several products share is written once."""

    def __init__(self, graph: ir.Graph, tensors: Mapping[str, Tensor]) -> None:
        self.graph, self.tensors = graph, tensors
        self.functions: dict[str, ir.Function] = {}

    def replace(self, node: ir.Node) -> Lowered:
        from onnx_ir.convenience import replace_nodes_and_values

        emit = self._linear if node.op_type == "linear" else self._unpack
        row, nodes, value = emit(node)
        old = node.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        replace_nodes_and_values(self.graph, node, [node], nodes, [old], [value])
        assert value.name is not None
        kind = WEIGHT if node.op_type == "unpack" else _kind(node)
        return Lowered(*row, output=value.name, kind=kind)

    def _linear(self, node: ir.Node) -> Emitted:
        product = self._product(node)
        x = product.x
        writer = Writer(product.name)
        types = writer.types
        assert x.dtype is not None
        if x.dtype == types.DOUBLE or isinstance(product.packed.format.codec, Fp8):
            # The engine has no such products: the body stands here.
            compute = types.DOUBLE if x.dtype == types.DOUBLE else types.FLOAT
            wide = writer.cast(x, compute)
            wide.shape = x.shape
            row, why, stored, y = _body(writer, replace(product, x=wide), compute)
            y = writer.cast(y, x.dtype)
            return _describe(product, row, why, stored), writer.tape.nodes, y
        # Half-precision products run in float32, as ONNX Runtime has no CPU kernels for bfloat16
        # and emulates float16; the weight is then not rounded to half precision either.
        wide, fmt = writer.cast(x, types.FLOAT), product.packed.format
        if fmt.a8 and not isinstance(fmt.codec, Int) and product.packed.k:
            # The engine multiplies float weights by floats only: these are rounded before.
            wide = round_rows(writer, wide, product.packed.k, fmt.a8_group or product.packed.k)
            product = replace(product, packed=replace(product.packed, format=fmt.float_activations))
        wide.shape = x.shape
        product = replace(product, x=wide)
        function, described = self._function(product)
        y = writer.tape.op(
            function.name, product.operands, _attributes(product), domain=DOMAIN,
            overload=function.overload,
        )  # fmt: skip
        y.dtype = types.FLOAT
        y = writer.cast(y, x.dtype)
        return (described[0], str(fmt), *described[2:]), writer.tape.nodes, y

    def _product(self, node: ir.Node) -> _Product:
        x, *rest = node.inputs
        assert x is not None
        assert x.shape is not None
        bias = rest.pop() if node.attributes["biased"].as_int() else None
        count = node.attributes["weights"].as_int()
        k = x.shape[-1]
        assert isinstance(k, int)
        weight: list[Any] = list(rest[:count])
        branch: list[Any] = list(rest[count:])
        packed, name = self._packed(node, weight, node.attributes["n"].as_int(), k)
        return _Product(x, weight, branch, bias, packed, name)

    def _function(self, product: _Product) -> tuple[ir.Function, tuple[str, str, str, str, str]]:
        """The body for `product`, and its row."""
        import onnx_ir

        writer = Writer(product.name)
        inputs = [
            onnx_ir.Value(name=name, shape=v.shape, type=v.type)
            for name, v in zip(_input_names(product), product.operands, strict=True)
        ]
        row, why, stored, y = _body(writer, product.over(inputs), writer.types.FLOAT)
        y.name = "y"
        key = _overload(product, stored.cut)
        if key not in self.functions:
            # A body's operators must mean the same in the model's opset: later ones only widen.
            imports = {"": max(OPSET, self.graph.opset_imports.get("", OPSET)), ORT_DOMAIN: 1}
            graph = onnx_ir.Graph(inputs, [y], nodes=writer.tape.nodes, opset_imports=imports)
            declared = [
                onnx_ir.Attr(name, onnx_ir.AttributeType.UNDEFINED, None)
                for name in _attributes(product)
            ]
            self.functions[key] = onnx_ir.Function(
                DOMAIN, "Linear", key, graph=graph, attributes=declared
            )
        return self.functions[key], _describe(product, row, why, stored)

    def _unpack(self, node: ir.Node) -> Emitted:
        n, k = node.attributes["n"].as_int(), node.attributes["k"].as_int()
        values: list[Any] = list(node.inputs)
        packed, name = self._packed(node, values, n, k)
        writer = Writer(name)
        row, _ = choose(Problem(packed.format, n, k), dense=True)
        stored = row.store(writer, Source.of(packed, values))
        to = writer.types(node.attributes["to"].as_int())
        y = writer.op("Transpose", writer.cast(stored.inputs[0], to), perm=[1, 0])
        y.dtype = to
        product = _Product(values[0], values, [], None, packed, name)
        return _describe(product, row, OPAQUE, stored), writer.tape.nodes, y

    def _packed(self, node: ir.Node, values: Sequence[Any], n: int, k: int) -> tuple[Packed, str]:
        """The stored weight behind a placeholder, and the name of the module that holds it."""
        names = [value.name for value in values]
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise ExportError(f"packed buffers {missing} are not constants of the exported program")
        fmt = Format.parse(node.attributes["format"].as_string())
        packed = Packed(fmt, n, k, tuple(self.tensors[name].detach().cpu() for name in names))
        owner = node.attributes.get("owner")
        return packed, _owner(values[0]) if owner is None else owner.as_string()


def _kind(node: ir.Node) -> str:
    count = len(node.inputs) - 1 - sum(node.attributes[a].as_int() for a in ("weights", "biased"))
    return BRANCHED if count else PRODUCT


def _owner(buffer: ir.Value) -> str:
    return str(buffer.name).rpartition(".")[0]


def _input_names(product: _Product) -> list[str]:
    branch = ["down", "up", "branch_scale"][: len(product.branch)]
    bias = ["bias"] * (product.bias is not None)
    return ["x", *product.packed.format.buffers, *branch, *bias]


def _attributes(product: _Product) -> dict[str, Any]:
    """What the CPU engine is told of a product; the body depends on none of it."""
    packed, fmt = product.packed, product.packed.format
    codec = [0]
    if isinstance(fmt.codec, Int):
        codec = [1, fmt.codec.bits, fmt.codec.group_size, int(fmt.codec.symmetric)]
    return {
        "format": str(fmt), "n": packed.n, "k": packed.k, "layout": attributes_of(fmt.layout),
        "codec": codec, "a8": int(fmt.a8), "a8_group": fmt.a8_group,
        "branch": int(bool(product.branch)), "biased": int(product.bias is not None),
    }  # fmt: skip


def _overload(product: _Product, cut: str) -> str:
    """A name for the body: everything that it depends on."""
    x, packed = product.x, product.packed
    sizes = "_".join(str(buffer.numel()) for buffer in packed.buffers)
    parts = [re.sub(r"[^\w]+", "_", str(packed.format)), f"{packed.n}x{packed.k}", sizes]
    parts += [f"b{v.dtype}" for v in (*product.weight[-1:], *product.branch[:1])]
    parts += ["bias_" + str(product.bias.dtype)] if product.bias is not None else []
    assert x.shape is not None
    parts += ["vector"] * (x.shape.rank() == 1)
    parts += [f"cut_{cut}_rank{x.shape.rank()}"] * bool(cut)
    return "-".join(parts)


def _body(
    writer: Writer, product: _Product, compute: ir.DataType
) -> tuple[Lowering, str, Stored, ir.Value]:
    """The product in ordinary operators: what serves it, why nothing better, weight and result."""
    x, packed = product.x, product.packed
    assert x.shape is not None
    double = compute == writer.types.DOUBLE
    problem = Problem(packed.format, packed.n, packed.k, double)
    row, why = choose(problem)
    row, plain = narrowed(problem, row, packed)
    why = "; ".join(part for part in (why, plain) if part)
    stored = row.store(writer, Source.of(packed, product.weight))
    wide = x
    if x.shape.rank() == 1:
        wide = writer.op("Unsqueeze", x, writer.ints(0))
        wide.dtype, wide.shape = compute, type(x.shape)([1, packed.k])
    y = row.product(writer, wide, stored)
    if product.bias is not None:
        y = writer.op("Add", y, writer.cast(product.bias, compute))
    y = _add_branch(writer, y, wide, product.branch, compute)
    if x.shape.rank() == 1:
        y = writer.op("Squeeze", y, writer.ints(0))
    y.dtype = compute
    return row, why, stored, y


def _describe(
    product: _Product, row: Lowering, why: str, stored: Stored
) -> tuple[str, str, str, str, str]:
    note = "; ".join(part for part in (why, stored.note) if part)
    names = dict(zip(product.packed.format.buffers, product.weight, strict=True))
    place = names["values"].name
    assert place is not None
    return product.name, str(product.packed.format), row.op, note, place


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
