"""Rotation: an orthogonal matrix between what writes a tensor and what reads it, exactly.

The residual stream of a decoder (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406) and the
values inside each attention head are rotated, which spreads outliers over all channels before
weights and activations are rounded. Everything is proven on the graph (`passes.residual`), computed
in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.ir.capture import capture
from sparsefx.ir.sites import Site
from sparsefx.passes.feeds import Feed, find_feeds
from sparsefx.passes.residual import Stream, find_stream
from sparsefx.passes.smooth import write


@dataclass(frozen=True)
class Rotation:
    """What was rotated; `reason` says why the residual stream was not, "" where it was."""

    reason: str
    hidden: int = 0
    how: str = ""
    """How the stream's matrix was made."""
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    """Sites and embeddings."""
    heads: tuple[str, ...] = ()
    """Output projections whose heads' values were rotated."""
    head: int = 0
    """Size of the heads, the last where they differ."""


def rotate(model: nn.Module, example_inputs: Any, seed: int = 0, untie: bool = False) -> Rotation:
    """Rotate `model` in place; its outputs stay what they were up to rounding.

    Norms' weights move into the Sites that read them. A head tied to the embedding is refused, or
    with `untie` gets a weight of its own (and stays tied where the stream is refused after all).
    """
    loosened = _untie(model) if untie else []
    captured = capture(model, example_inputs)
    feeds = find_feeds(model, captured)
    stream = find_stream(model, captured, feeds)
    new = _Edits(model)
    report = Rotation(stream.reason)
    if stream.reason:
        for module, weight in loosened:
            module.weight = weight
    else:
        matrix, how = orthogonal(stream.hidden, seed)
        _rotate_stream(new, stream, matrix)
        report = Rotation("", stream.hidden, how, tuple(stream.readers), tuple(stream.writers))
        _forget_tie(model, bool(loosened))
    heads = [f for f in feeds if f.head and f.source == "linear" and _whole_heads(f)]
    for feed in heads:
        _rotate_heads(new, feed, orthogonal(feed.head, seed + 1)[0])
    write(model, new.values)
    names = tuple(name for feed in heads for name in feed.names)
    size = heads[-1].head if heads else 0
    return Rotation(report.reason, report.hidden, report.how, report.readers, report.writers,
                    names, size)  # fmt: skip


# --- the matrix --------------------------------------------------------------------------------


def orthogonal(size: int, seed: int) -> tuple[Tensor, str]:
    """(size, size) float64 with R·Rᵀ = 1, random for every seed, and how it was made.

    A Hadamard matrix with random signs where an order is known (Sylvester's doubling of Paley's two
    constructions over prime fields), else Hadamard ⊗ a random orthogonal matrix of the odd part.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    twos = size & -size
    for base in [size // twos << j for j in range(twos.bit_length())]:
        core = _paley(base)
        if core is not None:
            both = torch.kron(_sylvester(size // base), core)
            how = f"Hadamard {size // base} ⊗ {base}"
            return signs[:, None] * both / size**0.5, how
    odd = size // twos
    q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
    uniform = (q * r.diagonal().sign()).contiguous()
    spread = torch.kron(_sylvester(twos) / twos**0.5, uniform)
    return signs[:, None] * spread, f"Hadamard {twos} ⊗ random {odd}"


def _sylvester(size: int) -> Tensor:
    out = torch.ones(1, 1, dtype=torch.float64)
    while len(out) < size:
        out = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), out)
    return out


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of this order by Paley's constructions (1933), None where neither applies.

    I: order q + 1 for primes q ≡ 3 mod 4. II: order 2(q + 1) for primes q ≡ 1 mod 4.
    """
    if order in (1, 2):
        return _sylvester(order)
    if order % 4:
        return None
    if _prime(order - 1):
        core = _conference(order - 1)
        core[1:, 0] = -1
        return core + torch.eye(order, dtype=torch.float64)
    q = order // 2 - 1
    if q % 4 != 1 or not _prime(q):
        return None
    ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    rest = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    eye = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(_conference(q), ones) + torch.kron(eye, rest)


def _conference(q: int) -> Tensor:
    """Jacobsthal's matrix of the field of q elements, bordered by ones (q + 1, q + 1)."""
    character = -torch.ones(q, dtype=torch.float64)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    out = torch.ones(q + 1, q + 1, dtype=torch.float64)
    out[0, 0] = 0
    out[1:, 1:] = character[(index[:, None] - index[None]) % q]
    return out


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


# --- the edits ---------------------------------------------------------------------------------


class _Edits:
    """Parameters in float64, edited several times and rounded once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[str, Tensor] = {}

    def value(self, name: str) -> Tensor:
        return self.values.get(name, self.model.get_parameter(name).detach().double())

    def matrix(self, site: Site) -> Tensor:
        """The Site's (N, K)."""
        return site.matrix(self.value(site.name))

    def put(self, site: Site, matrix: Tensor) -> None:
        self.values[site.name] = site.parameter_shape(matrix)


def _rotate_stream(new: _Edits, stream: Stream, rotation: Tensor) -> None:
    """Readers W·R, writers Rᵀ·W and b·R, embeddings E·R; norms' factors into the readers first."""
    for feed in stream.gains:
        factor = new.value(feed.parameters[0]) + feed.offset
        for site in feed.sites:
            new.put(site, new.matrix(site) * factor)
        new.values[feed.parameters[0]] = torch.full_like(factor, 1.0 - feed.offset)
    for site in stream.readers.values():
        matrix = new.matrix(site)
        new.put(site, matrix @ rotation.to(matrix.device))
    for name, made in stream.writers.items():
        if made is None:
            table = new.value(name)
            new.values[name] = table @ rotation.to(table.device)
            continue
        matrix = new.matrix(made)
        new.put(made, rotation.T.to(matrix.device) @ matrix)
    for name in stream.biases:
        bias = new.value(name)
        new.values[name] = bias @ rotation.to(bias.device)


def _whole_heads(feed: Feed) -> bool:
    """Whether every `head` channels read are `head` neighbouring rows of the producer, in order."""
    starts = feed.rows[:: feed.head]
    made = [start + i for start in starts for i in range(feed.head)]
    return list(feed.rows) == made and all(start % feed.head == 0 for start in starts)


def _rotate_heads(new: _Edits, feed: Feed, rotation: Tensor) -> None:
    """Rows of the producer by Rᵀ and the readers' columns by R, head by head."""
    assert feed.producer is not None
    size = feed.head
    matrix = new.matrix(feed.producer).clone()
    rotation = rotation.to(matrix.device)
    bias = new.value(feed.parameters[1]).clone() if len(feed.parameters) > 1 else None
    for start in sorted(set(feed.rows[::size])):
        matrix[start : start + size] = rotation.T @ matrix[start : start + size]
        if bias is not None:
            bias[start : start + size] = bias[start : start + size] @ rotation
    new.put(feed.producer, matrix)
    if bias is not None:
        new.values[feed.parameters[1]] = bias
    for site in feed.sites:
        columns = new.matrix(site)
        new.put(site, (columns.reshape(site.n, -1, size) @ rotation).reshape(site.n, site.k))


# --- tied heads --------------------------------------------------------------------------------


def _untie(model: nn.Module) -> list[tuple[nn.Module, nn.Parameter]]:
    """Give linear modules whose weight is an embedding's a copy; returns them and what they had."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    out: list[tuple[nn.Module, nn.Parameter]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            weight = module.get_parameter("weight")
            out.append((module, weight))
            copy = weight.detach().clone()
            module.weight = nn.Parameter(copy, requires_grad=weight.requires_grad)
    return out


def _forget_tie(model: nn.Module, untied: bool) -> None:
    """transformers ties again on `tie_weights()` unless the configuration says otherwise."""
    config = getattr(model, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
