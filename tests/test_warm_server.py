"""Warming into a server, with the made-up engine of `tests.warm_made_up`: as a tenant, killed and
resumed, while the server is away, and all that is wrong told before an engine is started."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from prefixstore import Store, admin, warm_run, warm_store
from prefixstore import warm as warm_module
from prefixstore.errors import RemoteError, StoreError
from prefixstore.warm import Progress, WarmReport, warm
from prefixstore.warm_manifest import Manifest
from prefixstore.warm_run import MEASURING_TAG
from tests.serve.support import ALICE, BOB, Running, certificate, running, tokens_file
from tests.store_helpers import Place, start_child
from tests.warm_made_up import (
    DOCUMENTS,
    IDENTITY,
    LAYOUT,
    OWN_CHUNKS,
    PREAMBLE,
    MadeUp,
    check_chunks,
    check_store,
    host_of,
)

pytest_plugins = ["tests.store_fixtures"]
WAIT_S = 60.0


class Served:
    """A server with tenants, at an address that stays; it can be taken away."""

    def __init__(self, place: Place, sizes: Sequence[str] = ("4MiB", "16MiB"), **options: Any):
        self.place, self._sizes = place, sizes
        self._options = {"tokens": tokens_file(place.folder), **options}
        self._stack = ExitStack()
        self.token_file = place.folder / "alice"
        self.token_file.write_text(ALICE + "\n")
        self.up()

    def up(self) -> None:
        self.store: Store = self._stack.enter_context(self.place.open(*self._sizes))
        self.running: Running = self._stack.enter_context(running(self.store, **self._options))
        self._options["port"] = int(self.running.address.rpartition(":")[2] or 0)

    def down(self) -> None:
        self._stack.close()

    def options(self, **more: Any) -> dict[str, Any]:
        return {"store": self.running.address, "token_file": str(self.token_file), **more}

    def run(self, **more: Any) -> WarmReport:
        options = self.options(**more)
        documents = options.pop("documents", DOCUMENTS)
        return warm(options.pop("store"), "made-up", documents, preamble=PREAMBLE, **options)

    def check(self) -> None:
        """That the tenant has all, and nobody anything else."""
        with self.running.open(ALICE) as client:
            kept = check_chunks(client.namespace(IDENTITY, LAYOUT))
        assert self.store.flush()
        check_store(self.store, kept)


@pytest.fixture
def served(place: Place) -> Iterator[Served]:
    served = Served(place)
    yield served
    served.down()


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[MadeUp]:
    class Fresh(MadeUp):
        pass

    monkeypatch.setattr(warm_module, "_host", lambda: host_of(Fresh))
    monkeypatch.setattr(warm_run, "SETTLE_S", 0.2)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return Fresh


def test_documents_are_stored_and_measured(served: Served, made_up: type[MadeUp]) -> None:
    plan = served.run(dry_run=True)
    assert {(d.status, d.staleness) for d in plan.documents} == {("to store", "to measure")}
    assert plan.namespace == ""
    assert served.store.namespaces() == []
    report = served.run(tag="all", ttl_s=1000)
    served.check()
    assert {(d.status, d.staleness) for d in report.documents} == {("stored", "measured")}
    assert [d.stored_chunks for d in report.documents] == OWN_CHUNKS
    assert report.computed_tokens == plan.computed_tokens
    assert (report.store, report.notes) == (served.running.address, [])
    [record] = served.store.namespaces()
    assert report.namespace == record.identity.namespace_hex != IDENTITY.namespace_hex
    for chunk in admin.list_chunks(served.store):
        assert chunk.row.tag == b"all"
        assert 0 < chunk.row.expires_s - chunk.row.created_s <= 1002
    assert list(Path().iterdir()) == []  # nobody asked for a file


def test_a_second_run_starts_no_engine(served: Served, made_up: type[MadeUp]) -> None:
    first = served.run()
    made_up.__init__ = None  # type: ignore[method-assign,assignment]
    names = Path("names.jsonl")
    again = served.run(manifest=names)
    assert [(d.status, d.staleness) for d in again.documents] == [("skipped", "known")] * 7
    assert (again.engine_start_s, again.computed_tokens) == (None, 0)
    assert again.namespace == first.namespace
    assert [entry.name for entry in Manifest(names).read()] == [d.name for d in DOCUMENTS]
    assert {d.status for d in served.run(dry_run=True).documents} == {"skipped"}
    served.check()


def test_tenants_do_not_share(served: Served, made_up: type[MadeUp]) -> None:
    served.run(staleness=False)
    served.token_file.write_text(BOB)
    assert {d.status for d in served.run(dry_run=True).documents} == {"to store"}


@pytest.mark.parametrize("dies_at", [0, 4, 8, 20])
def test_an_interrupted_run_is_completed(
    served: Served, made_up: type[MadeUp], dies_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_run, "BATCH_PIECES", 3)
    made_up.die_at = dies_at
    made_up.drop = staticmethod(lambda prompt, chunk: prompt == dies_at - 1 and chunk > 4)
    with pytest.raises(KeyboardInterrupt):
        served.run()
    tags = {chunk.row.tag for chunk in admin.list_chunks(served.store)}
    assert MEASURING_TAG.encode() not in tags
    made_up.die_at, made_up.drop = -1, staticmethod(MadeUp.drop)
    served.run()
    served.check()


def test_a_killed_run_is_completed(served: Served, made_up: type[MadeUp]) -> None:
    with start_child("tests.warm_made_up", json.dumps(served.options()), 5) as child:
        _, errors = child.communicate(timeout=WAIT_S)
    assert child.returncode == -signal.SIGKILL, errors
    left = list(admin.list_chunks(served.store))
    measuring = [c for c in left if c.row.tag == MEASURING_TAG.encode()]
    assert 0 < len(measuring) < len(left)
    assert all(chunk.row.expires_s for chunk in measuring)
    report = served.run()
    states = [d.status for d in report.documents]
    assert set(states) == {"skipped", "stored"}
    assert states[:3] == ["skipped"] * 3  # its first batch was being measured
    with served.running.open(ALICE) as client:
        kept = check_chunks(client.namespace(IDENTITY, LAYOUT))
    kept["measuring"] = [chunk.key for chunk in measuring]
    check_store(served.store, kept)


def test_what_was_dropped_is_computed_again(served: Served, made_up: type[MadeUp]) -> None:
    made_up.drop = staticmethod(lambda prompt, chunk: prompt % 2 == 0 and chunk % 3 == 2)
    assert {d.status for d in served.run().documents} == {"stored"}
    served.check()


def once(prompt: int, work: Callable[[], None]) -> Callable[[Progress], None]:
    """Do something when so many prompts have been computed."""
    calls: list[Progress] = []

    def shown(progress: Progress) -> None:
        calls.append(progress)
        if len(calls) == prompt:
            work()

    return shown


@pytest.mark.parametrize("prompt", [2, 7, 14])
def test_a_server_that_is_started_again(served: Served, made_up: type[MadeUp], prompt: int) -> None:
    timer = threading.Timer(1.0, served.up)

    def restart() -> None:
        served.down()
        timer.start()

    report = served.run(progress=once(prompt, restart))
    timer.join(WAIT_S)
    assert {d.status for d in report.documents} == {"stored"}
    served.run()  # staleness of what could not be read just then
    served.check()


def test_a_server_that_stays_away(
    served: Served, made_up: type[MadeUp], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_store, "SERVER_PATIENCE_S", 0.2)
    with pytest.raises(RemoteError, match="what is stored stays; run again to go on"):
        served.run(progress=once(9, served.down))
    served.up()
    report = served.run()
    assert {d.status for d in report.documents} == {"skipped"}
    assert {d.staleness for d in report.documents} == {"measured"}


def test_without_a_disk_and_over_tls(place: Place, made_up: type[MadeUp], tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    served = Served(place, ("16MiB", "0"), tls_cert=cert, tls_key=key)
    try:
        served.run(ca_file=cert)
        assert {d.status for d in served.run(ca_file=cert).documents} == {"skipped"}
        with served.running.open(ALICE, ca_file=cert) as client:
            kept = check_chunks(client.namespace(IDENTITY, LAYOUT))
        check_store(served.store, kept)
        with pytest.raises(StoreError, match="give the certificates it is signed by as --ca-file"):
            served.run()
    finally:
        served.down()


def test_mistakes_are_told_before_anything_starts(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(warm_module, "_host", None)
    monkeypatch.setattr(warm_module, "_tokenise", None)
    (tmp_path / "other").write_text("x" * 40)
    (tmp_path / "pair").write_text(f"alice:{ALICE}")
    address = served.running.address
    for options, message in (
        ({"token_file": None}, "wants a token .give --token-file"),
        ({"token_file": tmp_path / "other"}, "does not take the token in .*other"),
        ({"token_file": tmp_path / "pair"}, "does not hold one token"),
        ({"token_file": tmp_path / "none"}, "cannot read the token file"),
        ({"ca_file": tmp_path / "none"}, "cannot use .*none"),
        ({"memory": "1GiB"}, "memory, disk or memory_dir for a server"),
        ({"manifest": tmp_path / "none" / "names"}, "cannot write"),
        ({"store": address.replace("http:", "https:")}, "try http://"),
        ({"store": f"dir:{tmp_path / 'kv'}"}, "a token or ca_file for the folder"),
        ({"store": "unix:nowhere"}, "cannot reach unix:/.*nowhere"),
    ):
        with pytest.raises(StoreError, match=message):
            served.run(**options)
    served.down()
    with pytest.raises(RemoteError, match=r"cannot reach .*prefixstore serve"):
        warm(address, "made-up", DOCUMENTS, token_file=served.token_file)
    assert not (tmp_path / "kv").exists()


def test_a_server_that_only_reads(place: Place, made_up: type[MadeUp]) -> None:
    served = Served(place)
    served.run(staleness=False)
    served.down()
    served = Served(place, read_only=True)
    try:
        assert {d.status for d in served.run(dry_run=True).documents} == {"skipped"}
        with pytest.raises(StoreError, match="takes nothing new"):
            served.run()
    finally:
        served.down()


def test_a_folder_by_url(place: Place, made_up: type[MadeUp]) -> None:
    folder = place.folder / "store"
    place.open().close()
    report = warm(f"dir:{folder}", "made-up", DOCUMENTS[:2], preamble=PREAMBLE, staleness=False)
    assert report.store == str(folder)
    assert [d.status for d in report.documents] == ["stored"] * 2
    assert len(list(folder.glob("warm-*.jsonl"))) == 1
