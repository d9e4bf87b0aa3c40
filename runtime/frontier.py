"""Quality against latency and size: points, who beats whom, and the files that show them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sparsefx.ir.errors import MissingPackageError
from sparsefx.runtime.plan_file import write_atomically

OURS, PEER, INK, GRID = "#0b6e99", "#d98e04", "#222222", "#dddddd"
FAR = 5.0
"""Times the best perplexity: where pictures end."""
Axis = Literal["ms", "megabytes"]
AXES: dict[Axis, str] = {"ms": "milliseconds per run", "megabytes": "megabytes of weights"}


@dataclass(frozen=True)
class Point:
    """One model as it was run. With a `reason` it was not, and the figures are 0."""

    name: str
    quality: float = 0.0
    ms: float = 0.0
    bytes: int = 0
    ours: bool = False
    note: str = ""
    reason: str = ""

    @property
    def megabytes(self) -> float:
        return self.bytes / 1e6


@dataclass(frozen=True)
class Frontier:
    """All points of one run; `metric` is what quality is."""

    title: str
    metric: str
    better: Literal["lower", "higher"]
    setting: str = ""
    """What was run where: inputs, threads, processor."""
    points: tuple[Point, ...] = ()
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> list[Point]:
        """Those that ran."""
        return [point for point in self.points if not point.reason]

    def beats(self, a: Point, b: Point, axis: Axis) -> bool:
        """Whether `a` is nowhere worse than `b` in quality and on the axis."""
        sign = 1 if self.better == "higher" else -1
        return sign * (a.quality - b.quality) >= 0 and getattr(a, axis) <= getattr(b, axis)

    def beaten(self, axis: Axis) -> dict[str, str]:
        """Peers that one of our points beats, and the name of the fastest (smallest) that does."""
        ours = sorted((p for p in self.shown if p.ours), key=lambda p: (getattr(p, axis), p.name))
        out = {}
        for peer in (p for p in self.shown if not p.ours):
            if (best := next((o for o in ours if self.beats(o, peer, axis)), None)) is not None:
                out[peer.name] = best.name
        return out

    def edge(self, axis: Axis) -> list[Point]:
        """Our points that no other of ours beats, along the axis."""
        ours = sorted((p for p in self.shown if p.ours), key=lambda p: (getattr(p, axis), p.name))
        out: list[Point] = []
        for point in ours:
            if not any(self.beats(other, point, axis) for other in out):
                out.append(point)
        return out

    def report(self) -> str:
        """One line per peer and axis that we do not beat, or that we beat all."""
        lines = []
        for axis, label in AXES.items():
            beaten = self.beaten(axis)
            left = [p.name for p in self.shown if not p.ours and p.name not in beaten]
            lines.append(f"{label}: {len(beaten)} peers beaten" + (
                "; not beaten: " + ", ".join(left) if left else ", all that ran"))  # fmt: skip
        lines += [f"{p.name} did not run: {p.reason}" for p in self.points if p.reason]
        return "\n".join(lines)

    def height(self, point: Point) -> float:
        """Where a picture has the point: what is far worse than all else stands at its edge."""
        if self.better == "higher":
            return point.quality
        return min(point.quality, FAR * min(p.quality for p in self.shown))

    def label(self, point: Point) -> str:
        """Its name, and its figure where `height` is not that."""
        far = self.height(point) < point.quality
        return point.name + (f", {self.metric} {point.quality:.2g}" if far else "")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "beaten": {axis: self.beaten(axis) for axis in AXES}}


def read(path: Path) -> Frontier:
    """The Frontier that a JSON file of `write` holds."""
    fields = json.loads(path.read_text())
    fields.pop("beaten", None)
    return Frontier(**{**fields, "points": tuple(Point(**point) for point in fields["points"])})


def check_packages() -> None:
    """Raise MissingPackageError unless pictures can be drawn; call before measuring for hours."""
    for package in ("matplotlib", "plotly"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingPackageError(
                f"drawing frontiers needs: pip install 'sparsefx[frontier]' ({package} is missing)"
            ) from error


def write(frontier: Frontier, stem: Path) -> list[Path]:
    """`stem`.json, .png and .html, each in one step. Raises MissingPackageError before writing."""
    check_packages()
    made: list[tuple[str, Callable[[Frontier], bytes]]] = [
        (".json", _json), (".png", _png), (".html", _html),
    ]  # fmt: skip
    contents = {stem.with_name(stem.name + end): make(frontier) for end, make in made}
    for path, content in contents.items():
        write_atomically(path, content)
    return list(contents)


def _json(frontier: Frontier) -> bytes:
    return (json.dumps(frontier.to_dict(), indent=1) + "\n").encode()


# --- the picture ---------------------------------------------------------------------------------


def _png(frontier: Frontier) -> bytes:
    """Two panels over one key: numbers stand at the points, names beside the panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [point.name for point in frontier.shown]
    fig, axes = plt.subplots(
        1, 2, sharey=True, figsize=(15, max(6.0, 1.6 + 0.21 * len(names))), layout="constrained"
    )
    for panel, axis in zip(axes, AXES, strict=True):
        _panel(panel, frontier, axis)
    axes[0].set_ylabel(f"{frontier.metric} ({frontier.better} is better)", color=INK)
    _key(fig, axes[1], frontier)
    fig.suptitle(f"{frontier.title}\n{frontier.setting}", x=0.01, ha="left", fontsize=12, color=INK)
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=120, metadata={"Software": None})
    plt.close(fig)
    return content.getvalue()


def _panel(panel: Any, frontier: Frontier, axis: Axis) -> None:
    beaten = frontier.beaten(axis)
    edge = frontier.edge(axis)
    panel.plot(
        [getattr(p, axis) for p in edge], [frontier.height(p) for p in edge], color=OURS, lw=1.4,
        alpha=0.5, drawstyle="steps-post", zorder=2,
    )  # fmt: skip
    for number, point in enumerate(frontier.shown, 1):
        color = OURS if point.ours else PEER
        face = "white" if point.name in beaten else color
        x, y = getattr(point, axis), frontier.height(point)
        marker = "v" if y < point.quality else "o" if point.ours else "s"
        panel.plot(x, y, marker, ms=8, mfc=face, mec=color, mew=1.6, zorder=4)
        dx, dy = ((0, 8), (-8, 0))[number % 2] if point.ours else ((0, -8), (8, 0))[number % 2]
        panel.annotate(
            str(number), (x, y), xytext=(dx, dy), textcoords="offset points",
            ha=("right", "center", "left")[(dx > 0) - (dx < 0) + 1],
            va=("top", "center", "bottom")[(dy > 0) - (dy < 0) + 1],
            fontsize=8, color=color, zorder=5,
        )  # fmt: skip
    panel.set_xscale("log")
    panel.margins(0.06, 0.08)
    panel.set_xlabel(f"{AXES[axis]} (log scale)", color=INK)
    for which in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
        which(lambda value, _: f"{value:.3g}")
    panel.tick_params(colors=INK, labelsize=8, which="both")
    panel.grid(color=GRID, lw=0.8, zorder=0)
    for side_name in ("top", "right"):
        panel.spines[side_name].set_visible(False)
    if frontier.better == "lower":
        panel.set_yscale("log")
        panel.yaxis.set_inverted(True)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        panel.yaxis.set_minor_formatter(lambda value, _: f"{value:.3g}")


def _key(fig: Any, beside: Any, frontier: Frontier) -> None:
    from matplotlib.lines import Line2D

    latency = frontier.beaten("ms")
    handles = []
    for number, point in enumerate(frontier.shown, 1):
        color = OURS if point.ours else PEER
        face = "white" if point.name in latency else color
        handles.append(
            Line2D(
                [],
                [],
                color=color,
                ls="",
                marker="o" if point.ours else "s",
                mfc=face,
                label=f"{number}  {frontier.label(point)}"[:72],
            )
        )
    beside.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8,
        title="circles: sparsefx; squares: peers; triangles: off the scale\n"
        "hollow: one of ours is at least as good in both",
        title_fontsize=8, alignment="left",
    )  # fmt: skip


def _html(frontier: Frontier) -> bytes:
    """A page on its own, plotly inside: every point tells its name and figures."""
    from plotly.io import to_html
    from plotly.subplots import make_subplots

    figure: Any = make_subplots(1, 2, shared_yaxes=True, subplot_titles=list(AXES.values()))
    for column, axis in enumerate(AXES, 1):
        beaten, edge = frontier.beaten(axis), frontier.edge(axis)
        line = {"mode": "lines", "line": {"color": OURS, "shape": "hv"}, "hoverinfo": "skip"}
        figure.add_scatter(
            x=[getattr(p, axis) for p in edge], y=[frontier.height(p) for p in edge],
            name="our frontier", showlegend=column == 1, row=1, col=column, **line,
        )  # fmt: skip
        for label, ours in (("sparsefx", True), ("peers", False)):
            points = [p for p in frontier.shown if p.ours == ours]
            figure.add_scatter(
                x=[getattr(p, axis) for p in points], y=[frontier.height(p) for p in points],
                name=label, mode="markers", showlegend=column == 1, row=1, col=column,
                hovertext=[_hover(frontier, p, beaten.get(p.name, "")) for p in points],
                hoverinfo="text", marker={
                    "color": OURS if ours else PEER, "size": 11,
                    "symbol": [_symbol(p, p.name in beaten) for p in points],
                },
            )  # fmt: skip
    figure.update_xaxes(type="log")
    down = frontier.better == "lower"
    figure.update_yaxes(type="log" if down else "linear", autorange="reversed" if down else True)
    figure.update_yaxes(title_text=f"{frontier.metric} ({frontier.better} is better)", col=1)
    figure.update_layout(
        title_text=f"{frontier.title}<br><sup>{frontier.setting}</sup>", template="plotly_white"
    )
    page: str = to_html(figure, include_plotlyjs=True, full_html=True, div_id="frontier")
    return page.encode()


def _symbol(point: Point, beaten: bool) -> str:
    return ("circle" if point.ours else "square") + "-open" * beaten


def _hover(frontier: Frontier, point: Point, by: str) -> str:
    lines = [
        f"<b>{point.name}</b>", f"{frontier.metric} {point.quality:.4g}", f"{point.ms:.4g} ms",
        f"{point.megabytes:.4g} MB", point.note, f"beaten by {by}" if by else "",
    ]  # fmt: skip
    return "<br>".join(line for line in lines if line)


def describe(points: Sequence[Point]) -> str:
    """A table in plain text."""
    wide = max((len(p.name) for p in points), default=4)
    rows = [f"{'name':<{wide}}  {'quality':>8}  {'ms':>9}  {'MB':>8}"]
    rows += [
        f"{p.name:<{wide}}  {p.quality:8.4f}  {p.ms:9.3f}  {p.megabytes:8.2f}"
        for p in points
        if not p.reason
    ]
    return "\n".join(rows)
