"""Three doors, one normal form: which weights are Sites, of what kind, and why others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.ir.capture import capture
from sparsefx.ir.errors import CaptureError
from sparsefx.ir.sites import Site


class Conv1D(nn.Module):
    """Hugging Face's: the weight is stored (K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 8), self.weight).view(2, 3, 6)


class By(nn.Module):
    """A module that multiplies x (2, 3, 8) by its parameter in a given way."""

    def __init__(self, shape: tuple[int, ...], how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.w)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.fc(x))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x.long().sum(-1) % 10))
        return out


class Broken(nn.Module):
    """Python that no exporter follows, so that only dynamo with a graph break opens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if float(x.sum()) > 1e9:
                return x
        return x


def one(model: nn.Module, x: Tensor, door: str) -> Site:
    (site,) = capture(model.eval(), x, door).sites
    return site


X = torch.randn(2, 3, 8)
WAYS: list[tuple[str, nn.Module, str, bool, int]] = [
    ("linear", nn.Sequential(nn.Linear(8, 6)), "linear", False, 1),
    ("F.linear", By((6, 8), F.linear), "linear", False, 1),
    ("conv1d", Conv1D(), "linear", True, 1),
    ("x @ w.T", By((6, 8), lambda x, w: x @ w.T), "linear", False, 1),
    ("x @ w", By((8, 6), torch.matmul), "linear", True, 1),
    ("transpose", By((6, 8), lambda x, w: x @ w.transpose(-1, 0)), "linear", False, 1),
    ("permute", By((6, 8), lambda x, w: x @ w.permute(1, 0)), "linear", False, 1),
    ("1x1", nn.Sequential(nn.Conv1d(3, 6, 1)), "conv1x1", False, 1),
    ("called twice", Twice(), "linear", False, 2),
    ("left", By((6, 3), lambda x, w: w @ x), "opaque", False, 1),
    ("einsum", By((8, 6), lambda x, w: torch.einsum("bsk,kn->bsn", x, w)), "opaque", False, 1),
    ("slice", By((9, 8), lambda x, w: F.linear(x, w[:6])), "opaque", False, 1),
    ("experts", By((2, 8, 6), torch.bmm), "refused", False, 1),
    ("kernel 3", nn.Sequential(nn.Conv1d(3, 6, 3)), "refused", False, 1),
    ("groups", nn.Sequential(nn.Conv1d(3, 6, 1, groups=3)), "refused", False, 1),
]


@pytest.mark.parametrize("door", ["export", "dynamo", "symbolic"])
@pytest.mark.parametrize(("name", "model", "kind", "transposed", "calls"), WAYS, ids=lambda w: w)
def test_one_site_whatever_the_spelling(
    name: str, model: nn.Module, kind: str, transposed: bool, calls: int, door: str
) -> None:
    site = one(model, X, door)
    assert (site.kind, site.transposed, site.calls) == (kind, transposed, calls)
    assert bool(site.reason) == (kind in ("opaque", "refused"))


@pytest.mark.parametrize("door", ["export", "dynamo"])
def test_rows_are_seen(door: str) -> None:
    assert one(nn.Sequential(nn.Linear(8, 6)), X, door).rows == ("6",)
    for size in (5, 9, 7):  # dynamo remembers the sizes of a frame
        assert one(nn.Sequential(nn.Linear(8, 6)), torch.randn(size, 8), door).rows == (str(size),)


@pytest.mark.parametrize("door", ["export", "dynamo", "symbolic"])
def test_a_weight_tied_to_an_embedding_stays_dense(door: str) -> None:
    site = one(Tied(), X, door)
    assert site.kind == "refused"
    assert site.names == ("embed.weight", "head.weight")
    assert "tied" in site.reason


def test_packed_projections_of_attention() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    for door in ("export", "dynamo"):
        sites = capture(model, (X, X, X), door).sites
        assert [s.name for s in sites] == ["in_proj_weight", "out_proj.weight"]
        assert all(s.kind != "refused" for s in sites)


def test_dynamo_opens_where_export_does_not() -> None:
    captured = capture(Broken().eval(), X)
    assert captured.door == "dynamo"
    assert captured.notes
    assert captured.notes[0].startswith("export: ")
    assert [s.name for s in captured.sites] == [f"layers.{i}.weight" for i in range(3)]
    assert all(s.calls == 1 for s in captured.sites)


def test_a_layer_nothing_reaches_is_named() -> None:
    model = Twice()
    model.unused = nn.Linear(4, 4)
    sites = {s.name: s for s in capture(model.eval(), X).sites}
    assert sites["unused.weight"].kind == "refused"
    assert "no graph reaches it" in sites["unused.weight"].reason


def test_no_door_opens() -> None:
    with pytest.raises(CaptureError, match="pass example_inputs"):
        capture(Broken().eval())


def test_training_mode_survives() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    model[1].eval()
    capture(model, X)
    assert model.training
    assert model[0].training
    assert not model[1].training
