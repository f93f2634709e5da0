"""A client process of `benchmarks.serve`: this store, bare sockets, memcpy and Redis.

Tasks are those of `serve_tasks`. Addresses: those of `prefixstore.open`; ``bare:host:port``, a loop
over plain sockets (`serve_bare`); ``redis:host:port``; ``memcpy:``.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import Any

import numpy as np

import prefixstore
from benchmarks.serve_redis import RedisClient
from benchmarks.serve_tasks import CALL_CHUNKS, Call, answer_tasks, timed
from benchmarks.store_peers import Bytes, aligned
from benchmarks.store_sizes import LAYOUTS
from prefixstore.interface import NamespaceLike, StoreLike
from prefixstore.keys import ChunkRef, KeyChain
from prefixstore.testing_data import identity_for

MATCH_KEYS = 512
STORE_S = 30.0
CONNECT_S = 30.0


@lru_cache(maxsize=64)
def buffers(client: int, count: int, size: int) -> tuple[Bytes, Bytes]:
    """What a client puts and where it gets to, [chunks, bytes]; the same for all variants."""
    source, target = aligned(count * size), aligned(count * size)
    words = source.view(np.uint64)
    words[:] = np.random.default_rng(client).integers(0, 2**64, len(words), dtype=np.uint64)
    return source.reshape(count, size), target.reshape(count, size)


def opened(stack: ExitStack, task: dict[str, Any]) -> list[Call]:
    """See `serve_tasks`."""
    kib, op, address = task["kib"], task["op"], task["address"]
    store = None
    if address.partition(":")[0] not in ("bare", "redis", "memcpy"):
        store = stack.enter_context(prefixstore.open(address))
    calls = []
    for client in task["clients"]:
        source, target = buffers(client, task["chunks"], kib * 1024)
        if store is not None:
            work = of_store(store, op, kib, client, source, target)
        else:
            work = of_peer(stack, address, op, client, source, target)
        calls.append(timed(work))
    return calls


def of_peer(
    stack: ExitStack, address: str, op: str, client: int, source: Bytes, target: Bytes
) -> Callable[[], object]:
    """A function that makes one call of something else."""
    kind, _, place = address.partition(":")
    each = CALL_CHUNKS[op]
    turns = itertools.cycle(range(0, len(source), each))
    if kind == "memcpy":
        if op == "put":
            source, target = target, source
        return lambda: np.copyto(target[(i := next(turns)) : i + each], source[i : i + each])
    host, _, port = place.partition(":")
    sock = stack.enter_context(socket.create_connection((host, int(port)), CONNECT_S))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "bare":
        whole = source.shape[1] * each
        ends = zip(source.reshape(-1, whole), target.reshape(-1, whole), strict=True)
        turn = itertools.cycle([(one.data, other.data) for one, other in ends])
        return lambda: bare(sock, op, *next(turn))
    redis = RedisClient(sock)
    keys = [b"%d/%d" % (client, i) for i in range(len(source))]
    views, outs = [one.data for one in source], [one.data for one in target]
    if op == "put":
        return lambda: redis.set(b"put/" + keys[i := next(turns)], views[i])  # again and again
    for key, view in zip(keys, views, strict=True):
        redis.set(key, view)
    return lambda: redis.get(keys[(i := next(turns)) : i + each], outs[i : i + each])


def of_store(
    store: StoreLike, op: str, kib: int, client: int, source: Bytes, target: Bytes
) -> Callable[[], object]:
    """A function that makes one call of a store."""
    count, each = len(source), CALL_CHUNKS[op]
    turns = itertools.cycle(range(0, count, each))
    views, outs = [one.data for one in source], [one.data for one in target]
    layout = LAYOUTS[kib]
    ns = store.namespace(identity_for("bench", layout), layout)
    tokens = layout.chunk_tokens
    if op == "match":
        chain = ns.chain(range(MATCH_KEYS * tokens))
        store_all(ns, chain.refs(), [views[i % count] for i in range(MATCH_KEYS)])
        return partial(match, ns, chain)
    refs = ns.chain([client, *range(1, count * tokens)]).refs()
    if op != "put":
        store_all(ns, refs, views)

        def get() -> None:
            i = next(turns)
            assert 0 not in ns.get(refs[i : i + each], outs[i : i + each])

        return get
    seeds = itertools.count(time.monotonic_ns() % 2**30)

    def put() -> None:
        fresh = ns.chain([client, next(seeds), *range(2, tokens)]).refs()
        assert ns.put(fresh, [views[next(turns)]])[0].value == "stored"

    return put


def match(ns: NamespaceLike, chain: KeyChain) -> None:
    """Find all keys of a chain."""
    assert ns.match(chain).num_chunks == MATCH_KEYS


def store_all(ns: NamespaceLike, refs: list[ChunkRef], views: list[memoryview]) -> None:
    """Put chunks that others' puts do not evict; room of another size comes free in a second."""
    end = time.monotonic() + STORE_S
    while {state.value for state in ns.put(refs, views, pin=True)} - {"stored", "exists"}:
        assert time.monotonic() < end, "the memory tier is too small for this"
        time.sleep(0.2)


def bare(sock: socket.socket, op: str, view: memoryview, out: memoryview) -> None:
    """Ask for so many bytes and receive them, or send them and wait for a byte."""
    sock.sendall(len(view).to_bytes(8, "little") + op[:1].encode())
    if op == "put":
        sock.sendall(view)
        assert sock.recv(1) == b"k"
        return
    at = 0
    while at < len(out):
        got = sock.recv_into(out[at:])
        assert got, "the other side is gone"
        at += got


if __name__ == "__main__":
    answer_tasks(opened)
