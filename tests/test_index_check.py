"""The walk over LMDB's pages: what LMDB has written passes, pages that do not belong do not."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lmdb
import pytest

from prefixstore.index_check import Damaged, check_pages

PAGE = 4096
TABLES = (b"few", b"many", b"none")


def make(folder: Path, seed: int, rounds: int = 12) -> Path:
    """An environment with a history: values of all sizes, some on pages of their own; deletions."""
    rng = random.Random(seed)
    with lmdb.open(str(folder), map_size=1 << 30, max_dbs=len(TABLES), sync=False) as env:
        few, many, _ = (env.open_db(name) for name in TABLES)
        for _ in range(rounds):
            with env.begin(write=True) as txn:
                for _ in range(rng.randrange(600)):
                    size = rng.choice((0, 8, 48, 300, 300, 2000, 9000 if rng.random() < 0.1 else 3))
                    txn.put(rng.randbytes(rng.choice((1, 16, 200))), rng.randbytes(size), db=many)
                txn.put(b"k%d" % rng.randrange(4), b"v", db=few)
                cursor = txn.cursor(many)
                if cursor.set_range(rng.randbytes(2)):
                    for _ in range(rng.randrange(300)):
                        if not cursor.delete():
                            break
    return folder / "data.mdb"


@pytest.mark.parametrize("seed", range(8))
def test_what_lmdb_has_written_passes(tmp_path: Path, seed: int) -> None:
    path = make(tmp_path, seed)
    used = check_pages(path, PAGE)
    with lmdb.open(str(tmp_path), max_dbs=len(TABLES)) as env, env.begin() as txn:
        found = [txn.stat(env.open_db(name, txn=txn)) for name in TABLES]
        found.append(env.stat())
    counted = sum(one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"] for one in found)
    assert 0 <= used - counted - 2 <= 8, "the list of free pages is all that is not counted"


def test_an_empty_environment_passes(tmp_path: Path) -> None:
    lmdb.open(str(tmp_path)).close()
    assert check_pages(tmp_path / "data.mdb", PAGE) == 2


def reached(path: Path) -> list[int]:
    """Pages without which the walk fails: those of the newest state."""
    data = path.read_bytes()
    found = []
    for number in range(2, len(data) // PAGE):
        path.write_bytes(data[: number * PAGE] + bytes(PAGE) + data[(number + 1) * PAGE :])
        try:
            check_pages(path, PAGE)
        except Damaged:
            found.append(number)
    path.write_bytes(data)
    return found


def test_pages_that_are_lost_swapped_or_copied_are_found(tmp_path: Path) -> None:
    path = make(tmp_path, 1, rounds=5)
    data, pages = path.read_bytes(), reached(path)
    assert len(pages) > 50
    rng = random.Random(2)
    for _ in range(200):
        one, other = (PAGE * number for number in rng.sample(pages, 2))
        first, second = data[one : one + PAGE], data[other : other + PAGE]
        for swapped in (True, False):
            changed = bytearray(data)
            changed[other : other + PAGE] = first
            if swapped:
                changed[one : one + PAGE] = second
            path.write_bytes(changed)
            with pytest.raises(Damaged):
                check_pages(path, PAGE)


def test_a_changed_key_is_found_unless_it_is_still_in_order(tmp_path: Path) -> None:
    """Where a key was changed such that a look-up no longer goes to it, the walk says so."""
    path = make(tmp_path, 6, rounds=4)
    data, rng, found = path.read_bytes(), random.Random(7), 0
    with lmdb.open(str(tmp_path), max_dbs=len(TABLES)) as env, env.begin() as txn:
        keys = [bytes(key) for key, _ in txn.cursor(env.open_db(b"many", txn=txn)) if len(key) > 9]
    for key in rng.sample(keys, 100):
        at = data.index(key) + rng.randrange(3)
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        try:
            check_pages(path, PAGE)
        except Damaged:
            found += 1
            continue
        with lmdb.open(str(tmp_path), max_dbs=len(TABLES)) as env, env.begin() as txn:
            table = env.open_db(b"many", txn=txn)
            assert all(txn.get(bytes(key), db=table) is not None for key, _ in txn.cursor(table))
    assert 20 < found < 100


def test_a_file_that_was_cut_is_found(tmp_path: Path) -> None:
    path = make(tmp_path, 3, rounds=4)
    data = path.read_bytes()
    for pages in (0, 1, 2, 5, len(data) // PAGE // 2):
        path.write_bytes(data[: pages * PAGE])
        with pytest.raises(Damaged):
            check_pages(path, PAGE)


USER = """
import random, sys, lmdb
for name in sys.stdin.read().split():
    print(name, flush=True)
    with lmdb.open(name, map_size=1 << 30, max_dbs=4, sync=False) as env:
        tables = [env.open_db(table) for table in (b"few", b"many", b"none", b"new")]
        rng = random.Random(1)
        with env.begin() as txn:
            keys = [(key, table) for table in tables for key, _ in txn.cursor(table)]
        for _ in range(4):
            with env.begin(write=True) as txn:
                for key, table in rng.sample(keys, len(keys) // 3):
                    txn.delete(key, db=table)
                for key, table in rng.sample(keys, len(keys) // 6):
                    txn.put(key, rng.randbytes(rng.choice((1, 300, 9000))), db=table)
                for _ in range(50):
                    txn.put(rng.randbytes(16), rng.randbytes(300), db=rng.choice(tables))
        with env.begin(write=True) as txn:
            for table in tables:
                txn.drop(table, delete=False)
print("done", flush=True)
"""


def test_noise_is_found_or_harmless(tmp_path: Path) -> None:
    """Where it passes, LMDB reads, overwrites and deletes everything without a complaint: in a
    process of its own, which an assertion of LMDB's would end."""
    (tmp_path / "whole").mkdir()
    data, rng = make(tmp_path / "whole", 4, rounds=4).read_bytes(), random.Random(5)
    passed: list[str] = []
    for nth in range(300):
        changed = bytearray(data)
        at = rng.randrange(2 * PAGE, len(data) - 8)
        at = at // PAGE * PAGE + rng.choice((0, 8, 10, 12, 14, 16, 20, 40, at % PAGE))
        noise = rng.randbytes(rng.choice((1, 2, 8)))
        changed[at : at + len(noise)] = noise
        folder = tmp_path / f"case-{nth}"
        folder.mkdir()
        (folder / "data.mdb").write_bytes(changed[: len(data)])
        try:
            check_pages(folder / "data.mdb", PAGE)
        except Damaged:
            shutil.rmtree(folder)
        else:
            passed.append(str(folder))
    assert 10 < len(passed) < 290
    used = subprocess.run(
        [sys.executable, "-c", USER],
        input="\n".join(passed),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert used.stdout.endswith("done\n"), f"{used.stdout.split()[-1]}: {used.stderr[-2000:]}"


def test_a_bad_sector_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, calls = make(tmp_path, 2, rounds=4), os.preadv, itertools.count()

    def bad(fd: int, buffers: Any, offset: int) -> int:
        if next(calls) == 20:
            raise OSError(errno.EIO, "bad sector")
        return read(fd, buffers, offset)

    monkeypatch.setattr("prefixstore.index_check.os.preadv", bad)
    with pytest.raises(Damaged, match="bad sector"):
        check_pages(path, PAGE)
    assert check_pages(path, PAGE) > 20, "the next time it can be read"


def test_a_file_that_is_cut_while_it_is_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a mapping it would end the process."""
    path, read, calls = make(tmp_path, 2, rounds=4), os.preadv, itertools.count()

    def cut(fd: int, buffers: Any, offset: int) -> int:
        if next(calls) == 20:
            os.truncate(path, 3 * PAGE)
        return read(fd, buffers, offset)

    monkeypatch.setattr("prefixstore.index_check.os.preadv", cut)
    with pytest.raises(Damaged, match="it ends before page"):
        check_pages(path, PAGE)


WRITER = """
import random, sys, lmdb
env = lmdb.open(sys.argv[1], map_size=1 << 30, max_dbs=3, sync=False)
table, rng = env.open_db(b"many"), random.Random(int(sys.argv[2]))
while True:
    with env.begin(write=True) as txn:
        for _ in range(rng.randrange(1, 8)):
            size = rng.choice((8, 300, 300, 5000))
            txn.put(b"%06d" % rng.randrange(3000), rng.randbytes(size), db=table)
            txn.delete(b"%06d" % rng.randrange(3000), db=table)
"""


def test_writers_at_work_are_no_damage(tmp_path: Path) -> None:
    """The file grows, pages are freed and reused, meta pages change while it is looked at."""
    path = make(tmp_path, 7)
    with ExitStack() as stack:
        for seed in range(2):
            command = [sys.executable, "-c", WRITER, str(tmp_path), str(seed)]
            writer = stack.enter_context(subprocess.Popen(command))
            stack.callback(writer.kill)
        with lmdb.open(str(tmp_path), map_size=1 << 30, max_dbs=len(TABLES)) as env:
            size, end = path.stat().st_size, time.monotonic() + 20
            checks = 0
            while checks < 60 or path.stat().st_size < 2 * size:
                with env.begin():
                    check_pages(path, PAGE)
                checks += 1
                assert time.monotonic() < end, "the writers write nothing"
