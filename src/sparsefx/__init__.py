"""sparsefx: compiler passes on torch.fx that make pruned, quantised models smaller and faster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsefx.ir.errors import SparsefxError
    from sparsefx.ir.format import Format
    from sparsefx.models.causal_onnx import export_causal_lm
    from sparsefx.passes.spec import Spec
    from sparsefx.runtime.adapter_extract import extract_lora
    from sparsefx.runtime.adapters import adapters
    from sparsefx.runtime.artifact import load, save
    from sparsefx.runtime.auto import auto
    from sparsefx.runtime.explain import explain
    from sparsefx.runtime.export import export_onnx
    from sparsefx.runtime.from_onnx import compress_onnx
    from sparsefx.runtime.onnx_adapters import export_adapter
    from sparsefx.runtime.ort import ort_library, ort_session
    from sparsefx.runtime.sparsify import sparsify

__version__ = "0.1.0"
__all__ = [
    "Format",
    "SparsefxError",
    "Spec",
    "adapters",
    "auto",
    "compress_onnx",
    "explain",
    "export_adapter",
    "export_causal_lm",
    "export_onnx",
    "extract_lora",
    "load",
    "ort_library",
    "ort_session",
    "save",
    "sparsify",
]

_HOMES = {
    "Format": "ir.format",
    "SparsefxError": "ir.errors",
    "Spec": "passes.spec",
    "adapters": "runtime.adapters",
    "auto": "runtime.auto",
    "compress_onnx": "runtime.from_onnx",
    "explain": "runtime.explain",
    "export_adapter": "runtime.onnx_adapters",
    "export_causal_lm": "models.causal_onnx",
    "export_onnx": "runtime.export",
    "extract_lora": "runtime.adapter_extract",
    "load": "runtime.artifact",
    "ort_library": "runtime.ort",
    "ort_session": "runtime.ort",
    "save": "runtime.artifact",
    "sparsify": "runtime.sparsify",
}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use, so that `import sparsefx` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsefx' has no attribute {name!r}")
    value = getattr(import_module(f"sparsefx.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
