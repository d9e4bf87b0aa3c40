"""Bad input, by the row numbers of the project's list: a typed error that names the layer and the
way out before anything is changed, or tested success. Rows 47–52, 54 and 57–61 (files) are in
test_artifact*.py, test_cache.py and test_onnx*.py; 9 also in test_spec.py, 38 in test_backend.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.errors import (
    FrozenWeightError,
    SparsefxError,
    SpecError,
    StaleWeightError,
    WeightError,
)
from sparsefx.ir.format import Format
from sparsefx.runtime.install import packed_modules


def net(k: int = 30) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(k, 30), nn.ReLU(), nn.Linear(30, 16)).eval()


def refused(model: nn.Module, spec: Any, x: Any = None, error: type = WeightError) -> str:
    """The message of the error that `sparsify` must raise without having touched the model."""
    before = dict(model.state_dict().items())
    copies = {k: v.clone() for k, v in before.items() if not v.is_meta}
    with pytest.raises(error) as caught:
        sparsefx.sparsify(model, spec, example_inputs=x)
    assert isinstance(caught.value, SparsefxError)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[k] is not None for k in after)
    assert all(
        torch.equal(after[k].view(-1), v.view(-1)) or v.isnan().any() for k, v in copies.items()
    )
    return str(caught.value)


def test_row_07_k_not_divisible_by_m() -> None:
    message = refused(net(), "2:4+int8", torch.ones(1, 30))
    assert "0.weight, 2.weight" in message
    assert "K=30 is not a multiple of m=4" in message
    assert "use 'bitmap' or 'tile'" in message


@pytest.mark.parametrize(
    "spec", ["int4g16", "uint3g16", "bitmap@50%+int4g16", "tile4x8@50%+int8g64"]
)
def test_row_08_k_not_divisible_by_group_works_exactly(spec: str) -> None:
    """Better than the promised error: the last group is shorter, in every layout and codec."""
    model = sparsefx.sparsify(net(), spec, example_inputs=torch.ones(1, 30))
    for module, dense in zip(packed_modules(model).values(), (net()[0], net()[2]), strict=True):
        padded = nn.functional.pad(dense.weight.detach(), (0, 2))  # 32 columns: whole groups
        if not spec.startswith(("bitmap", "tile")):
            want = Format.parse(spec).pack(padded).unpack()[:, :30]
            assert torch.equal(module.packed.unpack(), want)
        assert module.packed.unpack().shape == (module.n, 30)


def test_row_09_a_filter_that_matches_nothing() -> None:
    message = refused(
        net(), {"format": "int8", "ignore": ["lm_head"]}, torch.ones(1, 30), SpecError
    )
    assert "'lm_head' matches none of the 2 weights" in message


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_rows_13_14_non_finite_weights(value: float, word: str) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 5] = value
    message = refused(model, "int4g16", torch.ones(1, 30))
    assert message.startswith("nothing was changed. 2.weight")
    assert word in message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.double(), "torch.float64 weight; convert with model.float() first"),
        (lambda m: m.to(torch.complex64), "complex weight (torch.complex64)"),
        (lambda m: m.to("meta"), "meta device"),
    ],
    ids=["row 18 fp64", "row 19 complex", "row 21 meta"],
)
def test_rows_18_19_21_dtypes(change: Callable[[nn.Module], nn.Module], says: str) -> None:
    model = change(nn.Sequential(nn.Linear(30, 16)))
    weight = next(model.parameters())
    x = torch.ones(1, 30, dtype=weight.dtype, device=weight.device)
    message = refused(model, "int8", x)
    assert "0.weight" in message
    assert says in message


def test_row_20_integer_weight() -> None:
    class Integer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 6, dtype=torch.int32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.T

    message = refused(Integer(), "int8", torch.ones(2, 6, dtype=torch.int32))
    assert "w: torch.int32 weight" in message
    assert "'ignore'" in message


def test_row_23_quantised_twice() -> None:
    x = torch.ones(1, 30)
    model = sparsefx.sparsify(net(), "int8", example_inputs=x)
    with pytest.raises(WeightError, match=r"already packed as 'int8'.*Load the dense model again"):
        sparsefx.sparsify(model, "int4g16", example_inputs=x)


def test_row_24_pruned_twice_changes_nothing() -> None:
    x = torch.ones(1, 30)
    model = sparsefx.sparsify(net(), "bitmap@50%", example_inputs=x)
    want = model[0].packed.unpack()
    sparsefx.sparsify(model, "bitmap@50%", example_inputs=x)
    assert torch.equal(model[0].packed.unpack(), want)
    again = Format.parse("bitmap@50%").pack(want)
    assert torch.equal(again.unpack(), want)


def test_row_25_two_four_that_is_not() -> None:
    mask = torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(WeightError, match=r"mask is not 2:4: row 0, columns 0…3 keep 4"):
        Format.parse("2:4+int8").pack(torch.randn(4, 8), mask)


def test_row_26_autograd() -> None:
    model = sparsefx.sparsify(net(), "int8", example_inputs=torch.ones(1, 30))
    x = torch.randn(3, 30, requires_grad=True)
    model(x).square().sum().backward()
    dense = net()
    for packed, layer in ((model[0], dense[0]), (model[2], dense[2])):
        layer.weight.data = packed.packed.unpack()
    twin = x.detach().clone().requires_grad_()
    dense(twin).square().sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(x.grad, twin.grad)
    with pytest.raises(FrozenWeightError, match=r"0\.weight.*train a branch"):
        model[0].weight.requires_grad_()


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data,
        lambda layer: layer.weight[0].zero_(),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(30, 30))),
        lambda layer: layer.weight.__setitem__(0, 1.0),
    ],
)
def test_row_38_edits_after_compression_are_noticed(edit: Callable[[Any], Any]) -> None:
    model = sparsefx.sparsify(net(), "int8", example_inputs=torch.ones(1, 30))
    with torch.no_grad(), pytest.raises(StaleWeightError, match=r"0\.weight.*sparsify again"):
        edit(model[0])


@pytest.mark.parametrize(
    "text", ["int8'; import os", "../int8", "int8\x00", "int4g128" * 40, "bf16 ; rm"]
)
def test_row_53_format_text_is_a_closed_language(text: str) -> None:
    """What reaches a kernel is parsed into frozen values first; nothing else gets through."""
    with pytest.raises(SpecError):
        Format.parse(text)


def test_scale_out_of_range_names_the_layer() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(1e9)
    with pytest.raises(WeightError, match=r"0\.weight: a scale of .* leaves the range of fp16"):
        sparsefx.sparsify(model, "int8", example_inputs=torch.ones(1, 30))


def test_deep_copies_are_independent() -> None:
    model = sparsefx.sparsify(net(), "int8", example_inputs=torch.ones(1, 30))
    twin = copy.deepcopy(model)
    twin[0].scales.zero_()
    assert not torch.equal(model(torch.ones(1, 30)), twin(torch.ones(1, 30)))
