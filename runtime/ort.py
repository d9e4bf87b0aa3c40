"""The CPU engine inside ONNX Runtime: the library that runs `sparsefx::Linear` nodes.

An exported model runs in stock ONNX Runtime, where a node's function body unpacks and multiplies.
With the library registered the node itself is run, by the same kernels as in torch.
"""

from __future__ import annotations

import os
from typing import Any

from sparsefx.codegen import native
from sparsefx.ir.errors import MissingPackageError


def ort_library() -> str:
    """Path of the library for `SessionOptions.register_custom_ops_library`.

    `SPARSEFX_NATIVE` and `SPARSEFX_ISA` are heeded. Raises MissingPackageError where the CPU engine
    was not built or does not run here.
    """
    engine = native.engine()
    if engine is None:
        raise MissingPackageError(f"no kernels for ONNX Runtime: {native.why_missing()}")
    return str(engine.path.resolve())


def ort_session(path: str | os.PathLike[str] | bytes, options: Any = None, **kwargs: Any) -> Any:
    """An `onnxruntime.InferenceSession` over the model at `path` that runs our kernels.

    `options` are SessionOptions; the library is registered with them. `kwargs` go to the session;
    providers default to the CPU. Raises MissingPackageError without onnxruntime or the engine.
    """
    library = ort_library()
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackageError('onnxruntime is missing: pip install "sparsefx[onnx]"') from None
    options = onnxruntime.SessionOptions() if options is None else options
    options.register_custom_ops_library(library)
    kwargs.setdefault("providers", ["CPUExecutionProvider"])
    model = path if isinstance(path, bytes) else os.fspath(path)
    return onnxruntime.InferenceSession(model, options, **kwargs)
