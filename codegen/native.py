"""The CPU engine (`runtime/native/`) through ctypes: load, pack a weight, multiply by it.

The library is an optional extension without torch headers. Where it is missing `why_missing` says
so and other rows of the kernel table serve. `SPARSEFX_ISA=avx2` forces an instruction set,
`SPARSEFX_NATIVE=/path/lib.so` another build.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefx.ir.codecs import Float, Int
from sparsefx.ir.errors import ShapeError, SpecError, WeightError
from sparsefx.ir.format import Format, Packed

ABI = 3
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Data types of activations, as `enum sfx_type` numbers them."""
CODE = 3
ERROR = 256
"""Bytes that an error message may take, SFX_ERROR."""
ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


class _Source(Structure):
    _fields_ = [
        ("n", c_int64), ("k", c_int64), ("type", c_int32), ("bits", c_int32), ("zero", c_int32),
        ("group_size", c_int64), ("a8_group", c_int64), ("values", c_void_p), ("mask", c_void_p),
        ("scales", c_void_p), ("zero_points", c_void_p),
    ]  # fmt: skip


class Call(Structure):
    """`sfx_call` of runtime/native/sparsefx.h."""

    _fields_ = [
        ("x", c_void_p), ("y", c_void_p), ("m", c_int64), ("x_stride", c_int64),
        ("y_stride", c_int64), ("x_type", c_int32), ("a8", c_int32), ("activation", c_int32),
        ("threads", c_int32), ("bias", c_void_p), ("multiply", c_void_p), ("residual", c_void_p),
        ("down", c_void_p), ("up", c_void_p), ("branch_scale", c_void_p), ("parallel", c_void_p),
        ("pool", c_void_p),
    ]  # fmt: skip


class Engine:
    """The loaded library. `isa` is the instruction set in use, `isas` those that run here."""

    def __init__(self, path: Path) -> None:
        lib = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("sfx_abi", c_int32, []),
            ("sfx_isa", c_char_p, []),
            ("sfx_isas", c_char_p, []),
            ("sfx_threading", c_char_p, []),
            ("sfx_set_isa", c_int32, [c_char_p, c_char_p]),
            ("sfx_pack", c_void_p, [POINTER(_Source), c_char_p]),
            ("sfx_free", None, [c_void_p]),
            ("sfx_bytes", c_int64, [c_void_p]),
            ("sfx_family", c_char_p, [c_void_p]),
            ("sfx_linear", c_int32, [c_void_p, POINTER(Call), c_char_p]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        if lib.sfx_abi() != ABI:
            raise OSError(f"{path.name} has interface {lib.sfx_abi()}, not {ABI}: build it again")
        self.path, self._lib = path, lib
        self.run = lib["sfx_linear"]
        """`sfx_linear` over pointers that are converted already."""
        self.run_parts = lib["sfx_linear_parts"]
        """`sfx_linear_parts`, its parts and its call as bytes."""
        self.run_norm = lib["sfx_norm"]
        """`sfx_norm`, its call as bytes."""
        self.run_rotary = lib["sfx_rotary"]
        """`sfx_rotary`, its call as bytes."""
        self.error = ctypes.create_string_buffer(ERROR)

    @property
    def isa(self) -> str:
        return str(self._lib.sfx_isa().decode())

    @property
    def isas(self) -> list[str]:
        return str(self._lib.sfx_isas().decode()).split()

    @property
    def threading(self) -> str:
        return str(self._lib.sfx_threading().decode())

    def use(self, isa: str) -> None:
        """Use this instruction set from now on; "auto" is the best. Raises SpecError."""
        if self._lib.sfx_set_isa(isa.encode(), self.error):
            raise SpecError(f"SPARSEFX_ISA: {self.error.value.decode()}")

    def pack(self, packed: Packed) -> Weight:
        """`packed` in the order in which the kernels read it. Raises WeightError, ShapeError."""
        source, held = _source(packed)
        handle = self._lib.sfx_pack(byref(source), self.error)
        del held
        if not handle:
            raise WeightError(f"format '{packed.format}': {self.error.value.decode()}")
        return Weight(self, handle, packed.n, packed.k)


class Weight:
    """One weight in the engine's memory; freed with this object."""

    def __init__(self, engine: Engine, handle: int, n: int, k: int) -> None:
        self.engine, self.handle, self.n, self.k = engine, handle, n, k
        self._run: Callable[..., int] = engine._lib.sfx_linear

    def __del__(self) -> None:
        self.engine._lib.sfx_free(self.handle)

    @property
    def bytes(self) -> int:
        """Bytes that a product with one row of x reads."""
        return int(self.engine._lib.sfx_bytes(self.handle))

    @property
    def family(self) -> str:
        """How it is laid out: dense, columns, lanes or bytes (runtime/native/weight.h)."""
        return str(self.engine._lib.sfx_family(self.handle).decode())

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        a8: bool = False,
        branch: tuple[Weight, Weight, Tensor] | None = None,
        activation: str = "none",
        multiply: Tensor | None = None,
        residual: Tensor | None = None,
        threads: int = 0,
    ) -> Tensor:
        """act(x · Wᵀ + bias + ((x · downᵀ) ⊙ scale) · upᵀ) ⊙ multiply + residual.

        x (…, K) float32, float16 or bfloat16; bias (N,), multiply and residual (…, N) in x's type;
        `branch` is (down, up, float32 scale (r,)); `threads` 0 stands for torch's number.
        """
        rows = x if x.is_contiguous() else x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.n))
        held = [
            None if t is None else t.to(x.dtype).contiguous() for t in (bias, multiply, residual)
        ]
        pointers = [None if t is None else t.data_ptr() for t in held]
        down, up, scale = (None, None, None) if branch is None else branch
        call = Call(
            rows.data_ptr(), y.data_ptr(), x.numel() // max(self.k, 1), self.k, self.n,
            TYPES[x.dtype], a8, ACTIVATIONS[activation], threads or torch.get_num_threads(),
            *pointers, down and down.handle, up and up.handle,
            None if scale is None else scale.data_ptr(),
        )  # fmt: skip
        if not self.k:
            call.m = y.numel() // max(self.n, 1)
        error = self.engine.error
        if self._run(self.handle, byref(call), error):
            raise WeightError(f"the CPU engine refuses: {error.value.decode()}")
        return y


def _source(packed: Packed) -> tuple[_Source, list[Any]]:
    """The dense codes or values and the mask, and the tensors that the pointers need alive."""
    fmt, n, k = packed.format, packed.n, packed.k
    split = len(fmt.layout.buffers)
    codec, written = fmt.codec, packed.buffers[split:]
    values, mask, grid = packed.read()
    bits = codec.value_bits(n, k, values.numel(), written[0].element_size())
    if sum(b.numel() * b.element_size() for b in written) != -(-bits // 8):
        raise ShapeError(f"what is stored as '{fmt}' is no ({n}, {k}) weight")
    source = _Source(n=n, k=k, group_size=codec.group(k))
    if isinstance(codec, Int):
        source.type, source.bits, source.zero = CODE, codec.bits, -codec.low
        source.a8_group = getattr(fmt, "a8_group", 0)
        values = (values.view(torch.uint8) - codec.low).to(torch.uint8)
    else:
        values = values if values.dtype in TYPES else values.float()
        source.type = TYPES[values.dtype]
    if mask is not None:
        full = values.new_zeros(n, k)
        values = full.masked_scatter_(mask, values)
        mask = mask.contiguous()
    held: list[Any] = [values.contiguous(), mask]
    for name, tensor, dtype in (
        ("scales", grid.scales, torch.float16), ("zero_points", grid.zero_points, torch.uint8)
    ):  # fmt: skip
        if tensor is not None:
            held.append(tensor.to(dtype).contiguous())
            setattr(source, name, held[-1].data_ptr())
    source.values = held[0].data_ptr()
    source.mask = None if mask is None else mask.data_ptr()
    return source, held


def branch_weights(engine: Engine, branch: Sequence[Tensor]) -> tuple[Weight, Weight, Tensor]:
    """down (r, K), up (N, r) and scale (r,) as `Weight.linear` takes them."""
    down, up, scale = branch
    plain = Format(codec=Float())
    packed = (Packed(plain, t.shape[0], t.shape[1], (t.detach().reshape(-1),)) for t in (down, up))
    first, second = (engine.pack(p) for p in packed)
    return first, second, scale.detach().float().contiguous()


@lru_cache(maxsize=1)
def _load() -> tuple[Engine | None, str]:
    built = (Path(__file__).parent.parent / "runtime").glob("_native*.so")
    found = sorted(built, key=lambda path: path.stat().st_mtime)
    if own := os.environ.get("SPARSEFX_NATIVE"):
        found = [Path(own)]
    if not found:
        return None, (
            "the CPU engine was not built (no C++17 compiler at installation?): "
            "install g++ or clang++ and reinstall sparsefx"
        )
    try:
        engine = Engine(found[-1])
        if not engine.isas:
            return None, "the CPU engine has no code for this processor"
        engine.use(os.environ.get("SPARSEFX_ISA", "auto"))
    except OSError as error:
        return None, f"the CPU engine does not load: {error}"
    except AttributeError as error:  # a function is missing
        return None, f"the CPU engine is older than this package: {error}; build it again"
    return engine, ""


def engine() -> Engine | None:
    """The engine, or None where it is missing."""
    return _load()[0]


def why_missing() -> str:
    """Why `engine()` is None."""
    return _load()[1]
