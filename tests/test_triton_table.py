"""No default kernel spills, loses its tensor cores or grows, on GPUs that need not be there."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from triton_rows import FEW, FEW_TARGETS, TABLE
from triton_table import apart

from sparsefx.codegen.triton_aot import TARGETS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def complain(found: list[str]) -> None:
    """Fails with the way out if there is anything to complain of."""
    import triton

    recorded = json.loads(TABLE.read_text())["triton"]
    way_out = (
        "If that is meant, record the table anew: PYTHONPATH=src:tests python -m triton_rows "
        f"--write (recorded with Triton {recorded}, this is {triton.__version__})."
    )
    assert not found, "\n".join([*found, way_out])


def test_few_kernels() -> None:
    complain(apart("triton_rows", "--few"))


@pytest.mark.slow
def test_all_kernels() -> None:
    complain(apart("triton_rows"))


def test_the_table_is_what_it_says() -> None:
    """No spills, tensor cores wherever blocks have 16 rows of x, every target."""
    table = json.loads(TABLE.read_text())["kernels"]
    assert set(FEW) <= set(table)
    assert set(FEW_TARGETS) <= set(TARGETS)
    for name, entries in table.items():
        assert list(entries) == sorted(TARGETS)
        for target, entry in entries.items():
            assert entry["spills"] == 0, f"{name} on {target}"
            assert entry["shared"] <= TARGETS[target].shared_limit
            assert bool(entry["mma"]) == ("lanes" not in name), f"{name} on {target}"
