"""How gradients are collected for criteria, and that the model is left alone meanwhile."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sparsefx.ir.capture import capture
from sparsefx.ir.sites import Site
from sparsefx.passes.criteria import CRITERIA
from sparsefx.passes.criteria.lora_guided import Adapter, collect_lora
from sparsefx.passes.gradients import GradientError, Gradients, collect

EPS = torch.finfo(torch.float32).eps


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, eos_token_id=None,
        pad_token_id=0, attention_dropout=0.5,
    )  # fmt: skip
    config.use_cache = False
    return transformers.LlamaForCausalLM(config)


def tokens(count: int = 3, batch: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(1, 32, (batch, 9), generator=generator)} for _ in range(count)
    ]


def sites_of(model: nn.Module) -> list[Site]:
    """The Sites that capture finds in models of nothing but Linear, in another order."""
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in sorted(linear)}
    return [Site((name,), tuple(w.shape), "linear") for name, w in weights.items()]


def by_hand(model: Any, batches: list[dict[str, Tensor]], names: list[str]) -> dict[str, Tensor]:
    """Every sample's gradient of the next-token loss (samples, …), by plain backward."""
    model = model.eval()
    weights = [model.get_parameter(name) for name in names]
    out = []
    for ids in (ids[None] for batch in batches for ids in batch["input_ids"]):
        out.append(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weights))
    return {name: torch.stack(g) for name, g in zip(names, zip(*out, strict=True), strict=True)}


def summed_in_any_order(samples: Tensor) -> Tensor:
    """How far float32 sums of these terms in two orders may lie apart, as a mean."""
    return 2 * len(samples) * EPS * samples.abs().mean(0)


def test_llama_gradients_are_those_of_each_sample_and_leave_the_model_alone() -> None:
    model = llama().train()
    model.model.layers[0].mlp.eval()
    batches, sites = tokens(), sites_of(model)
    assert len(sites) > 10
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    earlier = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = earlier
    modes = [m.training for m in model.modules()]
    got = dict(_by_name(collect(model, sites, batches)))
    kept = dict(_by_name(collect(model, sites, batches, samples=4)))
    assert [m.training for m in model.modules()] == modes
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert [name for name, flag in flags.items() if flag] == ["lm_head.weight"]
    assert model.lm_head.weight.grad is earlier
    assert torch.equal(earlier, torch.ones_like(earlier))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "lm_head.weight")
    model.requires_grad_(True)
    for name, want in by_hand(model, batches, list(got)).items():
        gradients = got[name]
        assert (gradients.count, kept[name].count) == (6, 4)
        # The loss of labels= and of logits differ in the order of a few dozen float32 terms
        close = partial(assert_close, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        close(gradients.mean, want.mean(0))
        close(gradients.square, want.square().mean(0))
        close(kept[name].samples, want[:4])
        close(kept[name].square, want[:4].square().mean(0))


def _by_name(found: Any) -> list[tuple[str, Gradients]]:
    return [(site.name, gradients) for site, gradients in found]


def test_a_small_budget_changes_nothing_but_the_number_of_runs() -> None:
    model = llama()
    batches, sites = tokens(1), sites_of(model)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    whole = _by_name(collect(model, sites, batches))
    assert len(calls) == 2
    parts = _by_name(collect(model, sites, batches, budget=3 * 4 * 32 * 24))
    assert len(calls) > 4
    assert [name for name, _ in parts] == [site.name for site in sites]
    for (_, a), (_, b) in zip(whole, parts, strict=True):
        assert torch.equal(a.mean, b.mean)
    with pytest.raises(GradientError, match=r"lm_head.weight: 3 copies .* budget"):
        list(collect(model, sites, batches, budget=100))


@pytest.mark.parametrize("name", ["taylor", "fisher", "mfac"])
def test_scores_do_not_depend_on_the_order_of_batches(name: str) -> None:
    model, batches = llama(), tokens(4)
    sites = sites_of(model)[:2]
    criterion = CRITERIA[name]
    there = dict(_by_name(criterion.collect(model, sites, batches)))
    back = dict(_by_name(criterion.collect(model, sites, batches[::-1])))
    again = dict(_by_name(criterion.collect(model, sites, batches)))
    for site in sites:
        weight = model.get_parameter(site.name).detach()
        a, b, c = (criterion.score(weight, None, g[site.name], 0) for g in (there, back, again))
        assert torch.equal(a, c)
        spread = summed_in_any_order(by_hand(model, batches, [site.name])[site.name])
        if name == "taylor":
            assert bool(((a - b).abs() <= weight.abs() * spread).all())
        else:
            assert_close(a, b, rtol=16 * EPS if name == "fisher" else 1e-4, atol=0)


class Classifier(nn.Module):
    """Linear, 1×1 convolution, a transposed product, and a branch that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed = nn.Linear(6, 8), nn.Conv2d(8, 7, 1)
        self.last = nn.Parameter(torch.randn(7, 5))
        self.unseen = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()[..., None, None]
        return self.mixed(hidden).flatten(1) @ self.last, self.unseen(x)


def test_a_users_loss_sees_the_targets_that_forward_does_not_take() -> None:
    torch.manual_seed(2)
    model = Classifier()
    x, y = torch.randn(4, 6), torch.tensor([0, 3, 1, 4])
    sites = capture(model, x).sites
    names = ["first.weight", "mixed.weight", "last"]
    assert [site.name for site in sites] == [*names, "unseen.weight"]
    assert sites[2].transposed

    def loss(output: Any, batch: Any) -> Tensor:
        target = batch["y"] if isinstance(batch, dict) else batch[1]
        return F.cross_entropy(output[0], target)

    weights = [model.get_parameter(name) for name in names]
    want = torch.autograd.grad(loss(model(x), (x, y)), weights)
    for batch in ((x, y), {"x": x, "y": y}):
        got = dict(_by_name(collect(model, sites, [batch], loss)))
        for site, gradient in zip(sites, want, strict=False):
            assert got[site.name].count == 4
            assert_close(got[site.name].mean, site.matrix(gradient), rtol=1e-5, atol=1e-6)
        assert not bool(got["unseen.weight"].square.any())
        assert got["unseen.weight"].count == 4
    adapted = dict(_by_name(collect_lora(model, sites, [(x, y)], loss, rank=2)))
    assert adapted["last"].mean.shape == (5, 7)
    assert bool(adapted["last"].mean.any())
    assert not bool(adapted["unseen.weight"].square.any())


def test_no_loss_no_gradients() -> None:
    model, x = Classifier(), torch.randn(4, 6)
    sites = capture(model, x).sites
    with pytest.raises(GradientError, match=r"no loss .* tuple.*pass loss=lambda"):
        next(collect(model, sites, [x]))
    with pytest.raises(GradientError, match="no scalar"):
        next(collect(model, sites, [x], lambda output, batch: output[0]))
    with pytest.raises(GradientError, match="is nan"):
        next(collect(model, sites, [x], lambda output, batch: output[0].sum() * torch.nan))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training


def test_padding_is_no_target() -> None:
    model = llama().eval()
    ids = tokens(1, batch=1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    padded = {"input_ids": F.pad(ids, (0, 3)), "attention_mask": F.pad(mask, (0, 3))}
    sites = sites_of(model)[:1]
    (_, short), (_, long) = (next(collect(model, sites, [b])) for b in ({"input_ids": ids}, padded))
    assert_close(short.mean, long.mean, rtol=1e-3, atol=1e-6)


# --- LoRA-guided ---------------------------------------------------------------------------------


def test_lora_estimate_is_what_a_step_of_both_factors_does() -> None:
    site = Site(("w",), (6, 4), "linear")
    adapter = Adapter(site, torch.device("cpu"), rank=3, seed=0)
    a, b = adapter.a.detach().clone(), torch.randn(6, 3)
    adapter.b.data.copy_(b)
    of_a, of_b = torch.randn(3, 4), torch.randn(6, 3)
    want = b @ a - (b - of_b) @ (a - of_a)
    assert_close(adapter.estimate(of_a, of_b), want, rtol=1e-5, atol=1e-5)


def test_lora_gradients_are_the_projected_gradients_and_touch_no_parameter() -> None:
    """B is 0 in the first step, so that ĝ = g·Aᵀ·A: the gradient seen through A."""
    model, batches = llama(), tokens(1, batch=1)
    sites = sites_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(output: Any, batch: Any) -> Tensor:
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
        ids = batch["input_ids"]
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    model.train()
    got = list(collect_lora(model, sites, batches, loss, rank=4))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for site, gradients in got:
        gradient = by_hand(model, batches, [site.name])[site.name][0]
        a = Adapter(site, torch.device("cpu"), 4, 0).a.detach()
        want = gradient @ a.T @ a
        slack = 1e-4 * float(want.abs().max())
        assert_close(gradients.mean, want, rtol=1e-4, atol=slack)


def test_lora_learns_and_reproduces_bit_for_bit() -> None:
    model, batches = llama(), tokens(3)
    sites = sites_of(model)[:3]
    runs = [list(collect_lora(model, sites, batches, seed=s)) for s in (0, 0, 1)]
    one = list(collect_lora(model, sites, batches, seed=0, steps=1))
    for (site, a), (_, b), (_, other), (_, first) in zip(*runs, one, strict=True):
        weight = model.get_parameter(site.name).detach()
        score = CRITERIA["lora_guided"].score
        assert torch.equal(score(weight, None, a, 0), score(weight, None, b, 0))
        assert not torch.equal(a.square, other.square)
        assert (a.count, first.count) == (6, 1)
        rank = torch.linalg.matrix_rank(a.mean)  # frozen adapters would stay in A's 8 dimensions
        assert int(rank) > int(torch.linalg.matrix_rank(first.mean))
