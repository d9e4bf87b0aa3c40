"""Hand-written modules, one per way that PyTorch code multiplies by a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.models.example import Example, Factory


class FunctionalLinear(nn.Module):
    """`F.linear` on a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class TransposedProduct(FunctionalLinear):
    """`x @ W.T`, as Falcon writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Einsum(FunctionalLinear):
    """A weight inside `einsum`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,oi->bso", x, self.weight)


class CalledTwice(nn.Module):
    """One Linear at two places: two products, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.linear(x)
        result: Tensor = self.linear(hidden.relu())
        return result


class TiedLinears(nn.Module):
    """Two Linears that own one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu())
        return result


class TiedHead(nn.Module):
    """An embedding whose table is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.embed(ids))
        return result


class Attention(nn.Module):
    """`nn.MultiheadAttention`; with widths given, keys and values come from elsewhere."""

    def __init__(self, key_width: int | None = None, value_width: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            16, 4, kdim=key_width, vdim=value_width, batch_first=True
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result: Tensor = self.attention(query, key, value, need_weights=False)[0]
        return result


def _self_attention() -> Example:
    x = torch.randn(2, 5, 16)
    return Example(Attention(), (x, x, x))


def _cross_attention() -> Example:
    args = (torch.randn(2, 5, 16), torch.randn(2, 7, 12), torch.randn(2, 7, 8))
    return Example(Attention(12, 8), args)


def _encoder_layer() -> Example:
    layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)
    return Example(layer, (torch.randn(2, 5, 16),))


def _decoder_layer() -> Example:
    layer = nn.TransformerDecoderLayer(16, 4, dim_feedforward=32, batch_first=True)
    return Example(layer, (torch.randn(2, 5, 16), torch.randn(2, 7, 16)))


def _recurrent(kind: Callable[..., nn.Module]) -> Example:
    model = kind(16, 32, 2, bidirectional=True, batch_first=True)
    return Example(model, (torch.randn(1, 8, 16),))


def _image() -> tuple[Tensor]:
    return (torch.randn(2, 16, 6, 6),)


def _sequence() -> tuple[Tensor]:
    return (torch.randn(2, 5, 16),)


EXAMPLES: dict[str, Factory] = {
    "functional_linear": lambda: Example(FunctionalLinear(), _sequence()),
    "transposed_product": lambda: Example(TransposedProduct(), _sequence()),
    "einsum": lambda: Example(Einsum(), _sequence()),
    "called_twice": lambda: Example(CalledTwice(), _sequence()),
    "tied_linears": lambda: Example(TiedLinears(), _sequence()),
    "tied_head": lambda: Example(TiedHead(), (torch.randint(0, 64, (2, 5)),)),
    "multihead_self_attention": _self_attention,
    "multihead_cross_attention": _cross_attention,
    "transformer_encoder_layer": _encoder_layer,
    "transformer_decoder_layer": _decoder_layer,
    "conv2d_1x1": lambda: Example(nn.Conv2d(16, 32, 1), _image()),
    "conv2d_1x1_strided": lambda: Example(nn.Conv2d(16, 32, 1, stride=2), _image()),
    "conv2d_1x1_grouped": lambda: Example(nn.Conv2d(16, 32, 1, groups=4), _image()),
    "conv1d_1x1": lambda: Example(nn.Conv1d(16, 32, 1), (torch.randn(2, 16, 6),)),
    "lstm": lambda: _recurrent(nn.LSTM),
    "gru": lambda: _recurrent(nn.GRU),
    "bilinear": lambda: Example(nn.Bilinear(16, 8, 4), (torch.randn(3, 16), torch.randn(3, 8))),
}
