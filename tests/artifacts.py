"""A model with every kind of packed weight, a saved folder of it, and ways to damage the folder."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsefx.ir.errors import ArtifactError
from sparsefx.ir.format import Format
from sparsefx.runtime.artifact import load, save
from sparsefx.runtime.install import install, packed_modules
from sparsefx.runtime.manifest import seal

PATTERN = "weights-*.safetensors"


class Net(nn.Module):
    """Every kind of weight: linears (two tied), 1×1 convolution, attention, both buffer kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.b.weight = self.a.weight
        self.conv = nn.Conv1d(32, 16, 1, stride=2)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(16)
        self.head, self.embed = nn.Linear(32, 10, bias=False), nn.Embedding(10, 32)
        self.head.weight = self.embed.weight
        self.mask: Tensor
        self.shift: Tensor
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.register_buffer("shift", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x))) + self.shift.sum() + self.mask.exp().sum()
        x = x + self.attn(x, x, x, need_weights=False)[0]
        y = self.norm(self.conv(x.transpose(1, 2)))
        out: Tensor = self.head(x).mean() + y
        return out


def dense(seed: int = 0, device: str = "cpu") -> Net:
    torch.manual_seed(seed)
    with torch.device(device):
        return Net().eval()


def put(model: nn.Module, names: list[str], text: str, rank: int = 0) -> None:
    """Pack the parameter `names` of `model` as `text`, with a random branch."""
    weight = model.get_parameter(names[0]).detach()
    matrix = weight.flatten(1) if weight.dim() > 2 else weight
    n, k = matrix.shape
    branch = (torch.randn(rank, k), torch.randn(n, rank), torch.rand(rank)) if rank else ()
    install(model, names, Format.parse(text).pack(matrix), branch)


def sparse(text: str = "tile16x1@50%+int4g32", seed: int = 1) -> Net:
    model = dense(seed)
    put(model, ["a.weight", "b.weight"], text, rank=3)
    put(model, ["conv.weight"], text)
    put(model, ["attn.in_proj_weight"], text)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return tensors | dict(model.named_buffers(remove_duplicate=False))


def assert_equal(got: nn.Module, want: nn.Module) -> None:
    """Same names, dtypes, bytes, ties and outputs."""
    a, b = state(got), state(want)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        one, two = (
            t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name])
        )
        assert torch.equal(one, two), name
    assert ties(a) == ties(b)
    assert {n: m.format for n, m in packed_modules(got).items()} == {
        n: m.format for n, m in packed_modules(want).items()
    }
    x = torch.randn(2, 5, 32)
    assert torch.equal(got(x), want(x))


def ties(tensors: dict[str, Tensor]) -> set[tuple[str, ...]]:
    groups: dict[int, tuple[str, ...]] = {}
    for name, tensor in sorted(tensors.items()):
        groups[tensor.data_ptr()] = (*groups.get(tensor.data_ptr(), ()), name)
    return {names for names in groups.values() if len(names) > 1}


@cache
def saved() -> dict[str, bytes]:
    """The files of a sound artifact, by name."""
    with tempfile.TemporaryDirectory() as folder:
        save(sparse(), folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def saved_into(folder: Path) -> Path:
    """`folder`, now a sound artifact of `sparse()`."""
    for name, content in saved().items():
        (folder / name).write_bytes(content)
    return folder


def weights(folder: Path) -> Path:
    return next(folder.glob(PATTERN))


def refused(folder: Path, model: nn.Module | None = None) -> str:
    """The message of the ArtifactError that `load` raises; the model is checked to be untouched."""
    model = dense() if model is None else model
    before, modules = copy.deepcopy(state(model)), list(model.modules())
    with pytest.raises(ArtifactError) as error:
        load(folder, model)
    assert list(model.modules()) == modules
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) for n in after if after[n].device.type != "meta")
    return str(error.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and seal it again."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields | {"seal": seal(fields)}))


def rewrite(folder: Path, content: bytes) -> None:
    """Give the folder other weights that its manifest vouches for."""
    sha = hashlib.sha256(content).hexdigest()
    weights(folder).unlink()
    (folder / f"weights-{sha[:16]}.safetensors").write_bytes(content)
    edit(folder, lambda f: f.update(
        weights=f"weights-{sha[:16]}.safetensors", bytes=len(content), sha256=sha))  # fmt: skip


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change stored tensors and keep size and hash right: what a hostile writer would do."""
    tensors = load_file(weights(folder))
    change(tensors)
    save_file(tensors, folder / "new")
    content = (folder / "new").read_bytes()
    (folder / "new").unlink()
    rewrite(folder, content)


def entry(fields: dict[str, Any], name: str = "a.weight") -> dict[str, Any]:
    found: dict[str, Any] = next(e for e in fields["packed"] if name in e["names"])
    return found
