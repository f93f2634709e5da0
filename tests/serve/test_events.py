"""Server-sent events: who hears what, and what happens to who listens slowly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prefixstore import Store, admin, journal
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.index import Txn
from prefixstore.journal import Change
from prefixstore.serve import events
from prefixstore.serve.eyes import EYES
from prefixstore.serve.run import ServeOptions
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from tests.serve.raw import ask
from tests.serve.sse import Ears
from tests.serve.support import ADMIN, ALICE, BOB, Running, running, tokens_file
from tests.store_helpers import wait_for

pytest_plugins = ["tests.store_fixtures"]
SIZE = CONTRACT_LAYOUT.payload_bytes
_PUT_ELSEWHERE = """
import sys
from prefixstore import Store
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, tokens_of
with Store.open(sys.argv[1]) as store:
    ns = store.namespace(identity_for("engine"), CONTRACT_LAYOUT)
    refs = ns.chain(tokens_of(7, 2)).refs()
    ns.put(refs, [content_of(ref.key, CONTRACT_LAYOUT.payload_bytes) for ref in refs])
"""


def status(server: Running) -> int:
    with Ears(server.address) as ears:
        return ears.status


def put(ns: RemoteNamespace, seed: int, count: int) -> list[str]:
    refs = ns.chain(tokens_of(seed, count)).refs()
    ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
    return [ref.key.hex() for ref in refs]


def test_what_happens_to_chunks_is_told_in_order(server: Running, ns: RemoteNamespace) -> None:
    with Ears(server.address) as ears:
        assert ears.status == 200
        assert b"content-type: text/event-stream" in ears.head
        assert ears.next()[0] == "ready"
        keys = put(ns, 1, 3)
        heard = ears.until("written")
        stored = [event for event in heard if event[0] == "stored"]
        assert [key for _, told in stored for key in told["keys"]] == keys
        assert [depth for _, told in stored for depth in told["depths"]] == [0, 1, 2]
        assert {(told["tier"], told["namespace"]) for _, told in stored} == {
            ("memory", ns.name.hex())
        }
        assert heard[-1][1]["tier"] == "disk"
        store = server.server.state.store
        admin.empty_memory(store)
        left = ears.until("removed")[-1][1]
        assert (left["tier"], left["elsewhere"]) == ("memory", True)
        refs = ns.chain(tokens_of(1, 3)).refs()
        ns.get(refs[:1], outputs(CONTRACT_LAYOUT, 1))  # from disk: it is copied to memory
        assert ears.until("promoted")[-1][1]["keys"] == keys[:1]


def test_a_prompt_that_is_not_found_is_told_with_the_reason(
    server: Running, ns: RemoteNamespace
) -> None:
    put(ns, 1, 2)
    with Ears(server.address, "?kinds=miss") as ears:
        ears.next()
        chain = ns.chain([*tokens_of(1, 2), *tokens_of(9, 1)])
        assert ns.match(chain).num_chunks == 2
        kind, told = ears.next()
        assert kind == "miss"
        assert (told["why"], told["depth"], told["asked_chunks"]) == ("absent", 2, 3)
        assert told["key"] == chain.keys[2].hex()
        put(ns, 3, 1)  # another kind: not asked for
        ns.get(ns.chain(tokens_of(8, 1)).refs(), outputs(CONTRACT_LAYOUT, 1))
        assert ears.next()[1]["depth"] == 0


def test_what_another_process_stores_is_told_too(server: Running, ns: RemoteNamespace) -> None:
    with Ears(server.address) as ears:
        ears.next()
        folder = str(server.server.state.store.folder)
        subprocess.run([sys.executable, "-c", _PUT_ELSEWHERE, folder], check=True, timeout=60)
        told = ears.until("stored")[-1][1]
    other = server.server.state.store.namespace(identity_for("engine"), CONTRACT_LAYOUT)
    assert told["keys"][0] == other.chain(tokens_of(7, 2)).keys[0].hex()


def test_a_tenant_hears_of_its_own_chunks_only(store: Store, tmp_path: Path) -> None:
    with running(store, tokens=tokens_file(tmp_path)) as server:
        assert status(server) == 401
        listeners = {t: Ears(server.address, token=t) for t in (ALICE, BOB, ADMIN)}
        for one in listeners.values():
            one.next()
        mine = {}
        for token in (ALICE, BOB, ADMIN):
            with server.open(token) as client:
                ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
                mine[token] = (ns.name.hex(), put(ns, 1, 2))
                ns.match(ns.chain(tokens_of(5, 1)))
        for token, ears in listeners.items():
            heard = [*ears.until("written"), *ears.until("miss")]
            assert {told["namespace"] for _, told in heard} == {mine[token][0]}
            keys = [key for kind, told in heard if kind == "stored" for key in told["keys"]]
            assert keys == mine[token][1]
            ears.close()
        for query in (f"?namespace={mine[BOB][0]}", "?namespace=" + "00" * 16):
            code, told = ask(server.address, "GET", f"/v1/events{query}",
                               Authorization=f"Bearer {ALICE}")  # fmt: skip
            assert (code, told["error"]["code"]) == (404, "namespace")


def test_listeners_have_a_bound_and_a_query_is_checked(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LISTENERS_OF_A_TENANT_MAX", 2)
    assert ask(server.address, "GET", "/v1/events?kinds=all")[0] == 400
    assert ask(server.address, "GET", "/v1/events?namespace=zz")[0] == 400
    with Ears(server.address), Ears(server.address):
        assert status(server) == 429
        monkeypatch.setattr(events, "LISTENERS_MAX", 2)
        assert status(server) == 503
    hub = server.server.app[EYES].hub
    wait_for(lambda: not hub.listeners, "who has gone listens no more")
    with Ears(server.address) as ears:
        assert ears.status == 200


def test_who_listens_slowly_is_told_how_much_it_missed_and_goes_on(server: Running) -> None:
    """The truth: what was offered less what came."""
    changes = [Change(True, 1, False, 4096, i, bytes(16), bytes(16)) for i in range(2)]
    changes[1] = changes[1]._replace(slot_bytes=8192)  # so that the two are not one message
    hub = server.server.app[EYES].hub
    rounds = 4000

    async def flood() -> None:
        for _ in range(rounds):
            hub.changed("", changes)

    async def offer() -> None:
        hub.changed("", changes[:1])

    with Ears(server.address, size=4096) as ears:
        ears.next()
        server.on_loop(flood())  # nothing is sent meanwhile: the loop is busy with this
        heard = ears.until("missed")
        came = sum(len(told["keys"]) for kind, told in heard if kind == "stored")
        assert came == events.QUEUE_MAX
        assert heard[-1][1]["chunks"] == 2 * rounds - came
        server.on_loop(offer())
        assert ears.next()[0] == "stored"


def test_a_follower_that_falls_behind_says_so(
    store: Store, server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More changes in one transaction than the journal keeps."""
    with Ears(server.address, "?kinds=missed") as ears:
        ears.next()

        def flood(txn: Txn) -> None:
            for i in range(journal.CHANGES_MAX + 5):
                journal.note(txn, True, 1, i.to_bytes(16, "big"), ns.name, 4096, 0)

        store.live.write(flood)
        assert ears.next() == ("missed", {"chunks": None})


def test_a_stream_ends_when_the_server_stops(store: Store) -> None:
    server = Running(store, ServeOptions())
    ears = Ears(server.address)
    ears.next()
    server.stop()
    with pytest.raises(EOFError):
        ears.next()
    ears.close()
