"""Architecture coverage: every product with a weight is a Site or refused with a reason.

`make check-zoo` runs it; the count it is held against watches the model run and shares no code
with the capture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from product_counter import count_products
from torch import Tensor
from torch.utils._pytree import tree_leaves

import sparsefx
from sparsefx.ir.capture import capture
from sparsefx.ir.sites import Site
from sparsefx.models.zoo import ZOO

pytestmark = pytest.mark.zoo
DOORS = ("export", "dynamo")


@pytest.mark.parametrize("name", list(ZOO))
def test_no_weight_is_missed(name: str, record_property: Callable[[str, str], None]) -> None:
    example = ZOO[name]()
    inputs = dict(example.kwargs) if example.kwargs else example.args
    counted = count_products(example.model, example.args, example.kwargs)
    assert counted.counts, "the oracle counts no product: the example is no test"
    opened = []
    for door in DOORS:
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                captured = capture(example.model, inputs, door)
            except Exception as error:
                record_property(door, f"closed: {str(error)[:120]}")
                continue
        opened.append(door)
        _compare(captured.sites, counted.counts, door)
        found = [s for s in captured.sites if s.kind != "refused"]
        record_property(door, f"{len(found)} sites, {len(captured.sites) - len(found)} refused")
    assert opened, "no door opens"


@pytest.mark.parametrize("name", list(ZOO))
def test_lossless_packing_changes_nothing(name: str) -> None:
    """Every Site packed as fp32: outputs stay, whatever kind of owner the weight had."""
    example = ZOO[name]()
    inputs = dict(example.kwargs) if example.kwargs else example.args
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = _floats(example.model(*example.args, **example.kwargs))
        packed = sparsefx.sparsify(example.model, "fp32", example_inputs=inputs)
        got = _floats(packed(*example.args, **example.kwargs))
    for x, y in zip(want, got, strict=True):
        # The same values in the same product; Conv1D and 1×1 convolutions sum in another order.
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(ZOO))
def test_graph_passes_change_nothing(name: str) -> None:
    """What dynamo makes of the packed model, after every pass, beside the packed model itself."""
    example = ZOO[name]()
    inputs = dict(example.kwargs) if example.kwargs else example.args
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = sparsefx.sparsify(example.model, "int8", example_inputs=inputs)
        want = _floats(packed(*example.args, **example.kwargs))
        run = torch.compile(packed, backend="sparsefx", options={"inner": "eager"})
        got = _floats(run(*example.args, **example.kwargs))
    assert len(got) == len(want)
    for x, y in zip(want, got, strict=True):
        # Merged and fused products sum in another order; norms and activations are another code.
        torch.testing.assert_close(y, x, rtol=1e-3, atol=2e-4)


def _floats(outputs: Any) -> list[Tensor]:
    leaves = tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _compare(sites: list[Site], counted: dict[str, int], door: str) -> None:
    reached = {site.name for site in sites if site.calls}
    missed = sorted(set(counted) - {site.name for site in sites})
    assert not missed, (
        f"{door}: multiplied by at run time, but neither a Site nor refused: {missed}"
    )
    extra = sorted(reached - set(counted))
    assert not extra, f"{door}: Sites that no product used: {extra}"
    for site in sites:
        assert site.kind != "refused" or site.reason, f"{door}: {site.name} refused without reason"
