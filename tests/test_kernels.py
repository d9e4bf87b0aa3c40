"""The kernel table and the engine's place in it: what is kept ready, when it is made anew, and what
happens where there is no engine. How exact the engine is, tests/test_native.py says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_op import check, made, random_branch
from torch import Tensor, nn

import sparsefx
from sparsefx.codegen import crossover, kernels, native
from sparsefx.codegen.kernels import NATIVE, Problem, choose
from sparsefx.codegen.prepared import PRODUCTS, Product
from sparsefx.ir.codecs import CODECS, Fp8
from sparsefx.ir.errors import ShapeError
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import LAYOUTS
from sparsefx.ir.op import LIBRARY, reference, round_activations
from sparsefx.runtime.modules import SparseLinear

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
ENGINE = native.engine()
needs_engine = pytest.mark.skipif(ENGINE is None, reason=native.why_missing())
TEXTS = ["int4g16", "int8+a8", "uint4g16+a8g24", "bitmap@50%+int4g16", "tile16x1@50%+uint4g16",
         "2:4+int8", "bitmap@50%", "2:4+bf16+a8"]  # fmt: skip


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, branch: tuple[Tensor, ...] = ()
) -> Tensor:
    out: Tensor = torch.ops.sparsefx.linear(
        x, list(packed.buffers), bias, list(branch), str(packed.format), packed.n
    )
    return out


def held(packed: Packed) -> Product | None:
    return PRODUCTS.find(packed.buffers)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after an installation without a compiler."""
    why = "the CPU engine was not built"
    monkeypatch.setattr(native, "_load", lambda: (None, why))
    choose.cache_clear()
    yield
    choose.cache_clear()


# --- the table -----------------------------------------------------------------------------------


@needs_engine
def test_the_engine_serves_every_layout_and_codec() -> None:
    for layout in LAYOUTS:
        for codec in CODECS:
            for tail in ("", "+a8", "+a8g64"):
                fmt = Format.parse(f"{layout.example}+{codec.example}{tail}")
                choice = choose(fmt, Problem(3, 64, 64, torch.float32, "cpu"))
                if codec is Fp8:
                    why = "cpu_native: holds integer codes and plain floats, not 'fp8g128'"
                    assert choice.refused == (why,)
                elif fmt.layout == Format().layout and not codec.example.startswith("int"):
                    assert choice.refused == (
                        "cpu_native: dense floats: torch multiplies them best",
                    )
                else:
                    assert (choice.kernel, choice.refused) == (NATIVE, ())


@needs_engine
@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (
            Problem(3, 8, 8, torch.float64, "cpu"),
            "cpu_native: computes in float32, not torch.float64",
        ),
        (Problem(3, 0, 8, torch.float32, "cpu"), "cpu_native: the weight is empty"),
        (
            Problem(3, 8, 8, torch.float32, "cuda"),
            "triton_columns: computes in float16 and bfloat16, not torch.float32",
        ),
    ],
)
def test_what_kernels_refuse(problem: Problem, why: str) -> None:
    choice = choose(Format.parse("int4"), problem)
    assert choice.kernel.name == "unpack_then_dense"
    assert choice.refused[0] == why


@needs_engine
@pytest.mark.parametrize("text", ["int8+a8", "int8", "int4+a8", "int8+a8g8", "2:4+int8+a8"])
def test_long_int8_products_may_go_to_another_kernel(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(crossover, "LEAST", 2)
    monkeypatch.setattr(
        crossover, "rows", lambda fmt, dtype, engine, name, run: 4 if "int8" in name else 99
    )
    choose.cache_clear()
    x, packed = made(text, 6, 8, 16)
    names = [choose(packed.format, Problem(m, 8, 16, x.dtype, "cpu")) for m in (3, 4)]
    assert names[0].kernel.name == "cpu_native"
    assert (names[1].kernel.name == "int8_matmul") == (text == "int8+a8")
    calls: list[int] = []
    product = torch._int_mm

    def int_mm(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.shape[0])
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    for m in (3, 6, 3):
        check(lambda *args, m=m: linear(x[:m], packed), x[:m], packed)
    assert calls == ([6] if text == "int8+a8" else [])
    choose.cache_clear()


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("text", TEXTS)
def test_without_the_engine_everything_works_and_says_so(text: str) -> None:
    x, packed = made(text, 3, 32, 48)
    check(lambda *args: linear(x, packed), x, packed)
    assert held(packed) is None
    model = nn.Sequential(nn.Linear(48, 32))
    found = sparsefx.explain(sparsefx.sparsify(model, text, example_inputs=x))
    name = "int8_matmul" if text == "int8+a8" else "unpack_then_dense"
    assert found.lines[0].kernel == name
    assert "cpu_native: the CPU engine was not built" in found.lines[0].refused
    assert "the CPU engine was not built" in found.fallbacks
    assert "the CPU engine was not built" in str(found)


# --- what explain shows --------------------------------------------------------------------------


@needs_engine
def test_explain_shows_family_instruction_set_and_memory() -> None:
    assert ENGINE is not None
    x = torch.randn(1, 64)
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(64, 32)), "int4g16", example_inputs=x)
    before = sparsefx.explain(model).lines[0]
    PRODUCTS.entries.clear()
    assert sparsefx.explain(model).lines[0].kernel == f"cpu_native {ENGINE.isa}"
    model(x)
    line = sparsefx.explain(model).lines[0]
    assert line.kernel == f"cpu_native dense {ENGINE.isa}"
    assert line.memory >= 32 * 64 // 2 + 32 * 4 * 2
    assert before.memory in (0, line.memory)
    shown = sparsefx.explain(model)
    assert shown.engine == f"CPU engine: {ENGINE.isa}, {ENGINE.threading}"
    assert shown.to_dict()["lines"][0]["memory"] == line.memory


@needs_engine
def test_explain_says_when_there_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.Engine, "threading", "serial")
    model = sparsefx.sparsify(
        nn.Sequential(nn.Linear(64, 32)), "int4", example_inputs=torch.ones(1, 64)
    )
    (text,) = sparsefx.explain(model).fallbacks
    assert "serial, as no OpenMP runtime" in text


# --- gradients, modes and transforms -------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("wanted", ["x", "bias", "branch", "all", "none"])
def test_gradients_are_those_of_the_reference(text: str, wanted: str) -> None:
    x, packed = made(text, 3, 32, 48)
    tensors = {"x": [x], "bias": [torch.randn(32)], "branch": random_branch(32, 48)}

    def leaves() -> dict[str, list[Tensor]]:
        asked = {name: wanted in (name, "all") for name in tensors}
        return {n: [t.clone().requires_grad_(asked[n]) for t in ts] for n, ts in tensors.items()}

    a, b = leaves(), leaves()
    y = linear(a["x"][0], packed, a["bias"][0], tuple(a["branch"]))
    rows = b["x"][0]
    if packed.format.a8:  # rounding is passed through
        rows = rows + (round_activations(rows, packed.format.a8_group) - rows).detach()
    plain = Packed(packed.format.float_activations, 32, 48, packed.buffers)
    r = reference(rows, plain, b["bias"][0], [])
    down, up, scale = b["branch"]
    r = r + ((b["x"][0] @ down.T) * scale) @ up.T
    assert torch.allclose(y, r, rtol=1e-4, atol=1e-4)
    assert y.requires_grad == (wanted != "none")
    if wanted != "none":
        torch.autograd.backward([y.square().sum(), r.square().sum()])
    for name, ts in a.items():
        for t, u in zip(ts, b[name], strict=True):
            assert (t.grad is None) == (u.grad is None)
            if t.grad is not None and u.grad is not None:
                assert torch.allclose(t.grad, u.grad, rtol=1e-3, atol=1e-3)


def test_plain_products_skip_the_autograd_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = made("int4g16", 3, 32, 48)
    seen: list[Tensor] = []

    def cpu(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x)
        return kernels.linear(x, *rest)

    monkeypatch.setattr(LIBRARY, "cpu", cpu)
    wanting = x.clone().requires_grad_()
    linear(x, packed)
    with torch.no_grad():
        linear(wanting, packed)
    assert len(seen) == 2
    linear(wanting, packed)
    with torch.inference_mode():
        linear(x, packed)
    assert len(seen) == 2


@pytest.mark.parametrize("text", TEXTS)
def test_opcheck(text: str) -> None:
    x, packed = made(text, 3, 32, 48)
    bias, branch = torch.randn(32), random_branch(32, 48)
    buffers = list(packed.buffers)
    trained = [t.clone().requires_grad_() for t in (x, bias, *branch)]
    cases: list[tuple[Any, ...]] = [
        (x, buffers, None, [], text, 32),
        (x, buffers, trained[1], branch, text, 32),
        (trained[0], buffers, bias, trained[2:], text, 32),
    ]
    for args in cases:
        linear(x, packed)  # the engine has the weight ready when fake tensors come
        torch.library.opcheck(torch.ops.sparsefx.linear.default, args)


def test_modes_see_the_product() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    x, packed = made("int4g16", 3, 32, 48)
    want = linear(x, packed)
    seen: list[object] = []

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        assert torch.equal(linear(x, packed), want)
        with torch.no_grad():
            assert torch.equal(linear(x, packed), want)
    assert seen.count(torch.ops.sparsefx.linear.default) == 2
    assert torch.equal(torch.func.functionalize(lambda x: linear(x, packed))(x), want)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_changes_nothing(device: str) -> None:
    x, packed = made("bitmap@50%+int4g16", 3, 32, 48)
    branch = tuple(random_branch(32, 48))
    with torch.device(device):
        got = linear(x, packed, None, branch)
    check(lambda *args: got, x, packed, None, branch)


@pytest.mark.parametrize("text", TEXTS)
def test_another_number_of_columns_is_refused(text: str) -> None:
    _, packed = made(text, 3, 32, 48)
    for k in (24, 96, 48, 24, 96):
        rows = torch.randn(3, k)
        if k == 48:
            check(lambda *args, rows=rows: linear(rows, packed), rows, packed)
            continue
        with pytest.raises(ShapeError, match=f"x has {k} columns|is no \\(32, {k}\\) weight"):
            linear(rows, packed)


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_keeps_one_extern_call(dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    x, packed = made("bitmap@50%+int4g16", 3, 32, 48)
    module = nn.Sequential(SparseLinear(packed, None, random_branch(32, 48)), nn.ReLU()).eval()
    compiled = torch.compile(module, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        got, (code, *_) = run_and_get_code(compiled, x)
    assert torch.equal(got, module(x))
    assert code.count("torch.ops.sparsefx.linear.default(") == 1
    assert "sparsefx.unpack" not in code
    torch._dynamo.reset()


# --- the engine's own process settings -----------------------------------------------------------


def fresh(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env={"PYTHONPATH": paths, "PATH": os.environ["PATH"], **environment},
    )  # fmt: skip


PRODUCT = (
    "import torch\nfrom sparsefx.runtime.modules import SparseLinear\n"
    "from sparsefx.ir.format import Format\n"
    "m = SparseLinear(Format.parse('int4').pack(torch.randn(8, 8)))\nm(torch.ones(1, 8))\n"
)


@needs_engine
def test_an_unknown_instruction_set_is_an_error() -> None:
    done = fresh(PRODUCT, SPARSEFX_ISA="mmx")
    assert done.returncode != 0
    assert "SpecError: SPARSEFX_ISA: this machine runs" in done.stderr
    assert "not 'mmx'" in done.stderr


@needs_engine
def test_every_instruction_set_can_be_forced() -> None:
    assert ENGINE is not None
    for isa in ENGINE.isas:
        ending = "from sparsefx.codegen.native import engine\nprint(engine().isa)"
        done = fresh(PRODUCT + ending, SPARSEFX_ISA=isa)
        assert (done.stdout.strip(), done.stderr) == (isa, "")


def test_a_library_that_does_not_load_is_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    code = PRODUCT + "from sparsefx.codegen.native import why_missing\nprint(why_missing())"
    done = fresh(code, SPARSEFX_NATIVE=str(broken))
    assert "the CPU engine does not load" in done.stdout, done.stderr
