"""Ways to run an ONNX file: ONNX Runtime as it is, with its own quantisers, OpenVINO, and ours.

A peer is one function and one line of `PEERS`: it makes a file from the dense one and runs it.
llama.cpp is in `benchmarks.end_to_end` instead: it configures a processor's matrix tiles once, and
dies in a process where somebody else has released them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ort_cases import Call, Case, Feed

import sparsefx


@dataclass(frozen=True)
class Setup:
    """What a peer starts from: a model's dense file, a folder for its own, and threads."""

    case: Case
    dense: Path
    folder: Path
    threads: int


Peer = Callable[[Setup], tuple[Call, int]]
"""To a call and the bytes of the file that it runs."""


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


def fp32(setup: Setup) -> tuple[Call, int]:
    return stock(setup.dense, setup.threads)


def dynamic_int8(setup: Setup) -> tuple[Call, int]:
    from onnxruntime.quantization import quantize_dynamic

    path = setup.folder / "dynamic-int8.onnx"
    quantize_dynamic(str(setup.dense), str(path), per_channel=True)
    return stock(path, setup.threads)


def nbits(setup: Setup, *, block: int, how: str = "round") -> tuple[Call, int]:
    """ONNX Runtime's own 4-bit quantiser, int8 activations: "round" to nearest, "hqq" or "gptq"."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nb

    path = setup.folder / f"nbits-{block}-{how}.onnx"
    size: dict[str, Any] = {"block_size": block}
    if how == "hqq":
        config: Any = nb.HQQWeightOnlyQuantConfig(bits=4, **size)
    elif how == "gptq" and setup.case.name == "smollm2":
        raise RuntimeError("not run: it is written in NumPy, less than 1 % done after four minutes")
    elif how == "gptq":
        feeds = iter(setup.case.feeds.values())
        config = nb.GPTQWeightOnlyQuantConfig(calibration_data_reader=_reader(feeds), **size)
    else:
        config = nb.DefaultWeightOnlyQuantConfig(
            bits=4, is_symmetric=True, accuracy_level=4, **size
        )
    maker = nb.MatMulNBitsQuantizer(
        str(setup.dense), accuracy_level=4, algo_config=config, bits=4, **size
    )
    maker.process()
    maker.model.save_model_to_file(str(path))
    return stock(path, setup.threads)


def _reader(feeds: Iterator[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Feed | None:
            return next(feeds, None)

    return Reader()


def openvino_int4(setup: Setup) -> tuple[Call, int]:
    """OpenVINO with weights compressed to 4 bits in groups of 64 by NNCF."""
    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)

    path = setup.folder / "openvino.xml"
    mode = nncf.CompressWeightsMode.INT4_SYM
    model = nncf.compress_weights(
        ov.convert_model(str(setup.dense)), mode=mode, group_size=64, ratio=1.0, all_layers=True
    )
    ov.save_model(model, str(path))
    compiled = ov.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": setup.threads})

    def call(feed: Any) -> list[Any]:
        return list(compiled(feed).values())

    return call, size_of(path) + size_of(path.with_suffix(".bin"))


PEERS: Mapping[str, Peer] = {
    "ORT fp32": fp32,
    "ORT dynamic int8": dynamic_int8,
    "ORT 4 bit block 32": partial(nbits, block=32),
    "ORT 4 bit block 128": partial(nbits, block=128),
    "ORT 4 bit block 128 HQQ": partial(nbits, block=128, how="hqq"),
    "ORT 4 bit block 128 GPTQ": partial(nbits, block=128, how="gptq"),
    "OpenVINO 4 bit": openvino_int4,
}
