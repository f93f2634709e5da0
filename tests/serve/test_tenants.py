"""Tenants: attempts to read, find, delete, hold, pin or evict what is another's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixstore import Layout, Roi, Store, owned, wire
from prefixstore.client.caller import RefusedError
from prefixstore.client.connection import finish
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.errors import ConfigError, RemoteError
from prefixstore.keeper import Keeper
from prefixstore.keys import ChunkRef
from prefixstore.ledger import DISK
from prefixstore.namespace import MISS, Namespace
from prefixstore.putting import PutState
from prefixstore.serve.auth import MARK_FIELD, read_tokens
from prefixstore.slots import SlotFile
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from tests.serve.raw import ask
from tests.serve.support import ADMIN, ALICE, BOB, Running, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]
PAYLOAD = CONTRACT_LAYOUT.payload_bytes
# Runs of 16 KiB, also of one head: what is sent by the kernel to the tenant `local`.
BIG = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=4096)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("2MiB", 0) as store:
        yield store


@pytest.fixture
def server(store: Store, tmp_path: Path) -> Iterator[Running]:
    with running(store, tokens=tokens_file(tmp_path)) as server:
        yield server


@pytest.fixture
def alice(server: Running) -> Iterator[RemoteNamespace]:
    with server.open(ALICE) as client:
        yield client.namespace(identity_for("a"), CONTRACT_LAYOUT)


@pytest.fixture
def bob(server: Running) -> Iterator[RemoteNamespace]:
    with server.open(BOB) as client:
        yield client.namespace(identity_for("a"), CONTRACT_LAYOUT)


def put(ns: RemoteNamespace, refs: list[ChunkRef]) -> list[PutState]:
    return ns.put(refs, [content_of(ref.key, PAYLOAD) for ref in refs])


def again(ns: RemoteNamespace, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Renew a lease."""
    return finish(ns.calls._json("POST", path, fields))


def held(ns: RemoteNamespace, refs: list[ChunkRef]) -> int:
    """How many chunks a tenant reads, each right."""
    outs = outputs(CONTRACT_LAYOUT, len(refs))
    tiers = ns.get(refs, outs)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        assert tier == MISS or out == content_of(ref.key, PAYLOAD)
    return sum(tier != MISS for tier in tiers)


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {ALICE}", ALICE, f"Bearer {ALICE}x",
     f"Bearer {ALICE[:-1]}", f"Bearer {ALICE.upper()}"],
)  # fmt: skip
def test_without_its_token_nobody_gets_anything(server: Running, header: str) -> None:
    for method, path in (("POST", "/v1/match"), ("GET", "/metrics"), ("GET", "/v1/namespaces"),
                         ("POST", "/v1/drain"), ("POST", "/v1/nothing")):  # fmt: skip
        status, answer = ask(server.address, method, path, Authorization=header)
        assert (status, answer["error"]["code"]) == (401, "token")
    status, _ = ask(server.address, "GET", "/v1/namespaces", Authorization=f"bearer  {ALICE}")
    assert status == 200
    with server.open("wrong-token-wrong-token") as client, pytest.raises(RemoteError):
        client.namespace(identity_for("a"), CONTRACT_LAYOUT)


def test_the_same_prompt_is_another_chunk(alice: RemoteNamespace, bob: RemoteNamespace) -> None:
    """Nor does the engine of the host see it, or does a tenant see the engine's."""
    tokens = tokens_of(1, 40)
    mine = alice.chain(tokens).refs()
    assert put(alice, mine) == [PutState.STORED] * 40
    theirs = bob.chain(tokens)
    assert not {ref.key for ref in mine} & set(theirs.keys)
    assert bob.match(theirs).num_chunks == 0
    assert bob.find_segments(tokens) == []
    assert alice.find_segments(tokens)[0].num_tokens == len(tokens)


def test_a_stolen_key_opens_nothing(
    store: Store, alice: RemoteNamespace, bob: RemoteNamespace, server: Running
) -> None:
    """Bob knows Alice's keys and preimages, and still reads, finds and changes nothing."""
    mine = alice.chain(tokens_of(2, 4)).refs()
    put(alice, mine)
    for stolen in (mine, [ref._replace(preimage=b"") for ref in mine]):
        assert bob.match(stolen).num_chunks == 0
        assert held(bob, stolen) == 0
        assert bob.lease(stolen, [1] * 4)[1] == 0
        assert (bob.delete(stolen), bob.pin(stolen), bob.prefetch(stolen)) == (0, 0, 0)
        assert bob.explain(stolen)["missing"]["why"] == "absent"
        assert bob.staleness_of(stolen) == [None] * 4
    assert held(alice, mine) == 4
    with server.open(ADMIN) as client:
        local = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert (held(local, mine), local.delete(mine)) == (0, 0)
    engine = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    assert engine.match(mine).num_chunks == 0
    assert engine.get(mine, outputs(CONTRACT_LAYOUT, 4)) == [MISS] * 4


def test_a_stolen_namespace_is_unknown(
    alice: RemoteNamespace, bob: RemoteNamespace, server: Running
) -> None:
    """Another's namespace gives the same answer as one that is not there."""
    mine = alice.chain(tokens_of(3, 2)).refs()
    put(alice, mine)
    answers = []
    for name in (alice.name, bytes(16)):
        fields = {"namespace": name.hex()}
        body = wire.pack_request(fields, wire.pack_refs(mine))
        for path in ("/v1/match", "/v1/get", "/v1/delete", "/v1/pin", "/v1/leases", "/v1/explain"):
            answers.append(
                ask(server.address, "POST", path, body, Authorization=f"Bearer {BOB}",
                    Content_Type=wire.CONTENT_TYPE)
            )  # fmt: skip
    assert {status for status, _ in answers} == {404}
    assert len({str(answer) for _, answer in answers}) == 1
    assert held(alice, mine) == 2


def test_a_mark_cannot_be_brought_along(alice: RemoteNamespace, server: Running) -> None:
    forged = replace(identity_for("a"), forward=f'{{"{MARK_FIELD}":"{"0" * 32}"}}')
    for token in (BOB, ADMIN):
        with server.open(token) as client, pytest.raises(ConfigError, match=MARK_FIELD):
            client.namespace(forged, CONTRACT_LAYOUT)


def test_a_namespace_is_found_again_by_its_name(server: Running) -> None:
    """As the workers of an engine do, which are told no more."""
    identity = replace(identity_for("a"), forward='{"activation":"silu","eps":1e-06}')
    for token in (ALICE, ADMIN):
        with server.open(token) as client:
            ns = client.namespace(identity, CONTRACT_LAYOUT)
            again = client.namespace_of(ns.name)
            assert (again.name, again.identity, again.layout) == (ns.name, ns.identity, ns.layout)
    with server.open(BOB) as client, pytest.raises(RemoteError, match="no namespace"):
        client.namespace_of(ns.name)


def test_leases_are_their_holders(alice: RemoteNamespace, bob: RemoteNamespace) -> None:
    mine = alice.chain(tokens_of(4, 2)).refs()
    put(alice, mine)
    lease, count = alice.lease(mine, alice.match(mine).tiers)
    assert count == 2
    with pytest.raises(RefusedError, match="no such lease"):
        again(bob, f"/v1/leases/{lease.lease_id.decode()}", {})
    bob.release(lease)
    answer = again(alice, f"/v1/leases/{lease.lease_id.decode()}", {"duration_s": 50})
    assert answer["held"] == 2
    alice.release(lease)
    with pytest.raises(RefusedError, match="no such lease"):
        again(alice, f"/v1/leases/{lease.lease_id.decode()}", {})


def test_one_tenant_does_not_evict_another(
    alice: RemoteNamespace, bob: RemoteNamespace, server: Running
) -> None:
    """However much Bob stores, under however many models and salts, only his own gives way."""
    mine = alice.chain(tokens_of(5, 20)).refs()
    put(alice, mine)
    with server.open(BOB) as client:
        models = [client.namespace(identity_for(f"m{i}"), CONTRACT_LAYOUT) for i in range(4)]
        for round_ in range(12):
            ns = models[round_ % 4]
            refs = ns.chain(tokens_of(100 + round_, 60), salt=b"%d" % round_).refs()
            assert PutState.STORED in put(ns, refs)
    assert held(alice, mine) == 20
    with server.open(BOB) as client:
        spaces = client.caller.json("GET", "/v1/namespaces", {}, deadline_s=10)["namespaces"]
    assert len(spaces) == 5
    assert MARK_FIELD not in str(spaces)


def test_a_quota_is_kept_over_all_models_and_salts(
    store: Store, tmp_path: Path, place: Place
) -> None:
    size = CONTRACT_LAYOUT.slot_bytes
    tokens = tokens_file(tmp_path, f"alice:{ALICE}:{10 * size}\nbob:{BOB}\n")
    with running(store, tokens=tokens) as server, server.open(ALICE) as client:
        for label in "abcd":
            ns = client.namespace(identity_for(label), CONTRACT_LAYOUT)
            for salt in (b"", b"x", b"y"):
                put(ns, ns.chain(tokens_of(7, 5), salt=salt).refs())
        with store.live.read() as txn:
            used = [int.from_bytes(value, "little") for _, value in txn.scan("usage", b"n")]
        assert 0 < sum(used) <= 10 * size


def test_only_local_sees_numbers_and_drains(server: Running) -> None:
    for token, expected in ((ALICE, 403), (ADMIN, 200)):
        header = f"Bearer {token}"
        assert ask(server.address, "GET", "/metrics", Authorization=header)[0] == expected
        assert ask(server.address, "POST", "/v1/drain", Authorization=header)[0] == expected


def test_a_stolen_key_costs_what_an_absent_one_does(
    alice: RemoteNamespace, bob: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of an answer tells nothing: no slot is read, or marked as used, for a stranger."""
    mine = alice.chain(tokens_of(8, 20)).refs()
    put(alice, mine)
    seen: list[str] = []
    for name in ("read", "send", "view"):
        real = getattr(SlotFile, name)

        def spy(*args: Any, real: Any = real, name: str = name) -> Any:
            seen.append(name)
            return real(*args)

        monkeypatch.setattr(SlotFile, name, spy)
    monkeypatch.setattr(Keeper, "touched", lambda *_: seen.append("touched"))
    roi = Roi(0, 1, 0, 1)
    assert (held(bob, mine), bob.match(mine).num_chunks) == (0, 0)
    bob.get(mine, outputs(CONTRACT_LAYOUT, 20, roi), roi)
    bob.lease(mine, [1] * 20)
    assert seen == []
    assert held(alice, mine) == 20
    assert {"touched"} < set(seen)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("alice:short\n", "at least 16"),
        ("alice\n", "tenant:token"),
        (f"al ice:{ALICE}\n", "tenant:token"),
        (f"alice:{ALICE}\nalice:{BOB}\n", "twice"),
        (f"alice:{ALICE}\nbob:{ALICE}\n", "twice"),
        (f"alice:{ALICE}:2MiB\n", "may be 90%"),
        (f"local:{ALICE}:1MiB\n", "none for local"),
        (f"alice:{ALICE}:much\n", "not a size"),
        ("# nobody\n", "has 0 tenants"),
    ],
)
def test_a_bad_tokens_file_is_refused(store: Store, tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        read_tokens(Path(tokens_file(tmp_path, text)), store)
    assert ALICE not in str(caught.value)


def test_a_tokens_file_others_may_read_is_refused(store: Store, tmp_path: Path) -> None:
    path = Path(tokens_file(tmp_path))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_tokens(path, store)


@pytest.mark.parametrize("part", [None, "heads=0:1", "part=k"])
def test_a_slot_that_has_become_anothers_is_not_sent(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str | None
) -> None:
    """Between the look-up of a get and its sending, the slot is evicted and Bob stores there."""
    secret = b"of bob's prompt" * 4096
    real = owned.locate

    def reused(ns: Namespace, refs: list[ChunkRef], region: owned.Region) -> Any:
        places = real(ns, refs, region)
        for place in places:
            assert place is not None
            place.file.write(place.slot, memoryview(secret)[: ns.layout.payload_bytes])
        return places

    with running(store, tokens=tokens_file(tmp_path)) as server, server.open(ALICE) as client:
        ns = client.namespace(identity_for("big", BIG), BIG)
        refs = ns.chain(tokens_of(1, 2, BIG)).refs()
        ns.put(refs, [content_of(ref.key, BIG.payload_bytes) for ref in refs])
        server.server.state.give_back([bytearray(secret[: BIG.payload_bytes]) for _ in refs])
        monkeypatch.setattr(owned, "locate", reused)
        body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs))
        status, answer = ask(server.address, "POST", f"/v1/get?{part or ''}", body,
                             Authorization=f"Bearer {ALICE}",
                             Content_Type=wire.CONTENT_TYPE)  # fmt: skip
        assert status == 200
        assert len(answer) > BIG.payload_bytes // 2
        assert b"bob" not in answer
        assert answer[0] == MISS


def test_a_tenant_is_told_of_its_own_chunks_that_could_not_be_written(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its own, once, whoever asks first."""

    def fail(*_: object) -> None:
        raise OSError(28, "planted: no space left on device")

    with (
        place.open("2MiB", "2MiB") as store,
        running(store, tokens=tokens_file(tmp_path)) as server,
        server.open(ALICE) as alice,
        server.open(BOB) as bob,
        server.open(ADMIN) as local,
    ):
        file = store.file_of(DISK, CONTRACT_LAYOUT.slot_bytes)
        for name in ("write", "allocate"):
            monkeypatch.setattr(file, name, fail)
        for client in (alice, bob):
            ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            assert put(ns, ns.chain(tokens_of(9, 2)).refs()) == [PutState.STORED] * 2
        clients = local, bob, alice, alice, bob, local
        found = []
        for one in clients:  # a drain tells of everybody's once, and in nobody's stead
            drained = ask(server.address, "POST", "/v1/drain", Authorization=f"Bearer {ADMIN}")[1][
                "flushed"
            ]
            found.append((one.flush(5), drained))
        assert [flushed for flushed, _ in found] == [True, False, False, True, True, True]
        assert [drained for _, drained in found] == [False, True, True, True, True, True]
