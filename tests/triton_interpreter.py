"""The Triton kernels in Triton's interpreter, which runs them on CPU tensors.

A process either interprets or compiles, from its first import of triton on: tests interpret, and
compile in processes of their own.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch


def _patch_bfloat16(interpreter: Any, tl: Any) -> None:
    """Triton 3.7 interprets bfloat16 as its bits: give dot and minus what they mean."""
    builder = interpreter.InterpreterBuilder
    dot, minus = builder.create_dot, builder.create_fsub

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), *rest)

    def create_fsub(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return minus(self, a, b)
        out = (wide(a).data - wide(b).data).view(np.uint32)
        assert not (out & 0xFFFF).any(), "a difference that bfloat16 does not hold"
        return interpreter.TensorHandle((out >> 16).astype(np.uint16), tl.bfloat16)

    builder.create_dot, builder.create_fsub = create_dot, create_fsub


def _round_bfloat16(interpreter: Any, tl: Any) -> None:
    """Triton 3.7's interpreter cuts float32 off to bfloat16, where GPUs round half to even."""
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        elif kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
            data = rounded.view(torch.uint16).numpy()
        else:
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(data, kinds[1])

    builder.cast_impl = cast_impl


@lru_cache
def interpreted() -> ModuleType:
    """`sparsefx.codegen.triton_kernels`, interpreted: conftest.py sets TRITON_INTERPRET.

    Left out is what costs most: patching again at every call, and checks for int32 overflow, which
    only report in debug mode anyway and would triple the number of operations.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    assert triton.knobs.runtime.interpret, "triton was imported without TRITON_INTERPRET=1"
    _patch_bfloat16(interpreter, tl)
    _round_bfloat16(interpreter, tl)
    from sparsefx.codegen import triton_kernels

    patched = set[int]()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    interpreter.InterpretedFunction.__call__ = call
    return triton_kernels
