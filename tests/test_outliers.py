"""int8 activations: what rounding means, bit for bit, and what the outlier probe decides."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsefx
from sparsefx.codegen.kernels import KERNELS, Problem
from sparsefx.ir.format import Format
from sparsefx.ir.op import per_column, quantize_rows, round_activations
from sparsefx.ir.sites import Site
from sparsefx.passes import outliers
from sparsefx.passes.outliers import LIMIT, NOT_PROBED, Errors, Probe, group_of, measure
from sparsefx.runtime.install import packed_modules

K = 1024


# --- the rounding, bit for bit -------------------------------------------------------------------


def by_hand(x: Tensor, group: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes and scales as the definition says, one group at a time."""
    rows = x.float().numpy()
    size = group or x.shape[1]
    starts = range(0, x.shape[1], size)
    codes = np.zeros(rows.shape, np.int8)
    scales = np.ones((len(rows), len(starts)), np.float32)
    for i, (j, start) in itertools.product(range(len(rows)), enumerate(starts)):
        part = rows[i, start : start + size]
        reach = np.abs(part).max()
        if not np.isfinite(reach):
            scales[i, j] = np.nan
        elif reach:
            scales[i, j] = reach / np.float32(127)
            codes[i, start : start + size] = np.clip(np.rint(part / scales[i, j]), -127, 127)
    return codes, scales


@settings(max_examples=200, deadline=None)
@given(
    k=st.integers(1, 300),
    group=st.sampled_from([0, 8, 9, 64, 128, 512]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    odd=st.lists(st.sampled_from([0.0, 6e4, 1e-30, torch.nan, torch.inf, -torch.inf]), max_size=4),
)
def test_codes_and_scales_are_the_definition(
    k: int, group: int, dtype: torch.dtype, seed: int, odd: list[float]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, k, generator=generator).to(dtype)
    for value in odd:
        row, column = (int(torch.randint(n, (), generator=generator)) for n in (5, k))
        x[row, column] = value
    codes, scales = quantize_rows(x, group)
    want_codes, want_scales = by_hand(x, group)
    np.testing.assert_array_equal(scales.numpy(), want_scales)
    sound = per_column(scales, group, k).isfinite().expand(5, k)
    assert torch.equal(codes[sound], torch.from_numpy(want_codes)[sound])
    rounded = round_activations(x, group)
    assert rounded.dtype == dtype
    wide = per_column(torch.from_numpy(want_scales), group, k)
    assert torch.equal(rounded[sound], (codes.float() * wide).to(dtype)[sound])
    assert bool(rounded[~sound].isnan().all())


def test_ties_go_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("lead", [(), (0,), (2, 0, 3), (2, 1, 3)])
@pytest.mark.parametrize("k", [0, 1, 8, 20])
def test_any_rank_and_any_k(lead: tuple[int, ...], k: int) -> None:
    x = torch.randn(*lead, k)
    codes, scales = quantize_rows(x, 8)
    assert codes.shape == x.shape
    assert scales.shape == (*lead, max(-(-k // 8), 1))
    assert round_activations(x, 8).shape == x.shape


def test_one_outlier_costs_only_its_group() -> None:
    x = torch.randn(4, 256)
    x[:, 3] = 1e4
    assert torch.equal(round_activations(x, 128)[:, 128:], round_activations(x[:, 128:]))
    assert bool((round_activations(x, 128)[:, 4:128] == 0).all())


def test_the_kernel_with_one_scale_per_row_refuses_groups() -> None:
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == "int8_matmul")
    fmt = Format.parse("int8+a8g64")
    why = kernel.rejects(fmt, Problem(4, 8, 128, torch.float32, "cpu"))
    assert why == "needs one activation scale per row, not one per 64 columns"
    assert kernel.rejects(fmt, Problem(4, 8, 64, torch.float32, "cpu")) is None


# --- the figure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [8, 32, 128, 4096])
def test_errors_are_those_of_the_outputs(group: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 20, 96), torch.randn(24, 96)
    x[..., 7] *= 50
    found = measure(x, weight, group)
    assert found is not None
    rows = x.view(-1, 96).double()
    for got, size in ((found.row, 0), (found.group, group)):
        moved = (round_activations(x, size).view(-1, 96).double() - rows) @ weight.T.double()
        assert got == pytest.approx(float(moved.norm() / (rows @ weight.T.double()).norm()), 1e-4)
    assert found.column == 7
    assert found.peak == pytest.approx(float(x[..., 7].abs().max() / x.abs().mean()), 1e-5)


def test_a_bounded_sample_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(x: Tensor, group: int) -> Tensor:
        seen.append(x)
        return round_activations(x, group)

    monkeypatch.setattr(outliers, "round_activations", watched)
    x = torch.arange(100_000.0)[:, None].expand(-1, 8) + 1
    measure(x, torch.randn(4, 8), 8)
    rows = seen[0][:, 0]
    assert len(rows) == outliers.ROWS
    assert (float(rows[0]), float(rows[-1])) == (1.0, 100_000.0)
    assert len(set(rows.diff().tolist())) <= 2


def test_odd_rows_do_not_decide() -> None:
    weight = torch.randn(4, 16)
    x = torch.randn(6, 16)
    clean = measure(x, weight, 8)
    x = torch.cat([x, torch.full((2, 16), torch.nan), torch.full((1, 16), -torch.inf)])
    assert measure(x, weight, 8) == clean
    assert measure(x[6:], weight, 8) is None
    assert measure(x[:0], weight, 8) is None
    nothing = measure(torch.zeros(3, 16), weight, 8)
    assert nothing is not None
    assert (nothing.row, nothing.group) == (0.0, 0.0)


def test_the_worst_call_is_kept_whichever_comes_first() -> None:
    site = Site(("fc.weight",), (24, K), "linear")
    weight = torch.randn(24, K)
    calm = torch.randn(16, K)
    wild = calm.clone()
    wild[:, 5] *= 300
    kept = []
    for calls in ((calm, wild), (wild, calm)):
        probe = Probe({site.name: Format.parse("int8+a8")})
        for x in calls:
            probe.watch(site, weight, x)
        kept.append(probe.worst[site.name])
        assert all(not isinstance(value, Tensor) for value in vars(kept[-1]).values())
    assert kept[0] == kept[1] == measure(wild, weight, 128)


@pytest.mark.parametrize(
    ("text", "group"),
    [("int8+a8", 128), ("2:4+int4g32+a8", 32), ("fp16+a8", 128), ("int4g32+a8g64", 64)],
)
def test_the_group_tried(text: str, group: int) -> None:
    assert group_of(Format.parse(text)) == group


@settings(max_examples=100, deadline=None)
@given(row=st.floats(0, 0.2), share=st.floats(0, 1), group=st.sampled_from(["", "g64"]))
def test_decisions_follow_the_limit(row: float, share: float, group: str) -> None:
    site = Site(("fc.weight",), (4, 4), "linear")
    fmt = Format.parse(f"int8+a8{group}")
    probe = Probe({site.name: fmt})
    probe.worst[site.name] = found = Errors(row, row * share, 3, 80.0)
    got, why = probe.decide(site, fmt)
    if (found.group if group else found.row) <= LIMIT:
        assert (got, why) == (fmt, "")
    elif found.group <= LIMIT:
        assert str(got) == "int8+a8g128"
        assert why.startswith("int8 activations per group of 128: outlier in column 3, 80 ×")
    else:
        assert str(got) == "int8"
        assert f"{row:.2%} per row" in why
        assert f"limit {LIMIT:.2%}" in why


# --- through sparsify ----------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A product whose weight is (K, N), as in GPT-2."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(k, n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def layer(kind: str, hidden: bool) -> tuple[nn.Module, list[Tensor]]:
    """One product and batches with an x300 column; `hidden`: a weight that hides it again."""
    torch.manual_seed(0)
    weight = torch.randn(32, K)
    x = torch.randn(3, 16, K)
    x[:, :, 5] *= 300
    if hidden:
        weight[:, 5] /= 300
    if kind == "conv":
        module: nn.Module = nn.Conv1d(K, 32, 1)
    else:
        module = nn.Linear(K, 32) if kind == "linear" else Conv1D(K, 32)
    stored = {"linear": weight, "conv": weight[..., None], "Conv1D": weight.T}[kind]
    module.get_parameter("weight").data.copy_(stored)
    batches = [b.T[None] if kind == "conv" else b for b in x]
    return nn.Sequential(module).eval(), batches


def packed_as(model: nn.Module) -> str:
    (module,) = packed_modules(model).values()
    return module.format


@pytest.mark.parametrize("kind", ["linear", "conv", "Conv1D"])
@pytest.mark.parametrize("solver", ["auto", "nearest"])
def test_an_outlier_of_x300_takes_groups(kind: str, solver: str) -> None:
    model, batches = layer(kind, hidden=False)
    spec = {"format": "int8+a8", "criterion": "magnitude", "solver": solver, "after": []}
    sparsefx.sparsify(model, spec, calibration=batches)
    assert packed_as(model) == "int8+a8g128"
    (line,) = sparsefx.explain(model).lines
    assert line.row.format == "int8+a8g128"
    assert line.row.algorithm == ("nearest" if solver == "nearest" else "sweep")
    (why,) = line.row.fallbacks
    assert "per group of 128: outlier in column 5" in why


@pytest.mark.parametrize("kind", ["linear", "conv", "Conv1D"])
@pytest.mark.parametrize("solver", ["auto", "nearest"])
@pytest.mark.parametrize("a8", ["a8", "a8g128", "a8g64"])
def test_an_outlier_that_the_weight_hides_is_refused(kind: str, solver: str, a8: str) -> None:
    model, batches = layer(kind, hidden=True)
    sparsefx.sparsify(
        model,
        {"format": f"int8+{a8}", "criterion": "magnitude", "solver": solver, "after": []},
        calibration=batches,
    )
    assert packed_as(model) == "int8"
    found = sparsefx.explain(model)
    (text,) = found.fallbacks
    assert "int8 activations refused: outlier in column 5" in text
    assert "per group of" in text
    assert f"limit {LIMIT:.2%}" in text
    assert "refused" in str(found)


@pytest.mark.parametrize("a8", ["a8", "a8g64"])
def test_calm_activations_keep_what_was_asked(a8: str) -> None:
    model, batches = layer("linear", hidden=False)
    for x in batches:
        x[..., 5] /= 300
    sparsefx.sparsify(model, f"int4g32+{a8}", calibration=batches)
    assert packed_as(model) == f"int4g32+{a8}"
    assert sparsefx.explain(model).fallbacks == []


def test_one_bad_batch_is_enough() -> None:
    model, batches = layer("linear", hidden=True)
    for x in batches[:2]:
        x[..., 5] /= 300
    sparsefx.sparsify(model, "int8+a8", calibration=batches)
    assert packed_as(model) == "int8"


def test_a_weight_left_with_nothing_to_do_is_the_weight_itself(tmp_path: Path) -> None:
    model, batches = layer("linear", hidden=True)
    want = model(batches[0])
    sparsefx.sparsify(model, "dense+a8", calibration=batches)
    assert torch.equal(model(batches[0]), want)
    assert "refused" in sparsefx.explain(model).fallbacks[0]
    sparsefx.save(model, tmp_path / "saved")
    again = sparsefx.load(tmp_path / "saved", layer("linear", hidden=False)[0])
    assert torch.equal(again(batches[0]), want)


def test_without_calibration_the_report_says_so() -> None:
    model, batches = layer("linear", hidden=True)
    sparsefx.sparsify(model, "int8+a8", example_inputs=batches[0])
    assert packed_as(model) == "int8+a8"
    assert sparsefx.explain(model).fallbacks == [f"0.weight: {NOT_PROBED}"]
    dense, batches = layer("linear", hidden=True)
    torch._dynamo.reset()
    options: dict[str, Any] = {"spec": "int8+a8", "inner": "eager"}
    compiled = torch.compile(dense, backend="sparsefx", options=options)
    compiled(batches[0])
    assert any(NOT_PROBED in text for text in sparsefx.explain(compiled).fallbacks)


@pytest.mark.parametrize("solver", ["auto", "nearest"])
def test_a_layer_that_calibration_misses_says_so(solver: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.rarely = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, both: bool = False) -> Tensor:
            y: Tensor = self.often(x)
            return self.rarely(y) if both else y

    model = Net().eval()
    spec = {"format": "int8+a8", "criterion": "magnitude", "solver": solver, "after": []}
    example = {"x": torch.randn(3, 16), "both": True}
    sparsefx.sparsify(model, spec, example_inputs=example, calibration=[torch.randn(9, 16)])
    often, rarely = (line.row for line in sparsefx.explain(model).lines)
    assert often.fallbacks == []
    assert NOT_PROBED in rarely.fallbacks[0]
    assert rarely.format == "int8+a8"


# --- streaming -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, 64), nn.Linear(64, K)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def blocks(spec: str, outlier: float) -> tuple[nn.Module, list[int]]:
    """Three blocks compressed with calibration, the second behind an outlier."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(Block() for _ in range(3))).eval()
    data = [torch.randn(16, K) for _ in range(2)]
    with torch.no_grad():
        model[0].down.weight.mul_(0.1)
        model[0].down.bias[5] = outlier
        model[1].up.weight[:, 5] /= max(outlier, 1)
    sparsefx.sparsify(model, spec, example_inputs=data[0], calibration=data)
    return model, [block.calls for block in model]


def test_every_block_is_judged_by_its_own_inputs() -> None:
    model, _ = blocks("int8+a8", 300.0)
    formats = {name: module.format for name, module in packed_modules(model).items()}
    assert formats["0.up"] == "int8+a8"
    assert formats["1.up"] == "int8"
    assert formats["1.down"] == "int8+a8"


def test_probing_runs_the_model_no_further_time() -> None:
    assert blocks("int8+a8", 0.0)[1] == blocks("int8", 0.0)[1]


# --- artifacts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["int8+a8g64", "bitmap@50%+int4g32+r4+a8g128", "uint4g24+a8g24"])
def test_groups_survive_saving(text: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(200, 24)).eval(), text)
    x = torch.randn(3, 200)
    sparsefx.save(model, tmp_path / "saved")
    again = sparsefx.load(tmp_path / "saved", nn.Sequential(nn.Linear(200, 24)))
    assert packed_as(again) == text
    assert torch.equal(again(x), model(x))
