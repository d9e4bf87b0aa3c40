"""A file cache that never trusts what somebody else could have written."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

_HEADER = hashlib.sha256(b"").digest_size


class CacheWarning(UserWarning):
    """The cache folder cannot be used, so the bytes were made again and not kept."""


class Cache:
    """Bytes kept by key under `root`; every answer equals what `make` returned for that key."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = default_root() if root is None else Path(root)

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Return the bytes of `key`, calling `make` only when no sound entry is there."""
        reason = _unusable(self.root)
        if reason is not None:
            warnings.warn(f"not caching in {self.root}: {reason}", CacheWarning, stacklevel=2)
            return make()
        path = self.root / hashlib.sha256(key.encode()).hexdigest()
        payload = _read(path, key)
        if payload is None:
            payload = make()
            reason = _write(path, key, payload)
            if reason is not None:
                warnings.warn(f"not cached in {self.root}: {reason}", CacheWarning, stacklevel=2)
        return payload


def default_root() -> Path:
    """The folder named by SPARSEFX_CACHE, or else the platform's per-user cache folder."""
    chosen = os.environ.get("SPARSEFX_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "sparsefx"


def _unusable(root: Path) -> str | None:
    """Make `root` private to this user, or say why it is not."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.stat(root)
    except OSError as error:
        return f"cannot be created ({error.strerror})"
    if not hasattr(os, "getuid"):
        return None  # Windows: the per-user folder's access list is what protects it
    if status.st_uid != os.getuid():
        return "it belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it; run `chmod go-w` on it"
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        return "it is not writable"
    return None


def _digest(key: str, payload: bytes) -> bytes:
    """Bind a payload to its key, so an entry renamed to another key is not accepted."""
    return hashlib.sha256(hashlib.sha256(key.encode()).digest() + payload).digest()


def _read(path: Path, key: str) -> bytes | None:
    """Return the payload of an entry that is a plain file and matches its digest."""
    try:
        # O_NOFOLLOW: a link may point at bytes which others can change after the check.
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        )
        with os.fdopen(descriptor, "rb") as file:
            content = file.read()
    except OSError:
        return None
    payload = content[_HEADER:]
    return payload if content[:_HEADER] == _digest(key, payload) else None


def _write(path: Path, key: str, payload: bytes) -> str | None:
    """Publish an entry in one step, or leave the old one as it was and say why."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(_digest(key, payload) + payload)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        return f"{error.strerror}"
    return None
