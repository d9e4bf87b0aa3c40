"""Rows of other packages: the example package through the whole way, and plugins that misbehave."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.codegen import kernels
from sparsefx.ir import format as ir_format
from sparsefx.ir import plugins
from sparsefx.ir.codecs import CODECS
from sparsefx.ir.errors import SpecError
from sparsefx.ir.format import Format
from sparsefx.ir.layouts import LAYOUTS, Layout
from sparsefx.ir.op import reference
from sparsefx.ir.plugins import Plugged, PluginWarning, spelling
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.manager import with_plugins
from sparsefx.passes.normalise import normalise

EXAMPLE = Path(__file__).parent.parent / "examples" / "sparsefx_checkerboard"


def _search_again() -> None:
    for table in plugins.TABLES:
        table.forget()
    ir_format._parse.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that only this test sees."""
    folder, known = tmp_path / "site", list(plugins.TABLES)
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    plugins.TABLES[:] = known
    monkeypatch.undo()
    _search_again()
    sys.modules.pop("sparsefx_checkerboard", None)


def installed(site: Path, name: str, code: str, **points: str) -> None:
    """A package of one module, with entry points by group ("layouts" → "module:Row")."""
    (site / f"{name}.py").write_text(code)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entries = [f"[sparsefx.{group}]\n{name} = {value}\n" for group, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(entries))
    _search_again()


@pytest.fixture
def example(site: Path, tmp_path: Path) -> Path:
    """The example package, installed with pip without network."""
    source = tmp_path / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--no-index", "--target", str(site), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _search_again()
    return site


def test_the_example_goes_the_whole_way(example: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(3, 64)
    model = sparsefx.sparsify(dense, "checker16+int8", example_inputs=x)
    assert [line.row.format for line in sparsefx.explain(model).lines] == ["checker16+int8"] * 2
    y = model(x)
    sparsefx.save(model, tmp_path / "saved")
    fresh = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    loaded: Any = sparsefx.load(tmp_path / "saved", fresh)
    assert torch.equal(loaded(x), y), "save and load are bit-exact"
    assert (loaded[0].packed.unpack() == 0).float().mean() >= 0.5
    assert not sparsefx.explain(loaded).plugins


def test_its_layout_keeps_the_contract(example: Path) -> None:
    fmt = Format.parse("checker16+bf16")
    weight = torch.randn(5, 48)
    packed = fmt.pack(weight)
    mask = fmt.layout.select(weight.abs())
    assert torch.equal(packed.unpack(), torch.where(mask, weight, 0).bfloat16().float())
    assert 8 * packed.stored_bytes >= fmt.needed_bits(5, 48, int(mask.sum()), 4)
    with pytest.raises(SpecError, match="did you mean 'checker16'"):
        Format.parse("chequer16")


def test_its_pass_stands_before_our_last(example: Path) -> None:
    table = with_plugins((normalise,), (clean_up,))
    assert [p.name for p in table] == ["normalise", "double_negation", "clean_up"]
    assert table.ours == (normalise, clean_up)


def test_without_packages_the_tables_are_ours() -> None:
    assert tuple(LAYOUTS) == LAYOUTS.ours
    assert tuple(CODECS) == CODECS.ours


BAD = {
    "does not import": ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
    "leaves Python": ("raise SystemExit(3)", "SystemExit: 3"),
    "is no layout": ("Row = 3", "3 is no subclass of Layout"),
    "is unfinished": (
        "from sparsefx.ir.layouts import Layout\nclass Row(Layout):\n    example = 'row'",
        "Row lacks index, index_bits",
    ),
    "takes our token": (
        "from sparsefx.ir.layouts import NM\nclass Row(NM):\n    pass",
        "its token '2:4' is spelt by sparsefx already",
    ),
    "is not there": ("", "AttributeError"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_plugin_is_named_and_harms_nothing(site: Path, case: str) -> None:
    code, why = BAD[case]
    installed(site, "badplug", code, layouts="badplug:Row")
    with pytest.warns(PluginWarning, match="left out: sparsefx.layouts 'badplug' of badplug 1.0"):
        assert str(Format.parse("2:4+int8")) == "2:4+int8"
    sys.modules.pop("badplug", None)
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(16, 8)).eval(), "int8")
    found = sparsefx.explain(model)
    assert len(found.plugins) == 1
    assert why in found.plugins[0]
    assert "plugin left out: sparsefx.layouts 'badplug'" in " ".join(str(found).split())
    assert any("badplug" in text for text in found.fallbacks)


def test_codecs_passes_and_any_table_are_searched(site: Path) -> None:
    code = (
        "from dataclasses import dataclass\n"
        "from sparsefx.ir.codecs import Float\n"
        "from sparsefx.passes.manager import graph_pass\n"
        "@dataclass(frozen=True)\n"
        "class Code(Float):\n"
        "    name: str = 'same'\n"
        "    example = 'same'\n"
        "    @classmethod\n"
        "    def parse(cls, token):\n"
        "        return cls() if token == 'same' else None\n"
        "    def encode(self, weight, grid): return weight\n"
        "    def value_bits(self, n, k, count, itemsize): return count * 8 * itemsize\n"
        "@graph_pass()\n"
        "def idle(traced): return False\n"
    )
    installed(site, "goodplug", code, codecs="goodplug:Code", passes="goodplug:idle")
    weight = torch.randn(4, 8)
    assert torch.equal(Format.parse("same").pack(weight).unpack(), weight)
    assert [p.name for p in with_plugins((), (clean_up,))] == ["idle", "clean_up"]
    sys.modules.pop("goodplug", None)


def test_a_kernel_serves_before_ours(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from sparsefx.codegen.kernels import Kernel\n"
        "from sparsefx.ir.codecs import Int\n"
        "from sparsefx.ir.layouts import Dense\n"
        "from sparsefx.ir.op import reference\n"
        "mine = Kernel('mine', Dense, Int, 'cpu', lambda *call: 2 * reference(*call))\n"
    )
    installed(site, "kernelplug", code, kernels="kernelplug:mine")
    table: Plugged[Any] = Plugged("sparsefx.kernels", _a_kernel, (), tuple(kernels.KERNELS))
    monkeypatch.setattr(kernels, "KERNELS", table)
    kernels.choose.cache_clear()
    try:
        packed = Format.parse("int4g8").pack(torch.randn(4, 8))
        x = torch.randn(3, 8)
        y = torch.ops.sparsefx.linear(x, packed.buffers, None, [], "int4g8", 4)
        assert torch.equal(y, 2 * reference(x, packed, None, ()))
    finally:
        kernels.choose.cache_clear()
        sys.modules.pop("kernelplug", None)


def _a_kernel(row: Any) -> str | None:
    return None if isinstance(row, kernels.Kernel) else f"{row!r} is no Kernel"


def test_a_table_is_not_searched_while_our_rows_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(**_: Any) -> Any:
        raise AssertionError("looked for packages")

    monkeypatch.setattr(plugins, "entry_points", searched)
    known = list(plugins.TABLES)
    table: Plugged[type[Layout]] = Plugged("sparsefx.x", spelling(Layout, ()), LAYOUTS.ours)
    plugins.TABLES[:] = known
    assert next(iter(table)) is LAYOUTS.ours[0]
    with pytest.raises(AssertionError, match="looked for packages"):
        len(table)


def test_import_looks_for_no_package() -> None:
    code = (
        "import torch, importlib.metadata as m\n"
        "real = m.entry_points\n"
        "def refuse(**want):\n"
        "    assert not want.get('group', '').startswith('sparsefx.'), want\n"
        "    return real(**want)\n"
        "m.entry_points = refuse\n"
        "import sparsefx, sparsefx.ir.format, sparsefx.codegen.kernels, sparsefx.passes.pipeline\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
