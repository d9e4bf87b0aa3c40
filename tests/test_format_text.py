"""The text form of formats: it parses back, and a misspelling is named with the nearest word."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import PAIRS

from sparsefx.ir.codecs import Codec
from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format, vocabulary
from sparsefx.ir.layouts import Bitmap, Layout

# --- text ----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    rank=st.sampled_from([0, 1, 32, 99999]),
    a8=st.sampled_from([(False, 0), (True, 0), (True, 8), (True, 128), (True, 65536)]),
)
def test_text_round_trips(pair: tuple[Layout, Codec], rank: int, a8: tuple[bool, int]) -> None:
    fmt = Format(*pair, rank, *a8)
    text = str(fmt)
    if not text:
        assert fmt.is_dense
        return
    assert Format.parse(text) == fmt
    assert str(Format.parse(text)) == text
    assert Format.parse(text.replace("+", " + ")) == fmt


@settings(max_examples=100, deadline=None)
@given(share=st.integers(1, 999_999))
def test_shares_round_trip(share: int) -> None:
    layout = Bitmap(share=share / 1e6)
    again = Format.parse(str(layout)).layout
    assert isinstance(again, Bitmap)
    assert abs(again.share - layout.share) < 1e-12


@pytest.mark.parametrize("token", vocabulary())
def test_the_vocabulary_parses(token: str) -> None:
    assert str(Format.parse(token)).removeprefix("dense+") == token
    assert Format.parse(str(Format.parse(token))) == Format.parse(token)


def test_formats_are_values() -> None:
    a, b = Format.parse("2:4+int4g128"), Format.parse("2:4 + int4g128")
    assert a == b
    assert hash(a) == hash(b)
    assert Format.parse("dense") == Format()
    assert Format.parse("dense").is_dense
    assert not Format.parse("fp32").is_dense


def test_a_group_of_activations_needs_int8_activations() -> None:
    with pytest.raises(SpecError, match="needs a8=True"):
        Format(a8_group=128)
    fmt = Format.parse("2:4+int4g128+r8+a8g64")
    assert str(fmt.float_activations) == "2:4+int4g128+r8"
    assert Format.parse("a8g64").float_activations.is_dense


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tile16x1@50", "unknown token 'tile16x1@50'; did you mean 'tile16x1@50%'"),
        ("int4g12x", "unknown token 'int4g12x'; did you mean 'int4g128'"),
        ("bitmp@50%", "unknown token 'bitmp@50%'; did you mean 'bitmap@50%'"),
        ("bf61", "did you mean 'bf16'"),
        ("zzzzz", "unknown token 'zzzzz'; known: "),
        ("", "unknown token ''"),
        ("2:4++int4", "unknown token ''"),
        ("tile16x1", "does not say how much"),
        ("bitmap", "does not say how much"),
        ("bitmap@0%", "does not say how much"),
        ("tile0x4@50%", "between 1 and 4096"),
        ("tile5000x1@50%", "between 1 and 4096"),
        ("4:2", "1 <= n < m <= 256"),
        ("0:4", "1 <= n < m <= 256"),
        ("4:4", "1 <= n < m <= 256"),
        ("2:512", "1 <= n < m <= 256"),
        ("int1", "2 to 8 bits"),
        ("int9", "2 to 8 bits"),
        ("int4g0", "group_size 0"),
        ("int4g4", "8 to 65536"),
        ("r0", "rank 0"),
        ("int4+2:4", "out of order"),
        ("2:4+2:4", "repeated"),
        ("a8+int8", "out of order"),
        ("a8+a8g128", "repeated"),
        ("int8+a8g4", "activation group must be 8 to 65536"),
        ("int8+a8g99999", "activation group must be 8 to 65536"),
        ("int8+a8g0", "leave out 'g0'"),
        ("int8+a8g12x", "unknown token 'a8g12x'; did you mean 'a8g128'"),
        ("int4+int8", "repeated"),
        ("int4+" * 60, "characters"),
    ],
)
def test_spec_errors_name_the_token(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        Format.parse(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="abcdefgilmnprtux0123456789:@%+. ", max_size=24))
def test_any_text_parses_or_raises_spec_error(text: str) -> None:
    try:
        fmt = Format.parse(text)
    except SpecError:
        return
    assert Format.parse(str(fmt)) == fmt
