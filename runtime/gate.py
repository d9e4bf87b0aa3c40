"""The differential gate: an ONNX file must agree with the eager model, or it is not handed out.

Three questions, each with a tolerance that is derived, none tuned:

1. Does the file hold the weights? Every lowered weight is decoded by ONNX's rules, bit for bit.
2. Do the outputs agree, with ONNX Runtime's optimiser off and on and with the CPU engine
   registered, at several shapes? Two float programs may differ by rounding. What rounding does to
   *this* model is measured: the eager model runs again with the promised bound of every operator's
   rounding error, u·|y| + 2√K·2⁻²⁴·|x||w|ᵀ for products, added to its result with random signs.
   The permitted difference is `MARGIN` times the greatest change seen, plus `FLOOR` units in the
   last place of the output's greatest value. The optimised graph is searched for slow paths.
3. With int8 activations eager rounds per row or group. MatMulNBits rounds per block, which is as
   fine or finer, other lowerings round as eager does: so the two are at most twice as far apart as
   eager is from itself without that rounding. That distance is measured on the rounding itself and
   on independent noise of the same size; as rounding to codes jumps, differences are compared by
   root mean square, plus three standard deviations of a root mean square over so many values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsefx.codegen import native
from sparsefx.codegen.onnx import Lowered
from sparsefx.codegen.onnx_inputs import Inputs
from sparsefx.codegen.onnx_read import inlined, written_weight
from sparsefx.ir.errors import ExportError
from sparsefx.ir.format import Format
from sparsefx.runtime.gate_graph import check_graph
from sparsefx.runtime.gate_probe import Call, Key, Magnitudes, Probe, unit
from sparsefx.runtime.modules import PackedWeight
from sparsefx.runtime.ort import ort_library

MARGIN = 2.0
"""Both programs round."""
FLOOR = 8.0
DRAWS = 2
GROWTHS: tuple[Callable[[int], int], ...] = (
    lambda s: s, lambda s: 1, lambda s: s + 1, lambda s: 2 * s - 1, lambda s: s - 1,
)  # fmt: skip
ENGINE = "full, CPU engine"
LEVELS = {"off": "ORT_DISABLE_ALL", "full": "ORT_ENABLE_ALL", ENGINE: "ORT_ENABLE_ALL"}
"""Optimisation of ONNX Runtime, with our kernels or without."""


@dataclass(frozen=True)
class Difference:
    """The greatest difference of one output between eager and one runtime at one shape."""

    runtime: str
    sizes: str
    output: int
    measure: str
    """"max" of absolute differences, or "rms"."""
    difference: float
    tolerance: float


def nearest_to_limit(differences: Sequence[Difference]) -> Difference | None:
    """The difference that comes nearest to its tolerance."""
    return max(differences, key=lambda d: d.difference / (d.tolerance or 1.0), default=None)


@dataclass(frozen=True)
class _Wanted:
    """What eager computes for one call, and how far from it is still right."""

    inputs: Inputs
    sizes: str
    outputs: list[Tensor]
    tolerances: list[float]


def check(model: nn.Module, inputs: Inputs, path: Path, rows: Sequence[Lowered]) -> tuple[
    tuple[Difference, ...], tuple[str, ...]
]:  # fmt: skip
    """Every difference seen, and notes on sizes that could not be tried.

    Raises ExportError naming the first differing layer.
    """
    check_weights(model, path, rows)
    measure = "rms" if any(Format.parse(row.format).a8 for row in rows) else "max"
    wanted, notes = _references(model, inputs, measure)
    seen: list[Difference] = []
    for level in LEVELS:
        if level == ENGINE and native.engine() is None:
            notes += (f"not tried with the CPU engine: {native.why_missing()}",)
            continue
        optimised = path.with_name("optimised.onnx") if level == "full" else None
        session = _session(path, level, optimised)
        if optimised is not None:
            check_graph(optimised)
        for want in wanted:
            got = _run(session, want)
            for index, difference in enumerate(_compare(want, got, measure, level)):
                seen.append(difference)
                if not difference.difference <= difference.tolerance:
                    layer = _first_differing(model, want, path, rows, measure, level)
                    raise ExportError(_complaint(difference, index, layer))
    return tuple(seen), notes


def check_weights(model: nn.Module, path: Path, rows: Sequence[Lowered]) -> None:
    """Raises ExportError naming a layer whose weight in the file is not the packed one, exactly."""
    import onnx_ir

    values = inlined(onnx_ir.load(path))
    for row in {row.stored: row for row in rows}.values():
        module = model.get_submodule(row.name)
        assert isinstance(module, PackedWeight)
        packed = module.packed
        double = packed.buffers[-1].dtype == torch.float64
        weight = packed.unpack(torch.float64 if double else torch.float32).cpu().numpy()
        found = written_weight(values, row.output).astype(weight.dtype, copy=False)
        if weight.shape != found.shape or not np.array_equal(weight, found):
            wrong = (
                "its shape" if weight.shape != found.shape else f"{(weight != found).mean():.1%}"
            )
            raise ExportError(
                f"layer '{row.name}' ({row.format} as {row.op}): {wrong} of the weight written to "
                "the file differs from the packed weight; this is a bug in sparsefx"
            )


# --- eager ---------------------------------------------------------------------------------------


def _references(
    model: nn.Module, inputs: Inputs, measure: str
) -> tuple[list[_Wanted], tuple[str, ...]]:
    """What eager computes at the example's sizes and at others."""
    wanted: list[_Wanted] = []
    notes: list[str] = []
    magnitudes = Magnitudes()
    growths = GROWTHS if inputs.dynamic_shapes else GROWTHS[:1]
    tried = [{name: grow(size) for name, size in inputs.sizes.items()} for grow in growths]
    tried[1:1] = [{**inputs.sizes, **sizes} for sizes in inputs.also]
    for sizes in tried:
        other, text = inputs.resized(sizes), _text(sizes)
        if other is None or (sizes is tried[-1] and len(wanted) > 2):
            continue
        try:
            outputs, tolerances = _reference(model, other, measure, magnitudes)
        except Exception as error:  # the model itself may refuse a size
            if not wanted:
                raise
            notes.append(f"not tried at {text}: the eager model raises {type(error).__name__}")
            continue
        wanted.append(_Wanted(other, text, outputs, tolerances))
    _refuse_empty(wanted[0])
    return wanted, tuple(notes)


def _text(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "the example's shape"


@dataclass(frozen=True)
class _Runs:
    """Tensors of several eager runs of one call: as it is, noisy, and with other activations."""

    plain: list[Tensor]
    noisy: list[list[Tensor]]
    exact: list[Tensor]
    """Without rounding of activations; empty when the model has none."""
    dithered: list[list[Tensor]]

    @staticmethod
    def of(run: Callable[[Probe], list[Tensor]], measure: str, magnitudes: Magnitudes) -> _Runs:
        plain = run(Probe())
        noisy = [run(Probe(draw, magnitudes=magnitudes)) for draw in range(DRAWS)]
        if measure == "max":
            return _Runs(plain, noisy, [], [])
        dithered = [run(Probe(draw, "dither")) for draw in range(DRAWS)]
        return _Runs(plain, noisy, run(Probe(activations="exact")), dithered)

    def tolerance(self, i: int, measure: str) -> float:
        """How far from tensor i a right result may be: see the module's docstring."""
        y = self.plain[i]
        response = max(distance(n[i], y, measure) for n in self.noisy)
        allowed = MARGIN * response + FLOOR * unit(y.dtype) * distance(y, y.new_zeros(()), "max")
        if self.exact:
            rounded = distance(y, self.exact[i], measure)
            drawn = [distance(d[i], self.exact[i], measure) ** 2 for d in self.dithered]
            typical = max(rounded, (sum(drawn) / DRAWS) ** 0.5)
            allowed += 2.0 * typical * (1 + 3 / (2 * max(y.numel(), 1)) ** 0.5)
        return allowed


def _reference(
    model: nn.Module, inputs: Inputs, measure: str, magnitudes: Magnitudes | None = None
) -> tuple[list[Tensor], list[float]]:
    def run(probe: Probe) -> list[Tensor]:
        return _tensors(probe.run(model, inputs.args, inputs.kwargs))

    runs = _Runs.of(run, measure, magnitudes or Magnitudes())
    floats = [y.is_floating_point() for y in runs.plain]
    return runs.plain, [runs.tolerance(i, measure) if f else 0.0 for i, f in enumerate(floats)]


def distance(a: Tensor, b: Tensor, measure: str) -> float:
    """Greatest or root-mean-square difference over the values that are finite in both."""
    delta = a.double() - b.double()
    if not bool(torch.isfinite(delta).all()):
        delta = delta[torch.isfinite(a) & torch.isfinite(b)]
    if not delta.numel():
        return 0.0
    return float(delta.abs().max() if measure == "max" else delta.square().mean().sqrt())


def _tensors(outputs: Any) -> list[Tensor]:
    return [t.detach().cpu() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _refuse_empty(want: _Wanted) -> None:
    floats = [y for y in want.outputs if y.is_floating_point()]
    if not floats:
        raise ExportError("the model returns no float tensor: nothing can be compared")
    if any(y.numel() and not torch.isfinite(y).any() for y in floats):
        raise ExportError("an output of the eager model holds no finite value for example_inputs")
    if all(y.numel() and not y.any() for y in floats):
        raise ExportError("every output of the eager model is zero for example_inputs; pass others")


# --- ONNX Runtime --------------------------------------------------------------------------------


def _session(path: Path, level: str, optimised: Path | None = None) -> Any:
    """A session; `optimised` is where its graph goes, with the weights in a file beside."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimised.name}.data"
        )
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if level == ENGINE:
        options.register_custom_ops_library(ort_library())
    try:
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no base class
        hint = "; it has few kernels for bfloat16 and float64: export model.float()"
        raise ExportError(
            f"onnxruntime (optimisation {level}) cannot load the graph: {error}"
            + hint * ("NOT_IMPLEMENTED" in str(error))
        ) from error


def _run(session: Any, want: _Wanted, names: Sequence[str] | None = None) -> list[Tensor]:
    feeds = {
        spec.name: _numpy(tensor)
        for spec, tensor in zip(session.get_inputs(), want.inputs.tensors, strict=True)
    }
    try:
        return [torch.from_numpy(np.asarray(y)) for y in session.run(names, feeds)]
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ExportError(
            f"onnxruntime fails at {want.sizes}, where the eager model runs: {error}; if that size "
            "is not needed, bound it with torch.export.Dim(name, min=…, max=…)"
        ) from error


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        raise ExportError("inputs in bfloat16 cannot be fed to onnxruntime; export model.float()")
    return tensor.detach().cpu().numpy()


def _compare(want: _Wanted, got: list[Tensor], measure: str, level: str) -> list[Difference]:
    if len(got) != len(want.outputs):
        raise ExportError(f"the graph has {len(got)} outputs, the eager model {len(want.outputs)}")
    runtime = f"onnxruntime, optimisation {level}"
    found: list[Difference] = []
    for index, (y, z, allowed) in enumerate(zip(want.outputs, got, want.tolerances, strict=True)):
        if y.shape != z.shape:
            raise ExportError(
                f"output {index} at {want.sizes} has shape {tuple(z.shape)} in {runtime}, but "
                f"{tuple(y.shape)} in eager"
            )
        if y.is_floating_point():
            apart = gap(y, z, measure)
            found.append(Difference(runtime, want.sizes, index, measure, apart, allowed))
    return found


def gap(y: Tensor, z: Tensor, measure: str) -> float:
    """`distance`, but infinite where one is finite and the other is not, or all of `z` is zero."""
    if bool((torch.isfinite(y) != torch.isfinite(z)).any()) or bool(y.any()) > bool(z.any()):
        return float("inf")
    return distance(y, z, measure)


# --- the complaint -------------------------------------------------------------------------------


def _complaint(found: Difference, index: int, layer: str) -> str:
    apart = "all zero or not finite" if found.difference == float("inf") else (
        f"{found.measure} difference {found.difference:.3g}, tolerance {found.tolerance:.3g}"
    )  # fmt: skip
    return (
        f"output {index} at {found.sizes} differs between eager and {found.runtime}: {apart}. "
        f"{layer}. Nothing was written; verify=False skips this check"
    )


def _first_differing(
    model: nn.Module,
    want: _Wanted,
    path: Path,
    rows: Sequence[Lowered],
    measure: str,
    level: str,
) -> str:
    """The first packed weight, in execution order, whose result differs from eager's."""
    pairs, runs = _layers(model, want.inputs, rows, measure)
    if not pairs:
        return "The layers' calls could not be told apart, so the first differing one is unknown"
    names = [row.output for row, _ in pairs]
    try:
        got = _run(_session(_with_outputs(path, names), level), want, names)
    except ExportError as error:
        return f"The first differing layer could not be found: {error}"
    before = "the input"
    for (row, call), z in zip(pairs, got, strict=True):
        y, allowed = runs.plain[call], runs.tolerance(call, measure)
        apart = gap(y, z, measure) if y.shape == z.shape else float("inf")
        if not apart <= allowed:
            return (
                f"First differing layer: '{row.name}' ({row.format} as {row.op}), {measure} "
                f"difference {apart:.3g}, tolerance {allowed:.3g}; all is well up to {before}"
            )
        before = f"'{row.name}'"
    alone = [f"'{row.name}'" for row in rows if row not in {row for row, _ in pairs}]
    also = f" or in {', '.join(alone)}, which eager computes in parts" if alone else ""
    return (
        f"No packed layer differs: the difference arises in other operators{also}, after {before}"
    )


def _layers(
    model: nn.Module, inputs: Inputs, rows: Sequence[Lowered], measure: str
) -> tuple[list[tuple[Lowered, int]], _Runs]:
    """Rows paired with the eager call that each stands for, and the results of all those calls."""
    keys: list[Key] = []

    def run(probe: Probe) -> list[Tensor]:
        calls: list[Call] = []
        probe.calls = calls
        probe.run(model, inputs.args, inputs.kwargs)
        keys[:] = [key for key, _ in calls]
        return [result for _, result in calls]

    runs = _Runs.of(run, measure, Magnitudes())
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    pairs: list[tuple[Lowered, int]] = []
    for row in rows:
        module = model.get_submodule(row.name)
        assert isinstance(module, PackedWeight)
        # A weight that is used several times is met in the same order in both.
        # One into which a pass put a branch, or that eager unpacks, is met in the file alone.
        queue = places.get((row.kind, *(b.data_ptr() for b in module.buffer_list)), [])
        if queue:
            pairs.append((row, queue.pop(0)))
    return pairs, runs


def _with_outputs(path: Path, names: Sequence[str]) -> Path:
    """A copy of the graph beside `path` (where its external data is) that also returns `names`."""
    import onnx_ir

    model = onnx_ir.load(path)
    values = {value.name: value for node in model.graph for value in node.outputs}
    have = {value.name for value in model.graph.outputs}
    model.graph.outputs.extend(values[name] for name in names if name not in have)
    out = path.with_name("layers.onnx")
    onnx_ir.save(model, out)
    return out
