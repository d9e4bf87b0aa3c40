"""Dense weights are let go one by one as they are packed, not when all are done."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.runtime import install as installing


@pytest.mark.parametrize("training", [False, True])
def test_a_packed_weight_is_no_longer_held(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(32, 32) for _ in range(5)]
    model = nn.Sequential(*layers).train(training)
    held = {f"{i}.weight": weakref.ref(layer.weight) for i, layer in enumerate(layers)}
    del layers
    alive: list[int] = []
    module = sys.modules["sparsefx.runtime.sparsify"]
    install = installing.install

    def counted(model: nn.Module, names: Any, *rest: Any) -> Any:
        out = install(model, names, *rest)
        alive.append(sum(weight() is not None for weight in held.values()))
        return out

    monkeypatch.setattr(module, "install", counted)
    data = [torch.randn(8, 32)]
    sparsefx.sparsify(model, "int4g32", calibration=data, progress=False)
    # The one just packed may still be in somebody's hands.
    assert [count <= 5 - i for i, count in enumerate(alive)] == [True] * 5
    assert all(m.training is training for m in model.modules())
