"""Tools around passes: numeric check, stopping early, dumps, records, claims, large graphs."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.pass_time import graph_of
from torch import fx, nn
from torch.nn import functional as F

from sparsefx.ir.errors import PassError, SpecError
from sparsefx.ir.format import Format
from sparsefx.ir.sites import ChosenFormat, Traced, group_sites
from sparsefx.passes.clean_up import clean_up
from sparsefx.passes.dump import LIMIT
from sparsefx.passes.manager import RECORDS, Pass, PassRecord, graph_pass, run_passes
from sparsefx.passes.normalise import normalise
from sparsefx.passes.pack import pack

SVG = "{http://www.w3.org/2000/svg}"


def work(text: str = "int4g16", size: int = 30) -> Traced:
    """Decoder blocks with every weight chosen for this format."""
    module = graph_of(size)
    weights: Any = module.weights
    traced = Traced(module.graph, weights)
    names = {id(t): (n.name,) for n, t in traced.weights.items()}
    nodes = {n.name: n for n in traced.weights}
    for site in group_sites(names, [traced]):
        traced.chosen[nodes[site.name]] = ChosenFormat(site, Format.parse(text))
    return traced


def records(traced: Traced) -> list[PassRecord]:
    found: list[PassRecord] = RECORDS[next(iter(traced.weights.values()))]
    return found


def rewrites(edit: Callable[[fx.Node], None], name: str = "faulty") -> Pass:
    """A pass that edits the last addition."""

    def run(traced: Traced) -> bool:
        edit([n for n in traced.graph.nodes if n.op == "call_function"][-1])
        return True

    run.__name__ = name
    return graph_pass()(run)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_CHECK", "1")


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("text", ["int4g16", "tile16x1@50%+int4g16+r4", "2:4+bf16", "bitmap@50%"])
def test_honest_passes_pass_the_check(text: str) -> None:
    traced = work(text)
    run_passes(traced, [normalise, pack, clean_up])
    assert [r.notes for r in records(traced)] == [()] * 3, "all were compared"


def _subtract(node: fx.Node) -> None:
    node.target = torch.sub


def _scale(node: fx.Node) -> None:
    """A relative error of 1e-3 in one operand of the last sum."""
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(torch.mul, (node.args[1], 1.001))
    node.replace_input_with(node.args[1], scaled)  # type: ignore[arg-type]


def _cast(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        cast = node.graph.call_method("half", (node,))
    node.replace_all_uses_with(cast)
    cast.args = (node,)


def _swap(node: fx.Node) -> None:
    """Harmless: a sum in the other order."""
    node.args = (node.args[1], node.args[0])


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (_subtract, r"output 0 is not what it was: error \S+, bound \S+$"),
        (_scale, r"output 0 is not what it was: error \S+, bound \S+$"),
        (_cast, r"torch.float32\[2, 8, 16\] → torch.float16\[2, 8, 16\]"),
    ],
)
def test_a_pass_that_changes_what_is_computed_is_named(
    edit: Callable[[fx.Node], None], why: str
) -> None:
    with pytest.raises(PassError, match=f"after faulty: .*{why}"):
        run_passes(work(), [normalise, rewrites(edit), clean_up])


@pytest.mark.usefixtures("checked")
def test_another_order_of_sums_is_no_fault() -> None:
    run_passes(work(), [rewrites(_swap, "swap")])


@pytest.mark.usefixtures("checked")
def test_a_weight_packed_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph before `pack` is judged with the weights that were stored."""

    def run(traced: Traced) -> bool:
        pack.run(traced)
        owner: Any = traced.graph.owning_module
        owner.packed_w0_values[0] ^= 7
        return True

    with pytest.raises(PassError, match="after run: output 0 is not what it was"):
        # The result's buffers are the module's: what was stored is kept apart here.
        run_passes(_apart(work()), [normalise, graph_pass()(run)])


def _apart(traced: Traced) -> Traced:
    class Copies(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            from dataclasses import replace

            packed = value.packed
            copied = replace(packed, buffers=tuple(b.clone() for b in packed.buffers))
            super().__setitem__(key, replace(value, packed=copied))

    traced.results = Copies()
    return traced


@pytest.mark.usefixtures("checked")
def test_what_cannot_be_compared_is_said() -> None:
    traced = work()
    del traced.graph.find_nodes(op="placeholder")[0].meta["example_value"]
    run_passes(traced, [rewrites(lambda node: None, "idle")])
    (note,) = records(traced)[0].notes
    assert "compared nothing: the graph before idle does not run" in note
    assert "no shape is recorded of x" in note


@pytest.mark.usefixtures("checked")
def test_the_check_leaves_state_and_randomness_alone() -> None:
    owner = nn.Module()
    owner.register_buffer("seen", torch.zeros(4))
    graph = fx.Graph(owner)  # type: ignore[arg-type]
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(4)
    seen = graph.call_method("add_", (graph.get_attr("seen"), 1))
    added = graph.call_function(torch.add, (x, seen))
    graph.output(graph.call_function(F.dropout, (added, 0.5, True)))
    state = torch.random.get_rng_state()
    run_passes(Traced(graph, {}), [rewrites(lambda node: None, "idle")])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not owner.get_buffer("seen").any()


def test_stop_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_STOP_AFTER", "normalise")
    traced = work()
    run_passes(traced, [normalise, pack, clean_up])
    assert [r.name for r in records(traced)] == ["normalise"]
    monkeypatch.setenv("SPARSEFX_STOP_AFTER", "normalize")
    with pytest.raises(SpecError, match="no pass 'normalize'; did you mean 'normalise'"):
        run_passes(work(), [normalise, pack])
    monkeypatch.delenv("SPARSEFX_STOP_AFTER")
    monkeypatch.setenv("SPARSEFX_CHECK", "yes")
    with pytest.raises(SpecError, match="SPARSEFX_CHECK is 'yes'"):
        run_passes(work(), [])


def test_dump_writes_text_and_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEFX_DUMP", str(tmp_path / "dump"))
    for _ in range(2):
        run_passes(work(), [normalise, pack])
    assert sorted(os.listdir(tmp_path / "dump")) == ["run-000", "run-001"]
    folder = tmp_path / "dump" / "run-000"
    stems = ["00-input", "01-normalise", "02-pack"]
    assert sorted(os.listdir(folder)) == [f"{s}.{e}" for s in stems for e in ("svg", "txt")]
    assert "sparsefx.linear" in (folder / "02-pack.txt").read_text()
    before, after = (ET.parse(folder / f"{s}.svg").getroot() for s in (stems[0], stems[2]))
    fills = [rect.get("fill") for rect in after.iter(f"{SVG}rect")]
    products = [t.text for t in after.iter(f"{SVG}text")].count("sparsefx.linear")
    assert fills.count("#bfe8c8") == products + 1, "new products are green; the legend has one"
    assert [r.get("fill") for r in before.iter(f"{SVG}rect")].count("#bfe8c8") == 1


def test_a_large_graph_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEFX_DUMP", str(tmp_path))
    run_passes(work(size=2500), [rewrites(_swap, "swap")])
    (path,) = tmp_path.glob("run-000/01-swap.svg")
    root = ET.parse(path).getroot()
    assert path.stat().st_size < 400_000
    assert len(list(root.iter(f"{SVG}title"))) == LIMIT
    assert "boxes not shown" in "".join(root.itertext())
    fills = [rect.get("fill") for rect in root.iter(f"{SVG}rect")]
    assert fills.count("#ffdf9e") == 2, "what changed is among what is shown"


def test_records_hold_the_cost_before_and_after() -> None:
    traced = work("tile16x1@50%+int4g16")
    run_passes(traced, [normalise, pack, clean_up])
    first, second, third = records(traced)
    assert (first.name, first.changed, second.changed, third.changed) == (
        "normalise", True, True, False,
    )  # fmt: skip
    assert first.before == first.after == second.before, "a respelling costs the same"
    assert second.after.bytes < second.before.bytes
    assert second.after.operations < second.before.operations
    assert third.after is third.before
    assert second.nodes[1] > second.nodes[0]
    assert all(r.seconds > 0 for r in (first, second, third))


def test_a_pass_that_claims_to_be_never_slower_is_held_to_it() -> None:
    def double(traced: Traced) -> bool:
        last = [n for n in traced.graph.nodes if n.op == "call_function"][-1]
        with traced.graph.inserting_after(last):
            again = traced.graph.call_function(torch.neg, (last,))
        again.meta = dict(last.meta)
        last.replace_all_uses_with(again)
        again.args = (last,)
        return True

    run_passes(work(), [graph_pass()(double)])
    with pytest.raises(PassError, match=r"after double: the graph is slower by the cost model"):
        run_passes(work(), [graph_pass(never_slower=True)(double)])
    assert graph_pass(never_slower=True)(clean_up.run).never_slower
    run_passes(work(), [normalise, graph_pass(never_slower=True)(pack.run)])


def test_time_grows_about_linearly() -> None:
    """Twenty times the nodes within 60 times the seconds; quadratic would be 400."""
    seconds = []
    for size in (200, 4000):
        traced = work(size=size)
        run_passes(traced, [normalise, pack, clean_up])
        seconds.append(sum(r.seconds for r in records(traced)))
    assert seconds[1] < 60 * seconds[0]
