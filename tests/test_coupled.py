"""Coupled dimensions: what is found, where it lies, and why the rest is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from coupled_models import FROM_ZOO, OWN, TIMM, couplings_of
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.errors import CaptureError
from sparsefx.passes.coupled import Group, couple


def layout(group: Group) -> list[tuple[str, int, int, str]]:
    return [(m.name, m.axis, m.index.shape[1], m.role) for m in group.members]


def test_mlp() -> None:
    first, second, last = couplings_of("mlp").groups
    assert (first.kind, first.size, first.unit, first.reason) == ("ffn", 16, 1, "")
    assert layout(first) == [("0.weight", 0, 1, "out"), ("0.bias", 0, 1, "beside"),
                             ("2.weight", 1, 1, "in")]  # fmt: skip
    assert layout(second)[-1] == ("4.weight", 1, 1, "in")
    assert last.reason == last.fixed == "model output"


def test_halves_of_a_glu_are_one_unit() -> None:
    group = couplings_of("gated").group("both")
    assert (group.kind, group.size, group.unit) == ("ffn", 12, 2)
    assert group.members[0].index.tolist() == [[i, i + 12] for i in range(12)]


def test_residual_stream_and_batch_norm() -> None:
    groups = {g.name: g for g in couplings_of("residual").groups}
    assert (groups["stem"].kind, groups["first"].kind) == ("residual", "channels")
    assert [m.name for m in groups["stem"].of_role("scale")] == [
        "stem_bn.weight",
        "second_bn.weight",
    ]
    names = {m.name for m in groups["first"].members}
    assert {"first_bn.running_mean", "first_bn.running_var", "second.weight"} <= names
    assert not groups["stem"].reason
    assert not groups["first"].reason


def test_depthwise_channels_go_one_by_one_and_grouped_ones_by_group() -> None:
    groups = {g.name: g for g in couplings_of("inverted").groups}
    assert (groups["expand"].size, groups["expand"].unit) == (12, 1)
    assert ("depthwise.weight", 0, 1, "out") in layout(groups["expand"])
    assert {"reduce.weight", "excite.weight"} <= {m.name for m in groups["expand"].members}
    grouped = groups["project"]
    assert (grouped.size, grouped.unit) == (4, 3)
    assert {(m.name, m.index.shape[1]) for m in grouped.members if m.axis == 0} >= {
        ("project.weight", 2), ("grouped.weight", 3)}  # fmt: skip
    assert ("last.weight", 1, 3, "in") in layout(grouped)


def test_concatenation_has_offsets() -> None:
    groups = {g.name: g for g in couplings_of("dense").groups}
    assert [g.size for g in groups.values()] == [6, 4, 4, 5]
    head = next(m for m in groups["convolutions.1"].members if m.name == "head.weight")
    assert head.blocks == [(40, 16)]
    assert head.index.shape == (4, 4)
    norm = next(m for m in groups["convolutions.0"].members if m.name == "norms.1.weight")
    assert norm.blocks == [(6, 4)]


@pytest.mark.parametrize(
    ("name", "group", "size", "unit"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", 4, 48),
        ("llama", "model.layers.0.self_attn.q_proj", 2, 32),  # two query heads read one key head
        ("bert", "bert.encoder.layer.0.attention.self.query", 4, 16),
        ("vit", "vit.layers.0.attention.q_proj", 4, 16),
        pytest.param("timm_vit", "blocks.0.attn.qkv", 3, 192, marks=pytest.mark.zoo),
        ("phi3", "model.layers.0.self_attn.qkv_proj", 2, 64),
        ("fixed_heads", "qkv", 2, 24),
    ],
)
def test_heads(name: str, group: str, size: int, unit: int) -> None:
    heads = couplings_of(name).group(group)
    assert (heads.kind, heads.size, heads.unit, heads.reason) == ("heads", size, unit, "")
    (reader,) = heads.of_role("in")
    width = reader.index.shape[1]
    assert reader.index.reshape(-1).tolist() == list(range(size * width))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_a_normalised_stream_may_move_but_not_shrink(name: str) -> None:
    stream = next(g for g in couplings_of(name).groups if g.kind == "residual")
    assert stream.size == 64
    assert not stream.fixed
    assert "layer_norm" in stream.reason or "mean" in stream.reason


@pytest.mark.parametrize("name", [*OWN, *FROM_ZOO, TIMM])
def test_every_group_is_free_or_says_why(name: str) -> None:
    couplings = couplings_of(name)
    for group in couplings.groups:
        assert group.reason or group.of_role("in")
        assert not group.fixed or group.reason
        for member in group.members:
            assert member.index.shape[0] == group.size
            assert len(set(member.index.reshape(-1).tolist())) == member.index.size


class Between(nn.Module):
    """Two products with an op on the six hidden features between them."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.op = nn.Linear(4, 6), nn.Linear(6, 4), op

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.op(self.a(x)))
        return out


class TwoRoles(nn.Module):
    """One square weight whose rows and columns become one index; its input is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w(self.w(x).relu())
        return out


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


@pytest.mark.parametrize(
    ("op", "named", "moves"),
    [
        (lambda h: h.sort(-1).values, "sort", False),
        (lambda h: h.cumsum(-1), "cumsum", False),
        (lambda h: h.roll(1, -1), "roll", False),
        (lambda h: h * torch.arange(6), "arange", False),
        (lambda h: h.softmax(-1), "softmax", True),
        (lambda h: h - h.mean(-1, keepdim=True), "mean", True),
        (lambda h: F.layer_norm(h, (6,)), "layer_norm", True),
        (lambda h: F.group_norm(h, 2), "group_norm", True),
        (lambda h: h @ h.T @ h, "matmul", True),
        (lambda h: h.relu(), "", True),
    ],
)
def test_an_op_that_binds_features_is_named(
    op: Callable[[Tensor], Tensor], named: str, moves: bool
) -> None:
    group = couple(Between(op), torch.randn(2, 4)).group("a")
    assert (named in group.reason) if named else not group.reason
    assert bool(group.fixed) != moves


def test_tied_weight_takes_both_sides_reasons() -> None:
    (group,) = couple(TwoRoles(), torch.randn(2, 6)).groups
    assert group.fixed in ("model input", "model output")


def test_no_whole_graph() -> None:
    with pytest.raises(CaptureError, match="whole graph"):
        couple(DataDependent(), torch.randn(2, 4))
