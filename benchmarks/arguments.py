"""Values on the benchmarks' command lines."""

from __future__ import annotations


def numbers(text: str) -> list[int]:
    """ "1,128" as [1, 128]."""
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, ...]]:
    """ "4096x14336,2048x2048" as [(4096, 14336), (2048, 2048)]."""
    return [tuple(numbers(part.replace("x", ","))) for part in text.split(",")]
