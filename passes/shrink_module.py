"""Shrink a module in place: smaller parameters, and the sizes its Python code reads.

torch's own layers have their sizes set from the new weights. Other modules may read attributes
(`num_heads`): these are found by value, tried from few to many, and judged by running the model;
a model that no attempt makes right is left as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparsefx.ir.errors import PassError
from sparsefx.passes.shrink_cut import Cut, differ, named_tensors, outputs

Undo = Callable[[], None]

HEADS = re.compile(r"head|(^|_)(split_size|inner(_kv)?_dim|inner_size|attn_dim|attention_dim)$")
"""Attributes that count heads or their total width, in transformers, timm and diffusers."""
NEVER = re.compile(
    r"^_|^((attention_)?head_(dim|size)|d_kv|key_value_proj_dim|dim_head)$|groups|rep$"
)
"""Width of one head, which stays, and ratios."""
FFN = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim")
"""The hidden size in transformers' configs, which a saved model is built from."""


def shrink_module(model: nn.Module, cut: Cut, example_inputs: Any) -> None:
    """Cut `model` in place so that it equals the masked model on the example inputs.

    Raises PassError, everything restored, when its forward keeps sizes that cannot be found.
    """
    tensors = named_tensors(model)
    want = outputs(model, example_inputs, cut.masked(tensors))
    smaller = cut.smaller(tensors)
    tried: list[str] = []
    for what, attributes in ATTEMPTS.items():
        undo: list[Undo] = []
        try:
            _replace(model, smaller, undo)
            for module, name, new in (*attributes(model, cut), *_ffn_config(model, cut)):
                _set(module, name, new, undo)
            why = differ(want, outputs(model, example_inputs))
        except Exception as error:  # whatever the model's code raises on smaller weights
            why = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        except BaseException:
            _roll_back(undo)
            raise
        if not why:
            return
        _roll_back(undo)
        tried.append(f"{what}: {why}")
    raise PassError(
        f"{type(model).__name__} keeps sizes in its code that could not be adjusted; restored. "
        f'Take form="graph", or leave groups {[g.name for g, _ in cut.groups()][:4]} out. '
        f"Tried {'; '.join(tried)}"
    )


def _roll_back(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _set(module: Any, name: str, new: object, undo: list[Undo]) -> None:
    old = getattr(module, name)
    undo.append(lambda: setattr(module, name, old))
    setattr(module, name, new)


def _replace(model: nn.Module, smaller: Mapping[str, Tensor], undo: list[Undo]) -> None:
    """Put the smaller tensors under every name of the old ones, and set torch layers' sizes."""
    old = named_tensors(model)
    by_id = {id(old[name]): tensor for name, tensor in smaller.items()}
    made: dict[int, Tensor] = {}
    for name, tensor in old.items():
        new = by_id.get(id(tensor))
        if new is None:
            continue
        if isinstance(tensor, nn.Parameter):
            new = made.setdefault(id(tensor), nn.Parameter(new, tensor.requires_grad))
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        _set(module, attribute, new, undo)
        for size, value in _layer_sizes(module, tensor):
            _set(module, size, value, undo)


def _layer_sizes(module: nn.Module, old: Tensor) -> Iterator[tuple[str, int]]:
    """Size attributes of a layer whose `weight` was `old`; nothing for other tensors."""
    weight: Any = getattr(module, "weight", None)
    if weight is None or weight.dim() != old.dim():
        return
    if isinstance(module, nn.Linear) and weight.dim() == 2:
        yield from zip(("out_features", "in_features"), weight.shape, strict=True)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and weight.dim() > 2:
        per_group = old.shape[0] // module.groups
        groups = 1 if module.groups == 1 else weight.shape[0] // per_group
        yield "groups", groups
        yield "out_channels", weight.shape[0]
        yield "in_channels", weight.shape[1] * groups
    elif isinstance(module, nn.Embedding):
        yield "embedding_dim", weight.shape[1]
    elif type(module).__name__ == "Conv1D":  # transformers' linear with a weight (K, N)
        if weight.dim() == 2:
            yield from zip(("nx", "nf"), weight.shape, strict=True)
    elif hasattr(module, "num_features") and weight.dim() == 1:
        yield "num_features", weight.shape[0]


Found = Iterator[tuple[Any, str, int]]


def _none(model: nn.Module, cut: Cut) -> Found:
    return iter(())


def _counts(model: nn.Module, cut: Cut) -> Found:
    return (f for f in _by_value(model, cut) if HEADS.search(f[1]))


def _config_too(model: nn.Module, cut: Cut) -> Found:
    """Also the counts in `config` objects, which all layers share."""
    yield from _counts(model, cut)
    for owner, sizes in _owners(model, cut):
        config = getattr(owner, "config", None)
        found = _matching(config, sizes) if hasattr(config, "__dict__") else ()
        yield from (f for f in found if HEADS.search(f[1]))


def _by_value(model: nn.Module, cut: Cut) -> Found:
    """Integer attributes of the modules around a cut group that equal a size that changes."""
    for module, sizes in _owners(model, cut):
        yield from _matching(module, sizes)


def _matching(owner: Any, sizes: Mapping[int, set[int]]) -> Found:
    for name, value in list(vars(owner).items()):
        news = sizes.get(value) if type(value) is int else None
        if news and len(news) == 1 and not NEVER.search(name):
            yield owner, name, next(iter(news))


def _owners(model: nn.Module, cut: Cut) -> Iterator[tuple[nn.Module, Mapping[int, set[int]]]]:
    """Modules around each cut group, with {old size: new sizes} of the axes the group lies on."""
    atoms = cut.couplings.atoms
    group_of = np.full(len(atoms.keep), -1)
    groups = [g for g, _ in cut.groups()]
    for i, group in enumerate(groups):
        group_of[group.atoms] = i
    sizes: list[dict[int, set[int]]] = [{} for _ in groups]
    for label in atoms.label:
        found = np.unique(group_of[label])
        for i in found[found >= 0]:
            sizes[i].setdefault(len(label), set()).add(cut.count(label))
    for group, changed in zip(groups, sizes, strict=True):
        for module in _around(model, [m.name for m in group.members]):
            yield module, changed


def _ffn_config(model: nn.Module, cut: Cut) -> Found:
    """The hidden size in `config`, where all hidden layers of that size became equally small."""
    every = [g for g in cut.couplings.groups if g.kind == "ffn" and not g.reason]
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in FFN:
            old = getattr(config, name, None)
            news = {len(cut.kept.get(g.name, g.atoms)) for g in every if g.size == old}
            if len(news) == 1 and old not in news:
                yield config, name, news.pop()


def _around(model: nn.Module, names: list[str]) -> Iterator[nn.Module]:
    """Modules between the common ancestor of the parameters (included) and their layers."""
    paths = [name.split(".")[:-1] for name in names]
    depth = 0
    while all(len(p) > depth and p[depth] == paths[0][depth] for p in paths):
        depth += 1
    found = {".".join(p[:i]) for p in paths for i in range(depth, len(p) + 1)}
    for path in sorted(found | {".".join(paths[0][:depth])}):
        module = model.get_submodule(path)
        if not type(module).__module__.startswith("torch.nn.modules"):
            yield module


ATTEMPTS: dict[str, Callable[[nn.Module, Cut], Found]] = {
    "weights only": _none,
    "head counts": _counts,
    "head counts, also in config": _config_too,
    "all sizes found by value": _by_value,
}
