"""Upgrades: golden stores are read bit for bit, other formats are refused, and a migration that is
killed leaves the old store or the new one."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixstore import Store, admin, cli, config
from prefixstore.errors import ConfigError, FormatError
from prefixstore.formats import FORMAT, INDEX_TABLES
from prefixstore.index import Txn
from prefixstore.keys import salt_digest
from prefixstore.ledger import DISK
from prefixstore.migrating import STEPS, Step, migrate, way
from prefixstore.namespace import MISS, Namespace
from prefixstore.rows import Row
from prefixstore.testing_data import content_of, identity_for, outputs, tokens_of
from prefixstore.warm_manifest import Manifest
from tests.golden import make
from tests.golden.migrant import POINTS, version_2, version_of
from tests.golden.unpacking import NAMES, unpack
from tests.store_helpers import Place, put_content, read_content, refs_of, start_child

pytest_plugins = ["tests.store_fixtures"]
V1 = "v1"  # the one that has everything


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, place: Place) -> tuple[Path, list[dict[str, Any]]]:
    return unpack(request.param, place.folder)


@pytest.fixture
def copy(place: Place) -> Path:
    return unpack(V1, place.folder)[0]


@pytest.fixture
def as_version_2() -> Iterator[None]:
    with version_2():
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """All files, but for locks and LMDB's table of readers."""
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock.mdb", ".lock")
    }


def opened(place: Place, folder: Path) -> Store:
    return Store.open(folder, memory_dir=str(place.memory_dir), create=False)


# ---------------------------------------------------------------------- golden stores
def test_a_golden_store_is_served_bit_for_bit(
    place: Place, golden: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, expected = golden
    with opened(place, folder) as store:
        for one in expected:
            ns = store.namespace_of(bytes.fromhex(one["name"]))
            ref = make.refs_of(ns, one["prompt"])[one["depth"]]
            assert ref.key.hex() == one["key"]
            out = outputs(ns.layout, 1)
            assert ns.get([ref], out) == [DISK], one
            assert hashlib.sha256(out[0]).hexdigest() == one["sha256"], one
            with store.index.read() as txn:
                row = Row.unpack(txn.get("chunk", ref.key) or b"")
            assert (row.tag.decode(), row.pinned) == (one["tag"], one["pinned"])
            assert (row.expires_s > 0, bool(row.flags & 4)) == (one["expires"], one["alone"])
            whole = make.refs_of(ns, one["prompt"])
            assert MISS not in ns.match(whole).tiers
            assert len(ns.match(whole).tiers) == len(whole)
        assert admin.verify(store).chunks["disk"] == len(expected)


def test_what_goes_with_the_chunks_of_a_golden_store_is_there(
    place: Place, golden: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, expected = golden
    with opened(place, folder) as store:
        ns = store.namespace(identity_for("golden", make.LAYOUT), make.LAYOUT)
        states = make.states_of(store, ns)
        assert {ns.name.hex(), states.name.hex()} <= {one["name"] for one in expected}
        tokens = [7, 7, 7, *tokens_of(5, 4, make.LAYOUT)]
        [segment] = ns.find_segments(tokens)
        assert (segment.start, segment.num_tokens, segment.alone) == (3, 128, True)
        noted = ns.staleness_of(make.refs_of(ns, "alone"))
        assert np.array_equal(np.array(noted), make.staleness().astype("<f2"), equal_nan=True)
        quota = store.quotas.of(DISK)
        assert quota.namespaces[ns.name] == 900_000
        assert quota.salts[salt_digest(make.SALT)] == 800_000


def test_names_of_the_newest_golden_store(place: Place, copy: Path) -> None:
    """Of a model that was retired, of a tenant, and of a warmed document."""
    names = {one["namespace"]: one["name"] for one in unpack(V1, place.folder)[1]}
    with opened(place, copy) as store:
        bumped = store.namespace(identity_for("bumped", make.LAYOUT), make.LAYOUT)
        assert bumped.name.hex() == names["bumped"] != identity_for("bumped").namespace_hex
        assert store.quotas.of(DISK).groups[bumped.name].limit_bytes == 700_000
        assert make.tenant_of(store).name.hex() == names["tenant"]
        [entry] = Manifest.of(copy, bytes.fromhex(names["kv"])).read()
        assert entry.name == "a.txt"


def test_a_golden_store_is_written_to(
    place: Place, golden: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, expected = golden
    for _ in range(2):
        with opened(place, folder) as store:
            ns = store.namespace(identity_for("golden", make.LAYOUT), make.LAYOUT)
            refs = refs_of(ns, 77, 20)
            put_content(ns, refs)
            assert store.flush()
            assert MISS not in read_content(ns, refs)
            report = admin.verify(store)
            assert report.sound, report
            assert report.chunks["disk"] == len(expected) + 20
            stored = json.loads((folder / "store.json").read_text())["format_version"]
            with store.index.read() as txn:
                assert txn.get_int("meta", FORMAT) == stored == config.FORMAT_VERSION


def records(store: Store) -> dict[tuple[str, bytes], bytes]:
    """The durable records; of rows not when they were written, nor where to."""
    found = {}
    with store.index.read() as txn:
        for table in set(INDEX_TABLES) - {"meta"}:
            for key, value in txn.scan(table):
                if table == "chunk":
                    value = value[:8] + bytes(4) + value[12:16] + bytes(8) + value[24:]
                found[table, key] = value
    return found


def slot_of(ns: Namespace, key: bytes) -> bytes:
    with ns.store.index.read() as txn:
        row = Row.unpack(txn.get("chunk", key) or b"")
    data = (ns.store.folder / f"disk-{row.slot_bytes}.slots").read_bytes()
    return data[row.slot * row.slot_bytes : (row.slot + 1) * row.slot_bytes]


def test_a_store_made_now_has_the_records_of_the_golden_one(place: Place, copy: Path) -> None:
    """Whoever breaks this changes the format: it needs a new version, a step and a golden store."""
    with opened(place, copy) as store:
        before = records(store)
        ns = store.namespace(identity_for("golden", make.LAYOUT), make.LAYOUT)
        slots = {ref.key: slot_of(ns, ref.key) for p in make.PROMPTS for ref in make.refs_of(ns, p)}
    with place.open(name="new") as store:
        ns = make.fill(store, named=False)["kv"]
        now = records(store)
        assert slots == {key: slot_of(ns, key) for key in slots}
    assert {table for table, _ in now} == set(INDEX_TABLES) - {"meta"}
    assert now == {name: before[name] for name in now if name in before}


# ---------------------------------------------------------------------- refusals
def set_version(folder: Path, version: int, **more: object) -> None:
    fields = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**fields, "format_version": version, **more}))


def test_settings_of_a_newer_format_are_refused(place: Place, copy: Path) -> None:
    set_version(copy, 2, new=[1])
    before = contents(copy)
    told = r"version 2, this prefixstore reads 1; nothing was changed .*upgrade prefixstore"
    with pytest.raises(FormatError, match=told):
        opened(place, copy)
    with pytest.raises(FormatError, match=told):
        migrate(copy)
    assert contents(copy) == before


def test_where_settings_and_index_differ_the_index_is_right(place: Place, copy: Path) -> None:
    set_version(copy, 0)
    with opened(place, copy) as store:
        assert admin.verify(store).sound
    assert json.loads((copy / "store.json").read_text())["format_version"] == 1
    set_version(copy, 0)
    (copy / "index" / "data.mdb").unlink()
    with pytest.raises(FormatError, match=r"version 0, .* no version before 1: restore"):
        opened(place, copy)
    with pytest.raises(FormatError, match="version 0, and no step leads from 0 to 1"):
        migrate(copy)


def test_an_index_of_another_format_is_refused(place: Place, copy: Path) -> None:
    """Also where the settings do not say so, as when a migration was killed after its commit."""
    with opened(place, copy) as store:
        store.index.write(lambda txn: txn.put_int("meta", FORMAT, 7))
    before = contents(copy)
    with pytest.raises(FormatError, match=r"version 7, .* reads 1; .*upgrade prefixstore"):
        opened(place, copy)
    with pytest.raises(FormatError, match=r"version 7, .* reads 1"):
        migrate(copy)
    assert contents(copy) == before


def test_a_row_of_another_version_is_named_and_dropped(place: Place, copy: Path) -> None:
    """Rows change with the format of the store only, so one of another version is damage."""
    with opened(place, copy) as store:
        ns = store.namespace(identity_for("golden", make.LAYOUT), make.LAYOUT)
        [ref] = make.refs_of(ns, "pinned")
        with store.index.read() as txn:
            row = txn.get("chunk", ref.key) or b""
        store.index.write(lambda txn: txn.put("chunk", ref.key, b"\2" + row[1:]))
        [told] = [text for text in admin.verify(store).accounting if ref.key.hex() in text]
        assert "version 1, but of 2" in told
        assert ns.get([ref], outputs(make.LAYOUT, 1)) == [MISS]
        admin.verify(store, fix=True)
        ns.put([ref], [content_of(ref.key, make.LAYOUT.payload_bytes)])
        assert read_content(ns, [ref]) != [MISS]
        assert admin.verify(store).sound


def test_what_is_found_and_known_is_said_of_a_row() -> None:
    with pytest.raises(ValueError, match="version 1, but of 9"):
        Row.unpack(b"\x09" + bytes(120))


# ---------------------------------------------------------------------- migrate
def test_today_there_is_nothing_to_do(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy)
    assert cli.main(["migrate", str(copy)]) == 0
    assert "has format version 1: nothing to do" in capsys.readouterr().out
    assert cli.main(["migrate", str(copy), "--json", "--to", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"found": 1, "target": 1, "steps": [], "done": False}
    assert contents(copy) == before
    assert len(STEPS) == config.FORMAT_VERSION - config.OLDEST_VERSION


@pytest.mark.parametrize(
    ("words", "told"), [(["--to", "2"], "only up to 1"), (["--to", "0"], "no way back to 0")]
)
def test_versions_that_cannot_be(
    copy: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["migrate", str(copy), *words]) == cli.REFUSED
    assert told in capsys.readouterr().err


def test_a_folder_without_a_store_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no store"):
        migrate(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("as_version_2")
@pytest.mark.parametrize("name", NAMES)
def test_an_older_store_is_refused_until_it_is_migrated(
    place: Place, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = unpack(name, place.folder)
    with pytest.raises(FormatError, match=r"version 1, .* reads 2; .*prefixstore migrate"):
        opened(place, folder)
    assert cli.main(["migrate", str(folder), "--dry-run"]) == 0
    assert "would go from format version 1 to 2:\n  rows of version 2" in capsys.readouterr().out
    with pytest.raises(FormatError, match="prefixstore migrate"):
        opened(place, folder)
    assert cli.main(["migrate", str(folder)]) == 0
    assert "has format version 2 now (it had 1)" in capsys.readouterr().out
    with opened(place, folder) as store:
        for one in expected:
            ns = store.namespace_of(bytes.fromhex(one["name"]))
            out = outputs(ns.layout, 1)
            assert ns.get([make.refs_of(ns, one["prompt"])[one["depth"]]], out) == [DISK]
            assert hashlib.sha256(out[0]).hexdigest() == one["sha256"]
        assert admin.verify(store).sound
    assert json.loads((folder / "store.json").read_text())["format_version"] == 2
    assert cli.main(["migrate", str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_new_store_is_of_the_newest_format(place: Place) -> None:
    with version_2():
        place.open().close()
        place.open(None, None).close()
    with pytest.raises(FormatError, match=r"version 2, .* reads 1"):
        place.open()


def test_an_index_that_was_removed_begins_anew(place: Place, copy: Path) -> None:
    """It has no version: the remedy for a damaged one."""
    with version_2():
        migrate(copy)
        shutil.rmtree(copy / "index")
        with opened(place, copy) as store:
            assert admin.verify(store).sound


def test_steps_are_found_in_order() -> None:
    def work(*_: object) -> None: ...

    steps = [Step(n, n + 1, str(n), work) for n in (3, 1, 2)]
    with version_2(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "FORMAT_VERSION", 4)
        assert [step.what for step in way(Path("x"), 1, 4, steps)] == ["1", "2", "3"]
        assert [step.what for step in way(Path("x"), 2, 3, steps)] == ["2"]
        assert way(Path("x"), 4, 4, steps) == ()
        with pytest.raises(FormatError, match="version 1, and no step leads from 2 to 4"):
            way(Path("x"), 1, 4, [steps[0], steps[1]])


def test_a_store_in_use_is_not_migrated(place: Place, copy: Path) -> None:
    code = (
        "import sys\nfrom prefixstore import Store\n"
        "with Store.open(sys.argv[1], memory_dir=sys.argv[2]):\n"
        "    print('open', flush=True)\n    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(copy), str(place.memory_dir)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with version_2(), pytest.raises(ConfigError, match="open in another process"):
            migrate(copy)
        child.communicate("\n")
    with version_2():
        assert migrate(copy).done


@pytest.mark.parametrize(("point", "version"), POINTS.items())
def test_killed_at_a_point(place: Place, copy: Path, point: str, version: int) -> None:
    with start_child("tests.golden.migrant", copy, point) as child:
        _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    assert version_of(copy, place.memory_dir, 24) == version
    with version_2():  # and it can be done, or done again
        migrate(copy)
    assert version_of(copy, place.memory_dir, 24) == 2
    assert not list(copy.glob(".store.json.*"))


def test_killed_at_random_instants() -> None:
    with start_child("tests.golden.migrant", "--kills", 8, "--seed", 1, V1) as child:
        told, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors
    assert told.startswith("8 kills: ")


def _put(txn: Txn, key: bytes, data: bytes) -> None:
    txn.put("chunk", key, data)


def test_the_harness_notices_a_half_migrated_store(place: Place, copy: Path) -> None:
    """Rows of which a third have changed, as if the step had not been in one transaction."""
    with opened(place, copy) as store:
        with store.index.read() as txn:
            rows = list(txn.scan("chunk"))
        for key, data in rows[::3]:
            store.index.write(partial(_put, key=key, data=b"\2" + data[1:]))
    with tempfile.TemporaryDirectory() as memory, pytest.raises(AssertionError):
        version_of(copy, Path(memory), 24)
