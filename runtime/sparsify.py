"""`sparsify`: find, plan, compress, install."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from sparsefx.ir.capture import capture
from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format
from sparsefx.passes.checkpoint import Checkpoint
from sparsefx.passes.compress import compress
from sparsefx.passes.compress_site import Result
from sparsefx.passes.feeds import find_feeds
from sparsefx.passes.gradients import Loss
from sparsefx.passes.plan import plan
from sparsefx.passes.rotate import rotate
from sparsefx.passes.spec import Spec, matches
from sparsefx.passes.target import Target
from sparsefx.runtime.adapters import adapters
from sparsefx.runtime.calibration_inputs import Calibration, batches_of
from sparsefx.runtime.install import install, packed_modules
from sparsefx.runtime.progress import Progress
from sparsefx.runtime.report import Report, Row, attach

if TYPE_CHECKING:
    from sparsefx.runtime.plan_file import Plan

M = TypeVar("M", bound=nn.Module)


def sparsify(
    model: M,
    spec: str | Path | Mapping[str, Any] | Format | Spec | Target,
    *,
    example_inputs: Any = None,
    calibration: Calibration | None = None,
    loss: Loss | None = None,
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> M:
    """Compress `model` in place to `spec` and return it: same class, same signature, less memory.

    `spec` may be a target instead, "auto:latency=0.5,rows=1" (`sparsefx.auto`): the formats are
    then found by measuring.

    The dense weights are replaced as they are compressed, so no second copy of the model is ever
    held; `copy.deepcopy` first if you need both.

    `example_inputs` (a tensor, a tuple of arguments or a dict of keyword arguments) show which
    weights are multiplied by what; without them the first calibration batch is used, and without
    that `torch.fx.symbolic_trace` must be able to read the model. `calibration` is an iterable of
    such inputs, say 16 of 512 tokens, a function that returns one, or (tokenizer, text); with it
    weights are pruned and quantised jointly (SparseGPT/GPTQ and a descent after it), without it by
    magnitude and rounding to nearest. `loss(output, batch)` is what gradient criteria
    differentiate, the model's own by default. `resume` names a folder that keeps finished parts: a
    run that was cut off goes on from there. `progress` shows a bar; None means where standard error
    is a terminal.

    Raises SpecError or WeightError before anything is changed, CaptureError when the model cannot
    be traced. `sparsefx.explain(model)` tells what was done to each weight and why.
    """
    start = time.perf_counter()
    reset_peak()
    batches = batches_of(calibration)
    if example_inputs is None and batches:
        example_inputs = batches[0]
    found = _auto(model, spec, batches, example_inputs, loss, progress)
    spec = Spec.read(spec) if found is None else found.spec  # type: ignore[arg-type]
    if _already(model, spec):
        return model
    captured = capture(model, example_inputs)
    choices = plan(model, captured.sites, spec, captured.graphs)
    notes = [f"capture: {note}" for note in captured.notes]
    report = Report(door=captured.door, spec=spec.model_dump(), notes=notes)
    report.plan = found
    report.notes += [f"plan: {note}" for note in found.notes] if found else []
    for choice in choices:
        report.rows.append(Row.planned(choice))
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()

    def put(result: Result) -> None:
        site = result.site
        unpacked = install(model, site.names, result.packed, result.branch, site.transposed)
        report.row(site.name).compressed(result, unpacked)

    if spec.rotate:
        turned = rotate(model, example_inputs, spec.seed)
        report.notes += [f"not rotated: {turned.reason}"] * bool(turned.reason)
    feeds = find_feeds(model, captured) if spec.smooth else []
    captured.graphs.clear()  # they hold every dense weight
    checkpoint = None
    if resume is not None:
        checkpoint = Checkpoint(Path(resume), model, spec.model_dump_json(), batches or ())
    with Progress("compressing", sum(not c.dense for c in choices), progress) as bar:
        advance = lambda site: bar.advance(site.name)
        compress(model, choices, spec, batches, put, advance, loss, checkpoint, feeds)
    for name, module in model.named_modules():
        module.training = training.get(name, module.training)
    report.seconds = time.perf_counter() - start
    report.peak_bytes = peak_bytes()
    attach(model, report)
    adapters(model)
    return model


def _auto(
    model: nn.Module, spec: Any, batches: list[Any] | None, example_inputs: Any,
    loss: Loss | None, progress: bool | None,
) -> Plan | None:  # fmt: skip
    """The plan that `spec` asks to be found ("auto:…"), None where it is a spec already."""
    target = Target.asked(spec)
    if target is None:
        return None
    if packed_modules(model):
        raise WeightError("'auto' plans dense models, and this one is packed; load it again")
    from sparsefx.runtime.auto import auto

    return auto(
        model, target, calibration=batches, example_inputs=example_inputs, loss=loss,
        progress=progress,
    )  # fmt: skip


def reset_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most bytes this process has held since `reset_peak` (outside Linux: since its start)."""
    with contextlib.suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _already(model: nn.Module, spec: Spec) -> bool:
    """Whether a second call asks for nothing new; WeightError when it asks for something else."""
    packed = packed_modules(model)
    if not packed:
        return False
    wanted = Format.parse(spec.format)
    for name, module in packed.items():
        names, classes = (module.name or name,), (type(module).__name__,)
        now = Format.parse(module.format)
        want = next(
            (Format.parse(f) for p, f in spec.overrides.items() if matches(p, names, classes)),
            wanted,
        )
        if now != want or "scales" in now.buffers:
            raise WeightError(
                f"{name} is already packed as '{now}'; a second '{want}' would compress the "
                "compressed. Load the dense model again and sparsify that"
            )
    return True
