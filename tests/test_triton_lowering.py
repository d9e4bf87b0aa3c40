"""What Inductor makes of graphs with our Triton kernels for a GPU that is not there."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from typing import Any

import pytest
from triton_table import apart

LOWERED = {
    "int4g32+r3 5+": ["columns_kernel", "rows_kernel"],
    "2:4+int8+a8 33+": ["mask_kernel", "rows_kernel"],
    "tile1x16@50%+uint3g32 1": ["vector_kernel", "reduce_kernel"],
}
"""A format and a number of rows ("+": open), and the kernels that serve it, its own first."""


@pytest.fixture(scope="module")
def lowered() -> dict[str, Any]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    said: dict[str, Any] = apart("triton_lowering", *LOWERED)
    return said


def test_torch_finds_the_kernels_that_its_caches_must_know(lowered: dict[str, Any]) -> None:
    names = ["columns_kernel", "mask_kernel", "reduce_kernel", "rows_kernel", "vector_kernel"]
    assert lowered["kernels"] == names


@pytest.mark.parametrize("case", LOWERED)
def test_inductor_gets_the_launches(lowered: dict[str, Any], case: str) -> None:
    """Our kernels, compiled for sm_90 from Inductor's own text, and operators fused around them."""
    said = lowered["cases"][case]
    assert set(said["bytes"]) == {*LOWERED[case]}
    assert all(said["bytes"].values())
    code = said["code"][said["code"].index("def call(") :]
    assert "sparsefx" not in code
    runs = re.findall(r"(\w+)\.run\(", code)
    main = [run for run in runs if re.match(rf"{LOWERED[case][0]}_\d+$", run)]
    assert len(main) == 4
    read = re.findall(r"(?:rows|columns|vector|mask)_kernel_\d+\.run\((\w+), ", code)
    assert max(Counter(read).values()) >= 4  # x is written once for all
    assert len([run for run in runs if run.startswith("triton_")]) == 3  # x; q·σ(k)+1; tanh(h)+1


@pytest.mark.parametrize("case", [case for case in LOWERED if case.endswith("+")])
def test_open_rows_are_not_guarded(lowered: dict[str, Any], case: str) -> None:
    """No guard tells numbers of rows apart: no recompilation at the edge of a bucket."""
    said = lowered["cases"][case]
    assert said["fail"]
    assert not any(said["fail"].values())
    assert re.search(r"kernel_\d+\.run\(\w+, \w+, s\d+, 48, 256,", said["code"])
