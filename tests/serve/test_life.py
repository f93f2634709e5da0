"""Times to live, retired and bumped models: of a folder and of a server, and of its tenants."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixstore import Namespace, PutState, Store, admin, registry, retiring
from prefixstore.client.caller import RefusedError
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.errors import StoreClosedError, StoreError
from prefixstore.interface import NamespaceLike
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.registry import GENERATION_FIELD, NamespaceRecord
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from prefixstore.testing_life import LastingFactory, LifeContract
from tests.serve.raw import ask
from tests.serve.support import ADMIN, ALICE, BOB, running, tokens_file
from tests.store_helpers import ROOT, Place, wait_for

pytest_plugins = ["tests.store_fixtures"]
SIZE = CONTRACT_LAYOUT.payload_bytes


class Counted(LifeContract):
    store: Store

    def chunks(self) -> int:
        return sum(1 for _ in admin.list_chunks(self.store))


class TestFolder(Counted):
    """In this process; what was put is on disk and in memory."""

    @pytest.fixture
    def namespace(self, place: Place) -> Iterator[LastingFactory]:
        with place.open("4MiB", "4MiB") as self.store:
            yield lambda label: self.store.namespace(identity_for(label), CONTRACT_LAYOUT)
            assert admin.verify(self.store).sound

    def settle(self, namespace: NamespaceLike) -> None:
        assert self.store.flush()


class TestFolderOnDisk(TestFolder):
    """What was put is on disk only."""

    def settle(self, namespace: NamespaceLike) -> None:
        admin.empty_memory(self.store)


class TestServer(Counted):
    """Over TCP, as a tenant, in memory only."""

    @pytest.fixture
    def namespace(self, place: Place, tmp_path: Path) -> Iterator[LastingFactory]:
        with (
            place.open("4MiB", 0) as self.store,
            running(self.store, tokens=tokens_file(tmp_path)) as server,
            server.open(ALICE) as client,
        ):
            yield lambda label: client.namespace(identity_for(label), CONTRACT_LAYOUT)
            assert admin.verify(self.store).sound


def fill(ns: NamespaceLike, count: int) -> list[Any]:
    refs = ns.chain(tokens_of(1, count)).refs()
    states = ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
    assert states == [PutState.STORED] * count
    return refs


# ---------------------------------------------------------------------- tenants
def test_nobody_ends_what_is_anothers(place: Place, tmp_path: Path) -> None:
    """Bob knows Alice's namespace and chunks; `local` is another tenant as well."""
    with (
        place.open("4MiB", "4MiB") as store,
        running(store, tokens=tokens_file(tmp_path)) as server,
        server.open(ALICE) as alice,
        server.open(BOB) as bob,
        server.open(ADMIN) as local,
    ):
        hers = alice.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = fill(hers, 4)
        for client in (bob, local):
            ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            assert ns.set_ttl(refs, 0.001) == 0
            fill(ns, 2)
            answers = []
            for name in (hers.name, bytes(16)):
                for what in ("retire", "bump"):
                    with pytest.raises(RefusedError, match="no such namespace") as caught:
                        client.caller.json(
                            "POST", f"/v1/namespaces/{name.hex()}/{what}", {}, deadline_s=5
                        )
                    answers.append(str(caught.value))
            assert len(set(answers)) == 1
            assert ns.retire() == 2
        outs = outputs(CONTRACT_LAYOUT, 4)
        assert MISS not in hers.get(refs, outs)
        assert outs == [content_of(ref.key, SIZE) for ref in refs]


def test_a_tenants_bumped_model_is_its_own_and_within_its_quota(
    place: Place, tmp_path: Path
) -> None:
    with (
        place.open("4MiB", 0) as store,
        running(store, tokens=tokens_file(tmp_path)) as server,
        server.open(ALICE) as alice,
    ):
        ns = alice.namespace(identity_for("a"), CONTRACT_LAYOUT)
        new = ns.bump()
        groups = store.quotas.of(MEMORY).groups
        assert new.name in groups
        assert ns.name not in groups
        shown = alice.caller.json("GET", "/v1/namespaces", {}, deadline_s=5)["namespaces"]
        assert [one["namespace"] for one in shown] == [new.name.hex()]
        assert GENERATION_FIELD not in json.dumps(shown)
        assert alice.namespace_of(new.name).name == new.name
        forged = json.loads(new.identity.to_json())
        body = json.dumps({"identity": forged, "layout": CONTRACT_LAYOUT.to_json()}).encode()
        header = f"Bearer {ALICE}"
        assert ask(server.address, "POST", "/v1/namespaces", body, Authorization=header)[0] == 400


def test_retired_models_leave_room_for_others(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the namespaces that a tenant may have."""
    monkeypatch.setattr("prefixstore.serve.limits.NAMESPACES_PER_TENANT_MAX", 2)
    with (
        place.open("4MiB", 0) as store,
        running(store, tokens=tokens_file(tmp_path)) as server,
        server.open(ALICE) as alice,
    ):
        spaces = [alice.namespace(identity_for(label), CONTRACT_LAYOUT) for label in "ab"]
        with pytest.raises(RefusedError, match="you have 2"):
            alice.namespace(identity_for("c"), CONTRACT_LAYOUT)
        spaces[0].retire()
        alice.namespace(identity_for("c"), CONTRACT_LAYOUT)


def test_only_a_server_that_writes_ends_anything(place: Place) -> None:
    with (
        place.open("4MiB", 0) as store,
        running(store) as server,
        running(store, read_only=True) as other,
    ):
        with server.open() as client:
            ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            refs = fill(ns, 2)
        with other.open() as client:
            same = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            for change in (same.retire, same.bump, lambda: same.set_ttl(refs, 1)):
                with pytest.raises(RefusedError, match="only reads"):
                    change()


def test_a_client_that_was_not_told(place: Place) -> None:
    """It has the model open while somebody else retires it: refused, and then it starts anew."""
    with (
        place.open("4MiB", "4MiB") as store,
        running(store) as server,
        server.open() as one,
        server.open() as two,
    ):
        mine = one.namespace(identity_for("a"), CONTRACT_LAYOUT)
        theirs = two.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = fill(mine, 3)
        assert theirs.match(refs).num_chunks == 3
        new = mine.bump()
        for call in (lambda: theirs.match(refs), lambda: fill(theirs, 2)):
            with pytest.raises(StoreClosedError, match="open it again"):
                call()
        assert theirs.get(refs, outputs(CONTRACT_LAYOUT, 3)) == [MISS] * 3
        assert two.namespace(identity_for("a"), CONTRACT_LAYOUT).name == new.name
        # An engine of the host, which has the folder open.
        assert store.namespace(identity_for("a"), CONTRACT_LAYOUT).name == new.name


# ---------------------------------------------------------------------- processes and crashes
def test_other_processes_notice(place: Place) -> None:
    """A process with the folder open is refused soon; one that opens it later has the new name."""
    with place.open("4MiB", "4MiB") as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = fill(ns, 3)
        other = (
            "import sys; from tests.serve.test_life import retire_elsewhere as r; r(sys.argv[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", other, str(store.folder)], cwd=ROOT, timeout=60,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        wait_for(lambda: refused(ns, refs), "the refusal")
        new = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert done.stdout.strip() == new.name.hex()
        assert new.match(refs).num_chunks == 0
        wait_for(lambda: not list(admin.list_chunks(store)), "the chunks to go")
        assert admin.verify(store).sound


def refused(ns: Namespace, refs: list[Any]) -> bool:
    try:
        ns.match(refs)
    except StoreClosedError:
        return True
    return False


def retire_elsewhere(folder: str) -> None:
    """Run in a process of its own."""
    with Store.open(folder) as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        print(ns.bump().name.hex())


@pytest.mark.parametrize("tier", [MEMORY, DISK])
def test_what_a_crash_left_is_swept_up(place: Place, tier: int) -> None:
    """Between the end of the name and the end of the chunks."""
    with place.open("4MiB", "4MiB" if tier == DISK else 0) as store:
        ns, other = (store.namespace(identity_for(label), CONTRACT_LAYOUT) for label in "ab")
        fill(ns, 20)
        theirs = fill(other, 5)
        store.flush()
        if tier == DISK:
            admin.empty_memory(store)
        NamespaceRecord.retire(store.index, ns.name)
    with place.open(None, None) as store:
        wait_for(lambda: len(list(admin.list_chunks(store))) == 5, "the sweep")
        assert store.namespace(identity_for("b"), CONTRACT_LAYOUT).match(theirs).num_chunks == 5
        assert admin.verify(store).sound


def test_a_put_under_way_when_its_model_ends(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are committed after the sweep, and go with the next one."""
    from prefixstore import filling

    go, began = threading.Event(), threading.Event()
    real = filling.fill

    def slow(*args: Any) -> Any:
        began.set()
        assert go.wait(30)
        return real(*args)

    monkeypatch.setattr(filling, "fill", slow)
    with place.open("4MiB", "4MiB") as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        putting = threading.Thread(target=lambda: fill(ns, 3))
        putting.start()
        assert began.wait(30)
        new = ns.bump()
        go.set()
        putting.join(30)
        assert new.match(new.chain(tokens_of(1, 3))).num_chunks == 0
        wait_for(lambda: not list(admin.list_chunks(store)), "the sweep")
        assert admin.verify(store).sound


def test_retired_models_that_are_remembered_have_a_bound(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "GENERATIONS_MAX", 3)
    with place.open("4MiB", 0) as store:
        for label in "abcdef":
            assert store.namespace(identity_for(label), CONTRACT_LAYOUT).retire() == 0
        with store.index.read() as txn:
            assert sum(1 for _ in txn.scan("meta", b"generation")) == 3
            assert txn.count("namespace") == 0


def test_a_forgotten_model_does_not_get_a_name_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is in use is not forgotten; one that is entered anew stays what it is then."""
    monkeypatch.setattr(registry, "GENERATIONS_MAX", 3)
    with place.open("4MiB", "4MiB") as store:

        def entered(label: str) -> bytes:
            return store.namespace(identity_for(label), CONTRACT_LAYOUT).name

        def retire(label: str) -> bytes:
            ns = store.namespace(identity_for(label), CONTRACT_LAYOUT)
            ns.retire()
            return ns.name

        never = entered("never retired")
        bumped = store.namespace(identity_for("bumped"), CONTRACT_LAYOUT).bump()
        refs = fill(bumped, 2)
        names = {label: {retire(label)} for label in "abcdefg"}
        assert entered("never retired") == never
        again = store.namespace(identity_for("bumped"), CONTRACT_LAYOUT)
        assert (again.name, again.match(refs).num_chunks) == (bumped.name, 2)
        for label in "abcdefg" * 3:
            name = entered(label)
            assert name not in names[label]
            names[label].add(name)
            for other in "hijk":  # forget some, and retire others
                retire(other)
            assert retire(label) == name
        assert entered("bumped") == bumped.name
        for number in (5, 6):  # given by a server, to which this store is in front
            numbered = registry._numbered(identity_for("y"), number)
            assert store.namespace(numbered, CONTRACT_LAYOUT).name == numbered.namespace


def test_the_sweep_knows_what_is_entered_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is entered, and stored for, while the sweep looks around keeps its chunks."""
    with place.open("4MiB", 0) as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = fill(ns, 3)
        for _ in range(3):
            assert store.on_keeper(lambda: retiring.sweep(store)) == 0
        assert ns.match(refs).num_chunks == 3


def test_command_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from prefixstore import cli

    folder = str(place.folder / "store")
    with place.open("4MiB", 0) as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        fill(ns, 3)
        name = ns.name.hex()
        assert cli.main(["ttl", folder, "--set", "1h", "--namespace", name]) == 0
        assert "3 chunks expire" in capsys.readouterr().out
        assert {one.row.expires_s > 0 for one in admin.list_chunks(store)} == {True}
        assert cli.main(["ttl", folder, "--set", "never", "--namespace", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"chunks": 3}
        assert {one.row.expires_s for one in admin.list_chunks(store)} == {0}
        assert cli.main(["retire", folder, "--namespace", name[:8], "--bump", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        new = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert told == {"retired": name, "chunks": 3, "namespace": new.name.hex()}
        assert cli.main(["retire", folder, "--namespace", new.name.hex()]) == 0
        assert "0 chunks" in capsys.readouterr().out
        for wrong in (["--namespace", name], ["--namespace", "zz"]):
            assert cli.main(["retire", folder, *wrong]) in (1, 2)
            assert capsys.readouterr().err
        assert cli.main(["ttl", folder, "--set", "soon", "--namespace", name]) == 2
        assert store.namespaces() == []


def test_errors_are_errors_of_the_store(place: Place) -> None:
    with place.open("4MiB", 0) as store, running(store) as server, server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert isinstance(ns, RemoteNamespace)
        for fields in ({}, {"ttl_s": "1"}, {"ttl_s": -1}, {"ttl_s": True}):
            with pytest.raises(StoreError):
                client.caller.json(
                    "POST", "/v1/ttl", {"namespace": ns.name.hex(), **fields}, deadline_s=5
                )
        with pytest.raises(StoreError):
            client.caller.json("POST", "/v1/namespaces/zz/retire", {}, deadline_s=5)
        assert ns.match([]).num_chunks == 0
