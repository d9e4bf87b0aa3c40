"""Compress: turn planned Sites into packed weights, streaming; the dense weights go as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.sites import Site
from sparsefx.passes.calibration import Hessian, stream
from sparsefx.passes.lowrank import lowrank
from sparsefx.passes.outliers import Probe
from sparsefx.passes.plan import Choice
from sparsefx.passes.round_to_nearest import round_to_nearest
from sparsefx.passes.sparsegpt import sparsegpt
from sparsefx.passes.spec import Spec

Algorithm = Callable[[Tensor, Tensor | None, Format, float], Packed]
ALGORITHMS: Mapping[str, Algorithm] = {"magnitude": round_to_nearest, "sparsegpt": sparsegpt}


@dataclass(frozen=True)
class Result:
    """One compressed Site: what is stored, how well it stands for the weight, how it was found."""

    site: Site
    packed: Packed
    branch: tuple[Tensor, ...]
    sqnr_db: float
    """10·log10(‖W‖² / ‖W − stored‖²), branch included; infinite when nothing was lost."""
    algorithm: str
    note: str
    """Why another algorithm or Format than was asked for was used, "" when none was."""
    seconds: float


Install = Callable[[Result], None]


def compress(
    model: nn.Module,
    choices: Sequence[Choice],
    spec: Spec,
    batches: Iterable[Any] | None,
    install: Install,
    progress: Callable[[Site], None] = lambda site: None,
) -> None:
    """Compress every Site that is not dense and hand each Result to `install`, in call order.

    Without `batches` each Site is compressed on its own. With them, statistics stream block by
    block, and int8 activations may be refused or get more scales (`passes.outliers`); a Site whose
    product shows no input rows falls back to magnitude, with a note.
    """
    formats = {c.site.name: c.format for c in choices if not c.dense}
    sites = [c.site for c in choices if not c.dense]
    algorithm = _algorithm(spec, batches is not None)
    probe = Probe(formats)

    def one(site: Site, hessian: Hessian | None) -> Result:
        progress(site)
        fmt, note = probe.decide(site, formats[site.name])
        name, statistics = algorithm, None if hessian is None else hessian.sum
        if algorithm == "sparsegpt" and hessian is None:
            name, unseen = "magnitude", site.reason or "calibration never reached it"
            note = "; ".join(filter(None, (f"sparsegpt saw no input rows: {unseen}", note)))
        matrix = site.matrix(model.get_parameter(site.name))
        return compress_site(site, matrix, statistics, fmt, name, spec.damping, note)

    if batches is None or (algorithm == "magnitude" and not probe.formats):
        for site in sites:
            install(one(site, None))
        return

    def part(sites: Sequence[Site], hessians: Mapping[str, Hessian]) -> Callable[[], None]:
        done = [one(site, hessians.get(site.name)) for site in sites]
        for result in done:
            _write_back(model, result)
        return partial(_install_all, install, done)

    stream(model, sites, batches, part, probe.watch, sum_inputs=algorithm == "sparsegpt")


def _algorithm(spec: Spec, calibrated: bool) -> str:
    if spec.algorithm == "sparsegpt" and not calibrated:
        raise WeightError("algorithm 'sparsegpt' needs calibration=…; 'magnitude' does not")
    best = "sparsegpt" if calibrated else "magnitude"
    return best if spec.algorithm == "auto" else spec.algorithm


def _install_all(install: Install, results: Sequence[Result]) -> None:
    for result in results:
        install(result)


def compress_site(
    site: Site,
    weight: Tensor,
    hessian: Tensor | None,
    fmt: Format,
    algorithm: str,
    damping: float,
    note: str = "",
) -> Result:
    """Pack one (N, K) weight. Raises WeightError naming the Site."""
    start = time.perf_counter()
    try:
        packed = ALGORITHMS[algorithm](weight, hessian, fmt, damping)
    except WeightError as error:
        raise WeightError(f"{site.name}: {error}") from None
    branch = lowrank(weight, packed, hessian)
    got = _effective(packed, branch)
    error_power = float((weight.float() - got).square().sum())
    power = float(weight.float().square().sum())
    sqnr = 10 * torch.tensor(power / error_power).log10().item() if error_power else float("inf")
    return Result(site, packed, branch, sqnr, algorithm, note, time.perf_counter() - start)


def _effective(packed: Packed, branch: tuple[Tensor, ...]) -> Tensor:
    dense = packed.unpack()
    if branch:
        down, up, scale = (t.float() for t in branch)
        dense = dense + (up * scale) @ down
    return dense


def _write_back(model: nn.Module, result: Result) -> None:
    """Let the dense parameter hold what is stored, so later blocks see the compressed model."""
    weight = model.get_parameter(result.site.name)
    dense = _effective(result.packed, result.branch).to(weight.dtype)
    weight.data.copy_(result.site.parameter_shape(dense))
