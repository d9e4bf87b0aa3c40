"""What padding holds changes nothing, and rows of padding are not counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.ir.sites import Site
from sparsefx.passes.collector import collect
from sparsefx.passes.padding import kept_tokens, mean_over_tokens, without_padding
from sparsefx.passes.statistics import Statistics
from sparsefx.runtime.install import packed_modules

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    "mask", [None, torch.ones(2, 8), torch.ones(2, 8).long(), torch.zeros(2, 8).long(),
             torch.zeros(2, 1, 8, 8).bool(), "longest"],
)  # fmt: skip
def test_a_mask_that_tells_of_no_padding_keeps_all(mask: Any) -> None:
    assert kept_tokens({"attention_mask": mask}) is None
    assert kept_tokens({}) is None


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.uint8])
def test_masks_of_zeros_and_others_are_read(dtype: torch.dtype) -> None:
    kept = kept_tokens({"attention_mask": MASK.to(dtype)})
    assert kept is not None
    assert kept.dtype is torch.bool
    assert torch.equal(kept, MASK.bool())


def test_rows_that_count() -> None:
    kept = MASK.bool()
    x = torch.arange(2 * 8 * 3).float().view(2, 8, 3)
    want = torch.cat([x[0, :6], x[1, 3:]])
    assert torch.equal(without_padding(x, kept), want)
    assert torch.equal(without_padding(x.view(16, 3), kept), want)
    assert torch.equal(without_padding(x.view(2, 8, 1, 3), kept), want[:, None])
    assert without_padding(x, None) is x
    expert = x.view(16, 3)[:5]
    assert without_padding(expert, kept) is expert
    assert float(mean_over_tokens(x[..., 0], kept)) == float(want[:, 0].mean())
    assert float(mean_over_tokens(x[..., 0], None)) == float(x[..., 0].mean())


def test_statistics_of_a_padded_batch_are_those_of_its_tokens() -> None:
    layer = nn.Linear(4, 3, bias=False)
    weights = {"w": (Site(("w",), (3, 4), "linear"), layer.weight)}
    batches = [torch.randn(2, 8, 4), torch.randn(5, 4)]

    def run() -> Any:
        for x in batches:
            yield layer(x)

    with torch.no_grad():
        found = collect(weights, run, kept=[MASK.bool(), None])["w"]
    rows = torch.cat([batches[0][0, :6], batches[0][1, 3:], batches[1]])
    assert found.rows == 6 + 5 + 5
    alone = Statistics(4, rows.device)
    for part in (rows[:11], rows[11:]):
        alone.add(part)
    assert alone.shrink() > 0
    torch.testing.assert_close(found.second, alone.second)
    torch.testing.assert_close(found.peak, rows.abs().amax(0))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    model: nn.Module = BertModel(config)
    return model.eval().requires_grad_(False)


def batches(padding: int) -> list[dict[str, Tensor]]:
    """Sentences padded with this token: two batches with padding, one without."""
    ids = torch.randint(0, 60, (3, 2, 8), generator=torch.Generator().manual_seed(1))
    masks = [MASK, MASK.flip(0), torch.ones_like(MASK)]
    return [
        {"input_ids": torch.where(mask > 0, x, padding), "attention_mask": mask}
        for x, mask in zip(ids, masks, strict=True)
    ]


RECOVERY = {"epochs": 2, "scale_epochs": 1, "learning_rate": 0.01, "whole_epochs": 1}


@pytest.mark.parametrize(
    "spec",
    [{"smooth": True}, {"ratios": "outlier"}, {"recovery": RECOVERY}],
    ids=["one-shot", "ratios", "recovered"],
)
def test_what_padding_holds_changes_no_bit_of_a_model(spec: dict[str, Any]) -> None:
    found = []
    for padding in (0, 63):
        data = batches(padding)
        first = {"format": "bitmap@50%+int4g16+a8", "overrides": {"pooler.dense": "dense"}}
        model = sparsefx.sparsify(
            bert(), first | spec, example_inputs=data[0], calibration=data, progress=False
        )  # fmt: skip
        buffers = [b for m in packed_modules(model).values() for b in m.packed.buffers]
        errors = [s["error"] for line in sparsefx.explain(model).lines for s in line.row.steps]
        found.append([*buffers, *model.parameters(), torch.tensor(errors)])
    assert len(found[0]) > 12
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
