"""Whose memory is given back when a new store is made: that of stores that are gone, no other's."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from prefixstore.opening import UNSEEN_S
from tests.store_helpers import Place, namespace_in, put_content, refs_of

pytest_plugins = ["tests.store_fixtures"]


@pytest.fixture
def left(place: Place) -> Path:
    """The memory of a store that nobody has open any more, with a chunk and without a disk."""
    with place.open(disk_bytes=0, name="a") as store:
        ns = namespace_in(store)
        put_content(ns, refs_of(ns, 1, 1))
        return store.live_dir


def chunks_in(place: Place, name: str) -> int:
    with place.open(None, None, name=name) as store:
        ns = namespace_in(store)
        return ns.match(refs_of(ns, 1, 1)).num_chunks


def make_another(place: Place, name: str = "b") -> None:
    place.open(name=name).close()


def test_that_of_a_folder_that_was_removed(place: Place, left: Path) -> None:
    shutil.rmtree(place.folder / "a")
    make_another(place)
    assert not left.exists()


def test_that_of_a_folder_that_was_made_anew(place: Place, left: Path) -> None:
    shutil.rmtree(place.folder / "a")
    make_another(place, "a")
    assert not left.exists()


def test_that_of_a_folder_whose_parent_was_removed(place: Place) -> None:
    with place.open(name="c/d/e") as store:
        live_dir = store.live_dir
    shutil.rmtree(place.folder / "c")
    make_another(place)
    assert not live_dir.exists()


def test_not_that_of_a_store_that_is_there(place: Place, left: Path) -> None:
    make_another(place)
    assert chunks_in(place, "a") == 1


def test_not_that_of_a_store_that_was_moved_and_opened(place: Place, left: Path) -> None:
    (place.folder / "a").rename(place.folder / "moved")
    assert chunks_in(place, "moved") == 1
    make_another(place)
    assert left.exists()
    assert chunks_in(place, "moved") == 1


@pytest.mark.parametrize("there", ["nothing", "another store"])
def test_not_that_of_a_store_another_container_sees(
    place: Place, left: Path, there: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It shares the memory; its folders have the same names and are others."""
    (place.folder / "a").rename(tmp_path_factory.mktemp("elsewhere") / "a")
    noted = left / "ancestors"
    noted.write_text(" ".join("1-2" for _ in noted.read_text().split()))
    make_another(place, "b" if there == "nothing" else "a")
    assert left.exists()
    long_ago = time.time() - UNSEEN_S - 1
    os.utime(left / "origin", (long_ago, long_ago))
    make_another(place, "d")
    assert not left.exists(), "nobody has seen it for long"


def test_opening_says_that_it_is_still_seen(place: Place, left: Path) -> None:
    long_ago = time.time() - UNSEEN_S - 1
    os.utime(left / "origin", (long_ago, long_ago))
    assert chunks_in(place, "a") == 1
    assert time.time() - (left / "origin").stat().st_mtime < UNSEEN_S


def test_not_that_of_a_store_that_is_open(place: Place) -> None:
    with place.open(name="a") as store:
        (place.folder / "a").rename(place.folder / "moved")
        make_another(place)
        assert store.live_dir.exists()


def test_a_note_half_made_says_nothing(place: Place, left: Path) -> None:
    """Its process was killed between two files."""
    (place.folder / "a").rename(place.folder / "moved")
    (left / "ancestors").write_text("")
    make_another(place)
    assert left.exists()


def test_without_room_for_a_note_it_opens_all_the_same(
    place: Place, left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.folder / "a").rename(place.folder / "moved")

    def full(path: Path, *_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert chunks_in(place, "moved") == 1
    assert chunks_in(place, "moved") == 1
