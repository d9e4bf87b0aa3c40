from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from product_counter import Products, count_products
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.randn(2, 5, 16)


class Uses(nn.Module):
    """A module with weight [32, 16], experts [4, 16, 8] and a function of them and x."""

    def __init__(self, function: Callable[[Uses, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16))
        self.experts = nn.Parameter(torch.randn(4, 16, 8))
        self.vector = nn.Parameter(torch.randn(16))
        self.mask = nn.Buffer(torch.ones(32, 16))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def count(function: Callable[[Uses, Tensor], Tensor], x: Tensor = X) -> Products:
    return count_products(Uses(function), (x,))


def copied(m: Uses, x: Tensor) -> Tensor:
    blank = torch.empty(32, 16)
    blank[:, :].copy_(m.weight)
    return x @ blank.T


def chosen_experts(m: Uses, x: Tensor) -> Tensor:
    return torch.bmm(x, m.experts[x[:, 0, 0].argsort()])


def out_of_sight(m: Uses, x: Tensor) -> Tensor:
    return x @ m.weight.data.T


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.weight),
        lambda m, x: x @ m.weight.T,
        lambda m, x: m.weight @ x.transpose(1, 2),
        lambda m, x: torch.einsum("bsi,oi->bos", x, m.weight),
        lambda m, x: torch.tensordot(x, m.weight, dims=([2], [1])),
        lambda m, x: torch.addmm(torch.zeros(32), x[0], m.weight.T),
        lambda m, x: torch.mv(m.weight, x[0, 0]),
        lambda m, x: F.linear(x.double(), m.weight.double()),
        lambda m, x: F.linear(x, torch.cat([m.weight[8:], m.weight[:8]])),
        lambda m, x: F.linear(x, m.weight[4:9].clone().contiguous()),
        lambda m, x: F.conv1d(x.transpose(1, 2), m.weight[..., None]),
        lambda m, x: F.linear(torch.ones(2, 16), m.weight),
        copied,
        out_of_sight,
    ],
)
def test_every_spelling_of_one_product_counts_once(
    function: Callable[[Uses, Tensor], Tensor],
) -> None:
    assert count(function) == Products({"weight": 1}, {}, {}, count(function).operators)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * m.vector + m.weight[0],
        lambda m, x: x @ m.vector,
        lambda m, x: F.layer_norm(x, (16,), m.vector),
        lambda m, x: F.embedding(x[..., 0].argsort(), m.weight) @ torch.ones(16, 3),
        lambda m, x: x @ torch.zeros_like(m.weight).T,
        lambda m, x: torch.addmm(m.weight, torch.ones(32, 5), x[0]),
    ],
)
def test_vectors_biases_tables_and_shapes_do_not_count(
    function: Callable[[Uses, Tensor], Tensor],
) -> None:
    seen = count(function)
    assert not seen.counts
    assert not seen.unknown


def test_a_masked_weight_is_not_the_weight() -> None:
    seen = count(lambda m, x: F.linear(x, m.weight * m.mask))
    assert (seen.counts, seen.others) == ({}, {"weight": 1})


def test_experts_chosen_by_the_input_count() -> None:
    assert count(chosen_experts).counts == {"experts": 1}


def test_two_parameters_multiplied_count_the_right_one() -> None:
    seen = count(lambda m, x: m.weight @ m.experts[0])
    assert (seen.counts, seen.others) == ({"experts": 1}, {"weight": 1})


def test_concatenated_weights_count_each() -> None:
    both = count(lambda m, x: x @ torch.cat([m.weight.T, m.experts[0]], dim=1))
    assert both.counts == {"weight": 1, "experts": 1}


def test_an_unlisted_operator_is_reported() -> None:
    seen = count(lambda m, x: torch.cdist(x[0], m.weight))
    assert list(seen.unknown) == ["weight"]
    assert not seen.counts


@pytest.mark.parametrize(
    ("model", "args", "counts"),
    [
        (nn.Linear(16, 4), (X,), {"weight": 1}),
        (nn.Conv2d(4, 8, 1, groups=2), (torch.randn(1, 4, 3, 3),), {"weight": 1}),
        (nn.ConvTranspose1d(4, 8, 3), (torch.randn(1, 4, 9),), {"weight": 1}),
        (nn.Bilinear(4, 3, 2), (torch.randn(5, 4), torch.randn(5, 3)), {"weight": 1}),
        (nn.MultiheadAttention(16, 4), (X, X, X), {"in_proj_weight": 1, "out_proj.weight": 1}),
        (
            nn.MultiheadAttention(16, 4),
            (X, X + 1, X),
            {"in_proj_weight": 3, "out_proj.weight": 1},
        ),
        (
            nn.TransformerEncoderLayer(16, 4, 8),
            (X,),
            dict.fromkeys(
                (
                    "self_attn.in_proj_weight",
                    "self_attn.out_proj.weight",
                    "linear1.weight",
                    "linear2.weight",
                ),
                1,
            ),
        ),
        (nn.LSTM(16, 8), (X,), {"weight_ih_l0": 1, "weight_hh_l0": 1}),
        (nn.GRU(16, 8), (X,), {"weight_ih_l0": 1, "weight_hh_l0": 2}),
        (nn.LSTMCell(16, 8), (X[0],), {"weight_ih": 1, "weight_hh": 1}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules(model: nn.Module, args: tuple[Tensor, ...], counts: dict[str, int]) -> None:
    seen = count_products(model.eval(), args)
    assert seen.counts == counts
    assert not seen.unknown


def test_tied_parameters_count_under_their_first_name() -> None:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    assert count_products(nn.Sequential(first, second, second), (X,)).counts == {"0.weight": 3}


def test_the_fast_path_setting_is_restored() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    count_products(nn.Linear(16, 4), (X,))
    assert torch.backends.mha.get_fastpath_enabled() == before
