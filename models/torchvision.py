"""Make `import torchvision` work when its compiled operators do not fit the installed torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType


def usable_torchvision() -> None:
    """Import torchvision where it is installed; without its C++ operators if those do not load.

    PyPI's torchvision is a CUDA build. Beside a CPU torch its registrations name operators that
    do not exist, the import fails, and timm and transformers, which both import it, fail with it.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        registrations = "torchvision._meta_registrations"
        sys.modules[registrations] = ModuleType(registrations)
        import torchvision  # noqa: F401
