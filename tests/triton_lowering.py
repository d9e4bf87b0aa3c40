"""What Inductor makes of graphs with our Triton kernels for a GPU that is not there.

`python -m triton_lowering CASE…` prints what `lowered` says of each case, as JSON. Tensors are fake
ones on "cuda"; Inductor's own code for kernels is compiled to machine code by its own means, and
nothing is run. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
import triton
from torch import Tensor, fx, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._library.triton import get_triton_kernels_for_op

import sparsefx
from sparsefx.codegen import triton as table
from sparsefx.passes.manager import Pass
from sparsefx.runtime import backend, triton_graph

HOPPER = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
backend_inductor = backend._inductor
WIDTH = 256
"""Columns: two blocks of int4 codes, so that few rows are split over tasks."""
ROWS = (2, 3, 4, 5, 15, 16, 17, 32, 33, 64, 65, 128, 129, 512, 513, 2048, 2049, 100_000)
"""Numbers of rows around every edge of `triton_tune.BUCKETS`."""


class Gated(nn.Module):
    """Two products of one x with operators around them, then a gated pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.gate, self.up = (nn.Linear(WIDTH, 48) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2 + 1
        h = nn.functional.silu(self.gate(x)) * self.up(x)
        return self.q(x) * torch.sigmoid(self.k(x)) + 1, torch.tanh(h) + 1


class Driver:
    """Stands for the driver of a card: its name is all that compiling asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def hopper() -> Iterator[None]:
    """torch and Triton take this machine for one with an H100."""
    triton.runtime.driver.set_active(Driver())
    with ExitStack() as stack:
        for target, value in {
            "torch.cuda.get_device_properties": lambda *_: HOPPER,
            "torch.cuda.get_device_capability": lambda *_: (9, 0),
            "torch.cuda.set_device": lambda *_: None,
            "torch._inductor.scheduler.has_triton": lambda *_: True,
            "torch._inductor.runtime.triton_heuristics.triton_helpers.set_driver_to_gpu": tuple,
            # Inductor's patterns are traced on the card when they are first wanted.
            "torch._inductor.fx_passes.joint_graph.lazy_init": lambda *_: None,
            "torch._inductor.fx_passes.post_grad.lazy_init": lambda *_: None,
        }.items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=HOPPER))
        stack.enter_context(
            torch._inductor.config.patch(fx_graph_cache=False, pattern_matcher=False)
        )
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield


class Lowered(Exception):
    """Carries the code that Inductor wrote, in place of running it."""


def stop(lowering: GraphLowering) -> Any:
    code = lowering.codegen()[0]
    raise Lowered(getattr(code, "value", code))


def lower(gm: fx.GraphModule, inputs: Sequence[Any], said: dict[str, Any]) -> Any:
    """In the place of `backend._inductor`: the same on fake GPU tensors, up to the code."""
    context = torch._guards.TracingContext.get()
    assert context.fake_mode is not None
    mode, shapes = context.fake_mode, context.fake_mode.shape_env
    assert shapes is not None

    def on_gpu(t: Any) -> Any:
        with mode:
            return torch.empty(t.shape, dtype=t.dtype, device="cuda") if _is(t) else t

    holders = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    for name, buffer in dict(gm.named_buffers()).items():
        setattr(gm, name, on_gpu(buffer))
    with mock.patch.object(GraphLowering, "compile_to_module", stop):
        try:
            backend_inductor(gm, [*map(on_gpu, holders)])
        except Exception as error:
            found: BaseException | None = error
            while found is not None and not isinstance(found, Lowered):
                found = found.__cause__ or found.__context__
            if found is None:
                raise
            said["code"] = str(found)
    said["fail"] = {str(guard.expr): _fail(guard.expr) for guard in shapes.guards}
    raise Lowered


def _fail(guard: Any) -> list[int]:
    """Of `ROWS`, those that a guard refuses, or every one if it is of several sizes."""
    if len(guard.free_symbols) != 1:
        return [*ROWS]
    (symbol,) = guard.free_symbols
    return [m for m in ROWS if not bool(guard.subs(symbol, m))]


def _is(t: Any) -> bool:
    return isinstance(t, Tensor)


def lowered(case: str) -> dict[str, Any]:
    """Of "format m" or "format m+" (open): the generated `code`, the guards on open sizes with the
    numbers of rows that `fail` them, and the bytes of machine code of every kernel of ours.
    """
    text, m = case.rsplit(" ", 1)
    x = torch.randn(int(m.rstrip("+")), WIDTH).half()
    model = sparsefx.sparsify(Gated().eval().half(), text, example_inputs=(x,))
    if m.endswith("+"):
        torch._dynamo.mark_dynamic(x, 0)
    said: dict[str, Any] = {}
    here = Pass(lambda traced: triton_graph.show(traced, "cpu"))
    torch._dynamo.reset()
    with (
        mock.patch.object(table, "why_missing", return_value=""),
        mock.patch.object(backend, "triton_ops", here),
        mock.patch.dict(backend.INNER, {"inductor": lambda gm, i: lower(gm, i, said)}),
        torch.no_grad(),
        hopper(),
    ):
        try:
            torch.compile(model, backend="sparsefx", dynamic=False if "+" not in m else None)(x)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if "Lowered" not in str(error):
                raise
        said["bytes"] = machine_code(said["code"])
    return said


def machine_code(code: str) -> dict[str, int]:
    """Bytes of our kernels in Inductor's `code`, each once, compiled as Inductor would."""
    pattern = r"async_compile\.triton\('(\w+_kernel)', '''(.*?)''', device_str"
    sources = dict(re.findall(pattern, code, re.DOTALL))
    return {name: _compiled(name, source) for name, source in sources.items()}


def _compiled(name: str, source: str) -> int:
    made: list[Any] = []
    real = triton.compile

    def compile_kernel(*args: Any, **options: Any) -> Any:
        made.append(real(*args, **options))
        return made[-1]

    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source)
        file.flush()
        spec = importlib.util.spec_from_file_location(name, file.name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        with mock.patch.object(triton, "compile", compile_kernel):
            tuner._precompile_config(tuner.configs[0])
    return len(made[0].asm["cubin"])


if __name__ == "__main__":
    said = {case: lowered(case) for case in sys.argv[1:]}
    kernels: list[Any] = get_triton_kernels_for_op("sparsefx::triton_linear")
    print(json.dumps({"cases": said, "kernels": sorted(k.__name__ for k in kernels)}))
