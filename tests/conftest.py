"""What every test run needs first, and the coverage table of `make check-zoo`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

os.environ.setdefault("SPARSEFX_TUNE", "off")  # which kernel runs must not depend on a stopwatch
os.environ.setdefault("TRITON_INTERPRET", "1")  # what compiles runs in a process of its own

if find_spec("torchvision"):  # a torchvision of another build breaks `import transformers`
    from sparsefx.models.torchvision import usable_torchvision

    usable_torchvision()


@pytest.fixture(autouse=True, scope="module")
def forget_compiled() -> Iterator[None]:
    """Dynamo counts compilations per function of a model's code, and stops at a limit."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per architecture: what each door found, refused, or why it stayed closed."""
    reports = [r for r in terminalreporter.getreports("passed") if dict(r.user_properties)]
    lines = {
        r.nodeid.partition("[")[2].rstrip("]"): dict(r.user_properties)
        for r in reports
        if "test_zoo" in r.nodeid
    }
    if not lines:
        return
    terminalreporter.section("architecture coverage")
    for name in sorted(lines):
        doors = "   ".join(f"{door}: {said}" for door, said in lines[name].items())
        terminalreporter.line(f"{name:28} {doors}")
    terminalreporter.line(
        f"{len(lines)} architectures: every weight multiplied by at run time is a Site or refused "
        "with a reason"
    )
