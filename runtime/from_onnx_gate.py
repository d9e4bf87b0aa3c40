"""The gate of `compress_onnx`: the file must agree with the source over the decoded weights.

The reference is the source's own graph in which every packed weight is replaced by the float32
matrix that it stands for, run by ONNX Runtime without optimisation. As in `runtime.gate`:

1. Every weight in the file is decoded by ONNX's rules and must be the packed one, bit for bit.
2. Outputs may differ by rounding. What rounding does to this graph is measured: every MatMul, Gemm
   and Conv of the reference can add the promised bound of its rounding error to its result with
   random signs: u·|y| + (2√K + 4)·2⁻²⁴·|x||w|ᵀ, the 4 for what elementwise operators before it
   round. The permitted difference is `MARGIN` times the greatest change seen, plus `FLOOR` units
   in the last place of the output's greatest value.
3. With int8 activations the two are at most twice as far apart as the reference is from itself
   without that rounding, by root mean square, plus three standard deviations of such a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsefx.codegen import native
from sparsefx.codegen.onnx import Lowered
from sparsefx.codegen.onnx_lower import round_rows
from sparsefx.codegen.onnx_read import inlined, written_weight
from sparsefx.codegen.onnx_writer import Writer
from sparsefx.ir.errors import ExportError
from sparsefx.passes.compress_site import Result
from sparsefx.runtime.from_onnx_calibrate import Feeds, run, session
from sparsefx.runtime.from_onnx_find import PRODUCTS, Use, Weight, number
from sparsefx.runtime.gate import DRAWS, FLOOR, MARGIN, Difference, distance, gap
from sparsefx.runtime.gate_probe import POINTWISE, unit

if TYPE_CHECKING:
    import onnx_ir as ir

STEPS = 5
NOISE, ROUND = "sparsefx.noise", "sparsefx.round"
"""Inputs of the reference: which noise products get (0 none), whether activations are rounded."""


def check_weights(path: Path, rows: Sequence[tuple[Lowered, Result]]) -> None:
    """Raises ExportError naming a weight of the file that is not the packed one, exactly."""
    import onnx_ir

    values = inlined(onnx_ir.load(path))
    for row, result in {row.stored: (row, result) for row, result in rows}.values():
        weight = result.packed.unpack().numpy()
        found = written_weight(values, row.output)
        if weight.shape != found.shape or not np.array_equal(weight, found):
            raise ExportError(
                f"'{row.name}' ({row.format} as {row.op}): the weight written to the file is not "
                "the packed weight; this is a bug in sparsefx"
            )


# --- the reference -------------------------------------------------------------------------------


def make_reference(model: ir.Model, done: Sequence[tuple[Weight, Result]]) -> None:
    """Let `model` compute with the decoded weights, in float32, and obey `NOISE` and `ROUND`."""
    import onnx_ir

    flags = [
        onnx_ir.Value(name=name, shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(kind))
        for name, kind in ((NOISE, onnx_ir.DataType.FLOAT), (ROUND, onnx_ir.DataType.BOOL))
    ]  # fmt: skip
    noisy, rounds = flags
    packed = {id(use.node): (use, result) for weight, result in done for use in weight.uses}
    products = [n for n in model.graph if n.op_type in PRODUCTS and n.domain in ("", "ai.onnx")]
    for seed, node in enumerate(products):
        old = node.outputs[0]
        w = Writer("")
        use, result = packed.get(id(node), (None, None))
        inputs = [None if v is None else _float(w, v) for v in node.inputs]
        if use is not None and result is not None:
            inputs[1] = _decoded(w, use, result)
            inputs[0] = _rounded(w, use, inputs[0], result, rounds)
        y = _again(w, node, inputs)
        absolute = [None if v is None else w.op("Abs", v) for v in inputs]
        reach = w.op("Abs", _again(w, node, absolute))
        y = _with_noise(w, y, reach, _columns(w, node, inputs), _unit(old), noisy, seed)
        y = w.op("CastLike", y, node.inputs[0]) if node.inputs[0] is not None else y
        _swap(model, node, w, old, y)
    model.graph.inputs.extend(flags)


def _unit(value: ir.Value) -> float:
    """Half a unit in the last place of what the source computes there."""
    name = "" if value.dtype is None else value.dtype.name
    return unit({"FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}.get(name, torch.float32))


def _float(w: Writer, value: ir.Value) -> ir.Value:
    return w.cast(value, w.types.FLOAT)


def _again(w: Writer, node: ir.Node, inputs: Sequence[Any]) -> ir.Value:
    return w.tape.op(node.op_type, inputs, dict(node.attributes))


def _swap(model: ir.Model, node: ir.Node, w: Writer, old: ir.Value, new: ir.Value) -> None:
    from onnx_ir.convenience import replace_nodes_and_values

    replace_nodes_and_values(model.graph, node, [node], w.tape.nodes, [old], [new])


def _decoded(w: Writer, use: Use, result: Result) -> ir.Value:
    """The dense weight as the node takes it."""
    dense = result.packed.unpack()
    if result.branch:
        down, up, scale = (t.float() for t in result.branch)
        dense = dense + (up * scale) @ down
    node = use.node
    if node.op_type == "Conv":
        dense = dense.reshape(*dense.shape, *[1] * len(use.strides))
    elif node.op_type == "MatMul" or not number(node, "transB", 0):
        dense = dense.T
    return w.constant(dense.contiguous())


def _rounded(w: Writer, use: Use, x: Any, result: Result, rounds: ir.Value) -> ir.Value:
    """The activations, in int8 steps where the format asks for it and `ROUND` is on."""
    value: ir.Value = x
    fmt, k = result.packed.format, result.packed.k
    if not fmt.a8:
        return value
    axes = len(use.strides)
    wide = value
    if axes:
        wide = w.op("Transpose", value, perm=[0, *range(2, 2 + axes), 1])
    wide.dtype = w.types.FLOAT
    rows = round_rows(w, wide, k, fmt.a8_group or k)
    if axes:
        rows = w.op("Transpose", rows, perm=[0, axes + 1, *range(1, axes + 1)])
    return w.op("Where", rounds, rows, value)


def _columns(w: Writer, node: ir.Node, inputs: Sequence[Any]) -> ir.Value:
    """√K: of the weight's columns for a convolution, of the activations' for the others."""
    if node.op_type == "Conv":
        shape = w.op("Shape", inputs[1], start=1)
    else:
        shape = w.op("Shape", inputs[0], start=-1)
    k = w.op("ReduceProd", w.cast(shape, w.types.FLOAT), keepdims=0)
    return w.op("Sqrt", k)


def _with_noise(
    w: Writer, y: ir.Value, reach: ir.Value, steps: ir.Value, u: float, noisy: ir.Value, seed: int
) -> ir.Value:
    """y, or where `NOISE` is on, y with each element moved by its bound, up or down at random."""
    single = 2.0**-24
    share = w.op("Add", w.op("Mul", steps, w.number(2 * single)), w.number(POINTWISE * single))
    around = w.op("Mul", w.op("Abs", y), w.number(u))
    if u > single:  # half precision: other operators round so, and one side may round its operands
        share = w.op("Add", share, w.op("Div", w.number(2 * u), steps))
        around = w.op("Mul", around, w.number(1 + POINTWISE))
    bound = w.op("Add", around, w.op("Mul", reach, share))
    # Signs like random ones: onnxruntime has no random numbers in every opset. y over its bound is
    # a large number whose fraction nothing determines.
    phase = w.op("Div", y, w.op("Add", bound, w.number(1e-30)))
    phase = w.op("Add", phase, w.op("Mul", noisy, w.number(2.4 * (seed + 1))))
    moved = w.op("Add", y, w.op("Mul", w.op("Sign", w.op("Sin", phase)), bound))
    return w.op("Where", w.op("Greater", noisy, w.number(0.0)), moved, y)


# --- comparing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What the reference computes from one set of inputs, and how far from it is still right."""

    feeds: Feeds
    sizes: str
    plain: list[Tensor]
    allowed: list[float]
    """By rounding of floats."""
    steps: list[float]
    """Share of the output's own root mean square that rounding of activations costs."""


def compare(
    reference: Path,
    draft: Path,
    samples: Sequence[Feeds],
    a8: bool,
    strict: bool,
    step: Callable[[str], None],
) -> tuple[tuple[Difference, ...], tuple[str, ...]]:
    """Every difference seen, and what could not be tried. Raises ExportError for one too great.

    `strict` also refuses a graph that ONNX Runtime would decode weights of at every run. `step` is
    called with what was done, `STEPS` times at most.
    """
    measure = "rms" if a8 else "max"
    made = session(reference, "off")
    wanted = [_wanted(made, feeds, measure) for feeds in samples]
    if a8:
        wanted = _pooled(wanted)
    step("reference")
    seen: list[Difference] = []
    missing = native.why_missing()
    for name, level, ours in (("onnxruntime", "off", False), ("onnxruntime", "full", False),
                              ("sparsefx in onnxruntime", "off", True),
                              ("sparsefx in onnxruntime", "full", True)):  # fmt: skip
        if ours and missing:
            continue
        seen += _tried(draft, f"{name}, optimisation {level}", level, ours, wanted, measure, strict)
        step(name)
    return tuple(seen), (f"not tried with the CPU engine: {missing}",) * bool(missing)


def _tried(
    draft: Path, runtime: str, level: str, ours: bool, wanted: Sequence[_Wanted], measure: str,
    strict: bool,
) -> Iterator[Difference]:  # fmt: skip
    optimised = draft.with_name("optimised.onnx") if level == "full" and not ours else None
    made = session(draft, level, ours, optimised)
    if optimised is not None and strict:
        from sparsefx.runtime.gate_graph import check_graph

        check_graph(optimised)
    for want in wanted:
        for difference in _differences(
            want, _outputs(run(made, None, want.feeds)), measure, runtime
        ):
            if not difference.difference <= difference.tolerance:
                raise ExportError(_complaint(difference))
            yield difference


def _complaint(found: Difference) -> str:
    apart = "all zero or not finite" if found.difference == float("inf") else (
        f"{found.measure} difference {found.difference:.3g}, tolerance {found.tolerance:.3g}"
    )  # fmt: skip
    return (
        f"output {found.output} at {found.sizes} differs between the decoded weights and "
        f"{found.runtime}: {apart}. Nothing was written; verify=False skips this check"
    )


def _differences(
    want: _Wanted, got: list[Tensor], measure: str, runtime: str
) -> Iterator[Difference]:
    for index, (y, z, allowed) in enumerate(zip(want.plain, got, want.allowed, strict=True)):
        if not y.is_floating_point():
            continue
        apart = gap(y, z, measure) if y.shape == z.shape else float("inf")
        yield Difference(runtime, want.sizes, index, measure, apart, allowed)


def _outputs(arrays: Sequence[np.ndarray[Any, Any]]) -> list[Tensor]:
    return [torch.from_numpy(a) if a.dtype != object else torch.zeros(0, dtype=torch.int8)
            for a in arrays]  # fmt: skip


def _wanted(made: Any, feeds: Feeds, measure: str) -> _Wanted:
    def values(noise: int, rounded: bool) -> list[Tensor]:
        flags = {NOISE: np.array(noise, np.float32), ROUND: np.array(rounded)}
        return _outputs(run(made, None, {**feeds, **flags}))

    plain = values(0, True)
    noisy = [values(draw, True) for draw in range(1, DRAWS + 1)]
    exact = values(0, False) if measure == "rms" else plain
    sizes = ", ".join(f"{name} {'×'.join(map(str, np.shape(x)))}" for name, x in feeds.items())
    _refuse_empty(plain, sizes)
    allowed, steps = [], []
    for i, y in enumerate(plain):
        response = max(distance(n[i], y, measure) for n in noisy)
        reach = distance(y, y.new_zeros(()), "max")
        allowed.append(MARGIN * response + FLOOR * unit(y.dtype) * reach)
        size = distance(y, y.new_zeros(()), "rms")
        steps.append(distance(y, exact[i], "rms") / size if size else 0.0)
    return _Wanted(feeds, sizes, plain, allowed, steps)


def _refuse_empty(plain: Sequence[Tensor], sizes: str) -> None:
    floats = [y for y in plain if y.is_floating_point() and y.numel()]
    ways = "give calibration=…, whose first batches are used"
    if not floats:
        raise ExportError("the model returns no float tensor: nothing can be compared")
    if any(not torch.isfinite(y).any() for y in floats):
        raise ExportError(f"an output at {sizes} holds no finite value; {ways}")
    if all(not y.any() for y in floats):
        raise ExportError(f"every output at {sizes} is zero; {ways}")


def _pooled(wanted: Sequence[_Wanted]) -> list[_Wanted]:
    """Tolerances with the rounding of activations: the greatest share that any sample shows."""
    out = []
    for want in wanted:
        allowed = list(want.allowed)
        for i, y in enumerate(want.plain):
            share = max(other.steps[i] for other in wanted)
            size = distance(y, y.new_zeros(()), "rms")
            allowed[i] += 2 * share * size * (1 + 3 / (2 * max(y.numel(), 1)) ** 0.5)
        out.append(replace(want, allowed=allowed))
    return out


# --- inputs --------------------------------------------------------------------------------------

SIZES = ((2, 16), (1, 32), (2, 8), (1, 64), (1, 224), (1, 128), (1, 1))
"""What unknown sizes may be: of a first axis, and of others; the first two that run are used."""


def draw_samples(model: ir.Model, reference: Path) -> list[Feeds]:
    """Inputs that fit the graph's types: normal floats, integers 0 and 1 (masks 1).

    Raises ExportError when the reference runs on none.
    """
    made = session(reference, "off")
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    flags = {NOISE: np.array(0, np.float32), ROUND: np.array(False)}
    out: list[Feeds] = []
    last = ""
    for first, others in SIZES:
        rng = np.random.default_rng(len(out))
        feeds = {str(v.name): _drawn(v, first, others, rng) for v in inputs}
        if len(out) == 2 or any(_same_shapes(feeds, known) for known in out):
            continue
        try:
            run(made, None, {**feeds, **flags})
        except ExportError as error:
            last = str(error)
            continue
        out.append(feeds)
    if not out:
        raise ExportError(f"inputs could not be made up, give calibration=…: {last}")
    return out


def _same_shapes(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(np.shape(a[name]) == np.shape(b[name]) for name in a)


def _drawn(
    value: ir.Value, first: int, others: int, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    if value.shape is None or value.dtype is None:
        raise ExportError(f"the input '{value.name}' has no shape or type; give calibration=…")
    shape = [side if isinstance(side, int) else others if axis else first
             for axis, side in enumerate(value.shape.dims)]  # fmt: skip
    kind = value.dtype.numpy()
    if np.issubdtype(kind, np.floating):
        return rng.standard_normal(shape).astype(kind)
    if kind == np.bool_ or "mask" in str(value.name):
        return np.ones(shape, kind)
    if np.issubdtype(kind, np.integer):
        return rng.integers(0, 2, shape).astype(kind)
    raise ExportError(f"the input '{value.name}' is {value.dtype.name}; give calibration=…")
