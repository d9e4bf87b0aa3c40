"""The machine a benchmark ran on: what it says it is, and the speeds it reaches.

Bandwidths and peaks are what the fastest method tried here achieves, never data-sheet figures.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx512_vbmi", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
WIDEST = {
    "amx_int8": "amx", "avx512f": "avx512", "avx_vnni": "avxvnni", "avx2": "avx2", "asimd": "neon",
}  # fmt: skip
PACKAGES = ("torch", "onnxruntime", "executorch", "torchao", "numpy")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def read(path: str | Path) -> str:
    """The file's text, empty when there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def cpu_model() -> str:
    """As the kernel names it."""
    found = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug() -> str:
    """The CPU model and its widest instructions as part of a file name: a virtual machine may hide
    some, and a model without its matrix unit is another machine."""
    plain = re.sub(r"\((R|TM)\)", "", cpu_model(), flags=re.IGNORECASE).split("@")[0]
    has = isa_flags()
    isa = next((name for flag, name in WIDEST.items() if flag in has), "")
    return re.sub(r"[^a-z0-9]+", "-", f"{plain} {isa}".lower()).strip("-")


def isa_flags() -> list[str]:
    """Those of FLAGS that this processor has."""
    words = set(read("/proc/cpuinfo").split())
    return [flag for flag in FLAGS if flag in words]


def caches() -> dict[str, int]:
    """Bytes of each cache that the first CPU sees: {"L1d": 49152, …}."""
    sizes: dict[str, int] = {}
    for folder in sorted(CACHES.glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(read(folder / "type"), "")
        found = re.fullmatch(r"(\d+)([KMG]?)", read(folder / "size"))
        if found:
            unit = {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]
            sizes[f"L{read(folder / 'level')}{kind}"] = int(found[1]) << unit
    return sizes


def last_level_bytes() -> int:
    """Size of the largest cache; 32 MB where the system does not say."""
    return max(caches().values(), default=32 << 20)


def memory(field: str) -> int:
    """Bytes of a line of /proc/meminfo, e.g. MemAvailable."""
    found = re.search(rf"^{field}:\s*(\d+) kB", read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def cpu_seconds() -> float:
    """CPU time that all processes have used on this machine, stolen time included."""
    fields = [int(part) for part in read("/proc/stat").split("\n")[0].split()[1:9]]
    idle = sum(fields[3:5])
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def facts() -> dict[str, Any]:
    """CPU, caches, ISA flags, memory, load and versions: what a reader needs to compare runs."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "pinned": len(os.sched_getaffinity(0)) < (os.cpu_count() or 1),
        "caches": caches(),
        "isa": isa_flags(),
        "memory_gb": round(memory("MemTotal") / 2**30, 1),
        "load_at_start": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Sorted times of `repeats` calls after one untimed one."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)


def bandwidth() -> dict[str, float]:
    """Read bandwidth in GB/s per method with torch's current threads: median of 5 passes over a
    buffer of 4 × the last-level cache (which would keep a good part of 1.5 ×)."""
    count = min(max(4 * last_level_bytes(), 128 << 20), 1 << 30) // 16384 * 4096
    buffer = torch.ones(count)
    half, rows, ones = count // 2, buffer.view(-1, 4096), torch.ones(4096)
    methods: dict[str, Callable[[], Tensor]] = {
        "sum of int32": lambda: buffer.view(torch.int32).sum(dtype=torch.int32),
        "sum of fp32": lambda: buffer.sum(),
        "dot": lambda: torch.dot(buffer, buffer),
        "dot of halves": lambda: torch.dot(buffer[:half], buffer[half:]),
        "matrix × vector": lambda: rows @ ones,
    }
    return {name: 4 * count / seconds(run, 5)[2] / 1e9 for name, run in methods.items()}


def peaks() -> dict[str, float]:
    """Achieved peak in GOP/s (2 · M · N · K) with torch's current threads: the best call of the
    best oneDNN product of 1024³ and 2048³, int8 and bf16."""
    best = {"int8": 0.0, "bf16": 0.0}
    for size in (1024, 2048):
        codes = torch.randint(-127, 128, (size, size), dtype=torch.int8)
        halves = torch.randn(size, size).bfloat16()
        for kind, run in (
            ("int8", lambda codes=codes: torch._int_mm(codes, codes.T)),
            ("int8", _prepacked_int8(codes)),
            ("bf16", lambda halves=halves: halves @ halves),
        ):
            if run is not None:
                best[kind] = max(best[kind], 2 * size**3 / seconds(run, 8)[0] / 1e9)
    return best


def _prepacked_int8(codes: Tensor) -> Callable[[], Any] | None:
    """oneDNN's int8 product with a weight in its own layout; None where torch lacks it."""
    size, ops = len(codes), torch.ops.onednn
    try:
        weight = ops.qlinear_prepack(codes, [size, size])
    except (AttributeError, RuntimeError):
        return None
    scales, zeros = torch.ones(size), torch.zeros(size, dtype=torch.int64)
    x = codes.to(torch.uint8)
    return lambda: ops.qlinear_pointwise(
        x, 1.0, 0, weight, scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
    )
