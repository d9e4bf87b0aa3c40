"""Repeated blocks of a model: members of one list that run one after the other, each replayable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparsefx.ir.sites import Site


@dataclass
class Blocks:
    """Members of one ModuleList in call order, and the Sites each one owns."""

    name: str
    modules: list[nn.Module]
    sites: list[list[Site]] = field(default_factory=list)


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


@dataclass
class Call:
    """How one block was called, beside its first argument, the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden state after `module`."""
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


Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of one call of the model."""


def record(
    model: nn.Module, blocks: Blocks, batches: Sequence[Batch]
) -> tuple[list[Tensor], list[list[Call]]] | None:
    """Each batch's first hidden state and its Call of every block; None if they are no chain."""
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    for batch in batches:
        # Once one batch has shown that all blocks get the same arguments, the first tells them all.
        alike = bool(calls) and all(call.same(calls[0][0]) for call in calls[0])
        seen = _record(model, blocks.modules[:1] if alike else blocks.modules, batch)
        if seen is None:
            return None
        hidden.append(seen[0])
        calls.append(seen[1] * len(blocks.modules) if alike else seen[1])
    return hidden, calls


class _Stop(Exception):
    """The last block's inputs were seen; the rest of the model need not run."""


def _record(
    model: nn.Module, modules: Sequence[nn.Module], batch: Batch
) -> tuple[Tensor, list[Call]] | None:
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
        model(*batch[0], **batch[1])
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    complete = state["chain"] and len(calls) == len(modules)
    return (state["first"], calls) if complete else None
