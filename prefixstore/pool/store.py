"""A store whose chunks are in a pool: what `prefixstore.open` gives for ``redis://`` and such.

No process of ours holds anything: what is stored is what the engine has, for every host that has
its address. So a host with an empty disk finds all there is. What must hold: nothing is believed
that the engine gives (`objects`), and whatever happens to it is a miss within ``deadline_s``.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count

from prefixstore import config
from prefixstore.codec import NONE, POOL_CHOICES, check_choice
from prefixstore.errors import DamagedError, LayoutError, RemoteError
from prefixstore.identity import ModelIdentity
from prefixstore.layout import Layout, checksum
from prefixstore.pool.backend import BEYOND_BYTES, Backend, Get, Put, Written
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.pool.objects import PREFIX, Shape
from prefixstore.pool.scout import Scout
from prefixstore.registry import NamespaceRecord

NAMING_S = 1.0  # an engine that is away keeps nobody from its model for longer
RECORD_BYTES_MAX = 256 << 10
MODELS_MAX = 10_000
LISTING_S = 600.0  # with all its parts
LISTING_PARTS_MAX = 1 << 16  # of 1,000 names or more each, wanted ones or others
_SUM_BYTES = 16


class PooledStore:
    """See the module docstring. Owns the backend. A context manager. Thread-safe.

    ``deadline_s`` bounds each call; a transfer has a second more for each 64 MiB. ``patience_s``:
    so long a search for segments may wait until it knows all that is there. ``codec``: one of
    `codec.POOL_CHOICES`, for what is put; what is read may be coded or not. Raises ConfigError.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        deadline_s: float = 10.0,
        patience_s: float = 0.0,
        prefix: str = PREFIX,
        codec: str = NONE,
    ) -> None:
        self.codec = check_choice(codec, POOL_CHOICES)
        self.backend, self.deadline_s, self.prefix = backend, deadline_s, prefix
        self.helpers = ThreadPoolExecutor(config.HELPERS, thread_name_prefix="prefixstore-codec")
        self.patience_s = patience_s
        self.counts: Counter[str] = Counter()  # chunks: ``damaged``
        self._unnamed: dict[str, bytes] = {}  # records that the engine has not got yet
        self._seed = secrets.randbits(63)
        self._turns: set[int] = set()  # of puts under way
        self._scout: Scout | None = None
        self._lock = threading.Lock()

    @contextmanager
    def seed(self) -> Iterator[int]:
        """What nobody else mixes into the names of its parts meanwhile: no other store, and no
        other put of this one (`writing`). Of one put after another it is the same."""
        with self._lock:
            turn = next(number for number in count() if number not in self._turns)
            self._turns.add(turn)
        try:
            yield self._seed + turn
        finally:
            with self._lock:
                self._turns.remove(turn)

    def namespace(self, identity: ModelIdentity, layout: Layout) -> PooledNamespace:
        """The part of the pool that belongs to one model identity. The engine is told of it, so
        that `namespace_of` finds it, now or when it takes something the next time. Raises
        LayoutError if the engine answers, and knows the model with another layout."""
        shape = Shape.of(identity.namespace, layout, self.backend.part_bytes, self.prefix)
        record = NamespaceRecord(identity, layout).pack()
        with self._lock:
            self._unnamed[self._record_of(identity.namespace)] = record
        self.name_models()
        with suppress(RemoteError):
            known = self._record(identity.namespace)
            if known is not None and known.layout != layout:
                raise LayoutError(
                    f"this model is in the pool with another layout: {known.layout}",
                    "give it that one, or the pool another prefix",
                )
        return PooledNamespace(self, identity, shape)

    def namespace_of(self, name: bytes) -> PooledNamespace:
        """The namespace of that name. Raises RemoteError if the pool does not know it."""
        known = self._record(name)
        if known is None:
            raise RemoteError(f"{self.backend.url} knows no namespace {name.hex()}")
        return self.namespace(known.identity, known.layout)

    def models(self) -> list[NamespaceRecord]:
        """All that the pool knows. Raises RemoteError."""
        prefix = f"{self.prefix}/models/"
        found: list[NamespaceRecord] = []
        for names in self.names(prefix):
            for name in names:
                with suppress(ValueError):
                    record = self._record(bytes.fromhex(name.removeprefix(prefix)))
                    found += [] if record is None else [record]
            if len(found) > MODELS_MAX:
                raise RemoteError(f"{self.backend.url} has more than {MODELS_MAX} models")
        return found

    def names(self, prefix: str) -> Iterator[list[str]]:
        """The names that begin so, some at a time. Raises RemoteError, also for a listing without
        an end."""
        end = time.monotonic() + LISTING_S
        parts = self.backend.names(prefix, deadline_s=self.deadline_s)
        for number, names in enumerate(parts):
            if number >= LISTING_PARTS_MAX or time.monotonic() > end:
                raise RemoteError(
                    f"{self.backend.url} comes to no end with its names",
                    f"{LISTING_PARTS_MAX} parts and {LISTING_S:.0f} s are the most",
                )
            yield names

    def _record(self, name: bytes) -> NamespaceRecord | None:
        """What is stored under a namespace's name; None if it is nothing, or not that."""
        data = self._read_to_end(self._record_of(name))
        record = data[_SUM_BYTES:]
        if not record or checksum(record) != data[:_SUM_BYTES]:
            return None
        try:
            known = NamespaceRecord.unpack(bytes(record))
        except DamagedError:
            return None
        return known if known.identity.namespace == name else None

    def _read_to_end(self, name: str) -> bytes:
        """An object of a length that nobody knows, RECORD_BYTES_MAX at most: asked for bit by bit,
        so that no engine is asked for more than it gives past an end. Most end with the first."""
        data, end = b"", time.monotonic() + self.deadline_s
        while len(data) < RECORD_BYTES_MAX:
            out = memoryview(bytearray(BEYOND_BYTES))
            [came] = self.backend.get(
                [Get(name, [(len(data), out)])], deadline_s=end - time.monotonic()
            )
            data += out[: max(0, came)]
            if came < len(out):
                break
        return data

    def _record_of(self, name: bytes) -> str:
        return f"{self.prefix}/models/{name.hex()}"

    def name_models(self) -> None:
        """Have the engine know which models there are; if it takes nothing now, the next time."""
        with self._lock:
            unnamed = dict(self._unnamed)
        if not unnamed:
            return
        puts = [Put(name, [checksum(record), record]) for name, record in unnamed.items()]
        with suppress(RemoteError):
            done = self.backend.put(puts, deadline_s=min(self.deadline_s, NAMING_S))
            with self._lock:
                for one, written in zip(puts, done, strict=True):
                    if written in (Written.YES, Written.THERE):
                        self._unnamed.pop(one.name, None)

    @property
    def scout(self) -> Scout:
        """What finds out what is there; begun by the first who wants to know."""
        with self._lock:
            if self._scout is None:
                self._scout = Scout(self)
            return self._scout

    def noted(self, name: bytes, keys: Sequence[bytes]) -> None:
        """Chunks of a namespace were stored: tell the others."""
        with self._lock:
            scout = self._scout
        if scout is not None:
            scout.put(name, keys)
        if self.backend.tells_news:
            with suppress(RemoteError):
                self.backend.announce(
                    self.news_topic, name + b"".join(keys), deadline_s=self.deadline_s
                )

    def removed(self, name: bytes, keys: Sequence[bytes]) -> None:
        """Chunks of a namespace were removed. Others find that out when they ask."""
        with self._lock:
            scout = self._scout
        if scout is not None:
            scout.removed(name, keys)

    @property
    def news_topic(self) -> str:
        """Under which it is told what was put."""
        return f"{self.prefix}/news"

    def count(self, what: str, number: int) -> None:
        """Add to `counts`."""
        with self._lock:
            self.counts[what] += number

    @property
    def gone(self) -> bool:
        """Never: an engine that was replaced is filled again."""
        return False

    @property
    def usable(self) -> bool:
        """Whether the engine has answered lately, or it is time to ask again."""
        return self.backend.usable

    def check_open(self) -> None:
        """Ask the engine. Raises RemoteError."""
        self.backend.check_open(self.deadline_s)

    def flush(self, deadline_s: float = config.OP_DEADLINE_S) -> bool:
        """What was put is with the engine already."""
        return True

    def close(self) -> None:
        """Let go of the connections."""
        with self._lock:
            scout, self._scout = self._scout, None
        if scout is not None:
            scout.close()
        self.helpers.shutdown(wait=False)
        self.backend.close()

    def __enter__(self) -> PooledStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
