"""Specs: strings, mappings, files; filters that match nothing and misspelt tokens are errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.ir.errors import SpecError
from sparsefx.passes.spec import Spec
from sparsefx.runtime.install import packed_modules


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.Conv1d(2, 4, 1)).eval()


X = torch.zeros(1, 2, 32)


def formats(model: nn.Module) -> dict[str, str]:
    return {name: module.format for name, module in packed_modules(model).items()}


def test_every_way_to_say_it(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("format: int4g16\nignore: ['2']\n")
    (tmp_path / "s.json").write_text(json.dumps({"format": "int4g16", "ignore": ["2"]}))
    said: list[Any] = [
        Spec(format="int4g16", ignore=("2",)),
        {"format": "int4g16", "ignore": ["2"]},
        tmp_path / "s.yaml",
        str(tmp_path / "s.json"),
    ]
    for spec in said:
        assert Spec.read(spec) == said[0]
    assert Spec.read("bitmap@50%+int4g128").format == "bitmap@50%+int4g128"


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ({"format": "int8", "targets": ["0"]}, {"0": "int8"}),
        ({"format": "int8", "targets": ["Linear"]}, {"0": "int8", "2": "int8"}),
        ({"format": "int8", "ignore": ["Conv1d"]}, {"0": "int8", "2": "int8"}),
        ({"format": "int8", "ignore": ["re:[02]"]}, {"3": "int8"}),
        (
            {"format": "int8", "overrides": {"2.weight": "2:4+int4g16", "Conv1d": "dense"}},
            {"0": "int8", "2": "2:4+int4g16"},
        ),
    ],
)
def test_filters(spec: dict[str, Any], want: dict[str, str]) -> None:
    assert formats(sparsefx.sparsify(net(), spec, example_inputs=X)) == want


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("bitmp@50%+int4", "'bitmp@50%'; did you mean 'bitmap@50%'"),
        ("tile16x1+int4", "write 'tile16x1@50%'"),
        ({"format": "int8", "ignor": ["0"]}, "no field 'ignor'; did you mean 'ignore'"),
        ({"format": "int8", "criterion": "wandaa"}, "did you mean 'wanda'"),
        ({"format": "int8", "solver": "gptq"}, "knows no 'gptq'"),
        ({"format": "int8", "after": ["descent"]}, "did you mean 'descend'"),
        ({"format": "int8", "ratios": "owl"}, "knows no 'owl'"),
        ({"format": "int8", "overrides": {"0": "int44"}}, "integers have 2 to 8 bits"),
        ({"format": "int8", "ignore": ["Linaer"]}, "matches none of the 3 weights; did you mean"),
        ({"format": "int8", "targets": ["re:("]}, "not a regular expression"),
        ("missing.yaml", "No such file"),
        (3, "spec is a int"),
    ],
)
def test_mistakes_teach_and_change_nothing(spec: Any, says: str) -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SpecError) as error:
        sparsefx.sparsify(model, spec, example_inputs=X)
    assert says in str(error.value)
    assert not packed_modules(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_file_that_is_no_spec(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("- just\n- a list\n")
    with pytest.raises(SpecError, match="holds a list"):
        Spec.read(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(SpecError, match="does not parse"):
        Spec.read(path)
