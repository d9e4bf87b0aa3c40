"""`SPARSEFX_DUMP=<folder>`: the graph before the first pass and after each, as text and SVG.

Every run of the passes gets a folder `run-000`, `run-001`, …, with `00-input.txt`, `00-input.svg`,
`01-normalise.txt` and so on. In the pictures green nodes are new, amber ones changed; an input with
one reader stands in its reader's box. A picture shows at most LIMIT boxes, those that changed and
their neighbours first, and says how many it left out; the text is always whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import networkx as nx
from torch.fx import Graph, Node

from sparsefx.ir.sites import Traced
from sparsefx.ir.text import text

LIMIT = 300
PER_ROW = 6
"""Nodes beside each other; a wider generation goes on in the next row."""
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN, TOP = 240, 54, 20, 30, 16, 52
FILL = {"new": "#bfe8c8", "changed": "#ffdf9e", "same": "#f4f4f4", "input": "#e3ecf7"}
INK, LINE = "#222222", "#9aa3ad"
Lines = dict[Node, str]


class Dumped:
    """A tool of the pass manager. Raises OSError where the folder cannot be written."""

    def __init__(self, folder: str, traced: Traced) -> None:
        self.folder = _next(Path(folder))
        self.count = 0
        self.before = lines(traced.graph)
        self._write("input", traced.graph, {})

    def __call__(self, name: str, changed: bool, traced: Traced) -> str | None:
        now = lines(traced.graph)
        states = {
            node: "new" if node not in self.before else "changed"
            for node, line in now.items()
            if self.before.get(node) != line
        }
        self.count, self.before = self.count + 1, now
        self._write(name, traced.graph, states)
        return None

    def _write(self, name: str, graph: Graph, states: Mapping[Node, str]) -> None:
        stem = f"{self.count:02d}-{name}"
        write(self.folder / f"{stem}.txt", text(graph) + "\n")
        write(self.folder / f"{stem}.svg", svg(graph, states, f"after {name}"))


def _next(root: Path) -> Path:
    """A new folder of `root`; two processes never get the same."""
    root.mkdir(parents=True, exist_ok=True)
    number = len(list(root.glob("run-*")))
    while True:
        folder = root / f"run-{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def write(path: Path, content: str) -> None:
    """Write a file in one step: a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content)
    os.replace(temporary, path)


def lines(graph: Graph) -> Lines:
    """What each node is, by names that outlive a pass."""
    return {node: f"{node.target} {node.args} {node.kwargs}" for node in graph.nodes}


def svg(graph: Graph, states: Mapping[Node, str], title: str) -> str:
    """The graph from top to bottom; `states` names the nodes to colour."""
    labels = _labels(graph)
    boxes = [node for node in graph.nodes if not _folded(node)]
    shown = _shown(boxes, states)
    places, width, height = _places(shown)
    left_out = len(boxes) - len(shown)
    counts = {kind: sum(s == kind for s in states.values()) for kind in ("new", "changed")}
    head = f"{title}: {len(graph.nodes)} nodes, {counts['new']} new, {counts['changed']} changed"
    if left_out:
        head += f"; {left_out} boxes not shown (the .txt beside this file has all)"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        '<g font-family="monospace" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="20" font-size="14" fill="{INK}">{escape(head)}</text>',
        *_legend(),
    ]
    for node in shown:
        out += [_edge(places[source], places[node]) for source in node.all_input_nodes
                if source in places]  # fmt: skip
    out += [_box(node, labels[node], places[node], states) for node in shown]
    return "\n".join([*out, "</g></svg>\n"])


def _folded(node: Node) -> bool:
    """It has no box of its own: an input with one reader, or none."""
    return node.op in ("placeholder", "get_attr") and len(node.users) < 2


def _labels(graph: Graph) -> dict[Node, tuple[str, str, str]]:
    """Three short lines per node, from the text form: what it computes, its name and shape, and
    the inputs that have no box."""
    out = {}
    for node, line in zip(graph.nodes, text(graph).splitlines(), strict=True):
        left, _, right = line.partition(" = ")
        call = right.partition("(")[0] if right else "return"
        if node.op in ("placeholder", "get_attr"):
            call, left = _short(node), left.partition(" : ")[2]
        inputs = ", ".join(_short(n) for n in node.all_input_nodes if _folded(n))
        out[node] = (_cut(call, 30), _cut(left if right else "", 33), _cut(inputs, 33))
    return out


def _short(node: Node) -> str:
    """An input's name without what dynamo puts around it."""
    parts = str(node.target).removeprefix("l_self_").removeprefix("L_self_").strip("_")
    for word in ("modules_", "parameters_", "buffers_"):
        parts = parts.replace(word, "")
    return parts


def _cut(word: str, length: int) -> str:
    return word if len(word) <= length else word[: length - 1] + "…"


def _shown(nodes: list[Node], states: Mapping[Node, str]) -> list[Node]:
    """All nodes, or the LIMIT that tell most: changed ones, their neighbours, then the first."""
    if len(nodes) <= LIMIT:
        return nodes
    boxes = dict.fromkeys(nodes)
    chosen = dict.fromkeys(n for n in nodes if n in states)
    for node in list(chosen)[:LIMIT]:
        chosen |= dict.fromkeys(n for n in (*node.all_input_nodes, *node.users) if n in boxes)
    chosen |= boxes
    kept = set(list(chosen)[:LIMIT])
    return [n for n in nodes if n in kept]


def _places(shown: list[Node]) -> tuple[dict[Node, tuple[float, float]], int, int]:
    """Upper left corners, and the size of the picture."""
    layers = _layers(shown)
    rows = [row[i : i + PER_ROW] for row in layers for i in range(0, len(row), PER_ROW)]
    across = max((len(row) for row in rows), default=1)
    width = max(2 * MARGIN + across * (WIDTH + GAP_X) - GAP_X, 760)
    places: dict[Node, tuple[float, float]] = {}
    for y, row in enumerate(rows):
        start = (width - len(row) * (WIDTH + GAP_X) + GAP_X) / 2
        for x, node in enumerate(row):
            places[node] = (start + x * (WIDTH + GAP_X), TOP + y * (HEIGHT + GAP_Y))
    return places, width, TOP + len(rows) * (HEIGHT + GAP_Y)


def _layers(shown: list[Node]) -> list[list[Node]]:
    """Topological generations; inputs stand just above their first reader, and each generation is
    ordered by where its inputs stand (barycentre)."""
    kept = set(shown)
    digraph = nx.DiGraph()
    digraph.add_nodes_from(shown)
    digraph.add_edges_from((s, n) for n in shown for s in n.all_input_nodes if s in kept)
    depth = {n: i for i, row in enumerate(nx.topological_generations(digraph)) for n in row}
    for node in shown:
        if not digraph.pred[node] and digraph.succ[node]:
            depth[node] = min(depth[user] for user in digraph.succ[node]) - 1
    layers: dict[int, list[Node]] = {}
    for node in shown:
        layers.setdefault(depth[node], []).append(node)
    where: dict[Node, float] = {}
    for level in sorted(layers):
        row = layers[level]
        keys = {n: _centre(n, where, i) for i, n in enumerate(row)}
        row.sort(key=keys.__getitem__)
        where |= {n: i - len(row) / 2 for i, n in enumerate(row)}
    return [layers[level] for level in sorted(layers)]


def _centre(node: Node, where: Mapping[Node, float], otherwise: float) -> float:
    above = [where[s] for s in node.all_input_nodes if s in where]
    return sum(above) / len(above) if above else otherwise


def _legend() -> Iterable[str]:
    x = MARGIN
    for kind, fill in FILL.items():
        yield f'<rect x="{x}" y="28" width="12" height="12" fill="{fill}" stroke="{LINE}"/>'
        yield f'<text x="{x + 17}" y="38" fill="{INK}">{kind}</text>'
        x += 90


def _box(
    node: Node, label: tuple[str, str, str], place: tuple[float, float], states: Mapping[Node, str]
) -> str:
    x, y = place
    source = node.op in ("placeholder", "get_attr")
    fill = FILL[states.get(node, "input" if source else "same")]
    first, second, third = (escape(part) for part in label)
    radius = 12 if source else 4
    return (
        f"<g><title>{escape(f'{node.name}: {node.target}')}</title>"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="{radius}" '
        f'fill="{fill}" stroke="{LINE}"/>'
        f'<text x="{x + 8:.0f}" y="{y + 16:.0f}" font-weight="bold" fill="{INK}">{first}</text>'
        f'<g fill="#555555" font-size="11"><text x="{x + 8:.0f}" y="{y + 31:.0f}">{second}</text>'
        f'<text x="{x + 8:.0f}" y="{y + 46:.0f}">{third}</text></g></g>'
    )


def _edge(source: tuple[float, float], target: tuple[float, float]) -> str:
    """A curve from box to box; a long one swings out, so that it is seen beside what it passes."""
    x1, y1, x2, y2 = source[0] + WIDTH / 2, source[1] + HEIGHT, target[0] + WIDTH / 2, target[1]
    bend = max((y2 - y1) / 2, GAP_Y / 2)
    swing = 0.95 * WIDTH if y2 - y1 > GAP_Y + HEIGHT else 0.0
    return (
        f'<path d="M{x1:.0f},{y1:.0f} C{x1 + swing:.0f},{y1 + bend:.0f} '
        f'{x2 + swing:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}" fill="none" stroke="{LINE}" '
        f'stroke-width="1.3"/>'
    )
