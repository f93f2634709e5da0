"""Names are synced with what they name, so that a power loss takes neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefixstore.folders import make_folder, sync_folder, write_whole
from prefixstore.index import Environment
from tests.store_helpers import Place, namespace_in, put_content, refs_of

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of what is synced, in order."""
    found: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        found.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    return found


def test_every_folder_above_a_new_store_is_synced(tmp_path: Path, synced: list[str]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert synced == [str(tmp_path), str(tmp_path / "a")]


def test_a_folder_that_is_there_is_synced_again(tmp_path: Path, synced: list[str]) -> None:
    """Who made it may have been killed before it could."""
    make_folder(tmp_path)
    assert synced == [str(tmp_path.parent)]


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "none")


def test_the_names_of_a_new_store_are_synced(place: Place, synced: list[str]) -> None:
    """Settings before anything else is there, the index and the disk tier before they are used."""
    with place.open() as store:
        folder = str(store.folder)
        at = [path.removeprefix(folder) for path in synced if path.startswith(folder)]
        assert at[0].startswith("/.store.json.")
        assert at[1] == ""
        assert at.index("/index") > at.index("/index/data.mdb.new")
        synced.clear()
        put_content(namespace_in(store), refs_of(namespace_in(store), 1, 1))
        assert store.flush()
        assert folder in synced  # the new file of slots


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: list[str]
) -> None:
    path = tmp_path / "a"
    write_whole(path, b"old")
    assert synced == [f"{tmp_path}/.a.{os.getpid()}", str(tmp_path)]

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_an_index_whose_making_was_interrupted_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(fd: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "data.mdb").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            Environment(tmp_path, ("meta",), durable=True)
    assert not (tmp_path / "data.mdb").exists()
    env = Environment(tmp_path, ("meta",), durable=True)
    env.write(lambda txn: txn.put("meta", b"a", b"1"))
    with env.read() as txn:
        assert txn.get("meta", b"a") == b"1"
    env.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.mdb", "lock.mdb"]
