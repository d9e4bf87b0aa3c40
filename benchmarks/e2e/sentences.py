"""MiniLM: 32 sentences of 64 tokens at a time, through PyTorch and ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.e2e.base import Session, Settings, weight_bytes
from torch import Tensor, nn

from sparsefx.models import MODELS, Bundle

BATCH, LENGTH = 32, 64


class Sentences(Session):
    """`run` encodes one batch; the quality is that of `judged`, the same weights uncompiled."""

    def __init__(self, bundle: Bundle, judged: nn.Module, run: Callable[..., Any]) -> None:
        self.bundle, self.judged, self.run = bundle, judged, run
        self.bytes = weight_bytes(judged)
        texts = bundle.calibration(2)[0]  # 64 sentences padded to 64 tokens
        ids = texts["input_ids"][texts["attention_mask"].bool()]
        self.inputs = {
            "input_ids": ids[: BATCH * LENGTH].view(BATCH, LENGTH),
            "token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
        }

    @torch.inference_mode()
    def measure(self) -> dict[str, float]:
        start = time.perf_counter()
        self.run(**self.inputs)
        return {"batch": time.perf_counter() - start}

    def quality(self) -> float:
        return float(self.bundle.metric(self.judged)[self.bundle.headline])


def _dense() -> tuple[Bundle, nn.Module]:
    bundle = MODELS["minilm"]()
    return bundle, bundle.model


def _frozen(model: nn.Module) -> Callable[..., Any]:
    torch._inductor.config.freezing = True
    run: Callable[..., Any] = torch.compile(model, fullgraph=True, dynamic=False)
    return run


def fp32(settings: Settings) -> Sentences:
    bundle, model = _dense()
    return Sentences(bundle, model, model)


def bf16(settings: Settings) -> Sentences:
    bundle, model = _dense()
    model.bfloat16()
    return Sentences(bundle, model, model)


def dynamic_int8(settings: Settings) -> Sentences:
    bundle, model = _dense()
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(model, {nn.Linear})
    return Sentences(bundle, model, model)


def compiled_fp32(settings: Settings) -> Sentences:
    bundle, model = _dense()
    return Sentences(bundle, model, _frozen(model))


def torchao_int8(settings: Settings) -> Sentences:
    ao: Any = import_module("torchao.quantization")
    bundle, model = _dense()
    model.bfloat16()  # torchao's integer kernels for CPUs take bf16 activations
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig())
    return Sentences(bundle, model, _frozen(model))


class _Ort(nn.Module):
    """An ONNX file as a module with the outputs of the model it was exported from."""

    def __init__(self, path: str, threads: int) -> None:
        super().__init__()
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def forward(self, **inputs: Tensor) -> Any:
        feed = {name: inputs[name].numpy() for name in self.names}
        return SimpleNamespace(last_hidden_state=torch.from_numpy(self.session.run(None, feed)[0]))


def onnxruntime_fp32(settings: Settings) -> Sentences:
    import sparsefx

    bundle, model = _dense()
    path = settings.keep("minilm.onnx")
    if not path.exists():
        sparsefx.export_onnx(
            model, path, bundle.example_inputs, bundle.dynamic_shapes, verify=False
        )
    session = _Ort(str(path), settings.threads)
    out = Sentences(bundle, session, session)
    out.bytes = sum(f.stat().st_size for f in path.parent.glob(path.name + "*"))
    return out


def ours(settings: Settings, spec: str, compiled: bool) -> Sentences:
    """Sparsified once per run, then loaded."""
    import sparsefx

    bundle, model = _dense()
    folder = settings.keep(f"minilm-{spec}")
    if not folder.exists():
        sparsefx.sparsify(
            model, spec, example_inputs=bundle.example_inputs, progress=False,
            calibration=bundle.calibration(settings.calibrate) if settings.calibrate else None,
        )  # fmt: skip
        sparsefx.save(model, folder)
        bundle, model = _dense()
    model = sparsefx.load(folder, model)
    run: Callable[..., Any] = model
    if compiled:
        run = torch.compile(model, backend="sparsefx", fullgraph=True, dynamic=False)
    return Sentences(bundle, model, run)
