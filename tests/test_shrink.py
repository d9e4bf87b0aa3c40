"""Structured pruning: the small model is the dense one with what went forced to zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from coupled_models import OWN, assert_equal, couplings_of, make, run, twin
from torch import Tensor, nn

from sparsefx.ir.errors import PassError, SpecError
from sparsefx.passes.coupled import Group
from sparsefx.passes.shrink import Form, nested, shrink
from sparsefx.passes.shrink_importance import input_statistics

ROUNDS_TO_FLOAT32 = ("llama", "phi3")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def with_zeros(
    model: nn.Module, inputs: Any, groups: Sequence[Group], kept: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The dense model's outputs, its layers' inputs forced to zero where units go."""
    hooks = []
    for group, stay in zip(groups, kept, strict=True):
        gone = [i for i in range(group.size) if i not in set(stay)]
        for m in group.of_role("in"):
            owner = model.get_submodule(m.name.rpartition(".")[0])
            mask = torch.ones(int(m.index.max()) + 1)
            size = model.get_parameter(m.name).shape[m.axis]
            mask = torch.cat([mask, torch.ones(size - len(mask))]).double()
            mask[torch.from_numpy(m.index[gone].reshape(-1))] = 0
            if isinstance(owner, CONVOLUTIONS):
                mask = mask.reshape(-1, *[1] * len(owner.kernel_size))
            hooks.append(owner.register_forward_pre_hook(partial(_times, mask)))
    out = run(model, inputs)
    for hook in hooks:
        hook.remove()
    return out


def _times(mask: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * mask, *args[1:])


def random_keep(groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for g in groups:
        stay = int(torch.randint(1, g.size, (1,), generator=generator))
        out[g.name] = sorted(torch.randperm(g.size, generator=generator)[:stay].tolist())
    return out


MODULES = ("mlp", "gated", "residual", "inverted", "dense", "gpt2", "llama", "bert", "vit", "phi3")
GRAPHS = (*OWN, "gpt2", "phi3")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((n, "module") for n in MODULES),
        *((n, "graph") for n in GRAPHS),
        pytest.param("timm_vit", "graph", marks=pytest.mark.zoo),
    ],
)
def test_shrunk_equals_masked(name: str, form: Form) -> None:
    model, inputs = make(name)
    groups = [g for g in couplings_of(name).groups if not g.reason]
    keep = random_keep(groups, 3)
    if name == "phi3":  # its code reads the number of heads from the config all layers share
        keep |= {g.name: [1] for g in groups if g.kind == "heads"}
    want = with_zeros(model, inputs, groups, [keep[g.name] for g in groups])
    report = shrink(model, inputs, keep=keep, form=form)
    eps = 2.0**-23 if name in ROUNDS_TO_FLOAT32 else 2.0**-52
    assert_equal(run(report.model, inputs), want, eps)
    assert (report.model is model) == (form == "module")
    assert report.parameters[1] < report.parameters[0]
    assert report.macs[1] < report.macs[0]
    for row in report.rows:
        assert row.after == len(keep[row.name])
    assert report.parameters[1] == sum(p.numel() for p in report.model.parameters())


def zeroed(gone: Sequence[int]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, list(gone)] = 0
        return out

    return hook


@pytest.mark.parametrize(
    ("name", "group", "after"),
    [("residual", "first", "first_bn"), ("inverted", "expand", "bn2"), ("mlp", "0", "")],
)
def test_zero_after_batch_norm(name: str, group: str, after: str) -> None:
    """Here the channels themselves are forced to zero, batch norm's shift too."""
    model, inputs = make(name)
    size = couplings_of(name).group(group).size
    gone = [0, 2, 5]
    oracle = twin(model)
    if after:  # ReLU and ReLU6 keep zero
        oracle.get_submodule(after).register_forward_hook(zeroed(gone))
    else:
        oracle.get_submodule("1").register_forward_hook(zeroed(gone))
    want = run(oracle, inputs)
    shrink(model, inputs, keep={group: [i for i in range(size) if i not in gone]})
    assert_equal(run(model, inputs), want)


def sizes(model: nn.Module, path: str, *names: str) -> list[int]:
    return [getattr(model.get_submodule(path), name) for name in names]


def test_sizes_in_modules_follow() -> None:
    model, inputs = make("inverted")
    shrink(model, inputs, keep={"expand": 5, "project": 2})
    channels = ("in_channels", "out_channels", "groups")
    assert sizes(model, "depthwise", *channels) == [5, 5, 5]
    assert sizes(model, "grouped", *channels) == [4, 6, 2]
    assert sizes(model, "bn2", "num_features") == [5]
    gpt2, ids = make("gpt2")
    shrink(gpt2, ids, keep={"transformer.h.0.attn.c_attn": 3})
    assert sizes(gpt2, "transformer.h.0.attn", "num_heads", "split_size") == [3, 48]
    assert sizes(gpt2, "transformer.h.0.attn.c_attn", "nf", "nx") == [144, 64]


def test_code_that_keeps_sizes_is_restored() -> None:
    model, inputs = make("fixed_heads")
    model.train()
    before, attributes = twin(model).state_dict(), dict(vars(model.get_submodule("qkv")))
    with pytest.raises(PassError, match='form="graph"'):
        shrink(model, inputs, 0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert vars(model.get_submodule("qkv")) == attributes
    assert model.training


@pytest.mark.parametrize("criterion", ["magnitude", "activation", "bn_scale", "parameter", "group"])
def test_the_least_important_go(criterion: str) -> None:
    """Channels 1, 4 and 7 matter least by each measure in turn."""
    model, inputs = make("residual")
    group, weak = couplings_of("residual").group("first"), [1, 4, 7]
    scores: Any = criterion
    with torch.no_grad():
        if criterion == "magnitude":
            model.get_parameter("first.weight")[weak] *= 1e-3
            model.get_parameter("second.weight")[:, weak] *= 1e-3
        elif criterion == "activation":
            model.get_parameter("first_bn.bias")[weak] = -100  # the ReLU stays shut
        elif criterion == "bn_scale":
            model.get_parameter("first_bn.weight")[:] = torch.linspace(1, 2, 10)
            model.get_parameter("first_bn.weight")[weak] = 1e-3
    if criterion == "parameter":
        scores = {"first.weight": torch.ones(10, 8, 3, 3)}
        scores["first.weight"][weak] = 0.5
    elif criterion == "group":
        scores = {"first": torch.tensor([0.0 if i in weak else 1.0 for i in range(10)])}
    statistics = input_statistics(model, [group], [inputs])
    second = model.get_parameter("second.weight").detach().clone()
    report = shrink(model, inputs, 0.3, criterion=scores, statistics=statistics)
    rest = [i for i in range(10) if i not in weak]
    assert torch.equal(model.get_parameter("second.weight"), second[:, rest])
    (row,) = [r for r in report.rows if not r.reason]
    assert (row.name, row.before, row.after) == ("first", 10, 7)
    assert "first (channels): 10 -> 7" in str(report)
    assert "MACs" in str(report)


def test_residual_channels_on_request() -> None:
    model, inputs = make("residual")
    report = shrink(model, inputs, 0.5, criterion="bn_scale", kinds=("channels", "residual"))
    assert {r.name: r.after for r in report.rows if not r.reason} == {"stem": 4, "first": 5}
    assert model.get_submodule("stem").out_channels == 4


def test_nested_takes_the_first_channels() -> None:
    model, inputs = make("gated")
    before = twin(model).state_dict()
    small = nested(model, inputs, 0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(small.get_parameter("down.weight"), before["down.weight"][:, :6])
    rows = [*range(6), *range(12, 18)]
    assert torch.equal(small.get_parameter("both.weight"), before["both.weight"][rows])
    inner = nested(small, inputs, 0.5)
    direct = nested(model, inputs, 0.25)
    assert_equal(run(inner, inputs), run(direct, inputs), 0.0)


def test_the_small_model_trains_and_saves(tmp_path: Path) -> None:
    model, inputs = make("residual")
    frozen = model.get_parameter("first.weight").requires_grad_(False)
    shrink(model, inputs, 0.5)
    assert not model.get_parameter("first.weight").requires_grad
    assert frozen.shape[0] == 10
    model.train()(inputs).sum().backward()
    assert model.get_parameter("second.weight").grad is not None
    torch.save(model.state_dict(), tmp_path / "small.pt")
    assert set(torch.load(tmp_path / "small.pt")) == set(make("residual")[0].state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give amount"),
        ({"amount": 1.0}, "give amount"),
        ({"amount": 0.5, "keep": {"0": 2}}, "give amount"),
        ({"keep": {"one": 2}}, "no group 'one'"),
        ({"keep": {"0": 17}}, "keep 17 of 16"),
        ({"keep": {"0": [16]}}, "among 0 to 15"),
        ({"keep": {"4": 2}}, "model output"),
        ({"amount": 0.5, "criterion": "size"}, "criterion 'size'"),
        ({"amount": 0.5, "criterion": {"0.weight": torch.ones(3)}}, "the parameter is"),
        ({"amount": 0.5, "criterion": {"0": torch.full((16,), torch.nan)}}, "without NaN"),
        ({"amount": 0.5, "criterion": "bn_scale"}, "no group can be cut"),
    ],
)
def test_requests_that_cannot_be_met(arguments: dict[str, Any], message: str) -> None:
    model, inputs = make("mlp")
    before = twin(model).state_dict()
    with pytest.raises(SpecError, match=message):
        shrink(model, inputs, **arguments)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("form", ["module", "graph"])
def test_onnx(form: Form, tmp_path: Path) -> None:
    """The gate of export_onnx compares ONNX Runtime with the small model."""
    from sparsefx.runtime.export import export_onnx

    model, inputs = make("inverted")
    model, inputs = model.float(), inputs.float()
    small = shrink(model, inputs, 0.5, form=form).model
    report = export_onnx(small, tmp_path / "small.onnx", inputs)
    assert report.path.exists()
    assert report.differences
