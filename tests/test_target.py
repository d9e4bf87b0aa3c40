"""Targets: every way to say one, and mistakes that teach."""

from __future__ import annotations

from typing import Any

import pytest

from sparsefx.ir.errors import SpecError
from sparsefx.passes.target import Target


def test_every_way_to_say_it() -> None:
    want = Target(latency=0.5, rows=128)
    said: list[Any] = [
        want, "auto:latency=0.5,rows=128", " auto : rows = 128 , latency=0.5",
        {"auto": "latency=0.5,rows=128"}, {"auto": {"latency": 0.5, "rows": 128}},
    ]  # fmt: skip
    assert [Target.asked(one) for one in said] == [want] * len(said)
    assert want.goal == ("latency", 0.5)
    assert Target.read({"bits": "3.2"}).goal == ("bits", 3.2)
    assert Target.read("quality_loss=0").goal == ("quality_loss", 0.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("40MB", 40_000_000), ("1.5 kB", 1500), ("2MiB", 2 << 20), ("123", 123), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert Target.read({"size": text}).size == size
    assert Target.read(f"auto:size={text}").size == size


@pytest.mark.parametrize(
    "text", ["auto:latency=0.5,rows=1", "auto:bits=3.2,rows=128", "auto:size=40000000,rows=7",
             "auto:quality_loss=0.01,rows=1,device=cuda"],
)  # fmt: skip
def test_text_parses_back(text: str) -> None:
    assert str(Target.read(text)) == text


@pytest.mark.parametrize(
    "spec", ["int8", "automatic.yaml", {"format": "int8"}, 3, {"latency": 0.5}, "auto.yaml"]
)
def test_other_specs_are_no_target(spec: Any) -> None:
    assert Target.asked(spec) is None


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("auto", "one goal, not none: write one of auto:latency=0.5"),
        ("auto:rows=3", "one goal, not none"),
        ("auto:latency=0.5,bits=3", "one goal, not latency and bits"),
        ("auto:latncy=0.5", "no field 'latncy'; did you mean 'latency'"),
        ("auto:latency=0", "latency=0: Input should be greater than 0"),
        ("auto:latency=1.5", "less than or equal to 1"),
        ("auto:latency=fast", "latency=fast"),
        ("auto:latency", "'latency' is no 'name=value'"),
        ("auto:latency=", "is no 'name=value'"),
        ("auto:latency=0.5,latency=0.6", "given twice"),
        ("auto:size=40 parsecs", "no number of bytes; write 40MB"),
        ("auto:size=0", "greater than 0"),
        ("auto:bits=-1", "greater than 0"),
        ("auto:quality_loss=-0.1", "greater than or equal to 0"),
        ("auto:latency=0.5,rows=0", "rows=0"),
        ({"auto": "bits=4", "ignore": ["lm_head"]}, "'auto' stands alone; move 'ignore' into it"),
    ],
)  # fmt: skip
def test_mistakes_teach(said: Any, says: str) -> None:
    with pytest.raises(SpecError) as error:
        Target.asked(said)
    assert says in str(error.value)
