"""KV events of a server, read as routers read vLLM's: with vLLM's own classes.

The truth for what is published is what the store holds: a router that heard everything knows the
same blocks, in the same tiers, behind the same parents, with the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from prefixstore import MultimodalItem, Namespace, Store, admin
from prefixstore.errors import ConfigError
from prefixstore.keys import preimage_tokens, salt_digest
from prefixstore.ledger import DISK, MEMORY
from prefixstore.rows import Row
from prefixstore.serve import kv_events
from prefixstore.serve.eyes import EyesOptions
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, tokens_of
from tests.serve.support import ALICE, Running, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]
SIZE, WAIT_MS, TOPIC = CONTRACT_LAYOUT.payload_bytes, 20_000, "kv@here"
MEDIA = {MEMORY: "CPU", DISK: "STORAGE"}
Block = tuple[bytes | None, tuple[int, ...]]


class Router:
    """What a router knows: block -> (parent, tokens), by medium."""

    def __init__(self, endpoint: str, replay: str) -> None:
        self.context = zmq.Context()
        self._sub = self.context.socket(zmq.SUB)
        self._sub.connect(endpoint)
        self._sub.setsockopt_string(zmq.SUBSCRIBE, TOPIC)
        self._ask = self.context.socket(zmq.DEALER)  # as many answers as there are batches
        self._ask.connect(replay)
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self.known: dict[str, dict[bytes, Block]] = {"CPU": {}, "STORAGE": {}}
        self.extra: dict[bytes, tuple[object, ...] | None] = {}
        self.numbers: list[int] = []
        self.cleared = 0

    def replay(self, first: int) -> None:
        """Ask for all batches from a number on."""
        self._ask.send_multipart((b"", first.to_bytes(8, "big")))
        while True:
            assert self._ask.poll(WAIT_MS), "no answer"
            empty, topic, number, payload = self._ask.recv_multipart()
            assert empty == b""
            if number == kv_events.END_SEQ:
                break
            self._take(topic, number, payload)

    def hear(self) -> None:
        """The next batch."""
        assert self._sub.poll(WAIT_MS), "nothing was published"
        self._take(*self._sub.recv_multipart())

    def _take(self, topic: bytes, number: bytes, payload: bytes) -> None:
        assert topic.decode() == TOPIC
        self.numbers.append(int.from_bytes(number, "big"))
        batch = self._decode(payload)
        assert batch.data_parallel_rank == 0
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.cleared += 1
                self.known = {"CPU": {}, "STORAGE": {}}
            elif isinstance(event, BlockStored):
                self._stored(event)
            else:
                assert isinstance(event, BlockRemoved)
                for block in event.block_hashes:
                    self.known[str(event.medium)].pop(bytes(block), None)

    def _stored(self, event: BlockStored) -> None:
        size, parent = event.block_size, event.parent_block_hash
        assert len(event.token_ids) == size * len(event.block_hashes)
        for i, block in enumerate(event.block_hashes):
            tokens = tuple(event.token_ids[i * size : (i + 1) * size])
            self.known[str(event.medium)][bytes(block)] = (parent, tokens)
            self.extra[bytes(block)] = event.extra_keys[i] if event.extra_keys else None
            parent = bytes(block)

    def close(self) -> None:
        for sock in (self._sub, self._ask):
            sock.close(linger=0)
        self.context.term()


def truth(store: Store) -> dict[str, dict[bytes, Block]]:
    """What is there, from the indexes."""
    found: dict[str, dict[bytes, Block]] = {"CPU": {}, "STORAGE": {}}
    for tier, env in ((MEMORY, store.live), (DISK, store.index)):
        with env.read() as txn:
            for key, data in txn.scan("chunk"):
                row = Row.unpack(data)
                record = store.namespace_of(row.namespace).identity
                if "prefixstore_tenant" in json.loads(record.forward):
                    continue
                tokens = preimage_tokens(row.preimage, CONTRACT_LAYOUT.chunk_tokens).tolist()
                found[MEDIA[tier]][key] = (row.preimage[:16] if row.depth else None, tuple(tokens))
    return found


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("4MiB", "4MiB") as store:
        yield store


@pytest.fixture
def options(tmp_path: Path) -> EyesOptions:
    return EyesOptions(f"ipc://{tmp_path}/kv", f"ipc://{tmp_path}/replay", TOPIC)


@pytest.fixture
def router(options: EyesOptions) -> Iterator[Router]:
    one = Router(str(options.kv_events), str(options.kv_events_replay))
    yield one
    one.close()


def put(ns: Namespace, tokens: list[int], **more: object) -> list[bytes]:
    refs = ns.chain(tokens, **more).refs()  # type: ignore[arg-type]
    ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
    return [ref.key for ref in refs]


def follow(router: Router, store: Store) -> None:
    """Hear until the router knows what is there."""
    assert store.flush(10)
    while router.known != truth(store):
        router.hear()


def test_a_router_knows_what_the_store_holds(
    store: Store, options: EyesOptions, router: Router
) -> None:
    ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    put(ns, tokens_of(1, 5))  # before the server: told of when it starts
    assert store.flush(10)
    with running(store, eyes=options):
        router.replay(0)
        while router.cleared < 1 or router.known != truth(store):
            router.hear()
        put(ns, tokens_of(2, 4))
        put(ns, [*tokens_of(2, 2), *tokens_of(3, 2)])
        follow(router, store)
        admin.empty_memory(store)
        follow(router, store)
        assert router.known["CPU"] == {}
        assert len(router.known["STORAGE"]) == 5 + 4 + 2
        admin.remove(store, admin.Selection(namespace=ns.name))
        follow(router, store)
        assert router.known == {"CPU": {}, "STORAGE": {}}
        again = Router(str(options.kv_events), str(options.kv_events_replay))
        again.replay(0)  # a router that comes later hears it all, in order
        assert again.known == router.known
        assert again.numbers == list(range(len(again.numbers)))
        assert len(again.numbers) >= 4
        again.close()


def test_salts_and_images_are_told_apart(
    store: Store, options: EyesOptions, router: Router
) -> None:
    ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    plain = put(ns, tokens_of(1, 2))
    salted = put(ns, tokens_of(1, 2), salt=b"mine")
    image = MultimodalItem(2, 3, bytes(range(8)))
    shown = put(ns, tokens_of(1, 2), items=[image])
    with running(store, eyes=options):
        router.replay(0)
        follow(router, store)
    assert router.extra[plain[0]] is None
    assert router.extra[salted[0]] == (salt_digest(b"mine").hex(),)
    assert [tuple(x) for x in router.extra[shown[0]] or ()] == [(bytes(range(8)).hex(), 2)]  # type: ignore[arg-type]


def test_other_tenants_are_not_told_of(
    store: Store, options: EyesOptions, router: Router, tmp_path: Path
) -> None:
    with running(store, eyes=options, tokens=tokens_file(tmp_path)) as server:
        put_as(server, ALICE)
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        mine = put(ns, tokens_of(4, 2))
        router.replay(0)
        while set(router.known["STORAGE"]) != set(mine):
            router.hear()
        assert set(router.known["CPU"]) == set(mine)


def put_as(server: Running, token: str) -> None:
    with server.open(token) as client:
        ns = client.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = ns.chain(tokens_of(1, 2)).refs()
        ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
        assert client.flush()


def test_what_was_lost_is_told_anew(store: Store, options: EyesOptions, router: Router) -> None:
    ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
    put(ns, tokens_of(1, 3))
    publisher = kv_events.KvEvents(store, options)
    publisher.publish([], 0)
    publisher.publish([], 7)
    assert [number for number, _ in publisher._kept] == [0, 1, 2, 3]
    publisher.close()


def test_what_is_kept_for_replays_has_a_bound(
    store: Store, options: EyesOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = kv_events.KvEvents(store, options)
    monkeypatch.setattr(kv_events, "REPLAY_BATCHES_MAX", 5)
    for _ in range(9):
        publisher.publish([], 1)
    assert [number for number, _ in publisher._kept] == [4, 5, 6, 7, 8]
    monkeypatch.setattr(kv_events, "REPLAY_BYTES_MAX", 40)
    publisher.publish([], 1)
    assert publisher._kept_bytes == sum(len(payload) for _, payload in publisher._kept) <= 40
    publisher.close()


@pytest.mark.parametrize(
    ("endpoint", "is_bound"),
    [
        ("tcp://*:5557", True), ("tcp://127.0.0.1:5557", True), ("tcp://[::1]:5557", True),
        ("ipc:///tmp/kv", True), ("tcp://router:5557", False), ("tcp://10.0.0.7:5557", False),
    ],
)  # fmt: skip
def test_which_endpoints_listen(endpoint: str, is_bound: bool) -> None:
    assert kv_events.is_bound(endpoint) == is_bound
    kv_events.check_endpoint(endpoint, insecure=True)


@pytest.mark.parametrize(
    "options",
    [
        EyesOptions("tcp://*:5557"), EyesOptions("tcp://0.0.0.0:5557"), EyesOptions("udp://x:1"),
        EyesOptions("tcp://127.0.0.1"), EyesOptions("tcp://127.0.0.1:5557", "tcp://10.0.0.7:5558"),
        EyesOptions(kv_events_topic="x"), EyesOptions(kv_events_replay="ipc:///x"),
    ],
)  # fmt: skip
def test_what_would_tell_everybody_is_refused(options: EyesOptions) -> None:
    with pytest.raises(ConfigError):
        options.check(insecure=False)


def test_an_endpoint_that_is_taken_is_a_clear_error(store: Store, tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PUB) as sock:
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(ConfigError, match="cannot publish"):
            kv_events.KvEvents(store, EyesOptions(f"tcp://127.0.0.1:{port}"))
