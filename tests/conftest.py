"""What every test run needs first."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("torchvision"):  # a torchvision of another build breaks `import transformers`
    from sparsefx.models.torchvision import usable_torchvision

    usable_torchvision()
