"""Every criterion, solver, after-treatment, ratio and fold, through `sparsify` on a real graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.errors import SpecError
from sparsefx.ir.layouts import Tile
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.ratios import RATIOS
from sparsefx.passes.solvers import AFTER
from sparsefx.runtime.install import packed_modules


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    return model.eval()


def batches(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (2, 24), generator=random)} for _ in range(count)]


def compressed(**spec: Any) -> tuple[nn.Module, float]:
    """The model and how far its logits moved on inputs that it was not calibrated on."""
    model = sparsefx.sparsify(
        llama(), {"ignore": ["lm_head"], **spec}, calibration=batches(), progress=False
    )
    other = batches(1, seed=9)[0]
    with torch.no_grad():
        want = llama()(**other).logits
        return model, float((model(**other).logits - want).norm() / want.norm())


LAYOUTS = ("2:4", "tile2x2@25%", "bitmap@50%")


@pytest.mark.parametrize(
    ("criterion", "layout"), [(name, LAYOUTS[i % 3]) for i, name in enumerate(CRITERIA)]
)
def test_every_criterion(criterion: str, layout: str) -> None:
    model, error = compressed(format=f"{layout}+int8", criterion=criterion)
    assert error < 1
    for line in sparsefx.explain(model).lines:
        if line.row.name != "lm_head.weight":
            assert line.row.format == f"{layout}+int8"
            assert line.row.algorithm == f"{criterion}+sweep"
            assert f"{criterion}+sweep" in [step["name"] for step in line.row.steps]


def test_better_criteria_lose_less() -> None:
    errors = {
        name: compressed(format="bitmap@50%", criterion=name, solver="nearest", after=[])[1]
        for name in ("random", "magnitude", "wanda")
    }
    assert errors["wanda"] < errors["magnitude"] < errors["random"]


@pytest.mark.parametrize(
    ("solver", "after"), [("nearest", "dsnot"), *(("sweep", name) for name in AFTER)]
)
def test_after_treatments_never_do_harm(solver: str, after: str) -> None:
    model, _ = compressed(format="2:4+int4g16", solver=solver, after=[after])
    for line in sparsefx.explain(model).lines:
        steps = line.row.steps[-2:]
        if steps:
            assert [s["name"] for s in steps] == [f"obs+{solver}", after]
            kept = [s["error"] for s in steps if s["kept"]]
            assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("ratio", [name for name in RATIOS if name != "uniform"])
def test_ratios_keep_the_share_of_all(ratio: str) -> None:
    model, _ = compressed(format="bitmap@50%+int8", ratios=ratio)
    packed = [m.packed for m in packed_modules(model).values()]
    masks = [p.mask() for p in packed]
    stored = sum(int(m.sum()) for m in masks if m is not None)
    stored += sum(p.n * p.k for p, m in zip(packed, masks, strict=True) if m is None)
    total = sum(p.n * p.k for p in packed)
    assert abs(stored / total - 0.5) < 0.01
    shares = {p.format.layout.share for p in packed if isinstance(p.format.layout, Tile)}
    assert len(shares) > 1


def test_ratios_refuse_a_fixed_pattern() -> None:
    with pytest.raises(SpecError, match="keeps the same share everywhere"):
        compressed(format="2:4", ratios="erk")


def test_smoothing_is_exact_and_shown() -> None:
    """Stored without loss, the smoothed model is the dense one; rounded, errors are recorded."""
    model, error = compressed(format="fp32", smooth=True)
    assert error < 1e-5
    model, _ = compressed(format="int3g16", smooth=True)
    names = [s["name"] for line in sparsefx.explain(model).lines for s in line.row.steps]
    assert any(name.startswith("smooth ") for name in names)


def test_what_is_not_smoothed_or_trained_says_so() -> None:
    """Also where nothing else needs calibration; the head is in no block and shares no norm."""
    model, _ = compressed(
        format="int3g16", ignore=[], criterion="magnitude", solver="nearest", after=[], smooth=True,
        recovery={"epochs": 1, "scale_epochs": 0},
    )  # fmt: skip
    rows = {line.row.name: line.row for line in sparsefx.explain(model).lines}
    assert any("not trained block by block" in text for text in rows["lm_head.weight"].fallbacks)
    names = [s["name"] for row in rows.values() for s in row.steps]
    assert any(name.startswith("smooth ") for name in names)
    assert "recovery" in names
    ratio, _ = compressed(format="bitmap@50%", criterion="taylor", ratios="sensitivity")
    assert any("was measured with 'obs'" in text for text in sparsefx.explain(ratio).fallbacks)


def test_rotation_is_exact_or_says_why_not() -> None:
    model, error = compressed(format="fp32", rotate=True)
    assert error < 1e-4
    assert not any("not rotated" in note for note in sparsefx.explain(model).notes)
    tied = sparsefx.sparsify(
        nn.Sequential(nn.Linear(8, 8)).eval(), {"format": "int8", "rotate": True},
        example_inputs=torch.randn(2, 8),
    )  # fmt: skip
    assert any("not rotated" in note for note in sparsefx.explain(tied).notes)


def test_the_branch_is_the_best_of_its_turns() -> None:
    model, error = compressed(format="2:4+int4g16+r4")
    _, without = compressed(format="2:4+int4g16")
    assert error < without
    for line in sparsefx.explain(model).lines:
        turns = [s for s in line.row.steps if s["name"].startswith("r4 ")]
        if line.row.steps:
            starts = {"r4 of the error", "r4 of the weight (SVDQuant)"}
            assert {s["name"] for s in turns} == {*starts, "r4 of what is left"}
            best = min(s["error"] for s in turns)
            assert [s["error"] for s in turns if s["kept"]][-1] == best


def test_batch_order_does_not_matter() -> None:
    """Sums of second moments differ by rounding only, so hardly a code does."""
    data = batches(4)
    first, second = (
        sparsefx.sparsify(llama(), "2:4+int8", calibration=order, progress=False)
        for order in (data, data[::-1])
    )
    for a, b in zip(packed_modules(first).values(), packed_modules(second).values(), strict=True):
        wanted = a.dense()
        assert float((wanted - b.dense()).norm() / wanted.norm()) < 0.05


def test_steps_are_printed() -> None:
    model, _ = compressed(format="2:4+int4g16")
    text = str(sparsefx.explain(model, steps=True))
    assert "obs+sweep 0." in text
    assert "→ descend 0." in text
