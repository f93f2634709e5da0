"""What one client or tenant does to another: threads, memory, time, leases; requests that cost."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prefixstore import Layout, Namespace, Store, owned, wire
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.keys import ChunkRef
from prefixstore.ledger import MEMORY
from prefixstore.namespace import MISS
from prefixstore.serve import limits
from prefixstore.serve.pools import Pool
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, outputs, tokens_of
from tests.serve.raw import ask, connect, read_answer
from tests.serve.support import ALICE, BOB, Running, certificate, running, tokens_file
from tests.store_helpers import Place, wait_for

pytest_plugins = ["tests.store_fixtures"]
BINARY = {"Content_Type": wire.CONTENT_TYPE}
SIZE = CONTRACT_LAYOUT.payload_bytes


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("16MiB", "16MiB") as store:
        yield store


def fill(ns: RemoteNamespace, count: int, seed: int = 1) -> list[ChunkRef]:
    refs = ns.chain(tokens_of(seed, count, ns.layout)).refs()
    ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs])
    return refs


def leased(store: Store) -> int:
    with store.live.read() as txn:
        return txn.count("leased")


# ---------------------------------------------------------------------- threads
def run_pool(threads: int, share: float, work: Callable[[Pool], Any]) -> Any:
    async def main() -> Any:
        pool = Pool("test", threads, lambda most: int(share * most))
        try:
            return await work(pool)
        finally:
            pool.close()
            pool.executor.shutdown()

    return asyncio.run(main())


def test_one_tenants_work_waits_behind_its_own() -> None:
    """Alice asks for ten times as much as there are threads, then Bob asks: he does not wait."""
    go, begun = threading.Event(), []

    def slow(name: str) -> str:
        begun.append(name)
        assert go.wait(30)
        return name

    async def work(pool: Pool) -> list[str]:
        jobs = [pool.submit("alice", lambda: slow("alice")) for _ in range(40)]
        jobs.append(pool.submit("bob", lambda: slow("bob")))
        while len(begun) < 3:
            await asyncio.sleep(0.005)
        first = sorted(begun)
        go.set()
        assert await asyncio.gather(*(job.future for job in jobs)) == ["alice"] * 40 + ["bob"]
        return first

    assert run_pool(4, 0.5, work) == ["alice", "alice", "bob"]


def test_a_thread_that_is_free_goes_to_who_has_fewest() -> None:
    order: list[str] = []

    async def work(pool: Pool) -> None:
        jobs = [pool.submit(name, partial(order.append, name)) for name in "aaaabbc"]
        await asyncio.gather(*(job.future for job in jobs))

    run_pool(1, 1.0, work)
    assert "".join(order) == "aabcaba"  # the first had nobody beside it


def test_what_nobody_waits_for_does_not_begin_or_is_undone() -> None:
    go = threading.Event()
    undone: list[object] = []

    async def work(pool: Pool) -> None:
        first, second = pool.submit("a", lambda: go.wait(30)), pool.submit("a", lambda: 7)
        second.give_up(undone.append)
        first.give_up(undone.append)
        go.set()
        await asyncio.wait((first.future, second.future))
        third = pool.submit("a", lambda: 1 // 0)
        third.give_up(undone.append)
        fourth = pool.submit("a", lambda: 3)
        await fourth.future
        fourth.give_up(undone.append)
        await asyncio.sleep(0)
        assert second.future.cancelled()

    run_pool(1, 1.0, work)
    assert undone == [True, 3]


def test_puts_of_one_tenant_that_wait_hold_up_no_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads, each waiting for room."""
    go = threading.Event()
    real = Namespace.put
    with (
        running(store, tokens=tokens_file(tmp_path)) as server,
        server.open(ALICE) as alice,
        server.open(BOB, deadline_s=5.0) as bob,
    ):
        hers = alice.namespace(identity_for("a"), CONTRACT_LAYOUT)
        his = bob.namespace(identity_for("a"), CONTRACT_LAYOUT)

        def slow(self: Namespace, *args: Any, **kwargs: Any) -> Any:
            if self.name == hers.name:
                assert go.wait(30)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Namespace, "put", slow)
        threads = [threading.Thread(target=fill, args=(hers, 1, seed)) for seed in range(12)]
        for thread in threads:
            thread.start()
        try:
            state = server.server.state
            wait_for(lambda: state.transfers["alice"] == 12, "all of them")
            refs = fill(his, 2)
            assert MISS not in his.get(refs, outputs(CONTRACT_LAYOUT, 2))
        finally:
            go.set()
            for thread in threads:
                thread.join(30)


# ---------------------------------------------------------------------- time
def test_where_a_look_up_is_done_tells_nothing_of_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going to a thread takes half a millisecond longer, which can be measured from outside."""
    with (
        running(store, tokens=tokens_file(tmp_path)) as server,
        server.open(ALICE) as alice,
        server.open(BOB) as bob,
    ):
        hers = alice.namespace(identity_for("a"), CONTRACT_LAYOUT)
        his = bob.namespace(identity_for("a"), CONTRACT_LAYOUT)
        stolen = fill(hers, 4)
        absent = [ref._replace(key=bytes(reversed(ref.key))) for ref in stolen]
        seen: list[bool] = []
        real = owned.in_memory

        def spy(*args: Any) -> bool:
            seen.append(real(*args))
            return seen[-1]

        monkeypatch.setattr(owned, "in_memory", spy)
        for refs in (stolen, absent):
            assert his.match(refs).num_chunks == 0
            his.get(refs, outputs(CONTRACT_LAYOUT, 4))
        assert len(set(seen)) == 1
        assert len(seen) == 4
        hers.match(stolen)
        assert seen[-1]


# ---------------------------------------------------------------------- memory and work
def test_one_request_takes_no_more_than_a_share(store: Store, tmp_path: Path) -> None:
    from prefixstore.serve.refusal import RefusedError

    with running(store, tokens=tokens_file(tmp_path)) as server:
        state = server.server.state
        alice = state.tenants.tenants[0]
        for wanted, most in ((51, 100), (101, 100)):
            with pytest.raises(RefusedError) as caught, state.memory(alice, "put", wanted, most):
                pass
            assert caught.value.status == 413
        assert not +state.memory_under_way


@pytest.mark.parametrize("query", ["", "part=k", "part=v", "part=v&layers=1:2"])
def test_a_checked_get_takes_one_buffer_for_a_chunk(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """And gives the plane that was asked for, or zeros for what failed its check."""
    import numpy as np

    refs = fill(ns, 3)
    state = server.server.state
    state.give_back([bytearray(b"secret" * SIZE)[:SIZE] for _ in refs])
    real = Namespace.get

    def damaged(self: Namespace, refs: Any, outs: Any, roi: Any = None) -> list[int]:
        return [MISS, *real(self, refs, outs, roi)[1:]]

    monkeypatch.setattr(Namespace, "get", damaged)
    body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs))
    status, answer = ask(server.address, "POST", f"/v1/get?checked=1&{query}", body, **BINARY)
    assert status == 200
    at = 0
    for i, ref in enumerate(refs):
        tier, _, _, sum_bytes, count = wire.RECORD.unpack_from(answer, at)
        at += wire.RECORD.size + sum_bytes
        whole = np.frombuffer(content_of(ref.key, SIZE), np.uint8).reshape(2, 2, 2, -1)
        layers = slice(1, 2) if "layers" in query else slice(0, 2)
        planes = slice("kv".index(query[5]), "kv".index(query[5]) + 1) if query else slice(0, 2)
        expected = whole[layers, planes].tobytes()
        assert (tier, count) == (MISS if i == 0 else MEMORY, len(expected))
        assert answer[at : at + count] == (bytes(count) if i == 0 else expected)
        at += count
    assert at == len(answer)


def test_items_do_not_grow_with_the_prompt(server: Running, ns: RemoteNamespace) -> None:
    """An item over all chunks stands in the preimage of each: small requests, large keys."""
    digest = "ab" * 1024
    for items, count in (([[0, 2**31 - 1, digest]] * 400, 16384), ([[0, 1, ""]] * 1000, 16384)):
        fields = {"namespace": ns.name.hex(), "tokens": True, "items": items}
        body = wire.pack_request(fields, bytes(16 * count))
        status, answer = ask(server.address, "POST", "/v1/match", body, **BINARY)
        assert (status, answer["error"]["code"]) == (400, "config")
    fields = {"namespace": ns.name.hex(), "tokens": True, "items": [[3, 9, digest]] * 20}
    body = wire.pack_request(fields, bytes(16 * 500))
    assert ask(server.address, "POST", "/v1/match", body, **BINARY)[0] == 200


@pytest.mark.parametrize(
    "layout",
    [Layout(1 << 17, 2, 2, chunk_tokens=1, head_bytes=64), Layout(2, 2, 2, 1, head_bytes=1)],
    ids=["many", "small"],
)
def test_layouts_of_many_small_pieces_are_refused(server: Running, layout: Layout) -> None:
    """The work of a request goes with the pieces of its chunks."""
    fields = json.loads(identity_for("x", layout).to_json())
    body = json.dumps({"identity": fields, "layout": layout.to_json()}).encode()
    status, answer = ask(server.address, "POST", "/v1/namespaces", body)
    assert (status, answer["error"]["code"]) == (400, "layout")


def test_an_identity_has_a_bound(server: Running) -> None:
    fields = json.loads(identity_for("a").to_json())
    forward = json.dumps({"x": "y" * limits.IDENTITY_BYTES_MAX}, separators=(",", ":"))
    layout = CONTRACT_LAYOUT.to_json()
    body = json.dumps({"identity": {**fields, "forward": forward}, "layout": layout}).encode()
    assert ask(server.address, "POST", "/v1/namespaces", body)[0] == 400


def test_a_prompt_that_is_searched_has_a_bound(server: Running, ns: RemoteNamespace) -> None:
    fields = {"namespace": ns.name.hex(), "tokens": True}
    for tokens, expected in ((limits.SEGMENT_TOKENS_MAX + 1, 400), (4096, 200)):
        body = wire.pack_request(fields, bytes(4 * tokens))
        assert ask(server.address, "POST", "/v1/segments", body, **BINARY)[0] == expected


def test_salts_that_are_gone_leave_nothing(store: Store, ns: RemoteNamespace) -> None:
    """Their names are the clients' to choose: counters of each for ever would fill the index."""
    refs = [ref for salt in range(20) for ref in
            ns.chain(tokens_of(1, 1), salt=b"%d" % salt).refs()]  # fmt: skip
    ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])

    def salts() -> int:
        with store.live.read() as txn:
            return sum(1 for _ in txn.scan("usage", b"s"))

    assert salts() >= 20
    assert ns.delete(refs) == 20
    wait_for(lambda: salts() == 0, "the counters to go")


@pytest.mark.parametrize("by_put", [False, True])
def test_pins_of_one_tenant_leave_room_for_others(
    store: Store, tmp_path: Path, by_put: bool
) -> None:
    """Half of a tier may be pinned in all: Alice, with nine tenths of it, pins what she can."""
    size = 7 * CONTRACT_LAYOUT.slot_bytes
    most = store.settings.disk_bytes
    tokens = tokens_file(tmp_path, f"alice:{ALICE}:{int(0.88 * most)}\nbob:{BOB}:{size}\n")
    with (
        running(store, tokens=tokens) as server,
        server.open(ALICE) as alice,
        server.open(BOB) as bob,
    ):
        hers = alice.namespace(identity_for("a"), CONTRACT_LAYOUT)
        his = bob.namespace(identity_for("a"), CONTRACT_LAYOUT)
        count = int(0.7 * most / CONTRACT_LAYOUT.slot_bytes)
        refs = hers.chain(tokens_of(3, count)).refs()
        hers.put(refs, [content_of(ref.key, SIZE) for ref in refs], pin=by_put)
        pinned = count if by_put else hers.pin(refs)
        if not by_put:
            assert 0.3 * count < pinned < 0.7 * count
        assert his.pin(fill(his, 3)) == 3
        with store.live.read() as txn:
            told = txn.get_int("meta", b"pinned%d" % MEMORY)
        assert 0 < told <= 0.5 * 0.88 * most + 3 * CONTRACT_LAYOUT.slot_bytes


# ---------------------------------------------------------------------- leases
def test_a_lease_nobody_waits_for_is_let_go(
    server: Running, ns: RemoteNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client goes while it is taken: nobody knows its name, and it would hold for a minute."""
    refs = fill(ns, 3)
    go, taken = threading.Event(), threading.Event()
    real = Namespace.lease

    def slow(self: Namespace, *args: Any) -> Any:
        lease = real(self, *args)
        taken.set()
        assert go.wait(30)
        return lease

    monkeypatch.setattr(Namespace, "lease", slow)
    assert store.flush()  # the copy to disk takes leases too
    for path, fields in (("match", {"lease_s": 50}), ("leases", {"tiers": [MEMORY] * 3})):
        go.clear()
        taken.clear()
        body = wire.pack_request({"namespace": ns.name.hex(), **fields}, wire.pack_refs(refs))
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.CONTENT_TYPE}\r\n"
        with connect(server.address) as sock:
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert taken.wait(30)
        assert leased(store) == 3
        time.sleep(0.2)  # until the server has seen that the client went
        go.set()
        wait_for(lambda: leased(store) == 0, "its end")
    assert server.server.state.num_leases == 0


def test_a_lease_released_while_it_is_renewed_is_gone(
    server: Running, ns: RemoteNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = fill(ns, 3)
    assert store.flush()
    lease, _ = ns.lease(refs, ns.match(refs).tiers)
    path = f"/v1/leases/{lease.lease_id.decode()}"
    go, taken = threading.Event(), threading.Event()
    real = Namespace.lease

    def slow(self: Namespace, *args: Any) -> Any:
        got = real(self, *args)
        taken.set()
        assert go.wait(30)
        return got

    monkeypatch.setattr(Namespace, "lease", slow)
    statuses: list[int] = []
    renewing = threading.Thread(
        target=lambda: statuses.append(ask(server.address, "POST", path, b"{}")[0])
    )
    renewing.start()
    assert taken.wait(30)
    assert ask(server.address, "DELETE", path)[0] == 200
    go.set()
    renewing.join(30)
    assert statuses == [404]
    wait_for(lambda: leased(store) == 0, "the end of both")


# ---------------------------------------------------------------------- faults of the host
@pytest.mark.parametrize("path", ["match", "get", "delete", "put"])
def test_a_failing_device_is_no_fault_of_ours(
    server: Running, ns: RemoteNamespace, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """503, so that the client tries again or goes without; never a 500."""
    from prefixstore.layout import checksum

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    for owner, name in ((Namespace, "match"), (Namespace, "put"), (owned, "locate"),
                        (owned, "delete")):  # fmt: skip
        monkeypatch.setattr(owner, name, fails)
    [ref] = ns.chain(tokens_of(1, 1)).refs()
    payload = content_of(ref.key, SIZE)
    rest = checksum(payload) + payload if path == "put" else b""
    body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs([ref])) + rest
    status, answer = ask(server.address, "POST", f"/v1/{path}", body, **BINARY)
    assert (status, answer["error"]["code"]) == (503, "store")
    assert "Too many open files" in answer["error"]["message"]


# ---------------------------------------------------------------------- pages of other sites
@pytest.mark.parametrize(
    ("host", "origin", "tokens", "allowed"),
    [
        ("127.0.0.1:7575", "http://127.0.0.1:7575", False, True),
        ("[::1]:7575", "http://[::1]:7575", False, True),
        ("localhost:7575", "http://localhost:7575", False, True),
        ("127.0.0.1:7575", "https://evil.example", False, False),
        ("127.0.0.1:7575", "null", False, False),
        ("evil.example:7575", "http://evil.example:7575", False, False),
        ("kv.example", "https://kv.example", True, True),
        ("kv.example", "https://evil.example", True, False),
    ],
)
def test_pages_of_other_sites_change_nothing(
    store: Store, tmp_path: Path, host: str, origin: str, tokens: bool, allowed: bool
) -> None:
    """A browser on this host may be told by any page to POST here."""
    options = {"tokens": tokens_file(tmp_path)} if tokens else {}
    with running(store, **options) as server, connect(server.address) as sock:
        sock.sendall(
            f"POST /v1/flush HTTP/1.1\r\nHost: {host}\r\nOrigin: {origin}\r\n"
            f"Authorization: Bearer {ALICE}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
        )
        assert read_answer(sock)[0] == (200 if allowed else 403)


# ---------------------------------------------------------------------- connections
def test_a_connection_that_says_nothing_is_closed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "IDLE_S", 0.3)
    with running(store) as server, connect(server.address) as sock:
        assert sock.recv(1) == b""
        wait_for(lambda: not server.server.app[_guards()].connections, "its place")


def _guards() -> Any:
    from prefixstore.serve.app import GUARDS

    return GUARDS


def test_many_requests_at_once_on_a_connection_wait_in_the_network(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind one that is slow: they are not all read and kept."""
    go = threading.Event()
    monkeypatch.setattr(Store, "flush", lambda *_: go.wait(30))
    with connect(server.address) as sock:
        sock.sendall(b"POST /v1/flush HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        sock.settimeout(1.0)
        many = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * (1 << 22)
        with pytest.raises(socket.timeout):
            sock.sendall(many)
        [guard] = [one for one in server.server.app[_guards()].connections.values() if one.busy]
        assert len(guard._inner._messages) < 10_000
        go.set()


@pytest.mark.parametrize("data", [b"\x00\xff\r\n\r\n", b"GET / HTTP/1.1\r\nA\x01: b\r\n\r\n"])
def test_what_is_no_http_fills_no_log(
    server: Running, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    """Anybody can send it, as often as they like."""
    with caplog.at_level(logging.INFO), connect(server.address) as sock:
        sock.sendall(data)
        assert read_answer(sock)[0] == 400
        assert ask(server.address, "GET", "/healthz")[0] == 200
    assert caplog.records == []


def test_a_handshake_that_does_not_come_is_given_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection counts when it has begun to speak TLS; until then only time bounds it."""
    monkeypatch.setattr(limits, "HEADER_S", 0.3)
    cert, key = certificate(tmp_path)
    with (
        running(store, tls_cert=cert, tls_key=key) as server,
        connect(server.address.replace("https", "http")) as sock,
    ):
        assert sock.recv(1) == b""
