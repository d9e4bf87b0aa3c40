from __future__ import annotations

import multiprocessing
import os
import stat
import sys
from pathlib import Path

import pytest

from sparsefx.ir.cache import Cache, CacheWarning, default_root

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


def fail() -> bytes:
    raise AssertionError("made again although a sound entry was there")


def entry(root: Path) -> Path:
    [path] = root.iterdir()
    return path


def test_made_once_and_kept(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "cache"
    assert Cache(root).get("key", lambda: b"made") == b"made"
    assert Cache(root).get("key", fail) == b"made"
    assert [path.name for path in root.iterdir()] == [entry(root).name]


@posix
def test_folder_and_entries_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        Cache(tmp_path / "cache").get("key", lambda: b"made")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(entry(tmp_path / "cache").stat().st_mode) == 0o600


def test_keys_do_not_become_paths(tmp_path: Path) -> None:
    for key in ("../../escape", "/etc/passwd", "nul\0", "ä" * 1000, ""):
        assert Cache(tmp_path / "cache").get(key, lambda: b"made") == b"made"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:7], lambda b: b + b"x"])
def test_damaged_entry_is_made_again(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    Cache(tmp_path).get("key", lambda: b"made")
    path = entry(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert Cache(tmp_path).get("key", lambda: b"again") == b"again"
    assert Cache(tmp_path).get("key", fail) == b"again"


def test_entry_of_another_key_is_not_accepted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get("one", lambda: b"1")
    one = entry(tmp_path)
    cache.get("two", lambda: b"2")
    [two] = set(tmp_path.iterdir()) - {one}
    os.replace(two, one)
    assert cache.get("one", lambda: b"1") == b"1"


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "cache"
    Cache(root).get("key", lambda: b"planted")
    root.chmod(mode)
    with pytest.warns(CacheWarning, match="others may write"):
        assert Cache(root).get("key", lambda: b"made") == b"made"


@posix
def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cache(tmp_path).get("key", lambda: b"planted")
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.warns(CacheWarning, match="another user"):
        assert Cache(tmp_path).get("key", lambda: b"made") == b"made"


@posix
def test_linked_entry_is_not_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    Cache(root).get("key", lambda: b"planted")
    path = entry(root)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    planted = elsewhere.read_bytes()
    assert Cache(root).get("key", lambda: b"made") == b"made"
    assert not path.is_symlink()
    assert elsewhere.read_bytes() == planted


def test_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.warns(CacheWarning, match="cannot be created"):
        assert Cache(tmp_path / "cache").get("key", lambda: b"made") == b"made"


def test_unwritable_folder_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, mode: int) -> bool:
        return False

    monkeypatch.setattr(os, "access", refuse)  # permission bits do not stop root
    with pytest.warns(CacheWarning, match="not writable"):
        assert Cache(tmp_path).get("key", lambda: b"made") == b"made"


def test_full_disk_leaves_no_partial_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(CacheWarning, match="No space left"):
        assert Cache(tmp_path).get("key", lambda: b"made") == b"made"
    assert not list(tmp_path.iterdir())


def write_many(root: Path, worker: int) -> None:
    payload = bytes([worker]) * 200_000
    for turn in range(20):
        got = Cache(root).get(f"key {turn}", lambda: payload)
        assert len(set(got)) == 1
        assert len(got) == len(payload)


def test_concurrent_processes_see_whole_entries(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_many, args=(tmp_path, i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 20


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("SPARSEFX_CACHE")
    assert default_root().name == "sparsefx"
