"""ONNX Runtime's quantised products, one session per layer, input and output bound in place."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from benchmarks.peers.base import Call, Layer, grouped, random_bytes, random_scales
from torch import Tensor


@lru_cache(maxsize=1)
def _share_threads(threads: int) -> None:
    """One thread pool for all sessions: else the idle ones' threads would fight over the cores."""
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(threads, 1)


def _session(op: str, n: int, k: int, weights: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """A model of one com.microsoft node, x (m, k) → y (m, n), with torch's number of threads."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(op, ["x", *weights], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node], op,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if torch.get_num_threads() == 1:
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        _share_threads(torch.get_num_threads())
        options.use_per_session_threads = False
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def _bind(session: Any, n: int, x: Tensor) -> Call:
    import onnxruntime as ort

    y, binding = torch.empty(len(x), n), session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x.numpy()))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(y.numpy()))
    run = session.run_with_iobinding

    def call() -> Tensor:
        run(binding)
        return y

    return call


def matmul_nbits(bits: int, block: int, level: int, n: int, k: int, seed: int) -> Layer:
    """`MatMulNBits`, symmetric, fp32 scales; accuracy level 4 rounds x to int8, 1 keeps floats."""
    blocks = -(-k // block)
    size = n * blocks * block * bits // 8
    scales = random_scales((n, blocks), seed)
    codes = random_bytes(size, seed).view(n, blocks, -1)
    weights = {"B": codes.numpy(), "scales": scales.numpy()}
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
    session = _session("MatMulNBits", n, k, weights, attributes)

    def weight() -> Tensor:
        stream = random_bytes(size, seed)
        lanes = [(stream >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        codes = torch.stack(lanes, -1).view(n, blocks * block)
        return grouped(codes.float() - (1 << (bits - 1)), scales)[:, :k]

    unit = "int8" if level == 4 else "bf16"
    return Layer(size + 4 * scales.numel(), lambda x: _bind(session, n, x), weight, unit=unit)


def dynamic_quantize_matmul(n: int, k: int, seed: int) -> Layer:
    """`DynamicQuantizeMatMul`: s8 weights with one scale per output, x rounded to u8."""
    raw = random_bytes(n * k, seed).view(torch.int8).view(k, n)
    scales = random_scales((n,), seed)
    zeros = np.zeros(n, np.int8)
    weights = {"B": raw.numpy(), "scales": scales.numpy(), "zeros": zeros}
    session = _session("DynamicQuantizeMatMul", n, k, weights, {})

    def weight() -> Tensor:
        codes = random_bytes(n * k, seed).view(torch.int8).view(k, n)
        return (codes.float() * scales).T.contiguous()

    size = raw.numel() + 5 * n
    return Layer(size, lambda x: _bind(session, n, x), weight, unit="int8")
