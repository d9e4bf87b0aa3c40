"""Rotations: the matrices are orthogonal, models keep their outputs, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_transformers import IDS, moved, output, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefx.passes.rotate import orthogonal, rotate


@pytest.mark.parametrize(
    ("size", "how"),
    [
        (1, "Hadamard 1 ⊗ 1"), (2, "Hadamard 2 ⊗ 1"), (64, "Hadamard 64 ⊗ 1"),
        (12, "Hadamard 1 ⊗ 12"), (20, "Hadamard 1 ⊗ 20"), (28, "Hadamard 1 ⊗ 28"),
        (36, "Hadamard 1 ⊗ 36"), (384, "Hadamard 32 ⊗ 12"), (576, "Hadamard 16 ⊗ 36"),
        (172, "Hadamard 4 ⊗ random 43"), (3, "Hadamard 1 ⊗ random 3"),
        (50, "Hadamard 2 ⊗ random 25"),
    ],
)  # fmt: skip
def test_matrices_are_orthogonal(size: int, how: str) -> None:
    matrix, made = orthogonal(size, 0)
    assert made == how
    # Sums of `size` products, each off by 2^-53.
    assert float((matrix @ matrix.T - torch.eye(size)).abs().max()) < size * 2**-52
    if "random" not in made:
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    again, other = orthogonal(size, 0)[0], orthogonal(size, 3)[0]
    assert torch.equal(matrix, again)
    assert size == 1 or not torch.equal(matrix, other)


@pytest.mark.parametrize("name", ["llama", "gqa", "gemma"])
def test_decoders_keep_their_outputs(name: str) -> None:
    model = tiny(name)
    want = output(model)
    untied = name != "gemma"
    report = rotate(model, IDS, untie=not untied)
    assert report.reason == ""
    assert (report.hidden, report.how, report.head) == (16, "Hadamard 16 ⊗ 1", 4)
    assert len(report.readers) == 2 * 5 + 1
    assert len(report.writers) == 2 * 2 + 1
    assert len(report.heads) == 2
    assert moved(output(model), want) < 1e-12
    for weight in (report.readers[0], report.writers[0], report.heads[0]):
        fresh = tiny(name).get_parameter(weight)
        assert moved(model.get_parameter(weight), fresh) > 0.1, "it was rotated indeed"
    gain = model.get_parameter("model.norm.weight")
    assert torch.equal(gain, torch.full_like(gain, 0.0 if name == "gemma" else 1.0))


def test_it_spreads_outliers() -> None:
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[3] *= 50
        model.model.embed_tokens.weight[:, 3] *= 50

    def crest() -> float:
        table = model.model.embed_tokens.weight
        return float(table.abs().amax() / table.square().mean().sqrt())

    before = crest()
    rotate(model, IDS)
    assert crest() < before / 2


def test_a_tied_head_is_refused_or_untied() -> None:
    model = tiny("gemma")
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = rotate(model, IDS)
    assert "model.embed_tokens.weight is tied to lm_head.weight" in report.reason
    assert report.heads, "the heads' values need no stream"
    assert torch.equal(before["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    report = rotate(model, IDS, untie=True)
    assert report.reason == ""
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_layer_norm_is_refused_and_heads_are_rotated(name: str) -> None:
    model = tiny(name)
    want = output(model)
    report = rotate(model, IDS, untie=True)
    assert "subtracts the mean" in report.reason or "tied" in report.reason
    assert len(report.heads) == 2
    assert moved(output(model), want) < 1e-12
    if name == "gpt2":
        assert model.lm_head.weight is model.transformer.wte.weight, "tied again"


class Stream(nn.Module):
    """embedding → change → norm → product (+ residual) → head."""

    def __init__(self, change: Callable[[Stream, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(10, 8), nn.RMSNorm(8)
        self.a, self.head, self.gain = nn.Linear(8, 8), nn.Linear(8, 5), nn.RMSNorm(8)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        x = self.change(self, self.table(ids))
        x = x + self.a(self.norm(x))
        return self.head(self.gain(x))  # type: ignore[no-any-return]


ALLOWED: dict[str, Callable[[Stream, Tensor], Tensor]] = {
    "nothing": lambda m, x: x,
    "scaled": lambda m, x: x * 3.5,
    "per row": lambda m, x: x * torch.arange(1.0, 7.0, dtype=x.dtype).view(2, 3, 1),
    "flattened": lambda m, x: x.view(1, 6, 8).transpose(0, 1).reshape(2, 3, 8),
    "no gain": lambda m, x: x + F.rms_norm(x, (8,)),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[Stream, Tensor], Tensor], str]] = {
    "activation": (lambda m, x: x + torch.sigmoid(x), "sigmoid"),
    "per channel": (lambda m, x: x * torch.arange(1.0, 9.0, dtype=x.dtype), "mul"),
    "constant": (lambda m, x: x + 1.0, "constant"),
    "softmax": (lambda m, x: torch.softmax(x, -1), "softmax"),
    "moved": (lambda m, x: x.view(2, 3, 2, 4).transpose(2, 3).reshape(2, 3, 8), "view"),
    "flip": (lambda m, x: x.flip(-1), "flip"),
    "norm twice": (lambda m, x: x + m.a(m.norm(x)), "read 2 times"),
    "post norm": (lambda m, x: m.gain(x) + x, "read 2 times"),
    "layer norm": (lambda m, x: x + m.a(F.layer_norm(x, (8,))), "subtracts the mean"),
    "max": (lambda m, x: x / x.abs().amax(-1, keepdim=True), "abs"),
    "one norm": (lambda m, x: x / x.pow(4).sum(-1, keepdim=True), "pow"),
    "over rows": (lambda m, x: x * x.pow(2).mean(1, keepdim=True), "pow"),
}  # fmt: skip
IDS8 = torch.tensor([[1, 5, 2], [9, 0, 3]])


@pytest.mark.parametrize("case", ALLOWED)
def test_what_commutes(case: str) -> None:
    torch.manual_seed(0)
    model = Stream(ALLOWED[case]).double().eval().requires_grad_(False)
    want = model(IDS8)
    report = rotate(model, IDS8)
    assert report.reason == ""
    assert moved(model(IDS8), want) < 1e-12


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not(case: str) -> None:
    change, reason = REFUSED[case]
    model = Stream(change).double().eval().requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert reason in rotate(model, IDS8).reason
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
