"""`sparsefx frontier MODEL`: a bundled model dense, to fixed specs and to what `auto` finds."""

from __future__ import annotations

import copy
import platform
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import SpecError, nearest
from sparsefx.models import MODELS, Bundle
from sparsefx.passes.spec import Spec
from sparsefx.passes.target import Target
from sparsefx.runtime import latency
from sparsefx.runtime.auto import model_bytes, plans
from sparsefx.runtime.frontier import Frontier, Point
from sparsefx.runtime.plan_file import Plan
from sparsefx.runtime.progress import Progress
from sparsefx.runtime.sparsify import sparsify

TARGETS = ("latency=0.75", "latency=0.5", "latency=0.35", "latency=0.25")
SPECS = ("int8+a8", "int4g128+a8", "bitmap@50%+int4g128+a8")


def frontier(
    name: str,
    targets: Sequence[str] = TARGETS,
    specs: Sequence[str] = SPECS,
    *,
    rows: int = 128,
    calibrate: int = 8,
    rounds: int = 15,
    progress: bool | None = None,
) -> tuple[Frontier, list[Plan]]:
    """Points of `name` run eagerly on about `rows` tokens at a time, in turns, and auto's plans.

    Every model stays loaded until all are timed. Raises SpecError before any work.
    """
    if name not in MODELS:
        raise SpecError(f"no bundled model {name!r}{nearest(name, MODELS)}")
    goals = [Target.read(f"{t.removeprefix('auto:')},rows={rows}") for t in targets]
    fixed = {spec: Spec.read(spec) for spec in specs}
    bundle = MODELS[name]()
    if "input_ids" not in bundle.example_inputs:
        raise SpecError(f"'{name}' reads no tokens; the frontier is drawn for models that do")
    batches = bundle.calibration(calibrate)
    missed: dict[str, str] = {}
    made = plans(
        bundle.model, goals, calibration=batches, example_inputs=bundle.example_inputs,
        progress=progress, unreachable=missed,
    ) if goals else []  # fmt: skip
    wanted = {plan.target: plan.spec for plan in made} | fixed
    models: dict[str, nn.Module] = {"dense": bundle.model}
    with Progress("compressing to", len(wanted), progress) as bar:
        for label, spec in wanted.items():
            bar.advance(label)
            models[label] = sparsify(
                copy.deepcopy(bundle.model), spec, example_inputs=bundle.example_inputs,
                calibration=batches, progress=False,
            )  # fmt: skip
    inputs = inputs_of(bundle, rows)
    times, share = _times(models, inputs, rounds, progress)
    points = _points(bundle, models, times, made, progress)
    points += tuple(Point(goal, ours=True, reason=why) for goal, why in missed.items())
    shape = "×".join(map(str, next(iter(inputs.values())).shape))
    setting = f"{shape} tokens, eager PyTorch, {latency.machine()}"
    if share < latency.CALM:
        setting += f"; a busy machine: other programs took {1 - share:.0%} of the processor"
    machine = {"system": platform.platform(), "torch": torch.__version__}
    return Frontier(name, bundle.headline, bundle.better, setting, points, machine), made


def inputs_of(bundle: Bundle, rows: int) -> dict[str, Tensor]:
    """Real tokens of the calibration data as (1, rows) up to 64, else (rows // 64, 64)."""
    shape = (1, rows) if rows <= 64 else (rows // 64, 64)
    batch = bundle.calibration(1)[0]
    mask = batch.get("attention_mask")
    count, out = shape[0] * shape[1], {}
    for name, tensor in batch.items():
        flat = tensor.flatten() if mask is None else tensor[mask.bool()]
        out[name] = flat.repeat(-(-count // len(flat)))[:count].view(shape)
    return out


def _times(
    models: Mapping[str, nn.Module], inputs: dict[str, Tensor], rounds: int, progress: bool | None
) -> tuple[dict[str, float], float]:
    """Least milliseconds of each model, run in random order round by round, and the share of the
    time that other programs left (`latency.Watch`)."""
    times: dict[str, list[float]] = {label: [] for label in models}
    order = random.Random(0)
    with Progress("timing", rounds, progress) as bar, torch.inference_mode():
        for model in models.values():
            model(**inputs)  # the first run prepares weights
        watch = latency.Watch()
        for _ in range(rounds):
            bar.advance()
            for label in order.sample(list(models), len(models)):
                start = time.perf_counter()
                models[label](**inputs)
                times[label].append(1000 * (time.perf_counter() - start))
        share = watch.share()
    return {label: min(found) for label, found in times.items()}, share


def _points(
    bundle: Bundle, models: Mapping[str, nn.Module], times: Mapping[str, float],
    made: Sequence[Plan], progress: bool | None,
) -> tuple[Point, ...]:  # fmt: skip
    notes = {plan.target: plan_note(plan) for plan in made}
    out: list[Point] = []
    with Progress("judging", len(models), progress) as bar:
        for label, model in models.items():
            bar.advance(label)
            quality: Any = bundle.metric(model)[bundle.headline]
            size = model_bytes(model)
            note = notes.get(label, "")
            out.append(Point(label, quality, times[label], size, label != "dense", note))
    return tuple(out)


def plan_note(plan: Plan) -> str:
    """What the plan promised, in short."""
    share = plan.us / plan.dense_us if plan.dense_us else 1.0
    return (
        f"products {share:.2f} of dense, loss {plan.measured_loss:.2g} on held-out batches "
        f"({plan.predicted_loss:.2g} predicted)"
    )
