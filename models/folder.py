"""A Hugging Face model folder on disk: config.json and safetensors, never a pickle."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sparsefx.ir.errors import ArtifactError
from sparsefx.models.torchvision import usable_torchvision


def load_folder(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a folder in eval mode, and token inputs of shape (2, 16) for it.

    Raises ArtifactError when the folder is not a text model with safetensors weights.
    """
    usable_torchvision()
    import transformers

    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ArtifactError(f"{folder} has no config.json with *.safetensors beside it")
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = (config.architectures or [""])[0]
    if not hasattr(transformers, kind):
        raise ArtifactError(f"{folder}/config.json names the architecture {kind!r}, unknown here")
    model = getattr(transformers, kind).from_pretrained(
        folder, use_safetensors=True, local_files_only=True
    )
    model.config.use_cache = False
    ids = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    return model.eval(), {"input_ids": ids}
