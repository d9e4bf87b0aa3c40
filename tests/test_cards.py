"""The cards' figures against each other, and the roofline against arithmetic by hand."""

from __future__ import annotations

import pytest

from sparsefx.codegen.cards import CARDS, Card, Work, roofline
from sparsefx.codegen.triton_aot import TARGETS
from sparsefx.ir.errors import SpecError

# Multiply-adds of one SM per clock, fp16 with fp32 sums and int8: the architecture papers.
PER_CLOCK = {
    "A100 80GB SXM": (1024, 2048),
    "L4": (512, 1024),
    "RTX 4090": (256, 1024),
    "H100 SXM": (2048, 4096),
    "H200": (2048, 4096),
    "B200": (4096, 8192),
}


@pytest.mark.parametrize("name", CARDS)
def test_rates_follow_from_sms_and_clock(name: str) -> None:
    """Data sheets round to three digits: half a unit of the third is 0.5 % at most."""
    card = CARDS[name]
    half, whole = (2 * rate * card.sms * card.clock for rate in PER_CLOCK[name])
    assert card.fp16 == pytest.approx(half, rel=0.005)
    assert card.int8 == pytest.approx(whole, rel=0.005)
    assert card.target in TARGETS


def work(**changes: object) -> Work:
    """A product on a card of round numbers, with what `changes` says."""
    per_weight = {"all": 8.0, "integer": 4.0, "float": 2.0}
    usual = {"moved": 3e9, "m": 10, "n": 100, "k": 1000, "dtype": "fp16", "weights": 50_000}
    return Work(**(usual | {"per_weight": per_weight, "row_blocks": 3} | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def round_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARDS, "round", Card("sm_80", 1e12, 2e12, 4e12, 10, 1e9, 64, 32))


def test_seconds_of_each_resource() -> None:
    seconds = roofline("round", work()).seconds
    decoded = 50_000 * 3  # weights times row blocks, over 10 SMs at 1e9 clocks a second
    assert seconds == pytest.approx(
        {
            "memory": 3e9 / 1e12,
            "tensor": 2 * 10 * 100 * 1000 / 2e12,
            "integer": 4 * decoded / 64 / 1e10,
            "float": 2 * decoded / 32 / 1e10,
            "issue": 8 * decoded / 128 / 1e10,
        },
        rel=1e-12,
    )


def test_int8_takes_its_own_rate() -> None:
    both = [roofline("round", work(dtype=dtype)).seconds["tensor"] for dtype in ("bf16", "int8")]
    assert both == pytest.approx([1e-6, 0.5e-6], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "limit", "least"),
    [
        ({}, "memory", 3e-3),
        ({"moved": 0.0}, "tensor", 1e-6),
        ({"moved": 0.0, "m": 0}, "integer", 4 * 150_000 / 64 / 1e10),
        ({"moved": 0.0, "row_blocks": 300}, "integer", 4 * 15_000_000 / 64 / 1e10),
    ],
)
def test_the_slowest_limits(changes: dict[str, object], limit: str, least: float) -> None:
    roof = roofline("round", work(**changes))
    assert roof.limit == limit
    assert roof.least == pytest.approx(least, rel=1e-12)


def test_unknown_names() -> None:
    with pytest.raises(SpecError, match="did you mean 'H200'"):
        roofline("H20", work())
    with pytest.raises(SpecError, match="no tensor-core rate for 'fp32'"):
        roofline("L4", work(dtype="fp32"))
