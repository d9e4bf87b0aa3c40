"""The Triton kernels on a real GPU: `make test-gpu`. Without one, what the interpreter can show.

A process either interprets or compiles (tests/triton_interpreter.py): on a GPU this needs
TRITON_INTERPRET=0, which `make test-gpu` sets.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_op import check
from torch import Tensor, nn

from sparsefx.codegen import triton, triton_fused, triton_tune
from sparsefx.codegen.kernels import KERNELS, Problem, choose
from sparsefx.ir import fused as meaning
from sparsefx.ir.codecs import Grid
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.fused import Part, arguments
from sparsefx.runtime.modules import SparseLinear

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FP16, BF16 = torch.float16, torch.bfloat16
N, K = (200, 400) if GPU else (24, 144)
"""Neither is a whole number of blocks; K is one group of 128 and a part of another."""
ROWS = (1, 3, 16, 50, 300) if GPU else (1, 17)
LAYOUTS = ("", "tile64x16@50%+", "tile16x16@50%+", "tile16x1@50%+", "tile1x16@50%+", "2:4+",
           "bitmap@50%+")  # fmt: skip
CODECS = ("int4g128", "uint4g128", "int3g128", "int2g128", "int8", "fp8g128", "bf16")
FORMATS = [layout + codec for layout in LAYOUTS for codec in CODECS if layout or codec != "bf16"]
FORMATS += [layout + codec + "+a8" for layout in LAYOUTS for codec in ("int8", "int4g128")]
FORMATS += ["int4g128+r8", "int8+r8+a8", "tile64x16@50%+int4g128+r8", "2:4+int4g128+r8"]
FEW = ["int4g128", "int8+r8+a8", "tile64x16@50%+int4g128", "bitmap@50%+int4g128"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
needs_gpu = pytest.mark.skipif(not GPU, reason="torch finds no GPU here")


@pytest.fixture(autouse=True, scope="module")
def compiling() -> None:
    """Compiled kernels on a GPU, interpreted ones without."""
    if not GPU:
        from triton_interpreter import interpreted

        interpreted()
    elif os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1 would not compile the kernels; run `make test-gpu`")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and no memory of what was tuned."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_tune, "_known", {})
    return tmp_path


def made(text: str, n: int = N, k: int = K, dtype: torch.dtype = FP16) -> tuple[Packed, Any]:
    """A packed weight and the branch that its format asks for."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    fmt = Format.parse(text)
    packed = fmt.pack(torch.randn(n, k, generator=generator).to(DEVICE))
    shapes = ((fmt.rank, k), (n, fmt.rank), (fmt.rank,)) if fmt.rank else ()
    return packed, [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def rows(m: int, k: int = K, dtype: torch.dtype = FP16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=generator).to(DEVICE, dtype)


def run(
    x: Tensor, packed: Packed, bias: Tensor | None = None, branch: Sequence[Tensor] = ()
) -> Tensor:
    """By the kernel that the table chooses on a GPU, which must be one of Triton's."""
    problem = Problem(x.shape[0], packed.n, packed.k, x.dtype, "cuda")
    choice = choose(packed.format, problem)
    assert choice.kernel.name.startswith("triton_"), choice.refused
    if GPU:
        y: Tensor = torch.ops.sparsefx.linear(
            x, list(packed.buffers), bias, list(branch), str(packed.format), packed.n
        )
        return y
    return choice.kernel.run(x, packed, bias, branch)


# --- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("text", FORMATS if GPU else FORMATS[::5])
def test_products(text: str, dtype: torch.dtype) -> None:
    """Every format at every M within the derived bound of the fp64 product."""
    packed, branch = made(text, dtype=dtype)
    bias = rows(1, packed.n, dtype, seed=1)[0]
    for m in ROWS:
        check(run, rows(m, dtype=dtype), packed, bias, branch)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("text", ["int4", "tile16x1@50%+fp8"])
def test_gates_are_what_they_mean(text: str, m: int) -> None:
    """Of small integers, which every step holds exactly but the last: the same bits."""
    grid, parts = Grid(torch.ones(N, 1, device=DEVICE)), []
    for seed in range(2):
        weight = torch.randint(-7, 8, (N, K), generator=torch.Generator().manual_seed(seed))
        weight[:, :16] = 7
        packed = Format.parse(text).pack(weight.float().to(DEVICE), grid=grid)
        parts.append(Part(list(packed.buffers), None, [], text, N))
    x = rows(m).sign()
    x[:, 32:] = 0
    op = torch.ops.sparsefx.fused.default if GPU else triton_fused.fused
    got = op(x, *arguments(parts), "relu", None, None)
    assert torch.equal(got, meaning.fused(x, *arguments(parts), "relu", None, None))


@needs_gpu
@pytest.mark.parametrize("text", FEW)
@pytest.mark.parametrize("m", [1, 16, 512])
def test_large_products(text: str, m: int) -> None:
    packed, branch = made(text, 4096, 2048, BF16)
    check(run, rows(m, 2048, BF16), packed, None, branch)


@pytest.mark.parametrize("text", FEW)
@pytest.mark.parametrize("m", [4, 17])
def test_bad_rows_stay_alone(text: str, m: int) -> None:
    """NaN and infinity make their own rows NaN or infinite, and change no other."""
    packed, branch = made(text)
    x = rows(m)
    clean = run(x, packed, None, branch)
    x[1], x[2] = torch.nan, torch.inf
    y = run(x, packed, None, branch)
    good = [i for i in range(m) if i not in (1, 2)]
    assert bool(y[1].isnan().all())
    assert not bool(y[2].isfinite().any())
    assert torch.equal(y[good], clean[good])


@pytest.mark.parametrize("text", FEW)
def test_runs_are_alike(text: str) -> None:
    """Sums are added in a fixed order: the same bits at every run."""
    packed, branch = made(text)
    x = rows(3)
    first = run(x, packed, None, branch)
    assert all(torch.equal(run(x, packed, None, branch), first) for _ in range(10 if GPU else 1))


@needs_gpu
@pytest.mark.parametrize("text", FEW)
@pytest.mark.parametrize("m", [1, 16, 300])
def test_cuda_graphs(text: str, m: int) -> None:
    """A replay gives the eager product's bits, for other x in the same place."""
    packed, branch = made(text, 1024, 512)
    x = rows(m, 512)
    with torch.inference_mode():
        run(x, packed, None, branch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(x, packed, None, branch)
        for seed in (1, 2):
            x.copy_(rows(m, 512, seed=seed))
            graph.replay()
            assert torch.equal(y, run(x, packed, None, branch))


# --- modules -------------------------------------------------------------------------------------


def layer(text: str, n: int = N, k: int = K) -> SparseLinear:
    packed, branch = made(text, n, k)
    return SparseLinear(packed, nn.Parameter(rows(1, n)[0]), branch, FP16).eval()


@needs_gpu
@pytest.mark.parametrize("text", FEW)
def test_devices(text: str) -> None:
    """cuda -> cpu -> cuda: the same stored bytes and the same results."""
    module, x = layer(text), rows(5)
    with torch.inference_mode():
        before = module(x)
        stored = {name: buffer.cpu().clone() for name, buffer in module.named_buffers()}
        module.cpu()
        assert all(torch.equal(b, stored[name]) for name, b in module.named_buffers())
        assert {b.device.type for b in module.buffers()} == {"cpu"}
        module.cuda()
        assert all(torch.equal(b.cpu(), stored[name]) for name, b in module.named_buffers())
        assert all(b.dtype == stored[name].dtype for name, b in module.named_buffers())
        assert torch.equal(module(x), before)


def test_compile_with_any_number_of_rows() -> None:
    """Inductor, M = 5 … 300: once for the first M and once for all others, the eager bits."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = nn.Sequential(layer("int4g128", 256, 128), nn.ReLU(), layer("int8+a8", 64, 256))
    counter: Any = CompileCounterWithBackend("inductor")
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for m in (5, 7, 33, 64, 300):
            x = rows(m, 128)
            assert torch.equal(compiled(x), model(x)), m
    assert counter.frame_count <= 2


class Decoder(nn.Module):
    """A language model as small as one can be: every token also sees the mean of those before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 256)
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256)
        self.head = nn.Linear(256, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        count = torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]
        h = h + (h.float().cumsum(1) / count).to(h.dtype)
        h = h + self.down(nn.functional.gelu(self.up(h)))
        logits: Tensor = self.head(h)
        return logits


def generate(model: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """`tokens` and the `count` most likely ones behind them, one at a time."""
    for _ in range(count):
        following = model(tokens)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, following), 1)
    return tokens


@pytest.mark.parametrize("text", ["int4g128", "int8+a8", "tile64x16@50%+int4g128", "2:4+int4g128"])
def test_sparsified_models_generate(text: str) -> None:
    """`sparsify(model).cuda()`: each layer within its bound at every step, the same text twice.

    On a GPU `explain` names Triton's kernel and its configuration for every layer.
    """
    pytest.importorskip("pydantic")
    import sparsefx

    model: Any = sparsefx.sparsify(
        Decoder().eval().half(), text, example_inputs=(torch.arange(6)[None],)
    ).to(DEVICE)
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(layers) == 3

    def checked(module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0].reshape(-1, module.k)
        flat = y.reshape(-1, module.n)
        check(lambda *_: flat, x, module.packed, module.bias)

    hooks = [one.register_forward_hook(checked) for one in layers]
    prompt = torch.arange(12, device=DEVICE).view(2, 6)
    with torch.inference_mode():
        first = generate(model, prompt, 8)
        for hook in hooks:
            hook.remove()
        assert torch.equal(generate(model, prompt, 8), first)
    lines = [line for line in sparsefx.explain(model).lines if line.kernel != "dense"]
    assert len(lines) == 3
    for line in lines if GPU else ():
        assert line.kernel.startswith("triton_"), (line.kernel, line.refused)
        assert "M≤16: " in line.kernel
        assert "warps" in line.kernel


def test_copies_are_of_their_own() -> None:
    """A deep copy that is edited changes nothing in the module it was made of."""
    module, x = layer("int4g128"), rows(2)
    with torch.no_grad():
        before = module(x)
        other = copy.deepcopy(module)
        other.buffer_list[-1].mul_(2)
        assert not torch.equal(other(x), before)
        assert torch.equal(module(x), before)


# --- tuning --------------------------------------------------------------------------------------


def tuned(monkeypatch: pytest.MonkeyPatch, mode: str, count: int = 4) -> tuple[Any, int]:
    """The configuration chosen for a new weight in `mode`, and how often something was timed."""
    measured, every = 0, triton_tune.candidates
    real = triton._measure

    def measure(*args: Any) -> triton_tune.Measure:
        inner = real(*args)

        def timed(config: Any) -> float:
            nonlocal measured
            measured += 1
            # Without a GPU nothing can be timed: the dense product is made out to be slowest.
            return inner(config) if GPU else 1.0 + (config is None)

        return timed

    with monkeypatch.context() as patch:
        patch.setenv("SPARSEFX_TUNE", mode)
        patch.setattr(triton, "_measure", measure)
        patch.setattr(triton_tune, "candidates", lambda work: every(work)[:count])
        packed, _ = made("int4g128", 256, 256)
        x = rows(1, 256)
        check(run, x, packed)
        product = triton.prepared("columns", packed)
        return product.configs[1, FP16], measured


def test_tuning_modes(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """full measures once and keeps it; cached and full then read it; off never looks."""
    default, none = tuned(monkeypatch, "off")
    assert (none, list(cache.iterdir())) == (0, [])
    assert tuned(monkeypatch, "cached") == (default, 0)  # nothing is there, nothing is kept
    assert list(cache.iterdir()) == []
    best, count = tuned(monkeypatch, "full")
    assert count == 5  # four candidates and the dense product
    assert len(list(cache.iterdir())) == 1
    for mode in ("cached", "full"):
        monkeypatch.setattr(triton_tune, "_known", {})  # as in another process
        assert tuned(monkeypatch, mode) == (best, 0)
    monkeypatch.setattr(triton_tune, "_known", {})
    assert tuned(monkeypatch, "off") == (default, 0)


@needs_gpu
def test_nothing_is_measured_into_a_graph(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A first product inside a graph takes the default; later ones are tuned."""
    packed, _ = made("int4g128", 256, 256)
    x = rows(1, 256)
    run(x, packed)  # packed and compiled, for SPARSEFX_TUNE=off
    product = triton.prepared("columns", packed)
    product.configs.clear()
    monkeypatch.setenv("SPARSEFX_TUNE", "full")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = run(x, packed)
    graph.replay()
    assert not product.configs
    assert not list(cache.iterdir())
    monkeypatch.setenv("SPARSEFX_TUNE", "off")
    assert torch.equal(y, run(x, packed))


def test_every_format_has_a_kernel_on_this_gpu() -> None:
    """No format of this file is unpacked for a dense product at any number of rows."""
    names = {kernel.name for kernel in KERNELS if kernel.device == "cuda"}
    for text in FORMATS:
        for m in ROWS:
            choice = choose(Format.parse(text), Problem(m, N, K, BF16, "cuda"))
            assert choice.kernel.name in names, (text, m, choice.refused)
