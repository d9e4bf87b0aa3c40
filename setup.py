"""Compiles the CPU engine; everything else is in pyproject.toml."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "src/sparsefx/runtime/native"


class Parallel(build_ext):
    """Compiles the sources of an extension side by side: one per instruction set, seconds each."""

    def build_extension(self, ext: Extension) -> None:
        one = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = pool.map(lambda source: one([source], **options), sources)
                return [path for part in parts for path in part]

        self.compiler.compile = compile_all
        super().build_extension(ext)


NATIVE = Extension(
    "sparsefx.runtime._native",
    sources=sorted(glob(f"{FOLDER}/*.cpp")),
    depends=sorted(glob(f"{FOLDER}/*.h")),
    language="c++",
    # No contraction: results stay within the bounds that the tests derive, on every machine.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-pthread",
    ],
    extra_link_args=["-pthread", "-ldl"],
    optional=True,  # without a compiler every product still works, through torch
)

setup(ext_modules=[NATIVE], cmdclass={"build_ext": Parallel})
