"""Bounds of one tenant, of one request and of the event loop; ends of servers and connections."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixstore import Layout, Namespace, Roi, Store, owned, wire
from prefixstore.client.caller import BlockingCalls
from prefixstore.client.connection import finish
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.errors import ConfigError, RemoteError, StoreError, StoreTimeoutError
from prefixstore.keys import ChunkRef, KeyChain
from prefixstore.layout import checksum
from prefixstore.ledger import MEMORY
from prefixstore.putting import PutState
from prefixstore.serve import limits, receiving
from prefixstore.serve.auth import read_tokens
from prefixstore.serve.refusal import RefusedError
from prefixstore.serve.sending import Step, _push
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    content_of,
    identity_for,
    region_of,
    tokens_of,
)
from tests.serve.raw import ask, connect, read_answer
from tests.serve.support import ADMIN, ALICE, BOB, Running, running, tokens_file
from tests.store_helpers import Place, wait_for

pytest_plugins = ["tests.store_fixtures"]
BINARY = {"Content_Type": wire.CONTENT_TYPE}
SIZE = CONTRACT_LAYOUT.payload_bytes
BIG = Layout(num_layers=8, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=8192)  # 1 MiB


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("64MiB", "16MiB") as store:
        yield store


@pytest.fixture
def big(server: Running) -> Iterator[RemoteNamespace]:
    with server.open(deadline_s=5.0) as client:
        yield client.namespace(identity_for("b", BIG), BIG)


def fill(ns: RemoteNamespace, count: int) -> list[ChunkRef]:
    refs = ns.chain(tokens_of(1, count, ns.layout)).refs()
    states = ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs])
    assert states == [PutState.STORED] * count
    return refs


def request_of(ns: RemoteNamespace, refs: list[ChunkRef], path: str, rest: bytes = b"") -> bytes:
    body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs)) + rest
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.CONTENT_TYPE}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def record(pauses: list[float], wait_s: float) -> Any:
    """A pause that is noted, not made."""

    async def none() -> None:
        pauses.append(wait_s)

    return none()


def put_request(ns: RemoteNamespace, refs: list[ChunkRef], roi: Roi | None = None) -> bytes:
    layout = ns.layout
    wholes = [content_of(ref.key, layout.payload_bytes) for ref in refs]
    parts = [region_of(one, layout, roi or layout.whole) for one in wholes]
    query = "" if roi is None else f"?heads={roi.head_start}:{roi.head_stop}"
    return request_of(ns, refs, f"/v1/put{query}", b"".join(checksum(one) + one for one in parts))


# ---------------------------------------------------------------------- one answer
def test_what_fails_after_the_headers_ends_the_connection(
    server: Running, big: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second answer would be read as the rest of the first."""
    refs = fill(big, 24)
    real, calls = Namespace.get, []

    def fails(self: Namespace, *args: Any) -> list[int]:
        calls.append(args)
        if len(calls) > 1:
            raise StoreTimeoutError("the disk is stalled")
        return real(self, *args)

    monkeypatch.setattr(Namespace, "get", fails)
    with connect(server.address) as sock:
        sock.sendall(request_of(big, refs, "/v1/get?checked=1"))
        data = b""
        with suppress(ConnectionResetError):
            while got := sock.recv(1 << 20):
                data += got
    assert len(calls) == 2
    assert data.count(b"HTTP/1.1 ") == 1
    assert 0 < len(data) < 24 * BIG.payload_bytes


@pytest.mark.parametrize("where", ["fields", "references", "payload"])
def test_a_client_that_goes_is_no_fault_of_ours(
    server: Running, ns: RemoteNamespace, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    whole = put_request(ns, ns.chain(tokens_of(1, 4)).refs())
    start = whole.index(b"\r\n\r\n") + 4
    stop = {"fields": start + 9, "references": start + 120, "payload": len(whole) - 9}[where]
    with caplog.at_level(logging.WARNING):
        for data in (whole[:stop], whole[:stop].replace(b"/put", b"/get", 1)):
            for _ in range(5):
                with connect(server.address) as sock:
                    sock.sendall(data)
        state = server.server.state
        wait_for(lambda: not +state.memory_under_way + state.transfers, "their end")
        assert ask(server.address, "GET", "/healthz")[0] == 200
    assert caplog.records == []


def test_the_last_bytes_are_not_held_back() -> None:
    """MSG_MORE on them waits 200 ms for more."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        seen: list[int] = []

        class Spy:
            def send(self, data: bytes, flags: int = 0) -> int:
                seen.append(flags)
                return ours.send(data)

            def fileno(self) -> int:
                return ours.fileno()

        steps: deque[Step] = deque([b"a", b"b", b"c"])
        assert _push(Spy(), steps) is False  # type: ignore[arg-type]
        assert seen == [socket.MSG_MORE, socket.MSG_MORE, 0]


def test_a_receiver_that_stops_is_cut_off_from_a_checked_get(
    server: Running, big: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STALL_S", 0.3)
    monkeypatch.setattr(limits, "BODY_S", 1000.0)
    refs = fill(big, 24)
    with connect(server.address) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(request_of(big, refs, "/v1/get?checked=1"))
        state = server.server.state
        wait_for(lambda: state.transfers.total() == 1, "the beginning")
        wait_for(lambda: state.transfers.total() == 0, "the end")
        wait_for(lambda: not +state.memory_under_way, "what it held to be given back")


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize("tiers", [[[]], [1.0], [True], ["1"], [3], [{}], 1, None])
def test_bad_tiers_are_refused(server: Running, ns: RemoteNamespace, tiers: object) -> None:
    refs = ns.chain(tokens_of(1, 1)).refs()
    fields = {"namespace": ns.name.hex(), "tiers": tiers}
    body = wire.pack_request(fields, wire.pack_refs(refs))
    assert ask(server.address, "POST", "/v1/leases", body, **BINARY)[0] == 400


@pytest.mark.parametrize(
    "text",
    ['"items": [[Infinity, 1, "00"]]', '"items": [[0, NaN, "00"]]', '"items": [[1.5, 1, "00"]]',
     '"items": [[true, 1, "00"]]', '"items": [[0, 1, "\\ud800"]]', '"salt": "\\ud800"',
     '"items": [' + ",".join(['[0, 1, "00"]'] * 1025) + "]"],
)  # fmt: skip
def test_bad_items_are_refused(server: Running, ns: RemoteNamespace, text: str) -> None:
    body = f'{{"namespace": "{ns.name.hex()}", "tokens": [1, 2, 3, 4], {text}}}'
    for path in ("/v1/match", "/v1/segments"):
        status, answer = ask(server.address, "POST", path, body.encode())
        assert (status, answer["error"]["code"]) == (400, "config")


def test_half_a_character_in_a_tag_is_refused(server: Running, ns: RemoteNamespace) -> None:
    [ref] = ns.chain(tokens_of(1, 1)).refs()
    payload = content_of(ref.key, SIZE)
    rest = wire.pack_refs([ref]), checksum(payload), payload
    body = wire.pack_request({"namespace": ns.name.hex(), "tag": "\ud800"}, *rest)
    assert ask(server.address, "POST", "/v1/put", body, **BINARY)[0] == 400


def test_a_chunk_has_so_many_tokens_at_most(server: Running) -> None:
    """Each of them is in the index, and is looked at when the chunk is stored: else one put of one
    tenant holds up all others."""
    layout = replace(CONTRACT_LAYOUT, chunk_tokens=limits.CHUNK_TOKENS_MAX + 1)
    identity = replace(identity_for("long"), chunk_tokens=layout.chunk_tokens)
    with server.open(token=ALICE) as client, pytest.raises(StoreError, match="at most 4096"):
        client.namespace(identity, layout)


def test_nobody_has_the_event_loop_decompress(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp would, before and after it is known who asks."""
    for body in (b"no gzip" * 1000, gzip.compress(bytes(1 << 20))):
        status, _ = ask(server.address, "POST", "/v1/match", body, Content_Encoding="gzip")
        assert status in (401, 415)
    assert ask(server.address, "GET", "/healthz")[0] == 200
    assert "Unhandled" not in caplog.text


def test_identities_that_are_none_are_refused(server: Running) -> None:
    deep = "[" * 900 + "]" * 900
    layout = json.dumps(CONTRACT_LAYOUT.to_json())
    fields = json.loads(identity_for("a").to_json())
    for identity in (deep, json.dumps({**fields, "weights": "\ud800"}), "{}", "7", "Infinity"):
        body = f'{{"identity": {identity}, "layout": {layout}}}'.encode()
        assert ask(server.address, "POST", "/v1/namespaces", body)[0] in (200, 400)


def test_a_token_that_is_no_text_is_no_token(store: Store, tmp_path: Path) -> None:
    with running(store, tokens=tokens_file(tmp_path)) as server, connect(server.address) as sock:
        sock.sendall(
            b"GET /v1/namespaces HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\r\n\r\n"
        )
        assert read_answer(sock)[0] == 401


# ---------------------------------------------------------------------- the event loop
def test_too_many_tokens_are_refused_before_they_are_hashed(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    monkeypatch.setattr(Namespace, "chain", lambda *args: made.append(args))
    count = (wire.REFS_MAX + 1) * CONTRACT_LAYOUT.chunk_tokens
    body = wire.pack_request({"namespace": ns.name.hex(), "tokens": True}, bytes(4 * count))
    assert ask(server.address, "POST", "/v1/match", body, **BINARY)[0] == 400
    assert made == []


def test_what_takes_long_is_done_on_threads(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, large JSON, many references; a look-up of many, or of what is not in memory."""
    loop_thread = server.on_loop(_ident())
    seen: set[tuple[str, bool]] = set()

    def spy(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            seen.add((name, threading.get_ident() == loop_thread))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    monkeypatch.setattr(limits, "INLINE_MATCH_REFS_MAX", 64)
    refs = fill(ns, 100)
    for owner, name in ((KeyChain, "extend"), (wire, "parse_fields"), (wire, "unpack_refs"),
                        (receiving, "_check_ref"), (Namespace, "match")):  # fmt: skip
        spy(owner, name)
    named = {"namespace": ns.name.hex()}
    small = wire.pack_request(named, wire.pack_refs(refs[:4]))
    assert ask(server.address, "POST", "/v1/match", small, **BINARY)[0] == 200
    assert seen == {("parse_fields", True), ("unpack_refs", True), ("match", True)}
    seen.clear()
    absent = [ref._replace(key=os.urandom(16)) for ref in refs[:1]]
    for some in (absent, refs):  # not in memory; more than INLINE_MATCH_REFS_MAX
        body = wire.pack_request(named, wire.pack_refs(some))
        assert ask(server.address, "POST", "/v1/match", body, **BINARY)[0] == 200
    assert ("match", True) not in seen
    seen.clear()
    many = ns.chain(tokens_of(2, 3000)).refs()
    seen.clear()
    for path, body in (("/v1/match", json.dumps({**named, "tokens": [1] * 40000}).encode()),
                       ("/v1/match", wire.pack_request(named, wire.pack_refs(many)))):  # fmt: skip
        kind = BINARY if body[:1] != b"{" else {}
        assert ask(server.address, "POST", path, body, **kind)[0] == 200
    assert {("extend", True), ("unpack_refs", True), ("match", True)} & seen == set()
    seen.clear()
    with connect(server.address) as sock:
        sock.sendall(put_request(ns, many))
        assert read_answer(sock)[0] == 200
    assert seen == {("parse_fields", True), ("unpack_refs", False), ("_check_ref", False)}


async def _ident() -> int:
    return threading.get_ident()


# ---------------------------------------------------------------------- shares
def test_a_tenant_leaves_room_for_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice has many slow requests under way; she is told to wait, and Bob is served."""
    go = threading.Event()
    real = owned.delete

    def slow(ns: Namespace, refs: list[ChunkRef]) -> int:
        assert go.wait(30)
        return real(ns, refs)

    monkeypatch.setattr(owned, "delete", slow)
    monkeypatch.setattr(limits, "CONTROL_MAX", 4)
    with running(store, tokens=tokens_file(tmp_path)) as server:
        spaces = {}
        for token in (ALICE, BOB):
            with server.open(token) as client:
                spaces[token] = client.namespace(identity_for("a"), CONTRACT_LAYOUT)

        def delete(token: str) -> int:
            ns = spaces[token]
            fields = {"namespace": ns.name.hex()}
            body = wire.pack_request(fields, wire.pack_refs(ns.chain(tokens_of(1, 1)).refs()))
            path, header = "/v1/delete", f"Bearer {token}"
            return ask(server.address, "POST", path, body, Authorization=header, **BINARY)[0]

        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(delete(ALICE))) for _ in "123"]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: statuses == [429], "the third to be refused")
            name = spaces[BOB].name.hex()
            body, header = wire.pack_request({"namespace": name, "keys": True}), f"Bearer {BOB}"
            answer = ask(server.address, "POST", "/v1/match", body, Authorization=header, **BINARY)
            assert answer[0] == 200
        finally:
            go.set()
            for thread in threads:
                thread.join(30)
        assert statuses == [429, 200, 200]


def test_memory_is_shared_out(store: Store, tmp_path: Path) -> None:
    with running(store, tokens=tokens_file(tmp_path)) as server:
        state = server.server.state
        alice, bob, local = state.tenants.tenants
        with state.memory(alice, "put", 50, 100):
            with pytest.raises(RefusedError, match="your"), state.memory(alice, "put", 1, 100):
                pass
            with (
                state.memory(bob, "put", 50, 100),
                pytest.raises(RefusedError, match="100 bytes"),
                state.memory(local, "put", 1, 100),
            ):
                pass
        assert not +state.memory_under_way


def test_bodies_under_way_have_a_bound(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_BYTES_MAX", 1000)
    with connect(server.address) as sock:
        sock.sendall(b"POST /v1/match HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\nx")
        state = server.server.state
        wait_for(lambda: state.memory_under_way["local", "body"] == 900, "the first body")
        body = wire.pack_request({"namespace": ns.name.hex()}, bytes(100))
        assert ask(server.address, "POST", "/v1/match", body, **BINARY)[0] == 503
    wait_for(lambda: not +state.memory_under_way, "its end")
    large = f"{limits.JSON_BODY_BYTES_MAX + 1}"
    assert ask(server.address, "POST", "/v1/match", Content_Length=large)[0] == 413


@pytest.mark.parametrize("binary", [True, False])
def test_what_bodies_are_parsed_into_counts(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch, binary: bool
) -> None:
    """Brackets of 3 bytes are lists of 64."""
    monkeypatch.setattr(limits, "BODY_BYTES_MAX", 1_000_000)
    for extra, status in (("x" * 30_000, 200), ([[]] * 10_000, 413)):
        fields: dict[str, Any] = {"namespace": ns.name.hex(), "tokens": [1], "extra": extra}
        body = wire.pack_request(fields) if binary else json.dumps(fields).encode()
        assert len(body) < 50_000
        given = BINARY if binary else {}
        assert ask(server.address, "POST", "/v1/match", body, **given)[0] == status
        if binary:  # a put that has no chunks is refused in any case
            answered = ask(server.address, "POST", "/v1/put", body, **given)[0]
            assert answered == (413 if status == 413 else 400)
    wait_for(lambda: not +server.server.state.memory_under_way, "the end of both")


def test_leases_keep_little_and_have_a_bound(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = fill(ns, 4)
    wanted = [*refs, refs[0]._replace(key=os.urandom(16))]
    lease, held = ns.lease(wanted, [MEMORY] * 5)
    [kept] = server.server.state.leases._leases.values()
    assert (held, kept.chunks) == (4, [(MEMORY, ref.key) for ref in refs])
    renewal = ns.calls._json("POST", f"/v1/leases/{lease.lease_id.decode()}", {"duration_s": 50})
    again = finish(renewal)
    assert again["held"] == 4
    monkeypatch.setattr(limits, "LEASE_CHUNKS_MAX", 6)
    other, _ = ns.lease(refs[:2], [MEMORY] * 2)
    with pytest.raises(RemoteError, match="you hold 2 leases of 6 chunks"):
        finish(ns.calls._calls.json("POST", "/v1/match", {"namespace": ns.name.hex(), "keys": True,
                                    "lease_s": 5}, refs[0].key, deadline_s=0.5))  # fmt: skip
    ns.release(lease)
    ns.release(other)


@pytest.mark.parametrize("bound", ["LEASES_PER_TENANT_MAX", "LEASE_CHUNKS_MAX"])
def test_a_look_up_goes_on_without_a_lease_that_is_not_to_be_had(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """It is asked for once: to come again, which others that hold too many must, is to stall."""
    refs, pauses = fill(ns, 4), list[float]()
    monkeypatch.setattr(limits, bound, 0)
    monkeypatch.setattr(BlockingCalls, "_pause", lambda _, wait_s: record(pauses, wait_s))
    lease, held = ns.lease(refs, ns.match(refs).tiers, wait=False)
    assert (lease.lease_id, held) == (b"", 4)
    ns.release(lease)
    with pytest.raises(RemoteError, match="you hold 0 leases"):
        ns.lease(refs, [MEMORY] * 4)  # who waits for it is told
    assert pauses == []
    fields = {"namespace": ns.name.hex(), "keys": True, "lease_s": 5}
    other = ns.calls._json("POST", "/v1/match", fields, refs[0].key)
    with pytest.raises(RemoteError, match="you hold 0 leases"):
        finish(other)
    assert pauses == []


def test_a_lease_is_asked_for_again_if_too_much_is_asked_for_at_once(
    ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is over in a moment, unlike too many leases."""
    refs, pauses = fill(ns, 4), list[float]()
    tiers = ns.match(refs).tiers
    monkeypatch.setattr(limits, "CONTROL_MAX", 0)

    def pause(_: Any, wait_s: float) -> Any:
        if len(pauses) == 1:
            monkeypatch.setattr(limits, "CONTROL_MAX", 8)
        return record(pauses, wait_s)

    monkeypatch.setattr(BlockingCalls, "_pause", pause)
    lease, held = ns.lease(refs, tiers, wait=False)
    assert lease.lease_id
    assert (held, len(pauses)) == (4, 2)


def test_a_lease_is_of_as_many_chunks_as_a_request_may_have(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = fill(ns, 5)
    monkeypatch.setattr(wire, "REFS_MAX", 3)
    held_leases = server.server.state.leases._leases.values()
    for wait, said in ((True, 3), (False, 5)):
        lease, held = ns.lease(refs, [MEMORY] * 5, wait=wait)
        assert held == said
        assert [len(one.chunks) for one in held_leases] == [3]
        ns.release(lease)
    missing = refs[1]._replace(key=os.urandom(16))
    assert ns.lease([refs[0], missing, *refs[2:]], [MEMORY] * 5, wait=False)[1] == 1


def test_quotas_are_those_of_the_tokens_file(store: Store, tmp_path: Path) -> None:
    """Those of a namespace that was there before as well; who is no longer in it has none."""

    def limits_of(text: str) -> dict[str, int]:
        tokens = tokens_file(tmp_path, text)
        with running(store, tokens=tokens):
            groups = store.quotas.of(MEMORY).groups
            owners = read_tokens(Path(tokens), store).tenants
        return {
            next((t.name for t in owners if t.owns(record.identity)), "gone"):
                groups[record.identity.namespace].limit_bytes
            for record in store.namespaces()
            if record.identity.namespace in groups
        }  # fmt: skip

    both = f"alice:{ALICE}:1MiB\nbob:{BOB}:1MiB\nlocal:{ADMIN}\n"
    with running(store, tokens=tokens_file(tmp_path, both)) as server:
        for token in (ALICE, BOB, ADMIN):
            with server.open(token) as client:
                client.namespace(identity_for("a"), CONTRACT_LAYOUT)
    first = limits_of(both)
    assert first["alice"] == first["bob"] > 0
    assert set(first) == {"alice", "bob"}
    second = limits_of(f"alice:{ALICE}:2MiB\nlocal:{ADMIN}\n")
    assert second == {"alice": 2 * first["alice"], "gone": 0}
    assert limits_of(both) == first


# ---------------------------------------------------------------------- ends
def test_a_cancelled_part_keeps_its_lock_while_its_thread_runs(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began = threading.Event(), threading.Event()
    real = Namespace.put

    def slow(self: Namespace, *args: Any, **kwargs: Any) -> Any:
        began.set()
        assert go.wait(30)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Namespace, "put", slow)
    state = server.server.state
    refs = ns.chain(tokens_of(1, 2)).refs()
    half = Roi(0, CONTRACT_LAYOUT.num_layers, 0, 1)
    with connect(server.address) as sock:
        sock.sendall(put_request(ns, refs, half))
        assert began.wait(30)
    time.sleep(0.2)  # until the server has seen that the client went
    assert state.lock(ns.name).locked()
    assert state.transfers.total() == 1
    go.set()
    wait_for(lambda: state.transfers.total() == 0, "the end of the put")
    wait_for(lambda: not state.lock(ns.name).locked(), "the lock to be given back")
    wait_for(lambda: not +state.memory_under_way, "what it held to be given back")


def test_a_stop_waits_for_threads_and_closes_connections(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(store) as server, connect(server.address) as sock:
        get = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        sock.sendall(get)
        assert b"connection: close" not in sock.recv(65536).lower()
        server.server.state.draining = True
        sock.sendall(get)
        assert b"connection: close" in sock.recv(65536).lower()
        assert sock.recv(1) == b""
        ended = threading.Event()
        threading.Timer(0.3, ended.set).start()
        server.server.state.transfer.executor.submit(ended.wait, 30)
    assert ended.is_set(), "the store may be closed only when nobody uses it"


def test_a_stop_ends_in_time_whatever_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that never ends, and a thread that takes long."""
    go = threading.Event()
    monkeypatch.setattr(limits, "ABORT_S", 0.1)
    monkeypatch.setattr(Store, "flush", lambda *_: go.wait(30))
    with running(store) as server, connect(server.address) as sock:
        sock.sendall(b"POST /v1/flush HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        wait_for(lambda: server.server.state._asked.total() == 1, "the flush")
        began = time.monotonic()
        server.on_loop(server.server.stop(0.2))
        assert time.monotonic() - began < 10, "it waits for 60 s if nobody tells it otherwise"
        go.set()


def test_a_socket_of_which_nothing_is_known_stays(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server may be too busy to answer."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
            for sock in (first, second):
                sock.setblocking(False)
                sock.connect_ex(str(path))
            with pytest.raises(ConfigError, match=r"cannot tell"), running(store, uds=str(path)):
                pass
    assert path.exists()
