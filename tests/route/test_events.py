"""KV events as vLLM publishes them, with vLLM's own publisher; what a worker is known to have.

The truth is a model of a cache: the blocks that are there, by the tokens of their whole prefix.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

from prefixstore.route import events
from prefixstore.route.events import Follower, make_context
from prefixstore.route.known import Known
from prefixstore.route.prompt import Prompt
from prefixstore.route.workers import Worker, WorkerSpec

BLOCK, WAIT_S = 4, 20.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def wait_until_free(port: int) -> None:
    """ZeroMQ closes sockets in the background."""
    end = time.monotonic() + WAIT_S
    while True:
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return one.bind(("", port))
            except OSError:
                assert time.monotonic() < end, f"port {port} stays taken"
        time.sleep(0.01)


class Engine:
    """A cache of blocks that tells what happens to it."""

    def __init__(self, replay: bool = True) -> None:
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        self.replay = f"tcp://127.0.0.1:{free_port()}" if replay else None
        self.blocks: dict[tuple[int, ...], bytes] = {}  # whole prefix -> its hash
        self.start()

    def start(self) -> None:
        # vLLM binds what has a star or is IPv6, and connects to others.
        bound = self.endpoint.replace("127.0.0.1", "*")
        for endpoint in filter(None, (self.endpoint, self.replay)):
            wait_until_free(int(endpoint.rpartition(":")[2]))
        self.publisher = ZmqEventPublisher(0, bound, self.replay)

    def stop(self) -> None:
        self.publisher.shutdown()

    def tell(self, *events: Any) -> None:
        self.publisher.publish(KVEventBatch(ts=time.time(), events=list(events)))

    def compute(self, tokens: list[int], **more: Any) -> None:
        """Store the blocks of a prompt behind those that are there, in one event."""
        there = self.matches(tokens)
        ends = range(BLOCK, len(tokens) + 1, BLOCK)
        prefixes = [tuple(tokens[:end]) for end in ends]
        hashes = [self.hash_of(prefix) for prefix in prefixes]
        if prefixes[there:]:
            self.blocks |= dict(zip(prefixes, hashes, strict=True))
            parent = hashes[there - 1] if there else None
            ids = tokens[there * BLOCK : len(hashes) * BLOCK]
            event = BlockStored(hashes[there:], parent, ids, BLOCK, None, "GPU", None, **more)
            self.tell(event)

    @staticmethod
    def hash_of(prefix: tuple[int, ...]) -> bytes:
        return hashlib.sha256(repr(prefix).encode()).digest()

    def evict(self, prefix: tuple[int, ...]) -> None:
        self.tell(BlockRemoved([self.blocks.pop(prefix)], "GPU"))

    def matches(self, tokens: list[int]) -> int:
        """The truth: how many leading blocks of a prompt are there."""
        count = 0
        while tuple(tokens[: BLOCK * (count + 1)]) in self.blocks and BLOCK * (count + 1) <= len(
            tokens
        ):
            count += 1
        return count


@asynccontextmanager
async def following(engine: Engine) -> AsyncIterator[Worker]:
    given = {"url": "http://a:1", "kv_events": engine.endpoint}
    if engine.replay:
        given["replay"] = engine.replay
    worker = Worker(WorkerSpec.parse(given))
    worker.known.shape(BLOCK, 10_000)
    worker.answers = True
    context = make_context()
    task = asyncio.create_task(Follower(context, worker).run())
    try:
        yield worker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        context.destroy(linger=0)


async def published(engine: Engine, count: int) -> None:
    """Wait until vLLM's thread has sent so many messages: whoever subscribes then misses them."""
    async with asyncio.timeout(WAIT_S):
        while len(engine.publisher._buffer) < count:
            await asyncio.sleep(0.01)


async def goes_on(engine: Engine) -> None:
    """Tell of nothing: who missed a message before it had subscribed learns so by the next."""
    engine.tell()
    await asyncio.sleep(0.02)


async def until(engine: Engine, worker: Worker, count: int) -> None:
    """Wait until so many blocks are known."""
    async with asyncio.timeout(WAIT_S):
        while len(worker.known._times) != count or not worker.known.tells:
            await goes_on(engine)


def matched(known: Known, tokens: list[int], **body: Any) -> int:
    lora = body.pop("lora", "")
    return known.matches(Prompt.of(tokens, body, lora).keys(BLOCK))


def test_what_is_known_is_what_is_there() -> None:
    """A random history: prompts that share beginnings, and evictions."""

    async def run() -> None:
        rng, engine = random.Random(1), Engine()
        async with following(engine) as worker:
            prompts: list[list[int]] = [[rng.randrange(100) for _ in range(40)] for _ in range(5)]
            for _ in range(200):
                old = rng.choice(prompts)
                new = old[: rng.randrange(len(old))] + [rng.randrange(100) for _ in range(20)]
                prompts.append(new)
                engine.compute(new)
                if len(engine.blocks) > 150:
                    for prefix in rng.sample(sorted(engine.blocks), 10):
                        engine.evict(prefix)
            last = [1000] * BLOCK  # the number of blocks is this one more than once on the way
            engine.compute(last)
            async with asyncio.timeout(WAIT_S):
                while not matched(worker.known, last):
                    await goes_on(engine)
            await until(engine, worker, len(engine.blocks))
            counts = [engine.matches(one) for one in prompts]
            assert [matched(worker.known, one) for one in prompts] == counts
            assert sum(counts) > 0
            engine.tell(AllBlocksCleared())
            await until(engine, worker, 0)
        engine.stop()

    asyncio.run(run())


def test_who_comes_late_asks_for_what_was_told_before() -> None:
    async def run() -> None:
        engine = Engine()
        engine.compute(list(range(40)))
        engine.compute(list(range(20)) + list(range(20)))
        await published(engine, 2)
        async with following(engine) as worker:
            await until(engine, worker, 15)
            engine.compute(list(range(60)))
            await until(engine, worker, 20)
            assert matched(worker.known, list(range(60))) == 15
        engine.stop()

    asyncio.run(run())


def test_more_is_repeated_than_a_socket_holds() -> None:
    """vLLM's socket drops what is more than 1,000 messages and does not say so."""

    async def run() -> None:
        engine = Engine()
        for number in range(6000):
            engine.compute([number] * BLOCK)
        await published(engine, 6000)
        async with following(engine) as worker:
            await until(engine, worker, 6000)
        engine.stop()

    asyncio.run(run())


def test_a_replay_that_nobody_answered_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_REPLAY_S", 0.2)
    monkeypatch.setattr(events, "_ASK_AGAIN_S", 0.3)

    async def run() -> None:
        engine = Engine()
        engine.compute(list(range(40)))
        engine.evict(tuple(range(40)))
        await published(engine, 2)
        behind, engine.replay = engine.replay, f"tcp://127.0.0.1:{free_port()}"  # nobody is there
        async with following(engine) as worker:
            async with asyncio.timeout(WAIT_S):
                while matched(worker.known, [7] * 8) != 2:  # the first that is heard of
                    engine.compute([7] * 8)
                    del engine.blocks[7, 7, 7, 7], engine.blocks[(7,) * 8]
                    await asyncio.sleep(0.02)
            assert not worker.known.tells
            assert matched(worker.known, list(range(40))) == 0
            async with forwarded(engine.replay, behind):
                await until(engine, worker, 11)
                assert matched(worker.known, list(range(40))) == 9, "what was evicted is not there"
        engine.stop()

    asyncio.run(run())


@asynccontextmanager
async def forwarded(endpoint: str, behind: str | None) -> AsyncIterator[None]:
    """TCP to one endpoint goes to another."""
    here, there = (int(str(one).rpartition(":")[2]) for one in (endpoint, behind))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        their_reader, their_writer = await asyncio.open_connection("127.0.0.1", there)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(1 << 16):
                sink.write(data)
            sink.close()

        await asyncio.gather(pump(reader, their_writer), pump(their_reader, writer))

    async with await asyncio.start_server(connected, "127.0.0.1", here):
        yield


Said = tuple[int, Any]  # a message's number, and what it says


class Played(Follower):
    """Of a worker that repeats what is in ``answers``: of each time it is asked, messages and
    whether that was all."""

    def __init__(self, *answers: tuple[list[Said], bool], replay: bool = True) -> None:
        given = {"url": "http://a:1", "kv_events": "tcp://a:2"}
        worker = Worker(WorkerSpec.parse(given | ({"replay": "tcp://a:3"} if replay else {})))
        worker.known.shape(BLOCK, 10_000)
        context: Any = None  # no socket is opened
        super().__init__(context, worker)
        self.known, self.answers, self.asked = worker.known, list(answers), list[int]()

    async def _repeated(self) -> AsyncIterator[Any]:  # type: ignore[override]
        self.asked.append(self._next)
        said, ended = self.answers.pop(0) if self.answers else ([], False)
        for number, event in said:
            yield number, self._decode(encoded(number, event))
        if ended:
            yield None, None

    def hears(self, *said: Said) -> None:
        async def take() -> None:
            for number, event in said:
                await self._take([b"", number.to_bytes(8, "big"), encoded(number, event)])

        asyncio.run(take())

    def later(self) -> None:
        self._ask_at = 0.0

    @property
    def blocks(self) -> set[int]:
        """By the token they are made of."""
        return {token for token in range(10) if matched(self.known, [token] * BLOCK)}


def encoded(number: int, event: Any) -> bytes:
    return msgspec.msgpack.encode(KVEventBatch(ts=float(number), events=[event]))


def stored(token: int) -> Any:
    prefix = (token,) * BLOCK
    return BlockStored([Engine.hash_of(prefix)], None, list(prefix), BLOCK, None, "GPU", None)


def removed(token: int) -> Any:
    return BlockRemoved([Engine.hash_of((token,) * BLOCK)], "GPU")


def test_a_gap_that_is_repeated_in_parts() -> None:
    """Each time it goes on where it ended; what came meanwhile is applied once more, in order."""
    one = Played(([(1, stored(1)), (2, stored(2))], False), ([], False))
    one.hears((0, stored(0)))
    assert one.known.tells
    one.hears((4, removed(2)))
    assert (one.known.tells, one.asked) == (False, [1, 3])
    one.later()
    one.answers = [([(3, stored(3)), (4, removed(2)), (5, removed(1))], True)]
    one.hears((5, removed(1)))
    assert (one.known.tells, one.asked) == (True, [1, 3, 3])
    assert one.blocks == {0, 3}


def test_a_gap_that_nobody_repeats_is_asked_for_later() -> None:
    one = Played()
    one.hears((0, stored(0)), (2, removed(5)), (3, stored(3)))
    assert (one.known.tells, one.asked) == (False, [1]), "not at once again"
    one.later()
    one.answers = [([(1, stored(5)), (2, removed(5)), (3, stored(3)), (4, stored(4))], True)]
    one.hears((4, stored(4)))
    assert (one.known.tells, one.asked) == (True, [1, 1])
    assert one.blocks == {0, 3, 4}
    one.later()
    one.hears((5, stored(5)))
    assert one.asked == [1, 1], "nothing is missing"


def test_what_is_lost_for_good_is_not_asked_for() -> None:
    one = Played(([(3, stored(3))], True))
    one.hears((0, stored(0)), (3, stored(3)))
    one.later()
    one.hears((4, stored(4)))
    assert (one.known.tells, one.asked) == (False, [1])
    one.answers = [([(5, stored(5)), (6, stored(6))], True)]
    one.hears((6, stored(6)))  # this gap is closed, the first is not
    assert (one.known.tells, one.asked) == (False, [1, 5])


@pytest.mark.parametrize(
    "ends", ["it has nothing", "it had nothing", "it is started anew", "message 0"]
)
def test_what_ends_a_gap(ends: str) -> None:
    one = Played()
    one.hears((0, stored(0)), (2, stored(2)))
    assert not one.known.tells
    one.later()
    if ends == "it has nothing":
        one.hears((3, AllBlocksCleared()), (4, stored(4)))
        assert one.blocks == {4}
    elif ends == "it had nothing":
        one.answers = [([(1, AllBlocksCleared()), (2, stored(2)), (3, stored(3))], False)]
        one.hears((3, stored(3)), (4, stored(4)))
        assert one.blocks == {2, 3, 4}
    elif ends == "it is started anew":
        one.known.restart()
        one._told_s = -1.0  # its clock goes on, which is that of the numbers here
        one.answers = [([(0, stored(7)), (1, stored(8))], True)]
        one.hears((1, stored(8)))
        assert one.blocks == {7, 8}
    else:
        one._told_s = -1.0
        one.hears((0, stored(7)))
        assert one.blocks == {7}
    assert one.known.tells
    asked = len(one.asked)
    one.later()
    one.hears((one._next, stored(9)))
    assert len(one.asked) == asked


def test_without_an_endpoint_nobody_is_asked() -> None:
    one = Played(replay=False)
    one.hears((0, stored(0)), (2, stored(2)))
    one.later()
    one.hears((3, stored(3)))
    assert (one.known.tells, one._missing) == (False, None)


def test_without_a_replay_what_was_sent_counts_until_all_is_told() -> None:
    async def run() -> None:
        engine = Engine(replay=False)
        engine.compute(list(range(20)))
        await published(engine, 1)  # it has been said, to nobody
        async with following(engine) as worker:
            worker.known.send(Prompt.of(range(40), {}, "").keys(BLOCK))
            assert matched(worker.known, list(range(40))) == 10
            async with asyncio.timeout(WAIT_S):
                while matched(worker.known, [7] * 8) != 2:  # the first that is heard of
                    engine.compute([7] * 8)
                    engine.blocks.clear()
                    await asyncio.sleep(0.02)
            assert not worker.known.tells
            assert matched(worker.known, list(range(40))) == 10
            engine.tell(AllBlocksCleared())
            async with asyncio.timeout(WAIT_S):
                while not worker.known.tells:
                    await asyncio.sleep(0.005)
            assert matched(worker.known, list(range(40))) == 0
        engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize("noticed", ["by its numbers", "by the polls"])
def test_an_engine_that_is_started_again_counts_anew(noticed: str) -> None:
    async def run() -> None:
        engine = Engine()
        async with following(engine) as worker:
            for end in range(20, 220, 20):
                engine.compute(list(range(end)))
            await until(engine, worker, 50)
            engine.stop()
            engine.blocks.clear()
            engine.start()
            if noticed == "by the polls":  # and its numbers have passed those of before
                worker.known.restart()
                for number in range(50):
                    engine.compute([number] * 4)
            async with asyncio.timeout(WAIT_S):
                while matched(worker.known, [500, *range(19)]) != 5 or not worker.known.tells:
                    engine.blocks.clear()
                    engine.compute([500, *range(19)])
                    await asyncio.sleep(0.05)
            assert matched(worker.known, list(range(40))) == 0
            if noticed == "by the polls":
                assert [matched(worker.known, [number] * 4) for number in range(50)] == [1] * 50
        engine.stop()

    asyncio.run(run())


def test_salts_adapters_and_images_part_blocks() -> None:
    known = Known()
    known.shape(BLOCK, 100)
    tokens = list(range(8))
    for number, extra in enumerate([None, [("s",), None], [("l",), ("l",)], [([b"x", 0],), None]]):
        hashes: list[Any] = [2 * number + 1, 2 * number + 2]
        lora = "l" if number == 2 else None
        event: Any = BlockStored(hashes, None, tokens, BLOCK, None, "GPU", lora, extra)
        known.stored(event)
        known.tells = True
        asked: list[dict[str, Any]] = [{}, {"cache_salt": "s"}, {"lora": "l"}]
        found = [matched(known, tokens, **one) for one in asked]
        assert found == [2 if i <= number else 0 for i in range(3)]
    assert len(known) == 8


def test_what_is_elsewhere_or_of_other_sizes_is_not_in_the_cache() -> None:
    known = Known()
    known.shape(BLOCK, 100)
    tokens = list(range(8))
    events: list[Any] = [
        BlockStored([1, 2], None, tokens, BLOCK, None, "CPU", None),
        BlockStored([1, 2], None, tokens, BLOCK, None, "GPU", None, group_idx=1),
        BlockStored([1], None, tokens, 8, None, "GPU", None),
        BlockStored([1, 2], 77, tokens, BLOCK, None, "GPU", None),
    ]
    for event in events:
        known.stored(event)
    assert matched(known, tokens) == 0


def test_what_is_kept_is_bounded_and_the_oldest_go() -> None:
    known = Known()
    known.shape(BLOCK, 10)
    for number in range(5):
        known.send(Prompt.of([number] * 16, {}, "").keys(BLOCK))
    assert len(known) == 10
    assert [matched(known, [number] * 16) for number in range(5)] == [0, 0, 2, 4, 4]
    known.tells = True
    for number in range(30):
        event: Any = BlockStored([number], None, [number] * 4, BLOCK, None, "GPU", None)
        known.stored(event)
    assert len(known) == 10
