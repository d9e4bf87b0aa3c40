"""English text that is already on the machine: Python's help topics and Jane Austen."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import struct
import sysconfig
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from sparsefx.models.assets import MissingAsset

_AUSTEN = "/usr/lib/R/site-library/janeaustenr/data"
_NOT_PROSE = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
_STRINGS, _STRING = 16, 9  # R's STRSXP and CHARSXP


@cache
def python_topics() -> tuple[str, str]:
    """Return (calibration text, held-out text): prose of Python's help topics, no paragraph shared.

    The words are those of the running Python, so figures compare within one Python version only.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingAsset("this Python was built without pydoc_data.topics") from error
    halves: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for name in sorted(topics):
        # By the name's hash: a topic keeps its half when another Python adds or drops topics.
        half = halves[hashlib.sha256(name.encode()).digest()[0] & 1]
        for paragraph in prose(topics[name]):
            if paragraph not in seen:
                seen.add(paragraph)
                half.append(paragraph)
    return "\n\n".join(halves[1]), "\n\n".join(halves[0])


@cache
def docstrings() -> str:
    """Return the prose of the docstrings of Python's library, without what `python_topics` holds.

    Sources are parsed, not imported: ten times as much text as half of the topics, in 3 s.
    """
    seen = {p for half in python_topics() for p in half.split("\n\n")}
    found: list[str] = []
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if _NOT_PROSE.isdisjoint(path.relative_to(library).parts):
            new = [p for text in _docstrings_of(path) for p in prose(text) if p not in seen]
            seen.update(new)
            found += dict.fromkeys(new)
    return "\n\n".join(found)


def _docstrings_of(path: Path) -> list[str]:
    """Return the docstrings of one source file; none where it is of another Python's syntax."""
    try:
        nodes = [*ast.walk(ast.parse(path.read_bytes()))]
    except (SyntaxError, ValueError):
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for n in nodes if isinstance(n, owners) and (text := ast.get_docstring(n))]


def prose(text: str) -> list[str]:
    """Return the paragraphs that read as sentences, unwrapped; code, grammar and titles go."""
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _is_prose(paragraph: str) -> bool:
    plain = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph.split()) >= 12
        and paragraph[-1] in ".:;!?)"
        and plain >= 0.85 * len(paragraph)
        and not re.search(r"::=|>>>|\*\*\*|===", paragraph)
    )


def novel(name: str) -> str:
    """Return one of Jane Austen's novels by its title, lines joined into paragraphs."""
    paragraphs = re.split(r"\n{2,}", novel_as_printed(name))
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def novel_as_printed(name: str) -> str:
    """Return a novel with its printed line breaks, which a language model finds easy to guess."""
    novels = _novels()
    if name.lower() not in novels:
        raise KeyError(f"no novel {name!r}; there are {', '.join(sorted(novels))}")
    return novels[name.lower()]


@cache
def _novels() -> dict[str, str]:
    """Return lower-case title to text of every novel in the R package's data file."""
    path = Path(os.environ.get("SPARSEFX_AUSTEN") or _AUSTEN) / "Rdata.rdb"
    if not path.is_file():
        raise MissingAsset(
            f"{path} is not there: `apt-get install r-cran-janeaustenr`, or without root "
            "`apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb DIR` "
            f"and SPARSEFX_AUSTEN=DIR{_AUSTEN}"
        )
    texts = (_lines(blob) for blob in _blobs(path.read_bytes()))
    return {next(filter(str.strip, lines)).strip().lower(): "\n".join(lines) for lines in texts}


def _blobs(data: bytes) -> Iterator[bytes]:
    """Yield the objects of an R lazy-load file: each a 4-byte length and a zlib stream."""
    while data:
        stream = zlib.decompressobj()
        yield stream.decompress(data[4:])
        data = stream.unused_data


def _lines(blob: bytes) -> list[str]:
    """Return the strings of one serialised R character vector (XDR, version 3)."""
    magic, version, _, _, encoding = struct.unpack_from(">2s4i", blob)
    at = 18 + encoding
    flags, count = struct.unpack_from(">2i", blob, at)
    if magic != b"X\n" or version != 3 or flags & 0xFF != _STRINGS:
        raise ValueError("the file does not hold plain character vectors of R's version 3")
    at, lines = at + 8, []
    for _ in range(count):
        flags, length = struct.unpack_from(">2i", blob, at)
        if flags & 0xFF != _STRING:
            raise ValueError(f"R type {flags & 0xFF} where a string was expected")
        lines.append(blob[at + 8 : at + 8 + max(length, 0)].decode("utf-8"))
        at += 8 + max(length, 0)
    return lines
