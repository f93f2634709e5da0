"""What happens to Redis servers, and to what lies in them: a miss in time, never a wrong byte."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fault_proxy import between
from prefixstore.errors import ConfigError, RemoteError
from prefixstore.found import REMOTE
from prefixstore.interface import open_store
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Roi
from prefixstore.namespace import MISS
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.redis import RedisBackend
from prefixstore.pool.resp import Command, Connection, RespError
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState
from prefixstore.testing_data import content_of, identity_for, outputs, tokens_of, wait_for
from tests.pool.contract import chunks, part_names, put, read
from tests.pool.servers import Redis, answers, free_ports, redis, redis_cluster
from tests.serve.support import certificate

LAYOUT = Layout(num_layers=4, num_planes=2, num_heads=2, chunk_tokens=8, head_bytes=128)
SIZE = LAYOUT.payload_bytes  # 16 KiB
DEADLINE_S = 1.0


@contextmanager
def opened(url: str) -> Iterator[PooledNamespace]:
    """The namespace of a store over it."""
    with PooledStore(RedisBackend(url), deadline_s=DEADLINE_S) as store:
        yield store.namespace(identity_for("a", LAYOUT), LAYOUT)


@pytest.fixture
def server() -> Iterator[Redis]:
    with redis() as one:
        yield one


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Redis]]:
    with redis_cluster() as nodes:
        yield nodes


@pytest.fixture
def ns(server: Redis) -> Iterator[PooledNamespace]:
    with opened(server.url) as namespace:
        yield namespace


def value_of(server: Redis, ns: PooledNamespace, ref: ChunkRef) -> bytes:
    data = server.ask("GET", ns.shape.object_of(ref.key))
    assert isinstance(data, bytes)
    return data


# ---------------------------------------------------------------------- what lies in it
PLACES: dict[str, Callable[[bytes], int]] = {
    "payload": lambda data: 77,
    "last byte of the payload": lambda data: SIZE - 1,
    "magic": lambda data: SIZE + 3,
    "sum": lambda data: SIZE + 12,
    "length of the row": lambda data: SIZE + 25,
    "row": lambda data: SIZE + 40,
    "tokens": lambda data: data.index(b"\0", SIZE + 120),
    "table": lambda data: len(data) - 5,
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("roi", [None, Roi(0, 4, 0, 1)], ids=["whole", "region"])
def test_a_flipped_byte_is_a_miss_and_the_chunk_is_dropped(
    server: Redis, ns: PooledNamespace, where: str, roi: Roi | None
) -> None:
    refs = chunks(ns)
    assert put(ns, refs) == [PutState.STORED] * 4
    name, data = ns.shape.object_of(refs[1].key), bytearray(value_of(server, ns, refs[1]))
    at = PLACES[where](bytes(data))
    data[at] ^= 0x10
    assert server.ask("SET", name, bytes(data)) == "OK"
    unseen = where == "last byte of the payload" and roi is not None  # another head's
    assert read(ns, refs, roi) == [REMOTE, REMOTE if unseen else MISS, REMOTE, REMOTE]
    if not unseen:
        assert server.ask("EXISTS", name) == 0
        assert ns.store.counts["damaged"] == 1
        assert put(ns, refs) == [PutState.EXISTS, PutState.STORED, *[PutState.EXISTS] * 2]
        assert read(ns, refs) == [REMOTE] * 4


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE, SIZE + 8, SIZE + 40, SIZE + 200])
def test_a_value_that_is_cut_short_is_a_miss(server: Redis, ns: PooledNamespace, size: int) -> None:
    refs = chunks(ns)
    put(ns, refs)
    data = value_of(server, ns, refs[2])
    assert server.ask("SET", ns.shape.object_of(refs[2].key), data[:size]) == "OK"
    assert read(ns, refs) == [REMOTE, REMOTE, MISS, REMOTE]


def test_another_chunks_value_is_a_miss(server: Redis, ns: PooledNamespace) -> None:
    """Sound in itself, but under another's name."""
    refs = chunks(ns)
    put(ns, refs)
    other = value_of(server, ns, refs[3])
    server.ask("SET", ns.shape.object_of(refs[0].key), other)
    bare = [ref._replace(preimage=b"") for ref in refs]
    assert read(ns, bare) == [MISS, REMOTE, REMOTE, REMOTE]


def test_a_part_that_was_evicted_is_a_miss(server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rest of the chunk goes, so that it can be stored again."""
    monkeypatch.setattr(RedisBackend, "part_bytes", 6000)
    with opened(server.url) as ns:
        refs = chunks(ns)
        put(ns, refs)
        assert read(ns, refs) == [REMOTE] * 4
        _, part = part_names(ns, refs[1])
        assert server.ask("DEL", part) == 1
        assert read(ns, refs) == [REMOTE, MISS, REMOTE, REMOTE]
        assert put(ns, refs)[1] is PutState.STORED
        assert read(ns, refs) == [REMOTE] * 4


def test_values_of_another_kind_are_no_chunks(server: Redis, ns: PooledNamespace) -> None:
    refs = chunks(ns)
    put(ns, refs)
    name = ns.shape.object_of(refs[0].key)
    server.ask("DEL", name)
    server.ask("LPUSH", name, "a list")
    assert read(ns, refs) == [MISS, REMOTE, REMOTE, REMOTE]


def test_a_full_server_takes_nothing(server: Redis, ns: PooledNamespace) -> None:
    """What is there is served."""
    refs = chunks(ns)
    put(ns, refs)
    server.ask("CONFIG", "SET", "maxmemory", "1")
    assert put(ns, chunks(ns, seed=2)) == [PutState.FULL] * 4
    assert read(ns, refs) == [REMOTE] * 4


# ---------------------------------------------------------------------- what is asked
def calls(server: Redis, verb: str) -> int:
    """How often the server has done a command."""
    info = server.ask("INFO", "commandstats")
    assert isinstance(info, bytes)
    for line in info.decode().splitlines():
        if line.startswith(f"cmdstat_{verb}:calls="):
            return int(line.partition("=")[2].partition(",")[0])
    return 0


def test_misses_cost_no_round_trip(server: Redis, ns: PooledNamespace) -> None:
    refs = chunks(ns)
    put(ns, refs)
    unknown = chunks(ns, 40, seed=3)
    ns.match(unknown)
    wait_for(lambda: ns.store.scout.may_have(ns.name, [b"x" * 16]) == [False], "a listing")
    before = calls(server, "exists")
    for _ in range(10):
        assert ns.match(unknown).num_chunks == 0
        assert ns.match_each(unknown) == [MISS] * 40
    assert calls(server, "exists") == before
    assert ns.match([*refs, *unknown]).num_chunks == 4
    assert calls(server, "exists") == before + 4, "what may be there is asked about"


def test_what_another_host_stores_is_not_hidden(server: Redis, ns: PooledNamespace) -> None:
    """It is heard of, though the next listing is half a minute away."""
    ns.match(chunks(ns))
    wait_for(lambda: ns.store.scout.may_have(ns.name, [b"x" * 16]) == [False], "a listing")
    with opened(server.url) as other:
        for seed in range(5, 9):
            refs = chunks(other, seed=seed)
            assert ns.match(refs).num_chunks == 0
            put(other, refs)
            wait_for(lambda refs=refs: ns.match(refs).num_chunks == 4, "the news")  # type: ignore[misc]


def test_without_news_everything_is_asked_for(server: Redis, ns: PooledNamespace) -> None:
    """As when the server that tells them is lost."""
    ns.match(chunks(ns))
    wait_for(lambda: ns.store.scout.may_have(ns.name, [b"x" * 16]) == [False], "a listing")
    server.ask("SET", ns.store.news_topic, "no stream")
    wait_for(lambda: ns.store.scout.may_have(ns.name, [b"x" * 16]) is None, "the loss to be seen")
    refs = chunks(ns)
    with opened(server.url) as other:
        put(other, refs)
    assert ns.match(refs).num_chunks == 4


# ---------------------------------------------------------------------- what happens to it
class Load:
    """Threads that put and read all the time, and compare; what they met."""

    def __init__(self, ns: PooledNamespace) -> None:
        self.ns, self.hits, self.misses, self.calls = ns, 0, 0, 0
        self.slowest_s = 0.0
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(4)
        self._work = [self._threads.submit(self._run, seed) for seed in range(4)]

    def _run(self, seed: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            refs = chunks(self.ns, 4, seed=1000 * seed + turn % 7)
            began = time.monotonic()
            try:
                put(self.ns, refs)
                found = self.ns.match(refs).num_chunks
            except RemoteError:
                found = 0
            tiers = read(self.ns, refs)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            assert found <= 4
            self.hits += tiers.count(REMOTE)
            self.misses += tiers.count(MISS)
            self.calls += 1
            time.sleep(0.001)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        wait_for(lambda: condition() or any(one.done() for one in self._work), what)

    def end(self) -> None:
        """Raises what a thread met."""
        self._stop.set()
        for one in self._work:
            one.result(30.0)
        self._threads.shutdown()


@contextmanager
def load(ns: PooledNamespace) -> Iterator[Load]:
    running = Load(ns)
    try:
        yield running
    finally:
        running.end()


def test_a_server_that_is_killed_and_comes_back(server: Redis, ns: PooledNamespace) -> None:
    """Under load: misses, no hang, no wrong byte; then hits again, by itself."""
    with load(ns) as running:
        running.until(lambda: running.hits > 100, "hits")
        server.kill()
        wait_for(lambda: not ns.store.usable, "the breaker to open")
        misses = running.misses
        running.until(lambda: running.misses > misses + 50, "misses")
        server.start()
        hits = running.hits
        running.until(lambda: running.hits > hits + 100, "hits again")
    assert running.slowest_s < 5 * DEADLINE_S, "three calls, each of which has a deadline"


def test_a_node_of_a_cluster_that_is_killed_is_a_miss_for_its_keys() -> None:
    """The others serve theirs meanwhile, and all when it is back."""
    with redis_cluster() as nodes, opened(nodes[0].url) as ns, load(ns) as running:
        running.until(lambda: running.hits > 100, "hits")
        nodes[2].kill()
        misses, hits = running.misses, running.hits
        running.until(lambda: running.misses > misses + 50 and running.hits > hits + 50, "both")
        assert ns.store.usable
        refs = chunks(ns, 30, seed=77)
        states = put(ns, refs)
        assert set(states) == {PutState.STORED, PutState.LOST}
        stored = [state is PutState.STORED for state in states]
        assert [tier == REMOTE for tier in read(ns, refs)] == stored
    assert running.slowest_s < 5 * DEADLINE_S


def test_a_server_that_stands_still_takes_no_other_servers_time() -> None:
    """When the cluster is asked which server has what: it takes connections and says nothing."""
    with redis_cluster() as nodes, socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        hosts = [address, *(one.url.removeprefix("redis://") for one in nodes)]
        backend = RedisBackend(f"redis://{','.join(hosts)}")
        try:
            names = [f"silent/{i}" for i in range(30)]
            assert backend.exist(names, deadline_s=DEADLINE_S) == [False] * 30
            assert address not in {str(node) for node in backend._owners}
        finally:
            backend.close()


@pytest.mark.parametrize("port", [b":0", b":70000", b"$1\r\nx"])
def test_a_cluster_that_tells_nonsense_of_its_slots(port: bytes) -> None:
    """Is as one that is away, at its own deadline."""
    told = b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n" + port + b"\r\n"
    with answers(told) as address, opened(f"redis://{address}") as ns:
        assert read(ns, chunks(ns)) == [MISS] * 4
        with pytest.raises(RemoteError, match="as nobody can read"):
            ns.store.check_open()


@pytest.mark.parametrize("error", [
    "BUSY Redis is busy running a script.", "LOADING Redis is loading the dataset in memory",
    "CLUSTERDOWN The cluster is down", "ERR max number of clients reached", "",
])  # fmt: skip
def test_a_cluster_that_does_not_tell_its_slots_at_first(
    monkeypatch: pytest.MonkeyPatch, cluster: list[Redis], error: str
) -> None:
    """Is no lone server: it is asked again, and until then it is away. "" is no answer in time."""
    run, is_over = Connection.run, threading.Event()

    def answer(self: Connection, commands: Sequence[Command], deadline: float) -> list[Any]:
        asks = any(one.words[0] == b"CLUSTER" for one in commands)
        if is_over.is_set() or not asks:
            return run(self, commands, deadline)
        if not error:
            raise TimeoutError("no answer within the deadline")
        return [RespError(error)]

    monkeypatch.setattr(Connection, "run", answer)
    monkeypatch.setattr("prefixstore.pool.redis.ASK_AGAIN_S", 0.0)
    with opened(cluster[0].url) as ns:
        refs = chunks(ns, 30)
        with pytest.raises(RemoteError, match=error or "deadline|has not answered"):
            ns.store.check_open()
        assert read(ns, refs) == [MISS] * 30
        is_over.set()

        def is_there() -> bool:
            try:
                ns.store.check_open()
            except RemoteError:  # left alone for a moment, since it failed
                return False
            return True

        wait_for(is_there, "it to be asked again")
        assert set(put(ns, refs)) <= {PutState.STORED, PutState.EXISTS}
        assert read(ns, refs) == [REMOTE] * 30


@pytest.mark.parametrize("error", [
    "ERR This instance has cluster support disabled", "ERR unknown command 'CLUSTER'",
    "ERR unknown command `CLUSTER`, with args beginning with: `SLOTS`, ",
    "ERR Unknown subcommand or wrong number of arguments for 'SLOTS'",
    "ERR Cluster is disabled. Use --cluster_mode=yes to enable.",
    "ERR Cluster mode is not enabled", "ERR unsupported command 'cluster'",
])  # fmt: skip
def test_a_server_that_has_no_clusters_stands_alone(error: str) -> None:
    with answers(f"-{error}\r\n".encode()) as address:
        backend = RedisBackend(f"redis://{address}")
        try:
            assert backend.exist(["a"], deadline_s=DEADLINE_S) == [False]
        finally:
            backend.close()


def test_a_server_that_stands_still_costs_a_deadline_and_then_nothing(server: Redis) -> None:
    """Here it takes what it is asked, and answers nothing."""
    stalled = threading.Event()

    def stall(data: bytes, before: int) -> bytes:
        if stalled.is_set():
            time.sleep(0.05)
            return b""
        return data

    with (
        between(server.url.removeprefix("redis://"), stall) as address,
        opened(address.replace("http://", "redis://")) as ns,
    ):
        refs = chunks(ns)
        put(ns, refs)
        assert read(ns, refs) == [REMOTE] * 4
        stalled.set()
        for _ in range(4):
            assert read(ns, refs) == [MISS] * 4
        assert not ns.store.usable
        began = time.monotonic()
        for _ in range(50):
            assert read(ns, refs) == [MISS] * 4
        assert time.monotonic() - began < 25 * DEADLINE_S, "each would take a deadline if it asked"
        stalled.clear()
        wait_for(lambda: read(ns, refs) == [REMOTE] * 4, "hits")


@pytest.mark.parametrize("answer", [
    b"nonsense\r\n", b"$5\r\n", b"*-7\r\n", b"$99999999999999\r\n", b":\r\n", b"*99999999\r\n",
    b"\r\n" * 40, b"x" * 40_000, b"*1\r\n" * 20,
])  # fmt: skip
def test_a_server_that_answers_nonsense(answer: bytes) -> None:
    """Is as one that is away."""
    with answers(answer) as address, opened(f"redis://{address}") as ns:
        refs = chunks(ns)
        assert read(ns, refs) == [MISS] * 4
        with pytest.raises(RemoteError):
            put(ns, refs)


# ---------------------------------------------------------------------- getting in
def test_a_password_is_wanted_and_never_told(server: Redis) -> None:
    server.ask("ACL", "SETUSER", "kv", "on", ">sesame!", "~*", "&*", "+@all")
    server.ask("ACL", "SETUSER", "default", "off")
    address = server.url.removeprefix("redis://")
    for url in (f"redis://kv:sesame%21@{address}", f"redis://kv@{address}/3"):
        with open_store(url, token="" if ":sesame" in url else "sesame!") as store:
            store.check_open()
            ns = store.namespace(identity_for("a", LAYOUT), LAYOUT)
            assert put(ns, chunks(ns)) == [PutState.STORED] * 4
            assert read(ns, chunks(ns)) == [REMOTE] * 4
    for url in (f"redis://{address}", f"redis://kv:hunter2@{address}"):
        with open_store(url) as store, pytest.raises(RemoteError) as caught:
            store.check_open()
        assert "hunter2" not in str(caught.value)
        assert address in str(caught.value)


@pytest.mark.parametrize("url", [
    "redis:nowhere", "redis://:hunter2@host:port", "redis://host/x",
    "redis://host/-1", "redis://host?x=1", "redis://,", "redis://",
])  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="redis://host:port") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_over_tls(tmp_path: Path) -> None:
    """Values of megabytes too: TLS neither gathers nor scatters."""
    cert, key = certificate(tmp_path)
    port = free_ports(1)[0]
    options = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no"]
    with redis("--tls-port", str(port), *options):
        url = f"rediss://localhost:{port}"
        large = Layout(4, 2, 4, 64, 1024)
        with open_store(url, ca_file=cert) as store:
            ns = store.namespace(identity_for("a", large), large)
            refs = ns.chain(tokens_of(1, 3, large)).refs()
            data = [content_of(ref.key, large.payload_bytes) for ref in refs]
            assert ns.put(refs, data) == [PutState.STORED] * 3
            outs = outputs(large, 3)
            assert ns.get(refs, outs) == [REMOTE] * 3
            assert outs == data
        with open_store(url) as store, pytest.raises(RemoteError, match="certificate"):
            store.check_open()
