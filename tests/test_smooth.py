"""Smoothing: the search never does harm, folding is exact, and what cannot be folded is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_transformers import IDS, moved, output, tiny
from torch import Tensor, nn

from sparsefx.ir.capture import capture
from sparsefx.ir.errors import WeightError
from sparsefx.ir.format import Format
from sparsefx.passes.feeds import Feed, find_feeds
from sparsefx.passes.smooth import fold, rescaled, search, smoothquant, tied
from sparsefx.passes.statistics import Statistics, output_error


def foldable(model: nn.Module) -> list[Feed]:
    found = [f for f in find_feeds(model, capture(model, IDS)) if not f.reason]
    assert found
    return found


def random_scales(feed: Feed) -> Tensor:
    """Between 1/4 and 4, equal where the Feed asks for it."""
    return tied(4 ** (2 * torch.rand(len(feed.rows), dtype=torch.float64) - 1), feed.rows)


@pytest.mark.parametrize("name", ["llama", "gqa", "gemma", "bert", "gpt2"])
def test_folding_is_exact_in_float64(name: str) -> None:
    model = tiny(name)
    want = output(model)
    for feed in foldable(model):
        before = model.get_parameter(feed.names[0]).clone()
        fold(model, feed, random_scales(feed))
        assert not torch.equal(before, model.get_parameter(feed.names[0]))
    assert moved(output(model), want) < 1e-12


@pytest.mark.parametrize("name", ["gqa", "gpt2"])
def test_powers_of_two_change_no_bit_in_float32(name: str) -> None:
    """Every product and sum is the old one times a power of two, so every rounding is the same."""
    model = tiny(name, torch.float32)
    want = output(model)
    for feed in foldable(model):
        exponents = tied(torch.randint(-3, 4, (len(feed.rows),)).double().exp2(), feed.rows)
        fold(model, feed, exponents.log2().round().exp2())
    assert torch.equal(output(model), want)


def test_float32_moves_within_the_bound_of_one_rounding_per_parameter() -> None:
    """Each folded parameter is off by a relative 2^-24 at most, so to first order an output moves
    by Σ |∂y/∂p|·|p|·2^-24 over them; the sum is the same before and after, the factors cancel.
    """
    model = tiny("gqa", torch.float32)
    found = foldable(model)
    exact = tiny("gqa")
    exact.load_state_dict(model.state_dict())
    edited = {n for f in found for n in (*f.names, *f.parameters)}
    for name, parameter in exact.named_parameters():
        parameter.requires_grad_(name in edited)
    y = exact(**IDS)[0][0, 0, 0]
    y.backward()
    grown = [(p.detach(), p.grad) for p in exact.parameters() if p.grad is not None]
    reach = sum(float((p * grad).abs().sum()) for p, grad in grown)
    # A norm's weight or a value's row may be edited twice, by what reads it and by what it reads.
    bound = 2 * reach * 2**-24
    for feed in found:
        fold(model, feed, random_scales(feed))
    exact.load_state_dict(model.state_dict())
    difference = abs(float(output(exact)[0, 0, 0] - y.detach()))
    assert 0 < difference <= bound


def outlier_case() -> tuple[list[Tensor], Statistics]:
    """Two weights whose inputs have three large channels, as after an LLM's norm."""
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    x[:, [3, 20, 41]] *= 30
    statistics = Statistics(64, x.device)
    statistics.add(x)
    return [torch.randn(48, 64), torch.randn(32, 64)], statistics


@pytest.mark.parametrize("text", ["int4g32", "int3g32", "2:4+int4g32", "int8+a8", "int8+a8g16"])
def test_the_search_pays_with_outliers(text: str) -> None:
    weights, statistics = outlier_case()
    found = search(weights, statistics, Format.parse(text))
    assert found.error_after < 0.9 * found.error_before
    assert found.how


def test_the_error_is_what_the_packed_weights_give() -> None:
    weights, statistics = outlier_case()
    fmt = Format.parse("int4g32")
    found = search(weights[:1], statistics, fmt)
    assert found.error_before == pytest.approx(
        output_error(weights[0], fmt.pack(weights[0]).unpack(), statistics), rel=1e-5
    )
    smoothed = (weights[0] * found.scales).float()
    after = output_error(smoothed, fmt.pack(smoothed).unpack(), rescaled(statistics, found.scales))
    assert found.error_after == pytest.approx(after, rel=1e-4)


def test_nothing_is_done_where_nothing_helps() -> None:
    weights, statistics = outlier_case()
    exact = search(weights, statistics, Format.parse("fp32"))
    assert (exact.error_after, exact.how) == (0.0, "")
    assert torch.equal(exact.scales, torch.ones(64, dtype=torch.float64))
    empty = search(weights, Statistics(64, torch.device("cpu")), Format.parse("int4"))
    assert empty.how == ""


def test_channels_of_one_row_get_one_factor() -> None:
    weights, statistics = outlier_case()
    rows = tuple(range(32)) * 2
    scales = search(weights, statistics, Format.parse("int4g32"), rows).scales
    assert torch.equal(scales[:32], scales[32:])
    assert not torch.equal(scales, scales[0].expand(64))


def test_smoothquant_is_its_formula() -> None:
    peak, largest = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    scales = smoothquant(peak, largest, 0.5)
    torch.testing.assert_close(scales[0] / scales[1], torch.tensor(2.0, dtype=torch.float64))
    assert scales[2] == 1


def test_statistics_follow_the_fold() -> None:
    torch.manual_seed(0)
    x, s = torch.randn(20, 8), torch.rand(8) + 0.5
    told, seen = Statistics(8, x.device), Statistics(8, x.device)
    told.add(x)
    seen.add(x / s)
    got = rescaled(told, s)
    for name in ("second", "squares", "total", "peak"):
        # 20 products of one rounding each, summed.
        torch.testing.assert_close(getattr(got, name), getattr(seen, name), rtol=1e-5, atol=1e-5)
    assert got.rows == 20


def test_bad_factors_change_nothing() -> None:
    model = tiny("gqa", torch.float16)
    found = foldable(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    out = next(f for f in found if f.head)
    with pytest.raises(WeightError, match="need one factor"):
        fold(model, out, torch.arange(1.0, 17.0))
    with pytest.raises(WeightError, match="16 positive numbers"):
        fold(model, out, torch.zeros(16))
    with pytest.raises(WeightError, match=r"outside torch\.float16"):
        fold(model, found[0], torch.full((16,), 1e-12))
    refused = Feed(out.sites, "none", reason="also read by add")
    with pytest.raises(WeightError, match=r"o_proj\.weight: no factors .* also read by add"):
        fold(model, refused, torch.ones(16))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_real_minilm_keeps_its_embeddings() -> None:
    minilm = pytest.importorskip("sparsefx.models.minilm")
    try:
        bundle = minilm.load()
    except Exception as error:  # its package is optional
        pytest.skip(str(error))
    model = bundle.model.double()
    with torch.no_grad():
        want = model(**bundle.example_inputs).last_hidden_state
    found = find_feeds(model, capture(model, bundle.example_inputs))
    usable = [f for f in found if not f.reason]
    assert [f.names[0].split(".")[-3:-1] for f in usable] == [["output", "dense"]] * 6
    for feed in usable:
        fold(model, feed, random_scales(feed))
    with torch.no_grad():
        assert moved(model(**bundle.example_inputs).last_hidden_state, want) < 1e-12
