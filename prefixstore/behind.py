"""Write-back: what was put in front is copied to the pool behind it, by a thread, soon.

A put waits for the front alone, so a pool that is slow or away never holds up who saves. What waits
are names, QUEUE_MAX at most, of which the oldest go first: the bytes are in front, and read from
there when their turn comes, checked. What must hold: a name that is lost, since its process died
or the queue was full, or its chunk evicted before its turn, is a copy that is lost, and nothing
else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from prefixstore.config import OP_DEADLINE_S
from prefixstore.errors import RemoteError, StoreError, StoreTimeoutError
from prefixstore.interface import NamespaceLike
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout
from prefixstore.namespace import Namespace
from prefixstore.owned import Region, locate
from prefixstore.putting import PutState
from prefixstore.wire import payload_is

logger = logging.getLogger("prefixstore")
QUEUE_MAX = 65536
BATCH_BYTES = 32 << 20  # so much memory it takes at most
ATTEMPTS_MAX = 20  # of a chunk
AGAIN_S = 0.5  # after an attempt that failed
CLOSE_S = 2.0  # what is left is written so long when the store is closed


class Labels(NamedTuple):
    """What is said of a chunk when it is put."""

    expires_s: float | None
    tag: str
    alone: bool


class _Wish(NamedTuple):
    near: Namespace
    far: NamespaceLike
    ref: ChunkRef
    labels: Labels
    attempts: int = 0

    @property
    def kind(self) -> tuple[bytes, Labels]:
        """What those of one batch have in common."""
        return self.near.name, self.labels


class Behind:
    """See the module docstring. One thread, which is started when there is something to do."""

    def __init__(self) -> None:
        self._wishes: deque[_Wish] = deque()
        self._changed = threading.Condition()
        self._busy = 0  # chunks that are being copied
        self._closed = False
        self._thread: threading.Thread | None = None
        self._counts: Counter[str] = Counter()

    def offer(
        self, near: Namespace, far: NamespaceLike, refs: Sequence[ChunkRef], labels: Labels
    ) -> None:
        """Copy chunks that are in front."""
        with self._changed:
            if self._closed or not refs:
                return
            self._wishes.extend(_Wish(near, far, ref, labels) for ref in refs)
            while len(self._wishes) > QUEUE_MAX:
                self._wishes.popleft()
                self._counts["lost"] += 1
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="prefixstore-behind", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def counted(self) -> Counter[str]:
        """Copies: ``waiting`` now, those under way included; and what became of others: ``made``
        (or there already), ``lost`` (the queue was full, the chunk had gone, or it was given up),
        ``refused`` by the pool, which is full."""
        with self._changed:
            return self._counts + Counter(waiting=len(self._wishes) + self._busy)

    @contextmanager
    def without(self, keys: Collection[bytes], deadline_s: float = OP_DEADLINE_S) -> Iterator[None]:
        """For what deletes these: they are copied no more, unless it fails. Waits for a copy that
        is under way."""
        end = time.monotonic() + deadline_s
        with self._changed:
            left_out = self._leave_out(keys)
            idle = self._changed.wait_for(lambda: not self._busy, max(0.0, end - time.monotonic()))
            left_out += self._leave_out(keys)  # what had failed was put back
        try:
            if not idle:  # it would be there again when that copy is made
                raise StoreTimeoutError(
                    f"a copy of chunks takes longer than {deadline_s:.0f} s", "delete them again"
                )
            yield
        except StoreError:
            with self._changed:
                self._wishes.extend(left_out)
                self._changed.notify_all()
            raise

    def _leave_out(self, keys: Collection[bytes]) -> list[_Wish]:
        found = [one for one in self._wishes if one.ref.key in keys]
        self._wishes = deque(one for one in self._wishes if one.ref.key not in keys)
        return found

    def flush(self, deadline_s: float = OP_DEADLINE_S) -> bool:
        """Wait until all was copied, or given up; False when the deadline came first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._wishes and not self._busy, max(0.0, deadline_s)
            )

    def close(self) -> None:
        """Copy what is left, as long as CLOSE_S and as it works; then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self.flush(CLOSE_S)
            with self._changed:
                self._counts["lost"] += len(self._wishes)
                self._wishes.clear()
                self._changed.notify_all()
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = 0
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wishes or self._closed)
                if not self._wishes:
                    return
                batch = self._next_batch()
                self._busy = len(batch)
            try:
                failed, is_away = self._copy(batch), False
            except RemoteError as error:
                logger.info("prefixstore: %d chunks wait for the pool: %s", len(batch), error)
                failed, is_away = batch, True
            except Exception as error:  # thread loop: a copy that fails is tried again, or lost
                logger.info("prefixstore: %d chunks not copied: %s", len(batch), error)
                failed, is_away = batch, False
            if failed:
                self._again(failed, is_away)

    def _next_batch(self) -> list[_Wish]:
        first = self._wishes[0]
        most = max(1, BATCH_BYTES // first.near.layout.payload_bytes)
        batch: list[_Wish] = []
        while self._wishes and len(batch) < most and self._wishes[0].kind == first.kind:
            batch.append(self._wishes.popleft())
        return batch

    def _again(self, failed: Sequence[_Wish], is_away: bool) -> None:
        """Put them back, unless they have been tried so often; a pool that is away is waited for,
        as long as the queue has room."""
        with self._changed:
            self._busy = 0
            left = [one._replace(attempts=one.attempts + (not is_away)) for one in failed]
            kept = [one for one in left if one.attempts < ATTEMPTS_MAX and not self._closed]
            self._counts["lost"] += len(left) - len(kept)
            self._wishes.extendleft(reversed(kept))
            self._changed.wait_for(lambda: self._closed, AGAIN_S)

    def _copy(self, batch: Sequence[_Wish]) -> list[_Wish]:
        """Copy chunks; those to be tried again. Raises RemoteError, StoreError."""
        near, far, labels = batch[0].near, batch[0].far, batch[0].labels
        ttl_s = None if labels.expires_s is None else labels.expires_s - time.time()
        refs = [one.ref for one in batch]
        is_over = ttl_s is not None and ttl_s <= 0
        payloads = [None] * len(refs) if is_over else read_in_front(near, refs)
        there = [i for i, payload in enumerate(payloads) if payload is not None]
        states = [] if is_over else far.put(
            [refs[i] for i in there],
            [payload for payload in payloads if payload is not None],
            ttl_s=ttl_s, tag=labels.tag, alone=labels.alone,
        )  # fmt: skip
        failed = [batch[i] for i, s in zip(there, states, strict=True) if s is PutState.LOST]
        copied = sum(state in (PutState.STORED, PutState.EXISTS) for state in states)
        with self._changed:
            self._busy = len(failed)
            self._counts["lost"] += len(refs) - len(there)
            self._counts["made"] += copied
            self._counts["refused"] += len(states) - copied - len(failed)
        return failed


def read_in_front(near: Namespace, refs: Sequence[ChunkRef]) -> list[memoryview | None]:
    """Whole chunks of a folder, checked; None for one that is not there. It is no use of them: what
    nobody asks for again must not look as if somebody had. Raises StoreError."""
    layout: Layout = near.layout
    places = locate(near, refs, Region(layout, layout.whole))
    found: list[memoryview | None] = []
    for place in places:
        data = memoryview(bytearray(layout.payload_bytes))
        try:
            if place is not None:
                place.file.read(place.slot, layout.runs(layout.whole), data)
        except OSError:
            place = None
        found.append(data if place is not None and payload_is(place.record, data) else None)
    return found
