"""KV events as vLLM publishes them, over ZeroMQ, so that routers that follow vLLM follow a store.

The wire is that of ``vllm.distributed.kv_events`` (0.32): messages of (topic, u64 big-endian
sequence number, msgpack of a batch), and a ROUTER socket that repeats batches from a number on.
``block_hashes`` are this store's keys (16 bytes), not vLLM's hashes; routers that compute their own
from ``token_ids`` need not mind. Told of are the chunks of the tenant `local` only: ZeroMQ asks
nobody for a token. What must hold: a subscriber that is slow loses messages (and sees it by the
numbers); nothing waits for it, and what is kept for it has a bound. Used on one thread: the
follower's, but for the constructor.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import struct
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from prefixstore.errors import ConfigError
from prefixstore.journal import Change
from prefixstore.keys import KEY_BYTES, preimage_tokens
from prefixstore.ledger import DISK, MEMORY
from prefixstore.registry import NamespaceRecord
from prefixstore.rows import Row, readable
from prefixstore.serve.auth import MARK_FIELD
from prefixstore.store import Store

if TYPE_CHECKING:
    from prefixstore.serve.eyes import EyesOptions

logger = logging.getLogger("prefixstore")
BATCH_CHUNKS = 256
REPLAY_BATCHES_MAX = 10_000  # as vLLM keeps
REPLAY_BYTES_MAX = 64 << 20
SNAPSHOT_CHUNKS_MAX = 65_536  # told of when the server starts; the rest when it changes
_RECORDS_MAX = 4096
HIGH_WATER = 100_000  # messages queued for a slow subscriber; then it loses some
END_SEQ = (-1).to_bytes(8, "big", signed=True)
_MEDIA = {MEMORY: "CPU", DISK: "STORAGE"}
_ITEM = struct.Struct("<iIH")  # of a multimodal item in a preimage, before its digest


@dataclass(frozen=True, slots=True)
class Told:
    """A chunk of which subscribers are told."""

    key: bytes
    tier: int
    row: Row
    block_size: int

    @property
    def parent(self) -> bytes | None:
        """The chunk before it; None at the start of a prompt."""
        return self.row.preimage[:KEY_BYTES] if self.row.depth else None

    def extra_keys(self) -> tuple[Any, ...] | None:
        """What else its key depends on: digests of images with their place, and of the salt."""
        found: list[Any] = []
        at = KEY_BYTES + 4 * self.block_size
        while at < len(self.row.preimage):
            offset, _, size = _ITEM.unpack_from(self.row.preimage, at)
            at += _ITEM.size + size
            found.append((self.row.preimage[at - size : at].hex(), offset))
        if any(self.row.salt):
            found.append(self.row.salt.hex())
        return tuple(found) or None


def is_bound(endpoint: str) -> bool:
    """Whether an endpoint is one to listen on (as vLLM has it, and loopback), or to connect to."""
    if endpoint.startswith("ipc://"):
        return True
    host = _host_of(endpoint)
    return host in ("*", "0.0.0.0", "::", "localhost") or _is_loopback(host)


def _host_of(endpoint: str) -> str:
    return endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_endpoint(endpoint: str, insecure: bool, listens: bool = False) -> None:
    """Raise ConfigError for what is no endpoint, or one that anybody could listen to.

    ``listens``: it is bound in any case, as that for replays is.
    """
    port = endpoint.rpartition(":")[2]
    is_tcp = endpoint.startswith("tcp://") and port.isascii() and port.isdigit()
    if not (endpoint.startswith("ipc://") or (is_tcp and _host_of(endpoint))):
        raise ConfigError(f"{endpoint!r} is no endpoint", "tcp://127.0.0.1:5557 or ipc:///path")
    listens = listens or is_bound(endpoint)
    if is_tcp and listens and not insecure and not _is_loopback(_host_of(endpoint)):
        raise ConfigError(
            f"{endpoint} would tell everybody who can reach it the token ids of prompts",
            "give tcp://127.0.0.1:PORT, the address of the router, or --insecure",
        )


class KvEvents:
    """See the module docstring."""

    def __init__(self, store: Store, options: EyesOptions) -> None:
        try:
            import msgspec
            import zmq
        except ImportError as error:
            raise ConfigError(
                f"--kv-events: {error}", "pip install 'prefixstore[events]'"
            ) from error
        from prefixstore.serve import kv_wire

        self._wire, self._zmq, self._again = kv_wire, zmq, zmq.Again
        self._encode = msgspec.msgpack.Encoder().encode
        self._store, self._topic = store, options.kv_events_topic.encode()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = self._number = 0
        self._records: dict[bytes, NamespaceRecord | None] = {}
        self._begun = False
        self._context = zmq.Context()
        self._out = self._context.socket(zmq.PUB)
        self._replay: zmq.Socket[bytes] | None = None
        try:
            assert options.kv_events is not None
            self._open(self._out, options.kv_events, is_bound(options.kv_events))
            if options.kv_events_replay is not None:
                self._replay = self._context.socket(zmq.ROUTER)
                self._open(self._replay, options.kv_events_replay, True)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"cannot publish at {options.kv_events}: {error}", "give another endpoint"
            ) from error

    def _open(self, sock: Any, endpoint: str, listens: bool) -> None:
        sock.setsockopt(self._zmq.LINGER, 0)
        sock.set_hwm(HIGH_WATER)
        if "[" in endpoint or "::" in endpoint:
            sock.setsockopt(self._zmq.IPV6, 1)
        (sock.bind if listens else sock.connect)(endpoint)

    def follow(self, store: Store) -> None:
        """Another store stands for the one that was lost: tell of all that is there."""
        self._store, self._begun = store, False

    def close(self) -> None:
        """Stop publishing."""
        for sock in (self._out, self._replay):
            if sock is not None:
                sock.close(linger=0)
        self._context.term()

    # ------------------------------------------------------------------ publishing
    def publish(self, changes: Sequence[Change], lost: int) -> None:
        """Tell of changes; at first, and when some were lost, of all that is there."""
        if lost or not self._begun:
            self._begun = True
            self._send([self._wire.AllBlocksCleared()])
            self._send_snapshot()
        else:
            for at in range(0, len(changes), BATCH_CHUNKS):
                events = self._events(changes[at : at + BATCH_CHUNKS])
                if events:
                    self._send(events)
        self._answer_replays()

    def _events(self, changes: Sequence[Change]) -> list[Any]:
        store = self._store
        events: list[Any] = []
        with store.live.lookup("chunk") as in_memory, store.index.lookup("chunk") as on_disk:
            for change in changes:
                record = self._local(change.namespace)
                if record is None:
                    continue
                if not change.entered:
                    self._add_removed(events, change)
                    continue
                data = in_memory(change.key) or on_disk(change.key)
                row = None if data is None else readable(data)
                if row is not None:  # else it has gone already, and that will be told
                    size = record.layout.chunk_tokens
                    self._add_stored(events, Told(change.key, change.tier, row, size))
        return events

    def _add_removed(self, events: list[Any], change: Change) -> None:
        medium = _MEDIA[change.tier]
        last = events[-1] if events else None
        if isinstance(last, self._wire.BlockRemoved) and last.medium == medium:
            last.block_hashes.append(change.key)
        else:
            events.append(self._wire.BlockRemoved([change.key], medium))

    def _add_stored(self, events: list[Any], told: Told) -> None:
        """One more block: in the last event, if it follows the last block there."""
        medium, size = _MEDIA[told.tier], told.block_size
        tokens = preimage_tokens(told.row.preimage, size).tolist()
        last = events[-1] if events else None
        if (
            isinstance(last, self._wire.BlockStored)
            and (last.medium, last.block_size) == (medium, size)
            and last.block_hashes[-1] == told.parent
        ):
            last.block_hashes.append(told.key)
            last.token_ids += tokens
        else:
            last = self._wire.BlockStored(
                [told.key], told.parent, tokens, size, None, medium, None
            )  # fmt: skip
            events.append(last)
        extra = told.extra_keys()
        if extra is not None and last.extra_keys is None:
            last.extra_keys = [None] * (len(last.block_hashes) - 1)
        if last.extra_keys is not None:
            last.extra_keys.append(extra)

    def _send_snapshot(self) -> None:
        told = 0
        for batch in _batches(self._there()):
            events: list[Any] = []
            for one in batch:
                self._add_stored(events, one)
            self._send(events)
            told += len(batch)
        if told >= SNAPSHOT_CHUNKS_MAX:
            logger.warning("KV events tell of %d chunks; of others when they change", told)

    def _there(self) -> Iterator[Told]:
        """Chunks of both tiers, in the order of their prompts as far as one can tell."""
        found: list[Told] = []
        for tier, env in ((MEMORY, self._store.live), (DISK, self._store.index)):
            with env.read() as txn:
                for key, data in txn.scan("chunk"):
                    row = readable(data)
                    record = None if row is None else self._local(row.namespace)
                    if row is not None and record is not None:
                        found.append(Told(key, tier, row, record.layout.chunk_tokens))
                        if len(found) >= SNAPSHOT_CHUNKS_MAX:
                            break
        yield from _in_chains(found)

    def _local(self, namespace: bytes) -> NamespaceRecord | None:
        """What is known of a namespace, if it is one of the tenant `local`."""
        known = self._records
        if namespace not in known:
            if len(known) > _RECORDS_MAX:
                known.clear()
            for one in self._store.namespaces():
                is_local = MARK_FIELD not in json.loads(one.identity.forward)
                known[one.identity.namespace] = one if is_local else None
            known.setdefault(namespace, None)  # retired: what is known of others is kept for that
        return known[namespace]

    def _send(self, events: list[Any]) -> None:
        payload = self._encode(self._wire.KVEventBatch(time.time(), events, 0))
        self._out.send_multipart((self._topic, self._number.to_bytes(8, "big"), payload))
        self._kept.append((self._number, payload))
        self._kept_bytes += len(payload)
        self._number += 1
        while len(self._kept) > REPLAY_BATCHES_MAX or self._kept_bytes > REPLAY_BYTES_MAX:
            self._kept_bytes -= len(self._kept.popleft()[1])

    # ------------------------------------------------------------------ replay
    def _answer_replays(self) -> None:
        """Repeat what was asked for: (client, empty, first number) as u64 big-endian."""
        while self._replay is not None:
            try:
                frames = self._replay.recv_multipart(self._zmq.NOBLOCK)
            except self._again:
                return
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            client, first = frames[0], int.from_bytes(frames[2], "big")
            for number, payload in self._kept:
                if number >= first:
                    answer = (client, b"", self._topic, number.to_bytes(8, "big"), payload)
                    self._replay.send_multipart(answer)
            self._replay.send_multipart((client, b"", b"", END_SEQ, b""))


def _batches(chunks: Iterator[Told]) -> Iterator[list[Told]]:
    while batch := list(islice(chunks, BATCH_CHUNKS)):
        yield batch


def _in_chains(found: Sequence[Told]) -> Iterator[Told]:
    """Each chunk behind its parent, so that few events tell of many."""
    children: dict[tuple[int, bytes], list[Told]] = {}
    keys = {(one.tier, one.key) for one in found}
    roots = []
    for one in found:
        parent = one.parent
        if parent is not None and (one.tier, parent) in keys:
            children.setdefault((one.tier, parent), []).append(one)
        else:
            roots.append(one)
    waiting = roots[::-1]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += children.get((one.tier, one.key), ())
