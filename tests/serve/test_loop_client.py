"""The client for event loops: the same answers as the blocking one, many at once, and its ends."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from prefixstore import PutState, Roi, Store, admin
from prefixstore.client.breaker import FAILURES_MAX
from prefixstore.client.caller import IDLE_MAX, RefusedError
from prefixstore.client.loop import AsyncNamespace, AsyncStore
from prefixstore.errors import (
    ConfigError,
    LayoutError,
    RemoteError,
    StoreClosedError,
    StoreError,
    StoreTimeoutError,
)
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout
from prefixstore.ledger import DISK, MEMORY
from prefixstore.namespace import MISS
from prefixstore.serve.app import GUARDS
from prefixstore.testing_data import (
    CONTRACT_LAYOUT,
    content_of,
    identity_for,
    outputs,
    region_of,
    tokens_of,
)
from tests.serve.support import ALICE, BOB, Running, certificate, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]
T = TypeVar("T")
BIG = Layout(num_layers=8, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=8192)  # 1 MiB
WAIT_S = 60.0


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("64MiB", "64MiB") as store:
        yield store


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, WAIT_S)

    return asyncio.run(bounded())


def payloads(refs: list[ChunkRef], layout: Layout) -> list[bytes]:
    return [content_of(ref.key, layout.payload_bytes) for ref in refs]


async def read(ns: AsyncNamespace, refs: list[ChunkRef]) -> list[int]:
    """Tiers; every hit must be right."""
    outs = outputs(ns.layout, len(refs))
    tiers = await ns.get(refs, outs)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        assert tier == MISS or out == content_of(ref.key, ns.layout.payload_bytes)
    return tiers


async def all_calls(client: AsyncStore, store: Store) -> None:
    ns = await client.namespace(identity_for("a", BIG), BIG)
    refs = ns.chain(tokens_of(1, 6, BIG)).refs()
    assert await ns.put(refs[:5], payloads(refs[:5], BIG), tag="t") == [PutState.STORED] * 5
    assert await ns.put(refs[:1], [bytes(BIG.payload_bytes)]) == [PutState.EXISTS]
    found = await ns.match(ns.chain(tokens_of(1, 6, BIG)))
    assert found.tiers == (await ns.match(refs)).tiers == (MEMORY,) * 5
    assert await read(ns, refs) == [MEMORY] * 5 + [MISS]
    half = Roi(2, 5, 1, 2)
    outs = outputs(BIG, 5, half)
    assert MISS not in await ns.get(refs[:5], outs, half)
    assert outs == [region_of(one, BIG, half) for one in payloads(refs[:5], BIG)]
    lease, held = await ns.lease(refs[:5], found.tiers)
    assert held == 5
    await ns.release(lease)
    await ns.release(lease)
    told = await ns.explain(refs)
    assert (told["found_chunks"], told["missing"]["why"]) == (5, "absent")
    assert await ns.pin(refs[:2]) == 2
    assert await ns.pin(refs[:2], pinned=False) == 2
    assert await ns.set_ttl(refs[:1], 100) == 1
    assert await client.flush()
    admin.empty_memory(store)
    assert await ns.prefetch(refs) == 5
    assert await ns.delete(refs[4:]) == 1
    assert (await ns.match(refs)).num_chunks == 4
    assert (await client.namespace_of(ns.name)).name == ns.name
    await client.check_open()
    new = await ns.bump()
    assert (await new.match(refs)).num_chunks == 0
    with pytest.raises(StoreClosedError):
        await ns.match(refs)
    assert await new.retire() == 0


@pytest.mark.parametrize("over", ["tcp", "unix", "tls"])
def test_every_call(store: Store, tmp_path: Path, over: str) -> None:
    options: dict[str, str] = {}
    ca_file = None
    if over == "unix":
        options["uds"] = str(tmp_path / "socket")
    if over == "tls":
        ca_file, options["tls_key"] = certificate(tmp_path)
        options["tls_cert"] = ca_file

    async def main(address: str) -> None:
        async with AsyncStore(address, ca_file=ca_file) as client:
            await all_calls(client, store)

    with running(store, **options) as server:
        run(main(server.address))


def test_errors_are_those_of_the_blocking_client(store: Store, tmp_path: Path) -> None:
    async def main(address: str) -> None:
        async with AsyncStore(address, token="x" * 20) as stranger:
            with pytest.raises(RefusedError, match="no valid token"):
                await stranger.namespace(identity_for("a"), CONTRACT_LAYOUT)
        async with AsyncStore(address, token=ALICE) as client:
            ns = await client.namespace(identity_for("a"), CONTRACT_LAYOUT)
            refs = ns.chain(tokens_of(1, 2)).refs()
            with pytest.raises(LayoutError):
                await ns.get(refs, [memoryview(bytearray(3))] * 2)
            with pytest.raises(ConfigError):
                await ns.set_ttl(refs, -1)
            async with AsyncStore(address, token=BOB) as bob:
                his = await bob.namespace(identity_for("a"), CONTRACT_LAYOUT)
                await ns.put(refs, payloads(refs, CONTRACT_LAYOUT))
                assert await read(his, refs) == [MISS] * 2
                assert (await his.match(refs)).num_chunks == 0
        with pytest.raises(StoreClosedError):
            await ns.match(refs)

    with running(store, tokens=tokens_file(tmp_path)) as server:
        run(main(server.address))


# ---------------------------------------------------------------------- many at once
def test_many_at_once_share_connections(server: Running) -> None:
    """64 tasks put, match and get at random what only they could have; bytes never mix."""

    async def one(client: AsyncStore, number: int) -> int:
        rng = random.Random(number)
        ns = await client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = ns.chain(tokens_of(number, 8)).refs()
        await ns.put(refs, payloads(refs, CONTRACT_LAYOUT))
        hits = 0
        for _ in range(6):
            some = rng.sample(refs, rng.randint(1, 8))
            if rng.random() < 0.3:
                assert (await ns.match(refs)).num_chunks == 8
            hits += sum(tier != MISS for tier in await read(ns, some))
        return hits

    async def main() -> None:
        async with AsyncStore(server.address) as client:
            hits = await asyncio.gather(*(one(client, number) for number in range(64)))
            assert min(hits) > 0
            kept = len(client.calls._idle)
            assert 0 < kept <= IDLE_MAX
            before = len(server.server.app[GUARDS].connections)
            for number in range(5):
                await one(client, number)
            assert len(server.server.app[GUARDS].connections) <= before, "they are used again"

    run(main())


def test_a_large_get_leaves_turns_to_others(server: Running) -> None:
    """The loop goes round while tens of MiB come in."""

    async def main() -> None:
        async with AsyncStore(server.address) as client:
            ns = await client.namespace(identity_for("a", BIG), BIG)
            refs = ns.chain(tokens_of(1, 40, BIG)).refs()
            await ns.put(refs, payloads(refs, BIG))
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count())
            assert MISS not in await read(ns, refs)
            counting.cancel()
            assert turns >= 10

    run(main())


# ---------------------------------------------------------------------- ends
def test_deadlines_and_the_breaker() -> None:
    """A server that listens and says nothing."""

    async def main(address: str) -> None:
        async with AsyncStore(address, deadline_s=0.3) as client:
            for _ in range(FAILURES_MAX):
                with pytest.raises(StoreError):
                    await client.check_open()
            assert not client.usable
            with pytest.raises(RemoteError, match="did not answer lately"):
                await client.check_open()
            assert await client.flush() is False

    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        run(main(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        assert time.monotonic() - began < 30


def test_nobody_there(tmp_path: Path) -> None:
    async def main(address: str) -> None:
        async with AsyncStore(address, deadline_s=1.0) as client:
            with pytest.raises((RemoteError, StoreTimeoutError)):
                await client.check_open()

    for address in (f"unix:{tmp_path}/none", "http://127.0.0.1:9", "http://nowhere.invalid:1"):
        run(main(address))


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.02])
def test_a_call_that_is_cancelled_leaves_nothing_behind(server: Running, after_s: float) -> None:
    """Its connection is closed, since the rest of its answer is still to come on it."""

    async def main() -> None:
        async with AsyncStore(server.address) as client:
            ns = await client.namespace(identity_for("a", BIG), BIG)
            refs = ns.chain(tokens_of(1, 20, BIG)).refs()
            await ns.put(refs, payloads(refs, BIG))
            for _ in range(5):
                task = asyncio.create_task(read(ns, refs))
                await asyncio.sleep(after_s)
                if task.cancel():
                    with pytest.raises(asyncio.CancelledError):
                        await task
                assert await read(ns, refs[:2]) == [MEMORY] * 2
            assert client.usable

    run(main())


def test_a_cancelled_probe_leaves_the_next_one_free() -> None:
    async def main(address: str) -> None:
        async with AsyncStore(address, deadline_s=5.0) as client:
            breaker = client.calls.breaker
            breaker._failures, breaker._open_until = FAILURES_MAX, time.monotonic()
            task = asyncio.create_task(client.check_open())
            await asyncio.sleep(0.05)
            assert not breaker.admits(), "the probe is under way"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert breaker.admits()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        run(main(f"http://127.0.0.1:{listener.getsockname()[1]}"))


def test_a_server_that_comes_back_is_found(store: Store, tmp_path: Path) -> None:
    """On connections that the first one had closed, without an error."""
    uds = str(tmp_path / "socket")

    def serve(call: Callable[[], Awaitable[T]], loop: asyncio.AbstractEventLoop) -> T:
        with running(store, uds=uds):
            return loop.run_until_complete(asyncio.wait_for(call(), WAIT_S))

    loop = asyncio.new_event_loop()
    client = AsyncStore(f"unix:{uds}")
    try:
        ns = serve(lambda: client.namespace(identity_for("a"), CONTRACT_LAYOUT), loop)
        refs = ns.chain(tokens_of(1, 3)).refs()
        serve(lambda: ns.put(refs, payloads(refs, CONTRACT_LAYOUT)), loop)
        assert set(serve(lambda: read(ns, refs), loop)) <= {MEMORY, DISK}
        assert set(loop.run_until_complete(read(ns, refs))) == {MISS}
    finally:
        client.close()
        loop.close()
