"""`export_onnx`: a compiled model becomes an ONNX file that stock ONNX Runtime reads and runs."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from sparsefx.codegen import fused  # noqa: F401  (kernels of the ops)
from sparsefx.codegen.onnx import Lowered, require_packages, to_onnx
from sparsefx.codegen.onnx_adapters import add_slots
from sparsefx.codegen.onnx_attention import fuse_attention
from sparsefx.codegen.onnx_fusions import in_place, rewrite
from sparsefx.codegen.onnx_inputs import Inputs
from sparsefx.codegen.onnx_norms import engine_norms
from sparsefx.codegen.onnx_program import closed, opened
from sparsefx.ir import fused as meaning
from sparsefx.ir import norm, rotary
from sparsefx.ir.errors import ExportError
from sparsefx.ir.sites import Traced
from sparsefx.passes.manager import run_passes
from sparsefx.passes.pipeline import PASSES
from sparsefx.runtime import adapter_add_rows
from sparsefx.runtime.gate import Difference, check, nearest_to_limit

if TYPE_CHECKING:
    import onnx_ir as ir

SINGLE_FILE = 1 << 30
"""Weights beyond this many bytes go to a second file; protobuf's limit is 2 GiB."""
SMALL = 1024
"""Tensors below this many bytes stay in the model file: shape inference reads them."""
SPELLED: dict[Any, Callable[..., Any]] = {
    meaning.LINEARS: meaning.linears, meaning.FUSED: meaning.fused,
    norm.NORM: norm.norm, rotary.ROTARY: rotary.rotary,
    adapter_add_rows.add_rows: adapter_add_rows.meaning,
}  # fmt: skip
"""How a file writes what passes merged and fused: as the products and operators that it means.

One product of several weights and a Split would be exact too, but is no faster: in ONNX Runtime
1.31 it took 0.83 to 1.11 of the time of products apart at 1 row and 0.98 to 1.08 at 128, where
Split copies (4- and 8-bit MatMulNBits and float MatMul, q/k/v and gate/up of K = 576, 1 thread),
with the CPU engine 0.90 to 1.02 and 0.92 to 1.19. Apart, each may have a slot for an adapter.
"""


@dataclass(frozen=True)
class ExportReport:
    """What was written, how each packed weight was lowered, and how far it is from eager."""

    path: Path
    data: Path | None
    """The second file with the weights, when they did not fit into the first."""
    bytes: int
    layers: tuple[Lowered, ...]
    differences: tuple[Difference, ...]
    """One row per runtime, shape and output; empty when the gate was skipped."""
    notes: tuple[str, ...]
    """What the gate could not try, and why."""
    left: tuple[str, ...] = ()
    """What graph passes left as it was, and why."""

    @property
    def worst(self) -> Difference | None:
        """The difference that comes nearest to its tolerance."""
        return nearest_to_limit(self.differences)


def export_onnx(
    compiled: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    dynamic_shapes: Any = None,
    verify: bool = True,
    *,
    adapters: Sequence[str] = (),
    inline: bool = False,
) -> ExportReport:
    """Write `compiled` to `path` as ONNX and return what was done.

    The graph first goes through the passes of `torch.compile`.
    `dynamic_shapes` is {input name: {axis: "batch"}}; without it every shape is fixed. The file
    appears only after it agreed with the eager model in ONNX Runtime, optimised and not, at several
    sizes; a mismatch raises ExportError naming the first differing layer and leaves an older file
    as it was. `verify=False` skips that comparison.

    `adapters` names packed modules ("layer.0", "*.q_proj") that get empty slots for LoRA matrices,
    which ONNX Runtime's adapters fill at run time (`sparsefx.export_adapter` writes those).

    The file runs in ONNX Runtime 1.27 or later, with our library in 1.21 or later. `inline` writes
    plain operators in place of our nodes: most formats then run from 1.18 on, and always at the
    speed of ONNX Runtime alone.
    """
    require_packages()
    _target(path)
    inputs = Inputs.of(compiled, example_inputs, dynamic_shapes)
    return export_call(compiled, path, inputs, verify, adapters=adapters, inline=inline)


def export_call(
    compiled: nn.Module,
    path: str | os.PathLike[str],
    inputs: Inputs,
    verify: bool = True,
    finish: Callable[[ir.Model], None] = lambda model: None,
    adapters: Sequence[str] = (),
    prefix: str = "",
    inline: bool = False,
) -> ExportReport:
    """`export_onnx` of one call; `finish` may rename inputs and outputs and add metadata.

    `prefix` is what names of modules have in `compiled` and not for the user.
    """
    target = _target(path)
    with _evaluating(compiled):
        program, left = _after_passes(_program(compiled, inputs))
        model, rows = to_onnx(program, [
            {axis: rule.name for axis, rule in axes.items()} for axes in inputs.axes
        ])  # fmt: skip
        _check_axes(model, inputs)
        rewrite(model, {row.output for row in rows})
        before = [value.name for value in model.graph.outputs]
        finish(model)
        renamed = dict(zip(before, (value.name for value in model.graph.outputs), strict=True))
        rows = [replace(row, output=renamed.get(row.output) or row.output) for row in rows]
        add_slots(model, rows, adapters, prefix)
        engine_norms(model)
        if inline:
            in_place(model)
        else:
            fuse_attention(model)
        try:
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as room:
                draft, data = _write(model, Path(room), target.name)
                found = check(compiled, inputs, draft, rows) if verify else ((), ())
                written = _publish(draft, data, target)
        except OSError as error:
            raise ExportError(f"'{target}' could not be written: {error}") from error
    size = sum(file.stat().st_size for file in written if file)
    return ExportReport(target, written[1], size, tuple(rows), *found, left)


def _target(path: str | os.PathLike[str]) -> Path:
    """`path` when a file may be put there. Raises ExportError otherwise."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f"the folder '{target.parent}' does not exist")
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISLNK(mode):
        raise ExportError(f"'{target}' is a symbolic link; give the path of the file itself")
    if not stat.S_ISREG(mode):
        raise ExportError(f"'{target}' exists and is not a regular file")
    return target


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _program(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                model,
                inputs.args,
                inputs.kwargs,
                dynamic_shapes=inputs.dynamic_shapes,
                strict=False,
            )
    except Exception as error:  # torch.export raises whatever the model's own code raises
        text = str(error).strip() or type(error).__name__
        if inputs.dynamic_shapes and ("onstraint" in text or "specializ" in text):
            text = f"an axis asked to be dynamic is fixed by the model's code: {text}"
        raise ExportError(f"torch.export cannot trace {type(model).__name__}: {text}") from error


def optimised(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """A module that computes what `program` does, after the graph passes for packed weights.

    Products of one input are one call, epilogues are fused, weights read through unpack are not
    unpacked. It takes what the exported model took and shares the program's weights.
    """
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    run_passes(Traced(gm.graph, {}), PASSES)
    gm.recompile()
    return gm


def _after_passes(
    program: torch.export.ExportedProgram,
) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """`program` after the graph passes, in operators that a file has (`SPELLED`), and what passes
    left as it was. The given one is used up.
    """
    gm = opened(program)
    traced = run_passes(Traced(gm.graph, {}), PASSES)
    return closed(program, gm, SPELLED), tuple(traced.notes)


def _check_axes(model: ir.Model, inputs: Inputs) -> None:
    """Raises ExportError where the graph fixed an axis, or its inputs are not those of the call."""
    values = model.graph.inputs
    if len(values) != len(inputs.axes):
        raise ExportError(
            f"the graph has {len(values)} inputs, the call {len(inputs.axes)} tensors: "
            "pass each once"
        )
    for value, axes in zip(values, inputs.axes, strict=True):
        for axis in axes:
            if value.shape is None or isinstance(value.shape[axis], int):
                raise ExportError(f"axis {axis} of '{value.name}' became fixed in the graph")


# --- files ---------------------------------------------------------------------------------------


def _write(model: ir.Model, room: Path, name: str) -> tuple[Path, Path | None]:
    """The model in `room`, and its weights' file when they are too many for one file."""
    import onnx
    import onnx_ir

    draft, data = room / "model.onnx", None
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value]
    if sum(tensor.nbytes for tensor in tensors) > SINGLE_FILE:
        # A new name each time: the old model and its data stay a pair until the new is in place.
        data = room / f"{name}.{secrets.token_hex(8)}.data"
        onnx_ir.save(model, draft, external_data=data.name, size_threshold_bytes=SMALL)
    else:
        onnx_ir.save(model, draft)
    try:
        onnx.checker.check_model(str(draft))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx's checker refuses the graph: {error}") from error
    return draft, data


def _publish(draft: Path, data: Path | None, target: Path) -> tuple[Path, Path | None]:
    """Move the finished files to their places; the model last, so that it is never without data."""
    for file in (draft, data):
        if file is not None:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    old = _data_of(target)
    _target(target)
    place = None
    if data is not None:
        place = target.with_name(data.name)
        os.replace(data, place)
    try:
        os.replace(draft, target)
    except OSError:
        if place is not None:
            place.unlink()
        raise
    for stale in old:
        stale.unlink(missing_ok=True)
    return target, place


def _data_of(target: Path) -> list[Path]:
    """The data files that an earlier export wrote for the model at `target`."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not target.exists():
        return []
    try:
        model = onnx.load(str(target), load_external_data=False)
    except DecodeError:  # not an ONNX file: it has no data of ours
        return []
    ours = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.data")
    names = {
        e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"
    }
    files = [target.with_name(name) for name in names if ours.fullmatch(name)]
    return [file for file in files if file.is_file() and not file.is_symlink()]
