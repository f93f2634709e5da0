"""Servers that die, stall, lie or come back, and clients that are slow."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import prefixstore
from benchmarks.fault_proxy import between
from prefixstore import Layout, Store, admin, cli, wire
from prefixstore.client.breaker import FAILURES_MAX
from prefixstore.client.namespace import RemoteNamespace
from prefixstore.client.remote import RemoteStore
from prefixstore.errors import ConfigError, RemoteError, StoreClosedError, StoreError
from prefixstore.layout import Roi, checksum
from prefixstore.ledger import DISK
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.serve import limits
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    content_of,
    identity_for,
    outputs,
    region_of,
    tokens_of,
)
from tests.serve.raw import ask, connect, read_answer
from tests.serve.support import Running, certificate, running
from tests.store_helpers import ROOT, Place, wait_for

pytest_plugins = ["tests.store_fixtures"]
# Chunks of 1 MiB with runs of 32 KiB for each layer and head: sent by the kernel.
BIG = Layout(num_layers=8, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=8192)

MAIN = "from prefixstore.cli import main; raise SystemExit(main())"


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("64MiB", "64MiB") as store:
        yield store


def fill(ns: RemoteNamespace, count: int, seed: int = 1) -> list[prefixstore.ChunkRef]:
    refs = ns.chain(tokens_of(seed, count, ns.layout)).refs()
    states = ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs])
    assert set(states) <= {PutState.STORED, PutState.EXISTS}
    return refs


def read(ns: RemoteNamespace, refs: Sequence[prefixstore.ChunkRef]) -> list[int]:
    """Tiers; every hit must be right."""
    outs = outputs(ns.layout, len(refs))
    tiers = ns.get(refs, outs)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        assert tier == MISS or out == content_of(ref.key, ns.layout.payload_bytes)
    return tiers


@contextmanager
def child(place: Place, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``prefixstore serve`` in a process of its own, and its address."""
    command = [sys.executable, "-c", MAIN, "serve", str(place.folder / "store"),
               "--memory=16MiB", "--disk=16MiB", f"--memory-dir={place.memory_dir}", "--json",
               "--port=0", *options]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()


# ---------------------------------------------------------------------- dying and coming back
def test_a_server_that_is_killed_and_comes_back(place: Place, tmp_path: Path) -> None:
    """Misses at once while it is gone; hits by themselves when it is there again."""
    uds = f"--uds={tmp_path / 'socket'}"
    with child(place, uds) as (process, address), RemoteStore(address, deadline_s=2.0) as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        refs = fill(ns, 4)
        assert client.flush()
        assert MISS not in read(ns, refs)
        process.kill()
        process.wait()
        began = time.monotonic()
        for _ in range(20):
            assert read(ns, refs) == [MISS] * 4
        assert time.monotonic() - began < 10
        with pytest.raises(StoreError):
            ns.match(refs)
        with child(place, uds):
            wait_for(lambda: MISS not in read(ns, refs), "hits of the new server", 10)
            assert ns.match(refs).num_chunks == 4


def test_a_stop_lets_requests_end_and_writes_to_disk(place: Place, tmp_path: Path) -> None:
    with child(place) as (process, address), RemoteStore(address) as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        refs = ns.chain(tokens_of(1, 2, BIG)).refs()
        payloads = [content_of(ref.key, BIG.payload_bytes) for ref in refs]
        body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs))
        body += b"".join(checksum(one) + one for one in payloads)
        head = f"POST /v1/put HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with connect(address) as sock:
            sock.sendall(head.encode() + body[:1_500_000])
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            sock.sendall(body[1_500_000:])
            assert json.loads(read_answer(sock)[1]) == {"states": ["stored"] * 2}
        assert process.wait(30) == 0
        with place.open(None, None) as store:
            assert [one.tiers[-1] for one in admin.list_chunks(store)] == [DISK] * 2


def test_a_store_that_was_replaced(place: Place, store: Store) -> None:
    """A client whose namespace the server does not know enters it again by itself."""
    with running(store) as server, server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        fill(ns, 2)
        with place.open("4MiB", 0, name="other") as other:
            server.server.state.store = other
            server.server.state._namespaces.clear()
            assert ns.match(ns.chain(tokens_of(1, 2))).num_chunks == 0
            assert len(other.namespaces()) == 1
        server.server.state.store = store


def test_nobody_there(tmp_path: Path) -> None:
    """Calls fail in time, and at once when it is known."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with RemoteStore(address, deadline_s=0.3) as client:
            for _ in range(FAILURES_MAX):  # it listens and says nothing
                with pytest.raises(StoreError):
                    client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            with pytest.raises(RemoteError, match="did not answer lately"):
                client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            assert client.flush() is False
    client = RemoteStore(f"unix:{tmp_path}/none")
    with pytest.raises(RemoteError):
        client.namespace(identity_for("a"), CONTRACT_LAYOUT)
    client.close()
    with pytest.raises(StoreClosedError):
        client.namespace(identity_for("a"), CONTRACT_LAYOUT)


# ---------------------------------------------------------------------- wrong bytes
def test_bytes_changed_on_the_way_are_a_miss(server: Running) -> None:
    with server.open() as client:
        refs = fill(client.namespace(identity_for("a", BIG), BIG), 3)

    def flip(data: bytes, seen: int) -> bytes:
        if seen > 100_000:
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    with between(server.address, flip) as address, RemoteStore(address, deadline_s=2.0) as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        assert MISS in read(ns, refs)


class Spoiler:
    """Changes what goes by once, somewhere: the same for the same seed, but for how it is cut."""

    def __init__(self, seed: int, within: int) -> None:
        rng = random.Random(seed)
        self.at, self.bit = int(within ** rng.random()), rng.randrange(8)
        self.way, self.noise = rng.choice(("flip", "zero", "noise", "cut", "twice", "lost")), rng
        self.done = False

    def __call__(self, data: bytes, seen: int) -> bytes | None:
        if self.done or seen + len(data) <= self.at:
            return data
        self.done = True
        at = max(0, self.at - seen)
        before, part, after = data[:at], data[at : at + 16], data[at + 16 :]
        if self.way == "cut":
            return None
        return (
            before
            + {
                "flip": bytes([part[0] ^ 1 << self.bit]) + part[1:],
                "zero": bytes(len(part)),
                "noise": self.noise.randbytes(len(part)),
                "twice": 2 * part,
                "lost": b"",
            }[self.way]
            + after
        )


SPOILT = 15


@pytest.mark.parametrize("requests", [False, True])
def test_anything_changed_on_the_way(server: Running, requests: bool) -> None:
    """Heads and bodies of all calls of a client: an error of ours or a miss, never a wrong byte;
    and the store stays right for those who come directly."""
    first = int(os.environ.get("PREFIXSTORE_TEST_SEED", "1"))
    spoilt = 0
    for seed in range(first, first + SPOILT):
        spoiler = Spoiler(seed, 100_000)
        with (
            between(server.address, spoiler, requests=requests) as address,
            RemoteStore(address, deadline_s=0.5) as client,
            suppress(StoreError),
        ):
            ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            refs = ns.chain(tokens_of(seed, 6)).refs()
            ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs])
            assert 0 <= ns.match(refs).num_chunks <= len(refs)
            read(ns, refs)
            ns.delete(refs[:1])
        spoilt += spoiler.done
    assert spoilt > 0
    with server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = [
            ref
            for seed in range(first, first + SPOILT)
            for ref in ns.chain(tokens_of(seed, 6)).refs()
        ]

        def all_there() -> bool:
            ns.put(refs, [content_of(ref.key, ns.layout.payload_bytes) for ref in refs])
            return MISS not in read(ns, refs)

        wait_for(all_there, "what was spoilt to be stored again")


def test_an_answer_that_ends_early_is_a_miss_of_the_rest(server: Running) -> None:
    with server.open() as client:
        refs = fill(client.namespace(identity_for("a", BIG), BIG), 3)

    def cut(data: bytes, seen: int) -> bytes | None:
        return data if seen < 1_500_000 else None

    with between(server.address, cut) as address, RemoteStore(address, deadline_s=1.0) as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        assert read(ns, refs)[1:] == [MISS] * 2


def test_an_answer_that_stalls_is_a_miss_in_time(server: Running) -> None:
    with server.open() as client:
        refs = fill(client.namespace(identity_for("a", BIG), BIG), 2)

    def stall(data: bytes, seen: int) -> bytes:
        if seen > 500_000:
            time.sleep(3)
        return data

    with between(server.address, stall) as address, RemoteStore(address, deadline_s=0.5) as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        began = time.monotonic()
        assert read(ns, refs) == [MISS] * 2
        assert time.monotonic() - began < 3


def test_a_damaged_slot_is_a_miss_that_heals(server: Running, store: Store) -> None:
    """Found by the client, which has the server look; then the chunk can be stored again."""
    with server.open() as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        refs = fill(ns, 3)
        assert client.flush()
        admin.empty_memory(store)
        assert read(ns, refs) == [DISK] * 3
        admin.empty_memory(store)
        with store.index.read() as txn:
            row = prefixstore.rows.Row.unpack(txn.get("chunk", refs[1].key) or b"")
        with open(store.folder / f"disk-{row.slot_bytes}.slots", "r+b") as file:
            file.seek(row.slot * row.slot_bytes + 1000)
            file.write(b"damage")
        tiers = read(ns, refs)
        assert [tier == MISS for tier in tiers] == [False, True, False]
        wait_for(lambda: ns.match(refs).num_chunks == 1, "the damaged row to go")
        assert MISS not in read(ns, fill(ns, 3))


# ---------------------------------------------------------------------- slow and many
def test_slow_readers_hold_nobody_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads; each is cut off in the end."""
    monkeypatch.setattr(limits, "STALL_S", 1.5)
    with server.open() as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        refs = fill(ns, 24)
        body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs))
        head = (f"POST /v1/get HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.CONTENT_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")  # fmt: skip
        slow = [connect(server.address) for _ in range(2 * limits.TRANSFER_THREADS)]
        for sock in slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(head.encode() + body)
        state = server.server.state
        wait_for(lambda: sum(state.transfers.values()) == len(slow), "all of them to begin")
        assert MISS not in read(ns, refs[:3])
        wait_for(lambda: sum(state.transfers.values()) == 0, "the end of the slow ones")
        for sock in slow:
            sock.close()
        assert MISS not in read(ns, refs[:3])
        wait_for(lambda: not +state.bytes_under_way, "the end of the last one")


def test_ranks_complete_each_others_chunks_at_the_same_time(server: Running) -> None:
    """Two clients put their heads of the same chunks at once, as tensor-parallel ranks do."""
    parts = [Roi(0, BIG.num_layers, head, head + 1) for head in range(2)]
    start = threading.Barrier(2)
    states: dict[int, list[PutState]] = {}

    def rank(number: int) -> None:
        with server.open() as client:
            ns = client.namespace(identity_for("a", BIG), BIG)
            refs = ns.chain(tokens_of(1, 8, BIG)).refs()
            whole = [content_of(ref.key, BIG.payload_bytes) for ref in refs]
            data = [region_of(one, BIG, parts[number]) for one in whole]
            start.wait(30)
            states[number] = ns.put(refs, data, roi=parts[number], group=7)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with server.open() as client:
        ns = client.namespace(identity_for("a", BIG), BIG)
        refs = ns.chain(tokens_of(1, 8, BIG)).refs()
        for one, other in zip(states[0], states[1], strict=True):
            assert {one, other} == {PutState.PARTIAL, PutState.STORED}
        assert MISS not in read(ns, refs)
        outs = outputs(BIG, 8, parts[1])
        assert MISS not in ns.get(refs, outs, parts[1])
        expected = [content_of(ref.key, BIG.payload_bytes) for ref in refs]
        assert outs == [region_of(one, BIG, parts[1]) for one in expected]


def test_staleness_and_what_else_is_beside_a_chunk(server: Running, store: Store) -> None:
    import numpy as np

    with server.open() as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = fill(ns, 3)
        assert client.flush()
        values = np.arange(8, dtype=np.float32).reshape(2, 4)
        assert ns.note_staleness(refs[:2], values) == 2
        found = ns.staleness_of(refs)
        assert found[2] is None
        assert [one.tolist() for one in found[:2] if one is not None] == values.tolist()
        local = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        assert local.match(refs).num_chunks == 3, "the engines of the host see the same chunks"
        admin.empty_memory(store)
        assert ns.match(refs).tiers == (2, 2, 2)
        assert ns.prefetch(refs) == 3
        wait_for(lambda: ns.match(refs).tiers == (1, 1, 1), "the prefetch")
        assert ns.pin(refs[:1]) == 1
        [pinned] = [one for one in admin.list_chunks(store) if one.row.pinned]
        assert pinned.key == refs[0].key
        assert ns.pin(refs[:1], pinned=False) == 1


# ---------------------------------------------------------------------- TLS, sockets, command line
def test_tls(store: Store, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with running(store, tls_cert=cert, tls_key=key) as server:
        assert server.address.startswith("https://")
        with server.open() as client:
            client.caller.breaker._failures = FAILURES_MAX
            for _ in range(FAILURES_MAX + 1):  # the probe and those after it are told why
                with pytest.raises(RemoteError, match="certificate"):
                    client.namespace(identity_for("a", BIG), BIG)
        with server.open(ca_file=cert) as client:
            ns = client.namespace(identity_for("a", BIG), BIG)
            assert MISS not in read(ns, fill(ns, 12))


def test_a_socket_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # of a server that was killed
    with running(store, uds=str(path)) as server:
        assert path.stat().st_mode & 0o777 == 0o600
        assert ask(server.address, "GET", "/healthz")[0] == 200
        with pytest.raises(ConfigError, match="another server"), running(store, uds=str(path)):
            pass
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"), running(store, uds=str(path)):
        pass
    assert path.read_text() == "precious"


def test_the_command_line(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(tmp_path / "none"), "--host=0.0.0.0"]) == 2
    assert "--tokens" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with child(place, "--json-log") as (_, address):
        assert ask(address, "GET", "/readyz")[1] == {"status": "ready", "read_only": False}


def test_open_gives_the_same_for_every_address(place: Place, server: Running) -> None:
    folder = f"dir:{place.folder / 'other'}"
    options: dict[str, Any] = {
        "memory_bytes": "4MiB",
        "disk_bytes": 0,
        "memory_dir": str(place.memory_dir),
    }
    for url, given in ((folder, options), (server.address, {})):
        with prefixstore.open(url, **given) as store:
            ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
            refs = ns.chain(tokens_of(1, 2)).refs()
            ns.put(refs, [content_of(ref.key, CONTRACT_LAYOUT.payload_bytes) for ref in refs])
            assert ns.match(refs).num_chunks == 2
    for wrong in (
        "",
        "/path",
        "ftp://x",
        "http://",
        "http://h:99999",
        "unix:",
        "dir:",
        "http://h/p",
    ):
        with pytest.raises(ConfigError):
            prefixstore.open(wrong)
    with pytest.raises(ConfigError):
        prefixstore.open(folder, token="x")
    assert os.path.exists(place.folder)
