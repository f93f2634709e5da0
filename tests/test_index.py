"""The index: snapshots, one lane of writers with deadlines, errors that reach their caller."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import lmdb
import pytest

from prefixstore import config
from prefixstore.errors import DamagedError, StoreClosedError, StoreTimeoutError
from prefixstore.index import REPLACED, Environment, Txn
from tests.store_helpers import ROOT, no_thread, wait_for, writer_lock_held


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Environment]:
    found = Environment(tmp_path / "env", ("one", "two"), durable=False)
    yield found
    found.close()


def test_tables_against_dictionaries(env: Environment) -> None:
    rng = random.Random(1)
    model: dict[str, dict[bytes, bytes]] = {"one": {}, "two": {}}
    for _ in range(300):
        table, key = rng.choice(["one", "two"]), rng.randbytes(rng.randint(1, 2))
        if rng.random() < 0.7:
            value = rng.randbytes(rng.randrange(20))
            env.write(partial(Txn.put, table=table, key=key, value=value))
            model[table][key] = value
        else:
            found = env.write(partial(Txn.delete, table=table, key=key))
            assert found == (model[table].pop(key, None) is not None)
    with env.read() as txn:
        for table, content in model.items():
            assert dict(txn.scan(table)) == content
            assert [key for key, _ in txn.scan(table)] == sorted(content)
            assert txn.count(table) == len(content)
            for first in range(256):
                prefix = bytes([first])
                expected = sorted(key for key in content if key.startswith(prefix))
                assert [key for key, _ in txn.scan(table, prefix)] == expected
                assert txn.first(table, prefix) == (expected[0] if expected else None)
                assert txn.get(table, prefix) == content.get(prefix)
                with env.lookup(table) as look:
                    assert look(prefix) == content.get(prefix)
            asked = [rng.randbytes(rng.randint(1, 2)) for _ in range(300)]
            assert txn.get_many(table, asked) == {k: content[k] for k in asked if k in content}
            assert txn.get_many(table, []) == {}
            start = b"\x80\x80"
            expected = sorted(key for key in content if key >= start)
            assert [key for key, _ in txn.scan(table, start=start)] == expected


def test_a_read_is_a_snapshot(env: Environment) -> None:
    env.write(lambda txn: txn.put("one", b"k", b"old"))
    with env.read() as txn:
        env.write(lambda txn: txn.put("one", b"k", b"new"))
        assert txn.get("one", b"k") == b"old"
    with env.read() as txn:
        assert txn.get("one", b"k") == b"new"


def test_a_failed_write_leaves_nothing_and_its_neighbours_alone(env: Environment) -> None:
    def fail(txn: Txn) -> None:
        txn.put("one", b"bad")
        raise RuntimeError("planted")

    with writer_lock_held(env.folder) as let_go:  # so that they go into one batch
        futures = [env.submit(partial(Txn.put, table="one", key=b"%d" % n)) for n in range(5)]
        failed = env.submit(fail)
        futures += [env.submit(partial(Txn.put, table="one", key=b"%d" % n)) for n in range(5, 9)]
        let_go()
        for future in futures:
            future.result(10)
        with pytest.raises(RuntimeError, match="planted"):
            failed.result(10)
    with env.read() as txn:
        assert [key for key, _ in txn.scan("one")] == [b"%d" % n for n in range(9)]


def test_writes_of_many_threads_are_all_there(env: Environment) -> None:
    def work(number: int) -> None:
        for step in range(50):
            env.write(lambda txn: txn.add_int("one", b"n", 1))
            env.write(partial(Txn.put, table="two", key=b"%d-%d" % (number, step)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with env.read() as txn:
        assert txn.get_int("one", b"n") == txn.count("two") == 200


def test_a_write_that_timed_out_is_not_done_later(env: Environment) -> None:
    """Who was told that it timed out must be able to rely on it, or to undo it."""
    with writer_lock_held(env.folder) as let_go:
        with pytest.raises(StoreTimeoutError):
            env.write(lambda txn: txn.put("one", b"late"), 0.1)
        let_go()
    env.write(lambda txn: txn.put("one", b"next"))
    with env.read() as txn:
        assert [key for key, _ in txn.scan("one")] == [b"next"]


OPEN = (
    "import sys\nfrom pathlib import Path\nfrom prefixstore.errors import StoreTimeoutError\n"
    "from prefixstore.index import Environment\n"
    "try:\n    Environment(Path(sys.argv[1]), ('one',), durable=False).close()\n"
    "except StoreTimeoutError:\n    pass\n"
)


def test_opening_while_the_writer_lock_is_held_ends(tmp_path: Path) -> None:
    """Every wait has a deadline: an engine must start, or say why it does not.

    In a process of its own: LMDB would wait with the interpreter's lock in hand.
    """
    Environment(tmp_path / "env", ("one",), durable=False).close()
    with writer_lock_held(tmp_path / "env"):
        child = subprocess.Popen([sys.executable, "-c", OPEN, tmp_path / "env"], cwd=ROOT)
        try:
            assert child.wait(10) == 0
        except subprocess.TimeoutExpired:
            pytest.fail("opening waits for a foreign writer without end")
        finally:
            child.kill()
            child.wait()


def test_it_opens_again_after_the_writer_lock_was_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same process: what was given up is closed. Until then it is told what it waits for."""
    monkeypatch.setattr(config, "LOCK_WAIT_S", 0.1)
    folder = tmp_path / "env"
    Environment(folder, ("one",), durable=False).close()
    with writer_lock_held(folder):
        with pytest.raises(StoreTimeoutError, match="another process holds the writer lock"):
            Environment(folder, ("one",), durable=False)
        with pytest.raises(StoreTimeoutError, match="waits for the writer lock"):
            Environment(folder, ("one",), durable=False)

    def opens() -> bool:
        try:
            Environment(folder, ("one",), durable=False).close()
        except StoreTimeoutError:
            return False
        return True

    wait_for(opens, "what was given up to be closed")


@pytest.mark.parametrize("name", ["prefixstore-tables", "lane-env"])
def test_it_opens_again_after_no_thread_could_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        no_thread(patch, name)
        with pytest.raises(RuntimeError, match="can't start"):
            Environment(tmp_path / "env", ("one",), durable=False)
    Environment(tmp_path / "env", ("one",), durable=False).close()


def test_a_closed_environment_says_so(env: Environment) -> None:
    env.close()
    env.close()
    with pytest.raises(StoreClosedError), env.read():
        pass
    with pytest.raises(StoreClosedError):
        env.write(lambda txn: None)


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "data.mdb").write_bytes(b"garbage" * 2000)
    with pytest.raises(DamagedError, match=r"the index .* is damaged"):
        Environment(tmp_path / "env", ("one",), durable=True)


def test_a_removed_index_is_noticed(env: Environment) -> None:
    assert env.lost() == ""
    (env.folder / "data.mdb").unlink()
    assert env.lost() == REPLACED
    (env.folder / "data.mdb").write_bytes(b"another")
    assert env.lost() == REPLACED


def test_an_index_that_has_no_reader_slot_left_is_not_lost(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be closed under those that read it."""

    class Full:
        def begin(self) -> object:
            raise lmdb.ReadersFullError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(env, "_env", Full())
        assert env.lost() == ""
    assert env.lost() == ""


def test_counters_are_seen_at_once_and_kept(env: Environment) -> None:
    def count(txn: Txn) -> list[int]:
        seen = [txn.add_int("one", b"n", 2), txn.get_int("one", b"n")]
        txn.put_int("one", b"m", 7)
        return [*seen, txn.add_int("one", b"m", -3)]

    def fail(txn: Txn) -> None:
        txn.add_int("one", b"n", 100)
        raise RuntimeError("no")

    assert env.write(count) == [2, 2, 4]
    with pytest.raises(RuntimeError, match="no"):
        env.write(fail)
    assert env.write(count) == [4, 4, 4]
    with env.read() as txn:
        assert (txn.get_int("one", b"n"), txn.get_int("one", b"m")) == (4, 4)


def test_records_that_contradict_each_other_are_told_as_damage(tmp_path: Path) -> None:
    told: list[str] = []
    env = Environment(
        tmp_path / "env", ("one",), durable=False, damaged=lambda: told.append("damaged")
    )
    with closing(env):

        def contradicts(txn: Txn) -> None:
            txn.put("one", b"key", b"value")
            txn.put_int("one", b"count", -1)

        with pytest.raises(DamagedError, match=r"is damaged: .*fell to -1 .*begins anew"):
            env.write(contradicts)
        assert told == ["damaged"]
        with env.read() as txn:
            assert txn.get("one", b"key") is None, "nothing of it was kept"


def test_a_close_waits_for_reads(env: Environment) -> None:
    """Closed beneath them, LMDB takes the process down."""
    reading, go_on = threading.Event(), threading.Event()

    def read() -> None:
        with env.read() as txn:
            reading.set()
            assert go_on.wait(30)
            assert txn.get("one", b"x") is None

    reader = threading.Thread(target=read)
    reader.start()
    assert reading.wait(30)
    ended: list[bool] = []
    closer = threading.Thread(target=lambda: ended.append(env.end()))
    closer.start()
    closer.join(0.3)
    assert closer.is_alive()
    with pytest.raises(StoreClosedError), env.read():
        pass
    go_on.set()
    closer.join(30)
    reader.join(30)
    assert ended == [True]


def test_what_is_compacted_is_what_there_was_though_somebody_closes_the_old_one(
    tmp_path: Path,
) -> None:
    """Its lock file says which of two pages is current, and that is another in the copy."""
    old = Environment(tmp_path / "env", ("one", "two"), durable=False)
    with old.read():  # keeps pages alive
        for number in range(400):
            old.write(partial(Txn.put, table="two", key=b"%d" % (number % 7), value=bytes(900)))
    old.write(partial(Txn.put, table="one", key=b"kept", value=b"so"))
    child = "\n".join([
        "from pathlib import Path", "from prefixstore.index import Environment",
        f"env = Environment(Path({str(tmp_path / 'env')!r}), ('one', 'two'), durable=False)",
        "with env.read() as txn: print(txn.get('one', b'kept'), env._env.info()['last_pgno'])",
        "env.close()",
    ])  # fmt: skip
    for parity in range(2):  # of the last transaction
        pages = old._env.info()["last_pgno"]
        told = subprocess.run(
            [sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True
        )
        assert told.stdout.startswith("b'so' "), (parity, told)
        assert int(told.stdout.split()[1]) < pages or parity
        old.write(partial(Txn.put, table="one", key=b"more", value=b""))
    old.close()
