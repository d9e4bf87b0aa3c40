"""LoRA that switch at run time: as PEFT, exact when off, no recompilation, rows of a batch."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import FORMATS, NAMES, OUT, WIDTH, bound, lora_file, sparse_and_twin, trained
from adapter_models import peft as peft_package
from torch import Tensor, nn
from torch._dynamo.utils import counters

import sparsefx
from sparsefx.runtime.adapter_files import open_adapter, read_lora
from sparsefx.runtime.adapters import adapters
from sparsefx.runtime.modules import SparseLinear

X = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(9))


def stored(model: nn.Module) -> dict[str, bytes]:
    """Every packed byte and every parameter."""
    state = model.state_dict().items()
    return {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in state}


def check(model: nn.Module, twin: nn.Module, loras: list[tuple[Any, float]], x: Tensor = X) -> None:
    """Each output within `bound` of float64 with these LoRA at these strengths."""
    for name, y in zip(NAMES, model(x), strict=True):
        layer: Any = twin.get_submodule(name)
        parts = [(lora[name][0], lora[name][1] * s) for lora, s in loras if name in lora]
        exact = x.double() @ layer.weight.double().T
        exact = exact + (0 if layer.bias is None else layer.bias.double())
        for a, b in parts:
            exact = exact + (x.double() @ a.double().T) @ b.double().T
        assert bool(((y - exact).abs() <= bound(x, layer.weight, layer.bias, parts)).all()), name


# --- against PEFT --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FORMATS[:4])
@torch.no_grad()
def test_two_trained_adapters_take_turns(spec: str, tmp_path: Path) -> None:
    model, twin = sparse_and_twin(spec)
    bytes_before, base = stored(model), model(X)
    with torch.enable_grad():
        peft_models = {n: trained(twin, tmp_path / n, seed=i)[0] for i, n in enumerate("ab")}
    loras = {n: read_lora(open_adapter(tmp_path / n)) for n in "ab"}
    manager = adapters(model, max_rank=8)
    own: Any = model.adapters
    assert adapters(model) is manager is own
    for name in "ab":
        manager.load(tmp_path / name, name)
    assert all(torch.equal(y, was) for y, was in zip(model(X), base, strict=True))
    seen: dict[str, tuple[Tensor, ...]] = {}
    for name in ("a", "b", "a", "b"):
        manager.set(name)
        check(model, twin, [(loras[name], 1.0)])
        check(peft_models[name], twin, [(loras[name], 1.0)])
        now = seen.setdefault(name, model(X))
        assert all(torch.equal(y, was) for y, was in zip(model(X), now, strict=True))
        manager.set(None)
        assert all(torch.equal(y, was) for y, was in zip(model(X), base, strict=True))
        assert stored(model) == bytes_before


@pytest.mark.parametrize(
    "config",
    [{"use_rslora": True}, {"rank_pattern": {"fc2": 2}, "alpha_pattern": {"fc1": 5}}],
    ids=["rslora", "patterns"],
)
def test_scaling_is_that_of_peft(config: dict[str, Any], tmp_path: Path) -> None:
    model, twin = sparse_and_twin("int4g32")
    wrapped, folder = trained(twin, tmp_path / "a", **config)
    lora = read_lora(open_adapter(folder))
    for name in NAMES:
        layer: Any = wrapped.get_submodule(f"base_model.model.{name}")
        a, b = (getattr(layer, f"lora_{p}")["default"].weight.detach() for p in "AB")
        assert torch.equal(lora[name][0], a)
        assert torch.equal(lora[name][1], b * layer.scaling["default"])
    manager = adapters(model, max_rank=4)
    manager.load(folder, "a")
    manager.set("a")
    with torch.no_grad():
        check(model, twin, [(lora, 1.0)])


@torch.no_grad()
def test_int8_activations_leave_the_branch_alone(tmp_path: Path) -> None:
    """With `+a8` the base is rounded; what the adapter adds is not."""
    model, twin = sparse_and_twin("int8+a8")
    base = model(X)
    file = lora_file(tmp_path / "a.safetensors", NAMES, 4, 1)
    manager = adapters(model, max_rank=4)
    manager.load(file, "a")
    manager.set("a")
    lora = read_lora(open_adapter(file))
    for name, y, was in zip(NAMES, model(X), base, strict=True):
        a, b = (t.double() for t in lora[name])
        layer: Any = twin.get_submodule(name)
        limit = bound(X, layer.weight, layer.bias, [lora[name]])
        limit = limit + 2**-23 * was.abs()  # the base's own last rounding is another
        assert bool(((y - was - (X.double() @ a.T) @ b.T).abs() <= limit).all())


@pytest.mark.parametrize("spelling", ["lora_A", "lora_A.default", "lora_down", "lora.down"])
def test_spellings_of_keys(spelling: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = spelling.replace("A", "B").replace("down", "up")
    a, b = torch.randn(2, WIDTH), torch.randn(OUT, 2)
    state = {
        f"base_model.model.fc1.{spelling}.weight": a,
        f"base_model.model.fc1.{other}.weight": b,
    }
    save_file(state, tmp_path / "a.safetensors", {"lora_alpha": "4"})
    lora = read_lora(open_adapter(tmp_path / "a.safetensors"))
    assert torch.equal(lora["fc1"][0], a)
    assert torch.equal(lora["fc1"][1], b * 2)
    model, _ = sparse_and_twin("int4g32")
    outer = nn.ModuleDict({"inner": model})
    state = {f"lora_unet_inner_fc1.{k.split('fc1.')[1]}": t for k, t in state.items()}
    save_file(state, tmp_path / "k.safetensors")
    found = adapters(outer, max_rank=2).load(tmp_path / "k.safetensors", "k", alpha=2)
    assert found.modules == ("inner.fc1",)


# --- mixing --------------------------------------------------------------------------------------


@torch.no_grad()
def test_strengths_and_mixes(tmp_path: Path) -> None:
    model, twin = sparse_and_twin("int4g32")
    manager = adapters(model, max_rank=9)
    loras = {}
    for i, (name, names) in enumerate((("a", NAMES), ("b", NAMES[:1]), ("c", NAMES[1:]))):
        file = lora_file(tmp_path / f"{name}.safetensors", names, 3, i)
        manager.load(file, name)
        loras[name] = read_lora(open_adapter(file))
    manager.set({"a": 0.7, "b": 0.3})
    check(model, twin, [(loras["a"], 0.7), (loras["b"], 0.3)])
    one = model(X)
    manager.set({"b": 0.3, "a": 0.7})
    assert all(torch.equal(y, was) for y, was in zip(model(X), one, strict=True))
    manager.compose("ab", {"a": 1, "b": 1})
    manager.compose("most", {"ab": 0.5, "c": -2})
    manager.set({"most": 2, "a": 1})
    check(model, twin, [(loras["a"], 2.0), (loras["b"], 1.0), (loras["c"], -4.0)])
    manager.set({"a": 0.0})
    check(model, twin, [])
    assert [a.name for a in manager] == ["a", "b", "c", "ab", "most"]
    assert "most: mix" in repr(manager)
    manager.set("most")
    manager.remove("most")
    check(model, twin, [])
    manager.remove("ab")
    manager.set({"a": 1, "b": 1})
    manager.remove("a")
    check(model, twin, [(loras["b"], 1.0)])
    manager.load(lora_file(tmp_path / "d.safetensors", NAMES, 3, 5), "d")  # in the ranks of a
    manager.set("c")
    check(model, twin, [(loras["c"], 1.0)])
    manager.set({"d": 1, "c": 1})
    d = read_lora(open_adapter(tmp_path / "d.safetensors"))
    check(model, twin, [(loras["c"], 1.0), (d, 1.0)])


def test_halves_hold_what_they_can(tmp_path: Path) -> None:
    """Adapters held as float16: what is computed is the rounded adapter."""
    model, twin = sparse_and_twin("int4g32")
    file = lora_file(tmp_path / "a.safetensors", NAMES, 4, 1)
    manager = adapters(model, 4, dtype=torch.float16)
    manager.load(file, "a")
    manager.set("a")
    lora = {n: (a.half(), b.half()) for n, (a, b) in read_lora(open_adapter(file)).items()}
    with torch.no_grad():
        check(model, twin, [(lora, 1.0)])


# --- rows of a batch -----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int4g32", "int4g32+r4"])
@torch.no_grad()
def test_each_row_has_its_own_adapter(spec: str, tmp_path: Path) -> None:
    model, twin = sparse_and_twin(spec)
    base = model(X)
    manager = adapters(model, max_rank=16)
    loras = {}
    for i, name in enumerate("abc"):
        file = lora_file(tmp_path / f"{name}.safetensors", NAMES[i % 2 :], 2 + i, i)
        manager.load(file, name)
        loras[name] = read_lora(open_adapter(file))
    manager.compose("ac", {"a": 1, "c": 0.5})
    parts = {"a": [(loras["a"], 1.0)], "b": [(loras["b"], 1.0)], None: [],
             "ac": [(loras["a"], 1.0), (loras["c"], 0.5)]}  # fmt: skip
    wide = X.view(3, 2, WIDTH)
    for ids in (["a", None, "b"], ["ac", "ac", "a"], [None, "b", "b"]):
        with manager.rows(ids):
            rows = model(wide)
        for i, own in enumerate(ids):
            fixed = [y[i] for y in rows]
            check_rows(fixed, twin, parts[own], wide[i])
    assert all(torch.equal(y, was) for y, was in zip(model(X), base, strict=True))
    with manager.rows(["a", "b", None]):
        assert [y.shape for y in model(X)] == [y.shape for y in base]  # 6 rows: 2 for each
        with pytest.raises(sparsefx.SparsefxError, match="x has 5 rows"):
            model(X[:5])


def check_rows(rows: list[Tensor], twin: nn.Module, parts: list[Any], x: Tensor) -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(rows)

    check(Given(), twin, parts, x)


# --- copies, files, compilation ------------------------------------------------------------------


@torch.no_grad()
def test_a_copy_has_adapters_of_its_own(tmp_path: Path) -> None:
    model, _ = sparse_and_twin("int4g32")
    keys, base = set(model.state_dict()), model(X)
    manager = adapters(model, max_rank=4)
    manager.load(lora_file(tmp_path / "a.safetensors", NAMES, 4, 1), "a")
    manager.set("a")
    on = model(X)
    twin = copy.deepcopy(model)
    assert adapters(twin) is not manager
    assert adapters(twin).active == {"a": 1.0}
    adapters(twin).set(None)
    for got, want in ((twin(X), base), (model(X), on)):
        assert all(torch.equal(y, was) for y, was in zip(got, want, strict=True))
    for strength in (1.0, 0.5, 1.0):
        adapters(twin).set({"a": strength})
        same = [torch.equal(y, was) for y, was in zip(twin(X), on, strict=True)]
        assert same == [strength == 1] * len(NAMES)
    assert set(model.state_dict()) == keys
    model.load_state_dict(twin.state_dict())
    assert all(torch.equal(y, was) for y, was in zip(model(X), on, strict=True))


@torch.no_grad()
def test_save_and_load_the_base(tmp_path: Path) -> None:
    model, _ = sparse_and_twin("int4g32+r4")
    base = model(X)
    manager = adapters(model, max_rank=4)
    manager.load(lora_file(tmp_path / "a.safetensors", NAMES, 4, 1), "a")
    manager.set("a")
    sparsefx.save(model, tmp_path / "saved")
    from adapter_models import Parallel

    again = sparsefx.load(tmp_path / "saved", Parallel().eval())
    assert all(torch.equal(y, was) for y, was in zip(again(X), base, strict=True))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_switching_compiles_nothing(inner: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, twin = sparse_and_twin("int4g32+r4")
    manager = adapters(model, max_rank=8)
    files = [lora_file(tmp_path / f"{n}.safetensors", NAMES, 3, i) for i, n in enumerate("ab")]
    a, b = (read_lora(open_adapter(file)) for file in files)
    options: dict[str, Any] = {"inner": inner, "spec": "fp32"}
    run: Any = torch.compile(model, backend="sparsefx", options=options, fullgraph=True)
    check(run, twin, [])
    graphs = counters["stats"]["unique_graphs"]
    manager.load(files[0], "a")
    manager.load(files[1], "b")
    for what, parts in (
        ("a", [(a, 1.0)]), ({"a": 0.5, "b": 2}, [(a, 0.5), (b, 2.0)]), (None, []), ("b", [(b, 1.0)])
    ):  # fmt: skip
        adapters(run).set(what)
        check(run, twin, parts)
    assert counters["stats"]["unique_graphs"] == graphs
    with manager.rows(["a", "b", None]):
        rows = run(X.view(3, 2, WIDTH))
    graphs = counters["stats"]["unique_graphs"]
    for ids in (["b", "b", "a"], [None, "a", "b"]):
        with manager.rows(ids):
            rows = run(X.view(3, 2, WIDTH))
        for i, name in enumerate(ids):
            parts = [] if name is None else [({"a": a, "b": b}[name], 1.0)]
            check_rows([y[i] for y in rows], twin, parts, X.view(3, 2, WIDTH)[i])
    check(run, twin, [(b, 1.0)])
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_llama_generates_as_under_peft(tmp_path: Path) -> None:
    package = peft_package()
    from adapter_models import effective
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, tie_word_embeddings=False, pad_token_id=0,
        eos_token_id=49, bos_token_id=1,
    )  # fmt: skip
    dense = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.arange(2, 14).view(2, 6)
    model = sparsefx.sparsify(
        copy.deepcopy(dense), {"format": "int4g32", "ignore": ["lm_head"]},
        example_inputs={"input_ids": ids}, progress=False,
    )  # fmt: skip
    twin = effective(model, dense)
    wanted = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj", "lm_head"]}
    wrapped = package.get_peft_model(copy.deepcopy(twin), package.LoraConfig(**wanted))
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(6):
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids.flip(1)).loss.backward()
        optimizer.step()
    wrapped.eval().save_pretrained(tmp_path / "a")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **options)
    manager = adapters(model, max_rank=4)
    assert len(manager.load(tmp_path / "a", "a").modules) == 5
    manager.set("a")
    want = wrapped.generate(input_ids=ids, **options)
    assert not torch.equal(want, before)
    assert torch.equal(model.generate(ids, **options), want)
    with manager.rows(["a", None]):
        assert torch.equal(model.generate(ids, **options), torch.stack([want[0], before[1]]))
    manager.set(None)
    assert torch.equal(model.generate(ids, **options), before)


# --- for good ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["int4g32", "bitmap@50%+int4g32", "fp32"])
@torch.no_grad()
def test_merging_requantises_and_says_the_error(spec: str, tmp_path: Path) -> None:
    model, twin = sparse_and_twin(spec)
    manager = adapters(model, max_rank=4)
    file = lora_file(tmp_path / "a.safetensors", NAMES, 4, 1)
    manager.load(file, "a")
    lora = read_lora(open_adapter(file))
    exact = {
        n: twin.get_parameter(f"{n}.weight") + 0.5 * lora[n][1] @ lora[n][0] for n in NAMES
    }  # fmt: skip
    manager.set("a")
    errors = manager.merge("a", 0.5)
    assert set(errors) == set(NAMES)
    assert "a" not in manager
    for name, weight in exact.items():
        layer: Any = model.get_submodule(name)
        now = layer.packed.unpack() if isinstance(layer, SparseLinear) else layer.weight
        found = float((now - weight).norm() / weight.norm())
        # both sides round the product of rank 4 and one sum: 6 roundings of an element's size
        assert abs(found - errors[name]) <= 6 * 2**-24 * (1 + found)
        twin.get_parameter(f"{name}.weight").copy_(now)
    if spec == "fp32":
        assert max(errors.values()) <= 2**-23
    else:
        assert errors["fc1"] > 1e-3 > errors["last"]
    check(model, twin, [])


def test_a_switch_packs_nothing_again(tmp_path: Path) -> None:
    """Going back to adapters that were on before finds their engine copies."""
    from sparsefx.codegen import native
    from sparsefx.codegen.prepared import BRANCHES

    if native.engine() is None:
        pytest.skip(native.why_missing())
    model, _ = sparse_and_twin("int4g32")
    manager = adapters(model, max_rank=8)
    for i, name in enumerate("ab"):
        manager.load(lora_file(tmp_path / f"{name}.safetensors", NAMES, 4, i), name)
    layer: Any = model.get_submodule("fc1")
    seen: dict[Any, Any] = {}
    for on in ("a", "b", None, "a", "b", None):
        manager.set(on)
        model(X)
        ranks = BRANCHES.find((layer.adapter_down, layer.adapter_up))
        assert ranks is not None
        active = ranks.active([layer.adapter_down, layer.adapter_up, layer.adapter_scale])
        assert seen.setdefault(on, active) is active
        assert (active.pair is None) == (on is None)
        assert len(active.scale) == (0 if on is None else 4)
    assert all(x is not y for x, y in pairwise(seen.values()))
