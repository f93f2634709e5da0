"""The power goes while processes work on a store: a few moments of two runs.

The cases and what must come of them are those of `benchmarks.power_loss`, which plays thousands.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.power_loss import Cases, Recorded, recorded
from benchmarks.power_loss_record import build_shim
from benchmarks.power_loss_replay import (
    CREATE,
    MKDIR,
    RENAME,
    SYNC,
    SYNC_FOLDER,
    TRUNCATE,
    WRITE,
    Disk,
    Record,
)

SEED = 2 * int(os.environ.get("PREFIXSTORE_TEST_SEED", "1"))  # even: the store that keeps all
ONE, OTHER = b"/r/one", b"/r/other"


def made(*paths: bytes) -> Iterator[Record]:
    for inode, path in enumerate(paths, 1):
        yield Record(CREATE, False, inode, 0, path)


def left(tmp_path: Path, records: list[Record], choice: str, seed: int = 0) -> dict[str, bytes]:
    """The files that are there after a power loss."""
    disk, target = Disk("/r"), tmp_path / f"{choice}-{seed}"
    for record in records:
        disk.apply(record)
    target.mkdir()
    disk.after_power_loss(target, random.Random(seed), choice)
    return {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    }


def test_what_was_synced_is_there_and_what_was_not_may_be_lost(tmp_path: Path) -> None:
    records = [
        *made(ONE),
        Record(WRITE, False, 1, 0, b"synced"),
        Record(SYNC, False, 1, 0, b""),
        Record(SYNC_FOLDER, False, 9, 0, b"/r"),
        Record(WRITE, False, 1, 0, b"unsure"),
        Record(WRITE, True, 1, 8, b"O_DSYNC"),
    ]
    assert left(tmp_path, records, "all lost") == {"one": b"synced\0\0O_DSYNC"}
    assert left(tmp_path, records, "all kept") == {"one": b"unsure\0\0O_DSYNC"}


def test_a_name_is_lost_unless_its_folder_was_synced(tmp_path: Path) -> None:
    records = [
        *made(ONE),
        Record(WRITE, False, 1, 0, b"x"),
        Record(SYNC, False, 1, 0, b""),
        Record(SYNC_FOLDER, False, 9, 0, b"/r"),
        Record(RENAME, False, 0, 0, ONE + b"\0" + OTHER),
        Record(MKDIR, False, 0, 0, b"/r/sub"),
        Record(CREATE, False, 2, 0, b"/r/sub/two"),
    ]
    assert left(tmp_path, records, "all lost") == {"one": b"x"}
    assert left(tmp_path, records, "all kept") == {"other": b"x", "sub/two": b""}


def test_writes_are_torn_at_sectors_and_newer_ones_may_be_there_alone(tmp_path: Path) -> None:
    records = [
        *made(ONE),
        Record(SYNC_FOLDER, False, 9, 0, b"/r"),
        Record(TRUNCATE, False, 1, 2048, b""),
        Record(SYNC, False, 1, 0, b""),
        Record(WRITE, False, 1, 256, b"a" * 1024),
        Record(WRITE, False, 1, 1024, b"b" * 512),
    ]
    seen = {left(tmp_path, records, "torn in sectors", seed)["one"] for seed in range(60)}
    for content in seen:
        for at in range(0, 2048, 512):  # a sector is of one write, or none
            kinds = set(content[at : at + 512]) - {0}
            assert len(kinds) <= 1 or at == 1024
        assert content[:256] == bytes(256)
    assert any(b"b" in one and b"a" not in one for one in seen)
    assert len(seen) > 4


@pytest.fixture(scope="module")
def run() -> Iterator[Recorded]:
    """Two boots of five processes, recorded once."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc builds the shim that records writes")
    with recorded(SEED, steps=6) as found:
        yield found


@pytest.mark.timeout(300)
def test_nothing_promised_is_lost_and_nothing_wrong_is_served(run: Recorded) -> None:
    cases = Cases()
    cases.play(run, count=10)
    assert cases.faults == []
    assert sum(cases.done.values()) == 10
    assert cases.promised > 0
    assert cases.unsure > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("without", [SYNC, SYNC_FOLDER], ids=["fdatasync", "fsync of folders"])
def test_a_harness_that_sees_a_sync_that_is_missing(run: Recorded, without: int) -> None:
    """Were files or their names not synced, it would say so."""
    cases = Cases()
    left_out = [record for record in run.records if record.kind != without]
    cases.play(replace(run, records=left_out), count=5)
    assert cases.faults


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="gcc is needed"):
        build_shim(tmp_path)
