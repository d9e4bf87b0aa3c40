"""ExecuTorch's XNNPACK delegate with torchao's 8da4w: 4-bit weights, int8 activations."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from benchmarks.peers.base import Call, Layer, random_weight
from torch import Tensor, nn

GROUP = 32
PORTABLE = "executorch.extension.pybindings.portable_lib"


@lru_cache(maxsize=1)
def _program(n: int, k: int) -> tuple[bytes, bytes, Tensor]:
    """An exported layer with any number of rows up to 1024, the bytes of its codes in there, and
    the dense weight that they stand for."""
    xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir, ao = import_module("executorch.exir"), import_module("torchao.quantization")
    kinds: Any = torch
    with torch.inference_mode(False):
        model = nn.Sequential(nn.Linear(k, n, bias=False)).eval()
        model[0].weight = nn.Parameter(random_weight(n, k, 0).clone(), requires_grad=False)
        config = ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=kinds.int4, weight_granularity=ao.PerGroup(GROUP)
        )
        ao.quantize_(model, config)
        stored: Any = model[0].weight
        rows = {0: torch.export.Dim("m", min=1, max=1024)}
        exported = torch.export.export(model, (torch.randn(4, k),), dynamic_shapes=(rows,))
        partitioners = [xnnpack.XnnpackPartitioner()]
        lowered = exir.to_edge_transform_and_lower(exported, partitioner=partitioners)
        program = lowered.to_executorch()
        names = [str(node.target) for node in lowered.exported_program().graph.nodes]
    if any("linear" in name for name in names):
        raise RuntimeError("XNNPACK did not take the product")
    codes = (stored.qdata.clone() + 8).to(torch.uint8)
    raw = (codes[:, ::2] | (codes[:, 1::2] << 4)).numpy().tobytes()
    return bytes(program.buffer), raw, stored.dequantize().clone()


@lru_cache(maxsize=1)
def _use_threads(threads: int) -> None:
    import_module(PORTABLE)._unsafe_reset_threadpool(threads)


def xnnpack_8da4w(n: int, k: int, seed: int) -> Layer:
    """The exported program with its rows of codes in another order for every seed."""
    program, raw, dense = _program(n, k)
    turn = seed * 37 % n * k // 2
    if (at := program.find(raw)) >= 0:
        turned = raw[turn:] + raw[:turn]
        program = program[:at] + turned + program[at + len(raw) :]
    _use_threads(torch.get_num_threads())
    module: Any = import_module(PORTABLE)._load_for_executorch_from_buffer(program)

    def bind(x: Tensor, held: bytes = program) -> Call:  # the module reads it, and copies nothing
        inputs = [x]
        return lambda: module.forward(inputs, clone_outputs=False)[0]

    # bf16 scales, and one fp32 sum per output that corrects for x's zero point.
    size = n * k // 2 + 2 * n * k // GROUP + 4 * n
    return Layer(size, bind, lambda: dense, unit="int8")
