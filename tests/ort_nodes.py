"""`sparsefx::Linear` nodes built by hand, for tests of the engine inside ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from native_cases import (
    Extras,
    expected,
    fitting,
    random_branch,
    seeded,
)
from torch import Tensor

from sparsefx.ir.codecs import Int
from sparsefx.ir.format import Format, Packed
from sparsefx.ir.layouts import NM, Tile
from sparsefx.runtime.ort import ort_session

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

TYPES = {torch.float32: 1, torch.uint8: 2, torch.float16: 10, torch.bfloat16: 16}


def attributes(packed: Packed, branch: bool = False, biased: bool = False) -> dict[str, Any]:
    """What the exporter writes."""
    fmt, layout, codec = packed.format, packed.format.layout, packed.format.codec
    where = [0]
    if isinstance(layout, NM):
        where = [1, layout.n, layout.m]
    elif isinstance(layout, Tile):
        where = [2, layout.rows, layout.cols]
    how = [1, codec.bits, codec.group_size, int(codec.symmetric)] if isinstance(codec, Int) else [0]
    return {
        "n": packed.n, "k": packed.k, "format": str(fmt), "layout": where, "codec": how,
        "a8": int(fmt.a8), "a8_group": fmt.a8_group, "branch": int(branch), "biased": int(biased),
    }  # fmt: skip


def proto(name: str, t: Tensor) -> Any:
    raw = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor(name, TYPES[t.dtype], list(t.shape), raw, raw=True)


def tensors(packed: Packed, extras: Extras) -> dict[str, Tensor]:
    out = dict(zip(packed.format.buffers, packed.buffers, strict=True))
    out |= dict(zip(("down", "up", "branch_scale"), extras.branch, strict=False))
    return out if extras.bias is None else {**out, "bias": extras.bias}


def model(
    given: dict[str, Tensor], fields: dict[str, Any], rank: int = 2, fed: Sequence[str] = (),
    functions: Sequence[Any] = (), x_type: int = 1,
) -> bytes:  # fmt: skip
    """One node; the tensors in `fed` are inputs of the graph, the others are constant."""
    h = onnx.helper
    node = h.make_node("Linear", ["x", *given], ["y"], name="fc", domain="sparsefx", **fields)
    lead: list[Any] = [f"d{i}" for i in range(rank - 1)]
    inputs = [h.make_tensor_value_info("x", x_type, [*lead, "width"])]
    inputs += [h.make_tensor_value_info(n, TYPES[given[n].dtype], given[n].shape) for n in fed]
    outputs = [h.make_tensor_value_info("y", 1, [*lead, "out"])]
    constants = [proto(name, t) for name, t in given.items() if name not in fed]
    graph = h.make_graph([node], "g", inputs, outputs, constants)
    opsets = [h.make_opsetid("", 18), h.make_opsetid("sparsefx", 1)]
    made = h.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    return bytes(made.SerializeToString())


def options(threads: int = 1, full: bool = True) -> Any:
    out = ort.SessionOptions()
    out.intra_op_num_threads = threads
    out.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    out.graph_optimization_level = level.ORT_ENABLE_ALL if full else level.ORT_DISABLE_ALL
    return out


def session(packed: Packed, extras: Extras | None = None, **how: Any) -> Any:
    extras = extras or Extras()
    rank = how.pop("rank", 2)
    fields = attributes(packed, bool(extras.branch), extras.bias is not None)
    return ort_session(model(tensors(packed, extras), fields, rank), options(**how))


def run(made: Any, x: Tensor, **fed: Tensor) -> Tensor:
    feeds = {name: t.numpy() for name, t in fed.items()}
    return torch.from_numpy(made.run(None, {"x": x.numpy(), **feeds})[0])


def assert_right(packed: Packed, x: Tensor, got: Tensor, extras: Extras | None = None) -> None:
    exact, limit = expected(packed, x, packed.format.a8, extras)
    assert got.shape == exact.shape
    wrong = ~((got.double() - exact).abs() <= limit)
    assert not bool(wrong.any()), f"{packed.format} {tuple(x.shape)}: {int(wrong.sum())} wrong"


def case(
    text: str, n: int = 37, k: int = 100, bias: bool = False, rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Packed, Extras]:  # fmt: skip
    fmt, rng = Format.parse(text), seeded(n + k)
    k = fitting(fmt, k)
    packed = fmt.pack(torch.randn(n, k, generator=rng))
    branch = [t.to(dtype) for t in random_branch(n, k, rank)] if rank else []
    return packed, Extras(torch.randn(n, generator=rng).to(dtype) if bias else None, branch)


def rows(k: int, *lead: int) -> Tensor:
    return torch.randn(*lead, k, generator=seeded(7))
