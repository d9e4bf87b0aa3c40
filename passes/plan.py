"""Plan: a Format for every Site, or "dense, because …"; all is checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import SpecError, WeightError
from sparsefx.ir.format import Format
from sparsefx.ir.sites import Site, Traced, parameter_names
from sparsefx.passes.fuse_branches import low_rank_weights
from sparsefx.passes.replaceable import reads_weight
from sparsefx.passes.spec import Spec, check_patterns, matches

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """What was decided for one Site. A dense `format` always has a `reason`."""

    site: Site
    format: Format
    reason: str = ""

    @property
    def dense(self) -> bool:
        return self.format.is_dense


def plan(
    model: nn.Module, sites: Sequence[Site], spec: Spec, graphs: Sequence[Traced] = ()
) -> list[Choice]:
    """One Choice per Site in call order. Raises SpecError or WeightError listing all bad layers.

    Low-rank branches found in `graphs` (LoRA's A and B) stay dense unless they are asked for.
    """
    classes = {site.name: owner_classes(model, site) for site in sites}
    check_patterns(spec, [(site.names, classes[site.name]) for site in sites])
    bases = low_rank_bases(graphs, parameter_names(model))
    known = {site.name: site.names for site in sites}
    choices = []
    for site in sites:
        choice = _choose(model, site, spec, classes[site.name])
        base = bases.get(site.name, "")
        if base in known and not choice.dense:
            named = [(site.names, classes[site.name]), (known[base], classes[base])]
            if not asked_for(spec, *named):
                choice = Choice(site, Format(), low_rank_reason(base))
        choices.append(choice)
    chosen = [(c, model.get_parameter(c.site.name)) for c in choices if not c.dense]
    if not sites:
        raise SpecError(
            f"{type(model).__name__} multiplies by no weight: there is nothing to shrink"
        )
    check(chosen)
    return choices


def low_rank_bases(
    graphs: Sequence[Traced], names: Mapping[int, tuple[str, ...]]
) -> dict[str, str]:
    """Names of A and B of low-rank branches → name of the weight they are added to.

    `names` are those of parameters by their id, as `ir.sites.parameter_names` gives them.
    """
    out: dict[str, str] = {}
    for traced in graphs:
        for part, base in low_rank_weights(traced).items():
            a, b = names.get(id(traced.weights[part])), names.get(id(traced.weights[base]))
            if a and b:
                out[a[0]] = b[0]
    return out


def low_rank_reason(base: str) -> str:
    """Why A and B of a branch of the weight `base` stay dense."""
    return f"low-rank branch of {base}, computed with it; name it in 'overrides' to pack it"


def asked_for(
    spec: Spec,
    part: tuple[tuple[str, ...], tuple[str, ...]],
    base: tuple[tuple[str, ...], tuple[str, ...]],
) -> bool:
    """Whether a filter names a branch's matrix and not its base; each is (names, classes)."""
    return any(
        matches(pattern, *part) and not matches(pattern, *base)
        for pattern in (*spec.targets, *spec.overrides)
    )


def owner_classes(model: nn.Module, site: Site) -> tuple[str, ...]:
    """Class names of the modules that own the Site's weight, base classes included."""
    found: dict[str, None] = {}
    for name in site.names:
        owner = model.get_submodule(name.rpartition(".")[0])
        found.update(dict.fromkeys(base.__name__ for base in type(owner).__mro__[:-2]))
    return tuple(found)


def _choose(model: nn.Module, site: Site, spec: Spec, classes: tuple[str, ...]) -> Choice:
    fmt, reason = spec.format_for(site.names, classes)
    if site.kind == "refused":
        return Choice(site, Format(), site.reason)
    if fmt.is_dense:
        return Choice(site, fmt, reason or "the spec says dense")
    if fmt.rank or fmt.a8:
        why = next(filter(None, (reads_weight(model, n, site.transposed) for n in site.names)), "")
        if why:
            return Choice(site, Format(), f"{why}: '+r…' and '+a8' need a product of our own")
    return Choice(site, fmt, reason)


def check(chosen: Sequence[tuple[Choice, Tensor]]) -> None:
    """Raise WeightError, naming every layer concerned, when a weight cannot have its Format."""
    bad: dict[str, list[str]] = {}
    for choice, weight in chosen:
        if why := _reject(choice, weight):
            bad.setdefault(why, []).append(choice.site.name)
    if bad:
        lines = [f"{', '.join(names)}: {why}" for why, names in bad.items()]
        raise WeightError("nothing was changed. " + "; ".join(lines))


def _reject(choice: Choice, weight: Tensor) -> str | None:
    site, fmt = choice.site, choice.format
    if weight.is_meta:
        return "the weight is on the meta device and has no values; load the checkpoint first"
    if weight.is_complex():
        return (
            f"complex weight ({weight.dtype}); only real weights can be packed: add it to 'ignore'"
        )
    if not weight.is_floating_point():
        return f"{weight.dtype} weight: already quantised or not a weight; add it to 'ignore'"
    if weight.dtype not in DTYPES:
        return f"{weight.dtype} weight; convert with model.float() first"
    if why := fmt.rejects(site.n, site.k):
        return f"'{fmt}' does not fit: {why} (override it or add it to 'ignore')"
    if not bool(torch.isfinite(weight.detach()).all()):
        kind = "NaN" if bool(torch.isnan(weight.detach()).any()) else "infinity"
        return f"the weight holds {kind}; repair the checkpoint"
    return None
