"""Nodes and libraries that are not what they should be: statuses, never crashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from native_cases import (
    ENGINE,
    Extras,
)
from ort_nodes import (
    attributes,
    case,
    model,
    options,
    rows,
    run,
    session,
    tensors,
)
from torch import Tensor

from sparsefx.codegen.native import why_missing
from sparsefx.runtime.ort import ort_session

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(ENGINE is None, reason=why_missing())


BITMAP, RUNS, PLAIN = "bitmap@50%+uint4g16", "1:16+int8", "fp16"
HUGE = 1 << 62
HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    (BITMAP, {"layout": [3]}, "unknown layout 3"),
    (BITMAP, {"layout": [2, 1]}, "layout has 2 numbers"),
    (BITMAP, {"layout": [2, 0, 1]}, "sides of tiles"),
    (BITMAP, {"layout": [2, 1, -1]}, "sides of tiles"),
    (BITMAP, {"layout": [2, 2, 2]}, "index has 64 elements, not 16"),
    (BITMAP, {"layout": [1, 4, 4]}, "1 <= n < m <= 256"),
    (BITMAP, {"layout": [1, -(1 << 63), 4]}, "1 <= n < m <= 256"),
    (BITMAP, {"layout": [1, 2, 5]}, "not a multiple of m = 5"),
    (BITMAP, {"codec": [2]}, "unknown codec 2"),
    (BITMAP, {"codec": [-1, 4, 16, 0]}, "unknown codec -1"),
    (BITMAP, {"codec": [1, 4, 16]}, "codec has 3 numbers"),
    (BITMAP, {"codec": [1, 9, 16, 0]}, "2 to 8 bits, not 9"),
    (BITMAP, {"codec": [1, -4, 16, 0]}, "2 to 8 bits, not -4"),
    (BITMAP, {"codec": [1, 4, HUGE, 0]}, "group_size"),
    (BITMAP, {"codec": [1, 4, -16, 0]}, "group_size"),
    (BITMAP, {"codec": [1, 4, 16, 7]}, "symmetric must be 0 or 1"),
    (BITMAP, {"codec": [1, 3, 16, 0]}, "values has 128 elements, not 96"),
    (BITMAP, {"codec": [1, 4, 8, 0]}, "scales has 32 elements, not 64"),
    (BITMAP, {"codec": [1, 4, 16, 1]}, "it has 5 inputs, not 4"),
    (BITMAP, {"codec": [0]}, "it has 5 inputs, not 3"),
    (BITMAP, {"n": -1}, "n and k must not be negative"),
    (BITMAP, {"n": HUGE, "k": HUGE}, "too large"),
    (BITMAP, {"n": HUGE, "k": 0}, "too large"),
    (BITMAP, {"n": 1 << 30, "k": 1 << 10}, "too large"),
    (BITMAP, {"n": 17}, "index has 64 elements, not 68"),
    (BITMAP, {"k": 48}, "index has 64 elements, not 96"),
    (BITMAP, {"a8": 2}, "a8 must be 0 or 1"),
    (BITMAP, {"a8": 1, "a8_group": -8}, "a8_group must be"),
    (BITMAP, {"branch": 1}, "it has 5 inputs, not 8"),
    (BITMAP, {"biased": 1}, "it has 5 inputs, not 6"),
    (PLAIN, {"a8": 1}, "a8 needs a codec of integers"),
    (PLAIN, {"n": 8}, "values has 512 elements, not 256"),
]


def refusal(given: dict[str, Tensor], fields: dict[str, Any], **how: Any) -> str:
    with pytest.raises(Exception, match="sparsefx") as caught:
        ort_session(model(given, fields, **how), options())
    return str(caught.value)


@pytest.mark.parametrize(("text", "change", "why"), HOSTILE)
def test_hostile_attributes(text: str, change: dict[str, Any], why: str) -> None:
    packed = case(text, 16, 32)[0]
    message = refusal(tensors(packed, Extras()), attributes(packed) | change)
    assert f"'fc' of format '{text}'" in message
    assert why in message


@pytest.mark.parametrize("text", [BITMAP, RUNS, PLAIN, "int3"])
def test_buffers_of_another_length_or_type(text: str) -> None:
    packed = case(text, 16, 32)[0]
    given = tensors(packed, Extras())
    for name in packed.format.buffers:
        t = given[name]
        for bad in (t[:-1], torch.cat([t.reshape(-1), t.reshape(-1)[:1]]), t[:0]):
            assert f"{name} has {bad.numel()} elements" in refusal(
                given | {name: bad.contiguous()}, attributes(packed)
            ) or (name == "index" and bad.numel() == t.numel())
        other = torch.zeros(t.shape, dtype=torch.uint8 if t.dtype != torch.uint8 else torch.float32)
        assert f"{name} must be " in refusal(given | {name: other}, attributes(packed))


def test_an_index_that_counts_other_values() -> None:
    packed = case(BITMAP, 16, 32)[0]
    for byte in (0, 255):
        index = torch.full_like(packed.buffers[0], byte)
        message = refusal(tensors(packed, Extras()) | {"index": index}, attributes(packed))
        assert "values has 128 elements, not " in message
    runs = case("1:3+int8", 16, 33)[0]
    index = torch.full_like(runs.buffers[0], 255)
    message = refusal(tensors(runs, Extras()) | {"index": index}, attributes(runs))
    assert "outside its run of 3" in message


def test_missing_or_odd_attributes() -> None:
    packed = case(RUNS, 16, 32)[0]
    fields, given = attributes(packed), tensors(packed, Extras())
    for name in fields:
        refusal(given, {k: v for k, v in fields.items() if k != name})
    message = refusal(given, fields | {"format": b"\xff\n" * 5000, "layout": [9]})
    assert "??" in message
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["index", "values", "scales", "zero_points"])
def test_a_weight_must_be_constant(name: str) -> None:
    packed = case(BITMAP, 16, 32)[0]
    message = refusal(tensors(packed, Extras()), attributes(packed), fed=[name])
    assert f"({name}) must be a constant initializer" in message


def test_x_of_another_width() -> None:
    packed = case(BITMAP, 16, 32)[0]
    made = session(packed)
    for width in (31, 33, 0):
        with pytest.raises(Exception, match=rf"x\) has shape \(2, {width}\), not \(…, 32\)"):
            run(made, rows(width, 2))
    made = session(packed, rank=1)
    with pytest.raises(Exception, match=r"has shape \(5\)"):
        run(made, rows(5))


def test_branch_and_bias_of_another_shape() -> None:
    packed, extras = case("int8", 16, 32, True, 4)
    given, fields = tensors(packed, extras), attributes(packed, True, True)
    for name, bad in (
        ("down", torch.zeros(4, 31)), ("up", torch.zeros(15, 4)), ("up", torch.zeros(16, 5)),
        ("down", torch.zeros(4, 32, dtype=torch.uint8)), ("down", torch.zeros(128)),
    ):  # fmt: skip
        assert f"({name}) " in refusal(given | {name: bad}, fields)
    for name, size in (("branch_scale", 5), ("bias", 15), ("bias", 0)):
        made = ort_session(model(given | {name: torch.zeros(size)}, fields), options())
        with pytest.raises(Exception, match=rf"\({name}\) has shape \({size}\)"):
            run(made, rows(32, 2))


def test_random_bytes_are_refused_or_multiplied() -> None:
    """Whatever the buffers hold, a product of the right shape or a sentence comes back."""
    rng, said = np.random.default_rng(3), list[str]()
    for text in (BITMAP, RUNS, "int3g8", "tile3x5@50%+uint5", "1:3+fp16"):
        packed = case(text, 15, 48)[0]
        given = tensors(packed, Extras())
        for _ in range(20):
            noise = dict(given)
            name = packed.format.buffers[int(rng.integers(len(given)))]
            size = given[name].numel() * given[name].element_size()
            raw = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
            noise[name] = raw.view(given[name].dtype)
            try:
                made = ort_session(model(noise, attributes(packed)), options())
            except Exception as error:
                said.append(str(error))
            else:
                assert run(made, rows(48, 2)).shape == (2, 15)
    assert said
    assert all("sparsefx::Linear 'fc'" in message for message in said)
