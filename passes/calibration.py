"""The calibration engine: stream calibration batches through the model block by block.

Repeated blocks (an `nn.ModuleList` whose members run one after the other) are replayed on their
own, so that only one block's statistics and one set of hidden states are in memory; later blocks
see what compressed earlier blocks really output. Weights outside such blocks are measured with
runs of the whole model, as many Sites at a time as fit in `BUDGET` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefx.ir.capture import split_inputs
from sparsefx.ir.products import PRODUCTS
from sparsefx.ir.sites import Site

BUDGET = 256 << 20
"""Bytes of Hessians held at once."""


class Hessian:
    """The running sum of xᵀx over rows x (…, K), in float32."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.sum = torch.zeros(k, k, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(flat.T, flat)
        self.rows += flat.shape[0]


Watch = Callable[[Site, Tensor, Tensor], None]
"""Sees a product of a Site's parameter with x (…, K); must keep neither."""


class Collector(TorchFunctionMode):
    """While active, every product with one of `weights` is shown to `watch`, and with `sum_inputs`
    adds its input rows to that Site's Hessian.

    Products that read the same tensor (q, k, v) share one Hessian, summed once.
    """

    def __init__(
        self,
        weights: Mapping[str, tuple[Site, Tensor]],
        watch: Watch = lambda site, weight, x: None,
        sum_inputs: bool = True,
    ) -> None:
        super().__init__()
        self.watch, self.sum_inputs = watch, sum_inputs
        self.sites = {id(w): (name, site) for name, (site, w) in weights.items()}
        self.hessians: dict[str, Hessian] = {}
        self._seen: dict[int, tuple[Tensor, Hessian]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in PRODUCTS:
            given = [*args, *kwargs.values()]
            for arg in given:
                if id(arg) in self.sites:
                    self._add(*self.sites[id(arg)], name, arg, given)
        return func(*args, **kwargs)

    def _add(self, name: str, site: Site, op: str, weight: Tensor, given: Sequence[Any]) -> None:
        x = given[1] if op == "addmm" else given[0]
        if site.kind == "conv1x1":
            x = x.movedim(1, -1)
        if site.kind not in ("linear", "conv1x1") or x.shape[-1] != site.k:
            return
        self.watch(site, weight, x)
        if not self.sum_inputs:
            return
        seen = self._seen.get(id(given[0]))
        if seen is not None and name not in self.hessians:
            self.hessians[name] = seen[1]
        mine = self.hessians.setdefault(name, Hessian(site.k, x.device))
        if seen is None or seen[1] is not mine:
            mine.add(x)
        self._seen[id(given[0])] = (given[0], mine)

    def forget_inputs(self) -> None:
        """Drop the references that tell shared inputs apart; call between batches."""
        self._seen.clear()


@dataclass
class Blocks:
    """Members of one ModuleList in call order, and the Sites each one owns."""

    name: str
    modules: list[nn.Module]
    sites: list[list[Site]] = field(default_factory=list)


Compress = Callable[[Sequence[Site], Mapping[str, Hessian]], Callable[[], None]]
"""Compresses Sites in place and returns what to do once their outputs have been passed on."""


Run = Callable[[], Iterator[None]]
"""Runs part of the model on one calibration batch after the other."""
Measure = Callable[[Sequence[Site], Run], dict[str, Hessian]]


def stream(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Any],
    compress: Compress,
    watch: Watch,
    sum_inputs: bool,
) -> None:
    """Call `compress(sites, hessians)` for every part of the model, in call order.

    `compress` edits weights in place; the next part's statistics see the edit. `watch` sees a
    part's products before that; without `sum_inputs` there are no Hessians.
    """
    data = [split_inputs(batch) for batch in batches]
    measure = partial(_measure, model, watch, sum_inputs)
    left = {site.name: site for site in sites}
    with torch.no_grad():
        for blocks in find_blocks(model, sites):
            if _replay(model, blocks, data, compress, measure):
                for group in blocks.sites:
                    for site in group:
                        left.pop(site.name, None)
        for part in _parts(list(left.values())):
            compress(part, measure(part, lambda: _run_all(model, data)))()


def find_blocks(model: nn.Module, sites: Sequence[Site]) -> list[Blocks]:
    """Outermost ModuleLists or Sequentials of two or more alike members that own Sites."""
    out: list[Blocks] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        if any(name.startswith(b.name + ".") for b in out) or len({type(m) for m in module}) > 1:
            continue
        owned = [
            [s for s in sites if s.name.startswith(f"{name}.{i}." if name else f"{i}.")]
            for i in range(len(module))
        ]
        if sum(map(len, owned)) > len(module) and all(len(s.names) == 1 for o in owned for s in o):
            out.append(Blocks(name, list(module), owned))
    return out


# --- replaying blocks ------------------------------------------------------------------------


@dataclass
class Call:
    """How one block was called: which argument is the hidden state, and all others."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        out = module(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out  # type: ignore[no-any-return]

    def same(self, other: Call) -> bool:
        """Whether both calls got the very same objects."""
        mine, theirs = ([*c.args, *c.kwargs.items()] for c in (self, other))
        return len(mine) == len(theirs) and all(
            _same(a, b) for a, b in zip(mine, theirs, strict=True)
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


class _Stop(Exception):
    """The last block's inputs were seen; the rest of the model need not run."""


def _record(
    model: nn.Module, modules: Sequence[nn.Module], data: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[Tensor, list[Call]] | None:
    """First hidden state and these blocks' other arguments, None when they are not a chain."""
    calls: list[Call] = []
    state: dict[str, Any] = {"first": None, "last": None, "chain": True}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = len(calls)
        hidden = args[0] if args else None
        follows = isinstance(hidden, Tensor) and (index == 0 or hidden is state["last"])
        if index >= len(modules) or modules[index] is not module or not follows:
            state["chain"] = False
            raise _Stop
        if index == 0:
            state["first"] = hidden
        calls.append(Call(args[1:], kwargs))
        if len(calls) == len(modules):
            raise _Stop

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        state["last"] = out[0] if isinstance(out, (tuple, list)) else out

    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in modules]
    try:
        model(*data[0], **data[1])
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    complete = state["chain"] and len(calls) == len(modules)
    return (state["first"], calls) if complete else None


def _replay(
    model: nn.Module, blocks: Blocks, data: list[Any], compress: Compress, measure: Measure
) -> bool:
    """Stream one chain of blocks; False (nothing done) when they are not called as a chain."""
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    count = len(blocks.modules)
    for batch in data:
        # Once one batch has shown that all blocks get the same arguments, the first tells them all.
        alike = bool(calls) and all(call.same(calls[0][0]) for call in calls[0])
        recorded = _record(model, blocks.modules[:1] if alike else blocks.modules, batch)
        if recorded is None:
            return False
        hidden.append(recorded[0])
        calls.append(recorded[1] * count if alike else recorded[1])
    for index, (module, sites) in enumerate(zip(blocks.modules, blocks.sites, strict=True)):
        now = [per_batch[index] for per_batch in calls]

        def run(module: nn.Module = module, now: list[Call] = now) -> Iterator[None]:
            for call, h in zip(now, hidden, strict=True):
                call.run(module, h)
                yield

        finish = compress(sites, measure(sites, run)) if sites else lambda: None
        if index + 1 < len(blocks.modules):
            for i, call in enumerate(now):
                hidden[i] = call.run(module, hidden[i])
        finish()
    return True


# --- measuring ---------------------------------------------------------------------------------


def _measure(
    model: nn.Module, watch: Watch, sum_inputs: bool, sites: Sequence[Site], run: Run
) -> dict[str, Hessian]:
    weights = {s.name: (s, model.get_parameter(s.name)) for s in sites}
    collector = Collector(weights, watch, sum_inputs)
    with collector:
        for _ in run():
            collector.forget_inputs()
    return collector.hessians


def _run_all(model: nn.Module, data: list[Any]) -> Iterator[None]:
    for args, kwargs in data:
        model(*args, **kwargs)
        yield


def _parts(sites: list[Site]) -> Iterator[list[Site]]:
    """Runs of Sites whose Hessians fit in the budget together."""
    part: list[Site] = []
    size = 0
    for site in sites:
        need = 4 * site.k * site.k
        if part and size + need > BUDGET:
            yield part
            part, size = [], 0
        part.append(site)
        size += need
    if part:
        yield part
