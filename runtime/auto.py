"""`auto`: the Format of every Site that meets a Target at the least cost, found by measuring.

Losses are predicted (`passes.sensitivity`), latencies measured (`runtime.latency`), the choice is
solved (`passes.solve`). Then the chosen plan's real loss is measured on held-out batches, whole and
family by family, the predictions are corrected by these factors, and it is solved again: at most
`ROUNDS` times. Of all plans measured the best one that keeps the target is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

import sparsefx
from sparsefx.ir.capture import capture
from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format
from sparsefx.ir.sites import Site
from sparsefx.passes.candidates import DENSE, family
from sparsefx.passes.distance import Distance, hold_out
from sparsefx.passes.gradients import Loss
from sparsefx.passes.plan import Choice, check, owner_classes
from sparsefx.passes.recipe import Recipe
from sparsefx.passes.sensitivity import Sensitivity, sensitivities
from sparsefx.passes.solve import Infeasible, Item, Solution, solve
from sparsefx.passes.spec import Spec, check_patterns
from sparsefx.passes.target import Target
from sparsefx.passes.trial import Trial
from sparsefx.runtime import latency
from sparsefx.runtime.plan_file import Plan, Price, SitePrices
from sparsefx.runtime.progress import Progress

ROUNDS = 4
"""Plans that are measured, at most."""
CLAMP = 100.0
"""A measured factor beyond this either way says that nothing was measured (a loss of about 0)."""
Measure = Callable[[latency.Product, Sequence[str], Callable[[str], None]], latency.Times]
Scales = Mapping[str, float]


def auto(
    model: nn.Module,
    target: str | Mapping[str, Any] | Target,
    *,
    calibration: Iterable[Any] | None,
    example_inputs: Any = None,
    loss: Loss | None = None,
    progress: bool | None = None,
    measure: Measure = latency.microseconds,
) -> Plan:
    """The Plan for `target`; the model is read, run and left as it is.

    `calibration` is as `sparsify` takes it, at least 2 batches: the last fourth is held out. `loss`
    (outputs, batch) → mean over rows replaces the distance from the dense model's outputs.
    `measure` gives the times of products.

    Raises SpecError (naming the nearest value that can be reached), WeightError, CaptureError.
    """
    return plans(
        model, [target], calibration=calibration, example_inputs=example_inputs, loss=loss,
        progress=progress, measure=measure,
    )[0]  # fmt: skip


class OutOfReach(SpecError):
    """A target that no choice keeps; says the nearest that one does."""


def plans(
    model: nn.Module,
    targets: Sequence[str | Mapping[str, Any] | Target],
    *,
    calibration: Iterable[Any] | None,
    example_inputs: Any = None,
    loss: Loss | None = None,
    progress: bool | None = None,
    measure: Measure = latency.microseconds,
    unreachable: dict[str, str] | None = None,
) -> list[Plan]:
    """`auto` for several goals that share rows, device and ignored Sites, priced once.

    Where `unreachable` is given, a goal that cannot be kept has its reason there and no Plan.
    """
    goals = [Target.read(target) for target in targets]
    first = goals[0]
    if any((t.rows, t.device, t.ignore) != (first.rows, first.device, first.ignore) for t in goals):
        raise SpecError("auto: targets that are solved together share rows, device and ignore")
    latency.check_device(first.device)
    batches, held = hold_out([] if calibration is None else list(calibration))
    sites = _sites(model, batches[0] if example_inputs is None else example_inputs, first)
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        distance, recipe = Distance(loss), Recipe.of(Spec(), calibrated=True)
        with Progress("pricing losses", len(sites), progress) as bar:
            found = sensitivities(
                model, sites, batches, distance, _ignored(model, first), recipe, bar.advance
            )
        lists, notes = _price_lists(model, found, first, measure, progress)
        other = model_bytes(model) - sum(s.price(DENSE).bytes for s in lists)
        trial = Trial(model, batches, held, distance, recipe)
        by_name = {site.name: site for site in sites}
        made: list[Plan] = []
        for goal in goals:
            try:
                made.append(_search(lists, by_name, goal, other, trial, progress))
            except OutOfReach as error:
                if unreachable is None:
                    raise
                unreachable[str(goal)] = str(error)
        return [replace(plan, notes=(*plan.notes, *notes)) for plan in made]
    finally:
        for module, mode in training.items():
            module.training = mode


def model_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, tied ones once."""
    unique = {id(t): t for t in chain(model.parameters(), model.buffers())}
    return sum(t.numel() * t.element_size() for t in unique.values())


def _sites(model: nn.Module, example_inputs: Any, target: Target) -> list[Site]:
    """All Sites, checked. Raises SpecError and WeightError before any work."""
    sites = capture(model, example_inputs).sites
    if not sites:
        raise SpecError(f"{type(model).__name__} multiplies by no weight: nothing can shrink")
    classes = [(site.names, owner_classes(model, site)) for site in sites]
    check_patterns(Spec(ignore=target.ignore), classes)
    ignored, any_shape = _ignored(model, target), Format.parse("bf16")
    usable = [s for s in sites if s.kind in ("linear", "conv1x1") and not ignored(s)]
    check([(Choice(s, any_shape), model.get_parameter(s.name)) for s in usable])
    devices = {model.get_parameter(site.name).device.type for site in sites}
    if devices != {torch.device(target.device).type}:
        raise SpecError(
            f"the model is on {' and '.join(sorted(devices))}, the target says "
            f"device={target.device}: move the model or name its device"
        )
    return sites


def _ignored(model: nn.Module, target: Target) -> Callable[[Site], str]:
    spec = Spec(ignore=target.ignore)
    return lambda site: spec.format_for(site.names, owner_classes(model, site))[1]


# --- prices --------------------------------------------------------------------------------------


def _price_lists(
    model: nn.Module,
    found: Sequence[Sensitivity],
    target: Target,
    measure: Measure,
    progress: bool | None,
) -> tuple[list[SitePrices], list[str]]:
    """Of every Site, with the losses as predicted; and what is unsure about the latencies."""
    weights = sum(one.site.n * one.site.k for one in found)
    most = max((_seen(one.site) for one in found), default=1)
    rows = [max(1, round(target.rows * (_seen(one.site) or most) / (most or 1))) for one in found]
    products: dict[latency.Product, dict[str, None]] = {}
    keys: list[latency.Product] = []
    for one, m in zip(found, rows, strict=True):
        dtype = model.get_parameter(one.site.name).dtype
        keys.append(latency.Product(one.site.n, one.site.k, m, dtype, target.device, weights))
        products.setdefault(keys[-1], {}).update(dict.fromkeys(one.loss))
    with Progress("timing products", sum(map(len, products.values())), progress) as bar:
        times = {key: measure(key, list(formats), bar.advance) for key, formats in products.items()}
    lists = [_prices(one, key, times[key].us) for one, key in zip(found, keys, strict=True)]
    return lists, _disturbed(list(times.values()))


def _disturbed(times: Sequence[latency.Times]) -> list[str]:
    """The note on latencies that were measured on a busy machine."""
    shares = [share for one in times for share in one.disturbed.values()]
    if not shares:
        return []
    count = sum(len(one.us) for one in times)
    note = (
        f"a busy machine: other programs took up to {1 - min(shares):.0%} of the processor while "
        f"{len(shares)} of {count} latencies were measured; these were not kept, and a quiet "
        "machine may lead to another plan"
    )
    return [note]


def _seen(site: Site) -> int:
    """Most rows that the example inputs brought, 0 where that is no number."""
    return max((int(rows) for rows in site.rows if rows.isdigit()), default=0)


def _prices(one: Sensitivity, key: latency.Product, us: Mapping[str, float]) -> SitePrices:
    calls = max(one.site.calls, 1)
    prices = tuple(
        Price(c.format, one.loss[c.format], us[c.format] * calls, one.bytes[c.format])
        if c.format in one.loss
        else Price(c.format, refused=c.refused)
        for c in one.candidates
    )
    return SitePrices(one.site.name, one.site.n, one.site.k, key.m, calls, prices)


# --- choosing ------------------------------------------------------------------------------------


@dataclass
class Tried:
    """A choice that was measured, with the prices it was made at."""

    lists: list[SitePrices]
    solution: Solution
    predicted: float
    measured: float

    @property
    def us(self) -> float:
        return sum(site.paid.us for site in self.lists)


def _search(
    lists: list[SitePrices],
    sites: Mapping[str, Site],
    target: Target,
    other: int,
    trial: Trial,
    progress: bool | None,
) -> Plan:
    """Solve, measure, correct, and again; the best measured plan."""
    tried: list[Tried] = []
    scales: dict[str, float] = {}
    with Progress("checking plans", ROUNDS * len(lists), progress) as bar:
        for _ in range(ROUNDS):
            now, solution = choose(lists, target, other, scales)
            if any([s.chosen for s in t.lists] == [s.chosen for s in now] for t in tried):
                break
            trial.compress({s.name: (sites[s.name], s.chosen) for s in now}, bar.advance)
            predicted = sum(s.paid.loss for s in now)
            measured, parts = _measure(now, trial)
            tried.append(Tried(now, solution, predicted, measured))
            scales = corrected(scales, now, measured, parts)
    best, notes = _best(tried, target, lists)
    shown = [_scaled(s, scales, s.chosen) for s in best.lists]
    versions = {"sparsefx": sparsefx.__version__, "torch": torch.__version__}
    notes += [f"{len(tried)} plans measured: " + ", ".join(f"{t.measured:.4g}" for t in tried)]
    return Plan(
        str(target), tuple(shown), latency.machine(target.device), versions, other,
        best.predicted, best.measured, best.solution.gap, tuple(notes),
    )  # fmt: skip


def choose(
    lists: Sequence[SitePrices], target: Target, other: int, scales: Scales
) -> tuple[list[SitePrices], Solution]:
    """The choice at prices corrected by `scales` (family → factor). Raises SpecError when the
    target is out of reach, with the nearest value that is not."""
    goal, value = target.goal
    scaled = [_scaled(site, scales, DENSE) for site in lists]
    dense_us = sum(site.price(DENSE).us for site in lists)
    weights = sum(site.n * site.k for site in lists)
    costs: dict[str, Callable[[Price], float]] = {
        "latency": lambda p: p.us, "bits": lambda p: 8.0 * p.bytes,
        "size": lambda p: float(p.bytes), "quality_loss": lambda p: p.loss,
    }  # fmt: skip
    budget = {
        "latency": value * dense_us, "bits": value * weights, "size": value - other,
        "quality_loss": value,
    }[goal]  # fmt: skip
    offered = [[p for p in site.prices if not p.refused] for site in scaled]
    groups = [
        [Item(p.format, p.us if goal == "quality_loss" else p.loss, costs[goal](p)) for p in prices]
        for prices in offered
    ]
    try:
        solution = solve(groups, budget)
    except Infeasible as error:
        reach = {"latency": error.least / (dense_us or 1.0), "bits": error.least / max(weights, 1),
                 "size": error.least + other}.get(goal, error.least)  # fmt: skip
        near = f"{math.ceil(reach)} bytes" if goal == "size" else f"{math.ceil(reach * 1e4) / 1e4}"
        raise OutOfReach(
            f"auto: {goal}={value:.12g} is out of reach; the nearest that can be kept is {near}"
        ) from None
    names = [prices[i].format for prices, i in zip(offered, solution.chosen, strict=True)]
    return [replace(s, chosen=n) for s, n in zip(scaled, names, strict=True)], solution


def _scaled(site: SitePrices, scales: Scales, chosen: str) -> SitePrices:
    other = scales.get("", 1.0)
    prices = tuple(
        p if p.refused or p.format == DENSE
        else replace(p, loss=float(f"{p.loss * scales.get(family(p.format), other):.6g}"))
        for p in site.prices
    )  # fmt: skip
    return replace(site, prices=prices, chosen=chosen)


def _measure(lists: Sequence[SitePrices], trial: Trial) -> tuple[float, dict[str, float]]:
    """Held-out loss of the whole choice, and of each family's Sites alone."""
    members: dict[str, set[str]] = {}
    for site in lists:
        if site.chosen != DENSE:
            members.setdefault(family(site.chosen), set()).add(site.name)
    variants = [frozenset(chain(*members.values())), *map(frozenset, members.values())]
    whole, *parts = trial.losses(variants)
    return whole, dict(zip(members, parts, strict=True))


def corrected(
    scales: Scales, lists: Sequence[SitePrices], measured: float, parts: Mapping[str, float]
) -> dict[str, float]:
    """Factors that make the predictions for this choice agree with what was measured.

    Each family gets what it cost alone over what was predicted; all get what the whole cost over
    the sum of the parts. Families that were not in the choice ("") get the geometric mean.
    """
    predicted: dict[str, float] = {}
    for site in lists:
        if site.chosen != DENSE:
            name = family(site.chosen)
            predicted[name] = predicted.get(name, 0.0) + site.paid.loss
    whole = _factor(measured, sum(parts.values()))
    out, mean = dict(scales), scales.get("", 1.0)
    for name, part in parts.items():
        out[name] = scales.get(name, mean) * _factor(part, predicted[name]) * whole
    if parts:
        logs = [math.log(scale) for name, scale in out.items() if name]
        out[""] = math.exp(sum(logs) / len(logs))
    return out


def _factor(got: float, predicted: float) -> float:
    if got <= 0 or predicted <= 0:
        return 1.0
    return min(max(got / predicted, 1 / CLAMP), CLAMP)


def _best(
    tried: Sequence[Tried], target: Target, lists: Sequence[SitePrices]
) -> tuple[Tried, list[str]]:
    """The measured plan of least loss, or for a quality goal the fastest that keeps it."""
    goal, value = target.goal
    if goal != "quality_loss":
        return min(tried, key=lambda t: t.measured), []
    kept = [t for t in tried if t.measured <= value]
    if kept:
        return min(kept, key=lambda t: t.us), []
    dense = Tried(list(lists), Solution((), 0.0, 0.0, 0.0), 0.0, 0.0)
    return dense, ["no plan measured keeps the quality asked for: all stay dense"]
