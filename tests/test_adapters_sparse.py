"""Sparse deltas that switch at run time, and LoRA extracted from tuned checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import NAMES, OUT, WIDTH, Parallel, bound, delta_file, sparse_and_twin
from adapter_models import peft as peft_package
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sparsefx.ir.errors import AdapterError
from sparsefx.runtime import adapter_scatter
from sparsefx.runtime.adapter_extract import extract_lora
from sparsefx.runtime.adapter_files import open_adapter, read_delta
from sparsefx.runtime.adapters import adapters

X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
SIZE = OUT * WIDTH


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def dense_delta(path: Path, name: str) -> Tensor:
    positions, values = read_delta(open_adapter(path))[name]
    return torch.zeros(SIZE).index_copy_(0, positions, values).view(OUT, WIDTH)


def check(model: nn.Module, twin: nn.Module, parts: list[tuple[Path, float]]) -> None:
    """Within the bound of a product by W + Σ s · Δ, one sum in float32 more per adapter."""
    for name, y in zip(NAMES, model(X), strict=True):
        layer: Any = twin.get_submodule(name)
        weight = layer.weight.double()
        for path, strength in parts:
            weight = weight + strength * dense_delta(path, name).double()
        exact = X.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
        limit = bound(X, weight, layer.bias, [])
        for path, strength in parts:  # the two products are rounded apart
            part = X.double().abs() @ (strength * dense_delta(path, name)).double().abs().T
            limit = limit + (2 * WIDTH**0.5 + 4) * 2.0**-24 * part
        limit = limit + 4 * 2.0**-24 * (X.double().abs() @ layer.weight.double().abs().T)
        assert bool(((y - exact).abs() <= limit).all()), name


@pytest.mark.parametrize("engine", [True, False])
@torch.no_grad()
def test_switching_restores_the_base_bit_for_bit(
    engine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, dense and stored as half floats; with the engine's scatter and with torch's."""
    if not engine:
        monkeypatch.setattr(adapter_scatter, "_engine", lambda: None)
    for spec, dtype in (("int4g32", torch.float32), ("fp16", torch.float32)):
        model, twin = sparse_and_twin(spec)
        weight = model.get_parameter("last.weight")
        weight[0, :4] = torch.tensor([-0.0, 0.0, 1e-40, 3e30])
        twin.get_parameter("last.weight").copy_(weight)
        before, base = bits(model), model(X)
        manager = adapters(model, 1, max_density=0.05, dtype=dtype)
        files = {n: delta_file(tmp_path / f"{n}.safetensors", NAMES, 200, i)
                 for i, n in enumerate("ab")}  # fmt: skip
        for name, file in files.items():
            assert manager.load(file, name).positions == 600
        for on in ("a", "b", "a", None, "b"):
            manager.set(on)
            if spec == "int4g32":
                check(model, twin, [] if on is None else [(files[on], 1.0)])
            assert on is None or not same(model, before)
        manager.set(None)
        assert same(model, before)
        assert all(torch.equal(y, was) for y, was in zip(model(X), base, strict=True))


@torch.no_grad()
def test_sums_do_not_depend_on_order(tmp_path: Path) -> None:
    model, twin = sparse_and_twin("int4g32")
    before = bits(model)
    manager = adapters(model, 1, max_density=0.2)
    files = {n: delta_file(tmp_path / f"{n}.safetensors", NAMES, 400, i)
             for i, n in enumerate("abc")}  # fmt: skip
    for name, file in files.items():
        manager.load(file, name)
    for mix in ({"a": 0.5, "b": -2, "c": 1}, {"c": 1, "b": -2, "a": 0.5}):
        manager.set(mix)
        check(model, twin, [(files[n], s) for n, s in mix.items()])
    manager.compose("both", {"a": 1, "b": 1})
    manager.set("both")
    check(model, twin, [(files["a"], 1.0), (files["b"], 1.0)])
    manager.set({"both": 1, "b": -1})
    check(model, twin, [(files["a"], 1.0)])
    manager.set(None)
    assert same(model, before)


@torch.no_grad()
def test_edits_of_the_base_are_seen(tmp_path: Path) -> None:
    model, twin = sparse_and_twin("int4g32")
    manager = adapters(model, 1, max_density=0.05)
    file = delta_file(tmp_path / "a.safetensors", NAMES, 99, 1)
    manager.load(file, "a")
    for _ in range(2):
        manager.set("a")
        check(model, twin, [(file, 1.0)])
        manager.set(None)
        for net in (model, twin):
            net.get_parameter("last.weight").mul_(2)
    before = bits(model)
    copied = copy.deepcopy(model)
    adapters(copied).set("a")
    assert same(model, before)
    adapters(copied).set(None)
    assert same(copied, before)
    manager.set("a")
    model.half()
    manager.set(None)
    assert torch.equal(model.get_parameter("last.weight"), before["last.weight"].half())


@torch.no_grad()
def test_switching_compiles_nothing(tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, twin = sparse_and_twin("int4g32")
    model.get_parameter("last.weight").zero_()
    twin.get_parameter("last.weight").zero_()
    manager = adapters(model, 1, modules=["fc1", "fc2"], max_density=0.05)
    files = [delta_file(tmp_path / f"{n}.safetensors", NAMES[:2], 50 + 9 * i, i)
             for i, n in enumerate("ab")]  # fmt: skip
    run = torch.compile(model, backend="sparsefx", options={"inner": "inductor", "spec": "fp32"})
    want = model(X)
    assert all(torch.equal(y, w) for y, w in zip(run(X)[:2], want[:2], strict=True))
    graphs = counters["stats"]["unique_graphs"]
    for i, file in enumerate(files):
        manager.load(file, str(i))
    for name in ("0", "1", None, "0"):
        manager.set(name)
        got, want = run(X), model(X)
        assert all(torch.equal(y, w) for y, w in zip(got[:2], want[:2], strict=True))
    assert counters["stats"]["unique_graphs"] == graphs


def test_gradients_pass_a_delta(tmp_path: Path) -> None:
    model, twin = sparse_and_twin("int4g32")
    file = delta_file(tmp_path / "a.safetensors", NAMES, 99, 1)
    manager = adapters(model, 1, max_density=0.05)
    manager.load(file, "a")
    manager.set("a")
    x = X.clone().requires_grad_()
    model(x)[0].sum().backward()
    layer: Any = twin.get_submodule("fc1")
    want = (layer.weight.double() + dense_delta(file, "fc1").double()).sum(0)
    assert x.grad is not None
    limit = (
        (2 * OUT**0.5 + 4)
        * 2.0**-24
        * (layer.weight.double().abs() + dense_delta(file, "fc1").double().abs()).sum(0)
    )
    assert bool(((x.grad - want).abs() <= limit).all())


@torch.no_grad()
def test_merging_a_delta(tmp_path: Path) -> None:
    model, twin = sparse_and_twin("int8")
    manager = adapters(model, 1, max_density=0.05)
    file = delta_file(tmp_path / "a.safetensors", NAMES, 99, 1)
    manager.load(file, "a")
    errors = manager.merge("a")
    assert errors["last"] == 0 < errors["fc1"] < 0.02
    want = twin.get_parameter("last.weight") + dense_delta(file, "last")
    assert torch.equal(model.get_parameter("last.weight"), want)


def test_a_tied_weight_is_not_written_to(tmp_path: Path) -> None:
    model = Parallel()
    model.fc2.weight = model.fc1.weight
    manager = adapters(model, 4)
    with pytest.raises(AdapterError, match=r"fc1: shares its memory with 'fc2\.weight'; untie"):
        manager.load(delta_file(tmp_path / "a.safetensors", ["fc1"], 9, 1), "a")


# --- extraction ----------------------------------------------------------------------------------


def checkpoints(folder: Path, rank: int = 3) -> tuple[Path, Path, dict[str, Tensor]]:
    """A base, the same tuned by changes of rank 3, 2 and 1, and the differences."""
    torch.manual_seed(4)
    base = dict(Parallel().state_dict())
    change = {
        f"{name}.weight": torch.randn(OUT, rank - i) @ torch.randn(rank - i, WIDTH) * 0.05
        for i, name in enumerate(NAMES)
    }
    tuned = {key: value + change.get(key, 0) for key, value in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        halves = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
        for i, half in enumerate(halves):
            save_file(half, folder / name / f"model-{i}.safetensors")
    return folder / "base", folder / "tuned", {k: tuned[k] - base[k] for k in change}


def test_an_extracted_lora_is_read_by_peft_and_by_us(tmp_path: Path) -> None:
    base, tuned, change = checkpoints(tmp_path)
    report = extract_lora(base, tuned, 3, tmp_path / "lora")
    assert report.energy.keys() == set(NAMES)
    assert report.left_out == ()
    assert min(report.energy.values()) > 1 - 1e-6  # the changes have rank 3 up to float32
    model = Parallel().requires_grad_(False)
    state = {k: v for file in base.glob("*") for k, v in load_file(file).items()}
    model.load_state_dict(state)
    twin = copy.deepcopy(model)
    wrapped = peft_package().PeftModel.from_pretrained(twin, tmp_path / "lora")
    manager = adapters(model, max_rank=6)
    manager.load(tmp_path / "lora", "a")
    found = manager.load(tuned, "whole", rank=3, base=base)
    assert found.kind == "extracted"
    assert found.energy == report.energy
    with torch.no_grad():
        for name in ("a", "whole"):
            manager.set(name)
            for got, want, layer in zip(model(X), wrapped(X), NAMES, strict=True):
                # what is left of the difference: its values below rank 3, rounding of float32
                size = (
                    X.abs() @ (state[f"{layer}.weight"].abs() + change[f"{layer}.weight"].abs()).T
                )
                limit = 2 * (2 * WIDTH**0.5 + 8) * 2.0**-24 * size
                assert bool(((got - want).abs() <= limit + 1e-6).all())
                exact = X @ (state[f"{layer}.weight"] + change[f"{layer}.weight"]).T
                bias = state.get(f"{layer}.bias", torch.zeros(OUT))
                assert bool(((got - exact - bias).abs() <= limit + 1e-5).all())


def test_energy_is_that_of_the_singular_values_kept(tmp_path: Path) -> None:
    base, tuned, change = checkpoints(tmp_path)
    report = extract_lora(base, tuned, 2, tmp_path / "lora")
    for name in NAMES:
        values = torch.linalg.svdvals(change[f"{name}.weight"].double()).square()
        assert report.energy[name] == pytest.approx(
            float(values[:2].sum() / values.sum()), abs=1e-6
        )
    assert report.energy["fc1"] < 0.99 < report.energy["fc2"]


def test_what_no_lora_can_hold_is_named(tmp_path: Path) -> None:
    base, tuned, _ = checkpoints(tmp_path)
    for file in tuned.glob("*"):
        state = {k: v + 1 if k.endswith("bias") else v for k, v in load_file(file).items()}
        save_file(state, file)
    assert extract_lora(base, tuned, 3, tmp_path / "lora").left_out == ("fc1.bias", "last.bias")


@torch.no_grad()
def test_the_difference_to_a_packed_base_mends_its_rounding(tmp_path: Path) -> None:
    """Without `base`, at full rank, the compressed model becomes the tuned one."""
    model, twin = sparse_and_twin("int4g32")
    state = {f"{n}.weight": torch.randn(OUT, WIDTH) for n in NAMES}
    save_file(state, tmp_path / "tuned.safetensors")
    manager = adapters(model, max_rank=OUT)
    manager.load(tmp_path / "tuned.safetensors", "tuned", rank=OUT)
    manager.set("tuned")
    for name, y in zip(NAMES, model(X), strict=True):
        layer: Any = twin.get_submodule(name)
        bias = 0 if layer.bias is None else layer.bias
        exact = X.double() @ state[f"{name}.weight"].double().T + bias
        # |W|, |B||A| ≤ √r‖·‖: float32 roundings of the base's product and of both factors'
        size = X.double().norm(dim=1, keepdim=True) * torch.linalg.matrix_norm(
            state[f"{name}.weight"].double() - layer.weight.double()
        )
        limit = bound(X, layer.weight, layer.bias, [])
        limit = limit + (2 * WIDTH**0.5 + 2 * OUT**0.5 + 4) * 2.0**-24 * size * OUT**0.5
        assert bool(((y - exact).abs() <= limit).all())
