"""Compiles a Triton kernel for a GPU that need not be there, and reads what came of it.

Triton brings its assemblers and disassemblers along, so registers, spills, tensor-core instructions
and the instructions of the inner loop are known without a device. Written for Triton 3.6 and 3.7.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefx.codegen.gpu_loops import Code, Loop, hottest, read_amdgcn, read_sass
from sparsefx.ir.errors import MissingPackageError, SpecError, nearest


@dataclass(frozen=True)
class Target:
    """Triton's names for a GPU generation, and the bytes of shared memory one block may ask for."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_89": Target("cuda", 89, 32, 99 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
"""Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's
CDNA 3 instruction set reference."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel for a target; the same input gives the same values.

    `registers` and `spilled` are per thread. `spilled` is bytes of local memory: the stack frame,
    which Triton's kernels use for nothing else; on AMD also registers that were put into
    accumulator registers. `shared` is the block's dynamic shared memory in bytes, `static_shared`
    what the file adds (from sm_90 on the 1024 bytes that the system keeps). `tensor` counts the
    tensor-core instructions of the whole kernel by name. `loop` is None where there is no loop.
    """

    target: str
    threads: int
    registers: int
    spilled: int
    shared: int
    static_shared: int
    tensor: dict[str, int]
    loop: Loop | None

    @property
    def fits(self) -> bool:
        """Whether a block's shared memory is there to be had; more fails at launch."""
        return self.shared <= TARGETS[self.target].shared_limit

    def per_weight(self, weights: int) -> dict[str, float]:
        """Instructions per weight of each kind and of "all".

        `weights` is what a block multiplies in one pass of the loop. Raises SpecError without one.
        """
        if self.loop is None:
            raise SpecError(f"a kernel without a loop for {self.target}: count its code whole")
        counts = {"all": self.loop.instructions, **self.loop.kinds}
        return {kind: count * self.threads / weights for kind, count in counts.items()}

    def weights(self, block_m: int, block_n: int) -> int | None:
        """Weights that a block of `block_m` × `block_n` results multiplies in one pass of the loop.

        From its tensor-core instructions: compilers unroll loops. None where there are none. Warps
        share the results; more warps than tiles of results do the same work again.
        """
        warps = self.threads // TARGETS[self.target].warp_size
        columns = Fraction(0)
        for opcode, count in (self.loop.opcodes if self.loop else {}).items():
            if (shape := tile(opcode, block_m, block_n)) is None:
                continue
            (m, n, k), together = shape
            tiles = -(-block_m // m) * -(-block_n // n)
            columns += Fraction(count * k, max(1, -(-tiles // max(1, warps // together))))
        return int(columns * block_n) or None


SASS_TILES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32), "16864": (16, 8, 64)}
"""Shapes m × n × k as SASS writes them."""
TILES = (
    (r"[HIQ]MMA\.(?:SP\.)?(\d+)\..*", 1),
    (r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)\..*", 4),
    (r"v_mfma_[a-z]+\d+_(\d+)x(\d+)x(\d+)_?\w*", 1),
)
"""Opcodes with their shape, and the warps that issue one together."""


def tile(opcode: str, block_m: int, block_n: int) -> tuple[tuple[int, int, int], int] | None:
    """(m, n, k) that a tensor-core instruction multiplies, and the warps that issue it together.

    None for any other opcode. Those of the tcgen05 family name no shape: one multiplies up to 128
    rows of the block by 32 bytes of columns (PTX ISA, "Matrix Shape" of tcgen05.mma).
    """
    if re.match(r"UTC[HIQ]MMA", opcode):
        return (min(block_m, 128), block_n, 16 if opcode.startswith("UTCH") else 32), 1 << 30
    for pattern, together in TILES:
        if found := re.fullmatch(pattern, opcode):
            numbers = tuple(map(int, found.groups()))
            m, n, k = SASS_TILES[found[1]] if len(numbers) == 1 else numbers
            return (m, n, k), together
    return None


TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def signature_of(
    kernel: Any, values: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, object]]:
    """(signature, constants) for `compile_for` as the launcher takes them from a call's `values`.

    Tensors may lie on any device and count as aligned where their offset in memory is. None, the
    integer 1 and constexpr arguments are constants, multiples of 16 are marked, both unless the
    kernel says do_not_specialize. Raises SpecError for another kind of value.
    """
    signature, constants = {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, values.get(parameter.name)
        special = not parameter.do_not_specialize
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and special)
        ):
            constants[name] = value
        elif isinstance(value, Tensor) and value.dtype in TYPES:
            offset = value.storage_offset() * value.itemsize
            signature[name] = f"*{TYPES[value.dtype]}" + ":16" * (special and offset % 16 == 0)
        elif isinstance(value, int):
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[name] = kind + ":16" * (special and value % 16 == 0)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise SpecError(f"kernel '{kernel.__name__}' cannot take {name}={value!r}")
    return signature, constants


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    num_warps: int,
    num_stages: int,
) -> Compiled:
    """Compiles `kernel`, a @triton.jit function, for a name of `TARGETS`.

    `signature` holds a type for each argument that `constants` does not hold: "*fp16", "i32", with
    ":16" behind it where the launcher would find a multiple of 16, as aligned tensors are. Such
    pointers also count as less than 2 GiB long on AMD, as the launcher finds. Raises SpecError,
    MissingPackageError and what Triton raises for code that it cannot compile.
    """
    if target not in TARGETS:
        raise SpecError(f"no target '{target}'{nearest(target, TARGETS)}")
    where = TARGETS[target]
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise MissingPackageError("compiling GPU kernels needs: pip install triton") from error
    if not isinstance(kernel, JITFunction):
        raise SpecError(
            f"{kernel!r} is not a function of @triton.jit; one that was imported with "
            "TRITON_INTERPRET=1 is not either: import it without"
        )
    gpu = GPUTarget(where.backend, where.arch, where.warp_size)
    types, attrs = _arguments(kernel, signature, constants, make_backend(gpu).parse_attr)
    source = ASTSource(kernel, types, constexprs=dict(constants), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=gpu, options=options)
    read = _read_amd if where.backend == "hip" else _read_nvidia
    code, registers, spilled, static = read(made)
    names = Counter(one.opcode for one in code.instructions if one.kind == "tensor")
    return Compiled(
        target=target,
        threads=made.metadata.num_warps * where.warp_size,
        registers=registers,
        spilled=spilled,
        shared=made.metadata.shared,
        static_shared=static,
        tensor=dict(sorted(names.items())),
        loop=hottest(code, made.metadata.name),
    )


def _arguments(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, object], parse: Any
) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """Triton's types and attributes of all arguments, in the function's order."""
    names = list(kernel.arg_names)
    given = [*signature, *constants]
    if sorted(given) != sorted(names):
        wrong = ", ".join(
            sorted(set(given) ^ set(names)) or sorted(set(signature) & set(constants))
        )
        raise SpecError(
            f"kernel '{kernel.__name__}' takes {', '.join(names)}; "
            f"without a type and value or twice or unknown: {wrong}"
        )
    types, attrs = {}, {}
    for i, name in enumerate(names):
        kind, _, hint = signature.get(name, "constexpr").partition(":")
        if hint not in ("", "16"):
            raise SpecError(f"argument '{name}': '{signature[name]}' may end in ':16' only")
        types[name] = kind
        if hint:
            attrs[i,] = parse("DS" if kind.startswith("*") else "D")
    return types, attrs


def _read_nvidia(made: Any) -> tuple[Code, int, int, int]:
    """(code, registers, bytes spilled, bytes of static shared memory) of a compiled CUDA kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", "-ndf", str(cubin))
    line = usage.partition(f"Function {made.metadata.name}:")[2].partition("Function ")[0]
    sizes = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
    return read_sass(sass), sizes["REG"], sizes["STACK"] + sizes["LOCAL"], sizes["SHARED"]


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools in Triton's package. Raises MissingPackageError."""
    from triton import knobs

    try:
        path = getattr(knobs.nvidia, name).path
    except RuntimeError as error:
        raise MissingPackageError(
            f"this Triton brings no {name}: pip install --force-reinstall triton, for Linux"
        ) from error
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _read_amd(made: Any) -> tuple[Code, int, int, int]:
    """(code, registers, bytes spilled, bytes of static shared memory) of a compiled HIP kernel."""
    text = made.asm["amdgcn"]
    sizes = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\b", text)}
    spilled = max(sizes["private_segment_fixed_size"], 4 * sizes["vgpr_spill_count"])
    return read_amdgcn(text), sizes["vgpr_count"], spilled, sizes["group_segment_fixed_size"]
