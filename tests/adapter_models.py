"""Tiny models, and adapters of them trained with PEFT, for the tests of adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sparsefx
from sparsefx.models.torchvision import usable_torchvision
from sparsefx.runtime.modules import SparseLinear

WIDTH, OUT = 96, 64
FORMATS = ("int4g32", "bitmap@50%+int4g32", "2:4+int8", "int4g32+r4", "int8+a8")


class Parallel(nn.Module):
    """Linears that all read x (M, 96): each output has a bound of its own. The last is not packed
    where `PLAIN` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, OUT)
        self.fc2 = nn.Linear(WIDTH, OUT, bias=False)
        self.last = nn.Linear(WIDTH, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.fc1(x), self.fc2(x), self.last(x)


NAMES = ("fc1", "fc2", "last")


def peft() -> Any:
    usable_torchvision()
    return pytest.importorskip("peft")


def sparse_and_twin(spec: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A compressed `Parallel` whose last layer is dense, and a dense model of the same weights."""
    torch.manual_seed(seed)
    model = Parallel().eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    wanted = {"format": spec, "ignore": ["last"]}
    sparsefx.sparsify(model, wanted, example_inputs=torch.randn(8, WIDTH), progress=False)
    return model, effective(model, twin)


def effective(model: nn.Module, twin: nn.Module) -> nn.Module:
    """`twin` with the weights that `model` computes with, branches included."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            weight = module.packed.unpack()
            if module.branch:
                down, up, scale = (t.float() for t in module.branch)
                weight = weight + (up * scale) @ down
            twin.get_parameter(f"{name}.weight").data.copy_(weight)
    return twin


def trained(
    twin: nn.Module, folder: Path, names: Sequence[str] = NAMES, seed: int = 1, **config: Any
) -> tuple[nn.Module, Path]:
    """`twin` under PEFT after a few steps towards random outputs, and where it was saved."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 12, "target_modules": list(names)} | config
    model = peft().get_peft_model(copy.deepcopy(twin), peft().LoraConfig(**given))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    x, wanted = torch.randn(32, WIDTH), torch.randn(3, 32, OUT)
    for _ in range(8):
        loss = (torch.stack(model(x)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval(), folder


def lora_file(path: Path, names: Sequence[str], rank: int, seed: int, alpha: float = 8) -> Path:
    """A plain LoRA file over `Parallel`, with alpha as kohya writes it."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name in names:
        state[f"{name}.lora_down.weight"] = torch.randn(rank, WIDTH) * 0.1
        state[f"{name}.lora_up.weight"] = torch.randn(OUT, rank) * 0.1
        state[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(state, path)
    return path


def delta_file(path: Path, names: Sequence[str], count: int, seed: int) -> Path:
    """A sparse delta over `Parallel`; positions are not in order."""
    torch.manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name in names:
        state[f"{name}.weight.indices"] = torch.randperm(OUT * WIDTH)[:count]
        state[f"{name}.weight.values"] = torch.randn(count) * 0.1
    save_file(state, path)
    return path


def bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """What y = x · Wᵀ + b + Σ (x · Aᵀ) · Bᵀ in float32 may differ from float64, per element.

    u|y| + 2√K·u·|x||W|ᵀ as for every float kernel; the branch adds that of its two products and of
    the rounding of its scales (3u). u = 2⁻²⁴.
    """
    u, k = 2.0**-24, x.shape[-1]
    x, weight = x.double().abs(), weight.double().abs()
    size = x @ weight.T
    total = (2 * k**0.5 + 1) * u * size
    for a, b in lora:
        part = (x @ a.double().abs().T) @ b.double().abs().T
        total = total + (2 * k**0.5 + 2 * len(a) ** 0.5 + 4) * u * part
        size = size + part
    result: Tensor = total + u * (size + (0 if bias is None else bias.double().abs()))
    return result
