"""A progress bar on work that takes longer than a glance."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self


class Progress:
    """`with Progress("compressing", total) as bar: bar.advance("layer")`, drawn on standard error.

    `show` None draws only where standard error is a terminal.
    """

    def __init__(self, title: str, total: int, show: bool | None = None) -> None:
        self.title, self.total = title, total
        self.show = sys.stderr.isatty() if show is None else show
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("[dim]{task.fields[at]}"),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self.title, total=self.total, at="")
            self._bar.start()
        return self

    def advance(self, at: str = "") -> None:
        """One step done; `at` names what is being worked on."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, at=at)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
