"""Ways to run an ONNX file: ONNX Runtime as it is, with its own quantisers, OpenVINO, and ours.

A peer is one function and one line of `PEERS`: it makes a file from the dense one and runs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ort_cases import Call

import sparsefx

Peer = Callable[[Path, Path, int], tuple[Call, int]]
"""(dense file, folder for its own, threads) to (call, bytes of the file it runs)."""


def size_of(path: Path) -> int:
    """Bytes of a model and of the weights beside it."""
    return sum(f.stat().st_size for f in path.parent.glob(path.name + "*"))


def options(threads: int) -> Any:
    import onnxruntime as ort

    out = ort.SessionOptions()
    out.intra_op_num_threads = threads
    out.log_severity_level = 3
    out.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return out


def stock(path: Path, threads: int) -> tuple[Call, int]:
    """The file in ONNX Runtime without our library."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), options(threads), providers=["CPUExecutionProvider"])
    return partial(session.run, None), size_of(path)


def with_library(path: Path, threads: int) -> tuple[Call, int]:
    """The same file with the CPU engine registered."""
    session = sparsefx.ort_session(path, options(threads))
    return partial(session.run, None), size_of(path)


def fp32(dense: Path, folder: Path, threads: int) -> tuple[Call, int]:
    return stock(dense, threads)


def dynamic_int8(dense: Path, folder: Path, threads: int) -> tuple[Call, int]:
    from onnxruntime.quantization import quantize_dynamic

    path = folder / "dynamic-int8.onnx"
    if not path.exists():
        quantize_dynamic(str(dense), str(path), per_channel=True)
    return stock(path, threads)


def nbits(
    dense: Path, folder: Path, threads: int, *, block: int, hqq: bool = False
) -> tuple[Call, int]:
    """ONNX Runtime's own 4-bit quantiser, int8 activations; round to nearest or HQQ."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nb

    path = folder / f"nbits-{block}{'-hqq' * hqq}.onnx"
    if not path.exists():
        how = {"block_size": block, "bits": 4}
        config = (
            nb.HQQWeightOnlyQuantConfig(**how)
            if hqq
            else nb.DefaultWeightOnlyQuantConfig(**how, is_symmetric=True, accuracy_level=4)
        )
        maker = nb.MatMulNBitsQuantizer(str(dense), accuracy_level=4, algo_config=config, **how)
        maker.process()
        maker.model.save_model_to_file(str(path))
    return stock(path, threads)


def openvino_int4(dense: Path, folder: Path, threads: int) -> tuple[Call, int]:
    """OpenVINO with weights compressed to 4 bits in groups of 64 by NNCF."""
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)

    path = folder / "openvino.xml"
    if not path.exists():
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(
            ov.convert_model(str(dense)), mode=mode, group_size=64, ratio=1.0, all_layers=True
        )
        ov.save_model(model, str(path))
    compiled = ov.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": threads})

    def call(feed: Any) -> list[Any]:
        return list(compiled(feed).values())

    return call, size_of(path) + size_of(path.with_suffix(".bin"))


PEERS: Mapping[str, Peer] = {
    "ORT fp32": fp32,
    "ORT dynamic int8": dynamic_int8,
    "ORT 4 bit block 32": partial(nbits, block=32),
    "ORT 4 bit block 128": partial(nbits, block=128),
    "ORT 4 bit block 128 HQQ": partial(nbits, block=128, hqq=True),
    "OpenVINO 4 bit": openvino_int4,
}
