"""Copies of a server's chunks to the folder in front of it, beside what is deleted meanwhile.

A chunk is fetched, which takes a while, and then put in front. What must hold, for all threads of a
process, whichever of its stores has that folder in front: what is deleted while it is fetched is
not in front once the delete has returned. So who deletes has the server do it, which leaves later
fetches nothing to find; has fetches under way leave these chunks out, and waits for copies that had
begun; and deletes in front last. Fetches of other processes are not known: what they copy beside a
delete is in front for as long as any copy may be.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from prefixstore.config import OP_DEADLINE_S
from prefixstore.errors import StoreError, StoreTimeoutError
from prefixstore.keys import ChunkRef
from prefixstore.layout import Buffer
from prefixstore.namespace import Namespace
from prefixstore.store import Store

logger = logging.getLogger("prefixstore")
COPY_TTL_S = 3600.0


class Copies:
    """Those to one folder by this process. Thread-safe."""

    def __init__(self) -> None:
        self._fetches: list[Fetch] = []
        self.changed = threading.Condition()

    @contextmanager
    def fetch(self, front: Namespace) -> Iterator[Fetch]:
        """Chunks are fetched within it, and copied by what it yields."""
        fetch = Fetch(self.changed, front)
        with self.changed:
            self._fetches.append(fetch)
        try:
            yield fetch
        finally:
            with self.changed:
                self._fetches.remove(fetch)

    def leave_out(self, keys: set[bytes], deadline_s: float = OP_DEADLINE_S) -> None:
        """What is being fetched of these is copied no more, and no copy of them is under way after.
        Raises StoreTimeoutError."""
        with self.changed:
            for fetch in self._fetches:
                fetch.left_out |= keys
            ended = self.changed.wait_for(
                lambda: all(keys.isdisjoint(fetch.copied) for fetch in self._fetches), deadline_s
            )
        if not ended:
            raise StoreTimeoutError(
                f"a copy of chunks takes longer than {deadline_s:.0f} s", "delete them again"
            )


class Fetch:
    """One call's chunks on their way."""

    def __init__(self, changed: threading.Condition, front: Namespace) -> None:
        self._changed, self._front = changed, front
        self.left_out: set[bytes] = set()
        self.copied: set[bytes] = set()  # now

    def copy(self, refs: Sequence[ChunkRef], buffers: Sequence[Buffer]) -> None:
        """Put what came in front, but for what was deleted meanwhile."""
        with self._changed:
            pairs = [
                (ref, buffer)
                for ref, buffer in zip(refs, buffers, strict=True)
                if ref.preimage and ref.key not in self.left_out
            ]
            self.copied = {ref.key for ref, _ in pairs}
        try:
            self._front.put(
                [ref for ref, _ in pairs], [buffer for _, buffer in pairs],
                ttl_s=COPY_TTL_S, wait=False,
            )  # fmt: skip
        except StoreError as error:
            logger.info("prefixstore: not copied to the front: %s", error)
        finally:
            with self._changed:
                self.copied = set()
                self._changed.notify_all()


_known: WeakKeyDictionary[Store, Copies] = WeakKeyDictionary()


def copies_to(front: Store) -> Copies:
    """Those to a folder: all that have it open in this process have the same `Store`."""
    return _known.setdefault(front, Copies())
