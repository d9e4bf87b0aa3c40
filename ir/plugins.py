"""Rows that other packages add to our tables through entry points (`[project.entry-points]`).

Groups: `sparsefx.layouts`, `sparsefx.codecs`, `sparsefx.passes`, `sparsefx.kernels`. They are
looked up when a table is first searched beyond our own rows. A row that does not load or does not
keep its table's contract is left out with a PluginWarning, and `explain` repeats why.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, overload

Row = TypeVar("Row")
Check = Callable[[Any], str | None]
"""Why an object is no row of a table, or None."""

TABLES: list[Plugged[Any]] = []


class PluginWarning(UserWarning):
    """Another package's row is left out; the message names it, its package and the reason."""


class Plugged(Sequence[Row], Generic[Row]):
    """Our rows, with those of installed packages between `first` and `last`, ordered by name.

    Iterating gives `first` before it looks for packages, so `import sparsefx` costs nothing more.
    """

    def __init__(
        self, group: str, check: Check, first: Sequence[Row], last: Sequence[Row] = ()
    ) -> None:
        self.group, self.check = group, check
        self.first, self.last = tuple(first), tuple(last)
        self.problems: list[str] = []
        """Rows left out, and why."""
        self._found: tuple[Row, ...] | None = None
        self._lock = threading.RLock()
        TABLES.append(self)

    @property
    def ours(self) -> tuple[Row, ...]:
        """The rows that this package brings."""
        return self.first + self.last

    @property
    def found(self) -> tuple[Row, ...]:
        """The rows of other packages."""
        with self._lock:
            if self._found is None:
                self._found = ()  # a package that searches this table while it is imported
                self._load()
            return self._found

    def __iter__(self) -> Iterator[Row]:
        yield from self.first
        yield from self.found
        yield from self.last

    def __len__(self) -> int:
        return len(self.ours) + len(self.found)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return (self.first + self.found + self.last)[index]

    def forget(self) -> None:
        """Look for packages again at the next search."""
        self._found = None
        self.problems.clear()

    def _load(self) -> None:
        for point in sorted(entry_points(group=self.group), key=lambda p: (p.name, p.value)):
            try:
                row = point.load()
                why = self.check(row)
            except (Exception, SystemExit) as error:  # whatever a stranger's module raises
                why = f"{type(error).__name__}: {error}"
            if why is None:
                self._found = (*(self._found or ()), row)
            else:
                self.problems.append(f"{self.group} '{point.name}' of {_package(point)}: {why}")
        for problem in self.problems:
            warnings.warn(f"left out: {problem}", PluginWarning, stacklevel=4)


def problems() -> list[str]:
    """Every row of another package that is left out, and why; searches all tables."""
    return [problem for table in TABLES for problem in (len(table), table.problems)[1]]


def spelling(kind: type[Any], ours: Sequence[Any]) -> Check:
    """The contract of a token's class: a subclass of `kind` whose example parses and prints back,
    and is no token of `ours`."""

    def check(row: Any) -> str | None:
        if not (isinstance(row, type) and issubclass(row, kind)):
            return f"{row!r} is no subclass of {kind.__name__}"
        if inspect.isabstract(row):
            missing = ", ".join(sorted(getattr(row, "__abstractmethods__", ())))
            return f"{row.__name__} lacks {missing}"
        made: Any = row
        token = made.example
        if any(own.parse(token) is not None for own in ours):
            return f"its token '{token}' is spelt by sparsefx already"
        if (back := str(made.parse(token))) != token:
            return f"its example '{token}' parses to '{back}'"
        return None

    return check


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
