"""Slots of the memory tier registered with CUDA before anybody loads or saves there.

Registering a slot for the first time takes several times as long as its copy, and making its pages
as long again; and both hold up the engine while it computes. So a thread does it when the engine
starts, which waits for it: it registers what other processes have left or made, and makes the rest
of the tier, as far as it was given memory, a few slots at a time. Later it registers what others
make. What it has not come to yet is done when it is needed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from connector.handle import StoreHandle
from connector.registered import RegisteredSlots
from prefixstore.config import HELPERS, MIB, format_bytes
from prefixstore.errors import StoreError
from prefixstore.fronted import FrontedStore
from prefixstore.holding import Space, held_free, held_new, spaces, times_changed
from prefixstore.ledger import MEMORY
from prefixstore.lending import Lent
from prefixstore.reading import share_out
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

LOOK_S = 0.25
BATCH_BYTES = 128 * MIB  # held at once
WAIT_S = 60.0  # that the engine's start waits for it
BUSY_S = 0.05  # since the last step

_NO_SUMS = np.zeros(0, np.uint64)
Register = Callable[[Lent], object]


class Ahead:
    """See the module docstring. ``make``: also make slots, not only register what there is."""

    def __init__(
        self, slots: RegisteredSlots, handle: StoreHandle, slot_bytes: int, *, make: bool
    ) -> None:
        self._slots, self._handle, self._slot_bytes = slots, handle, slot_bytes
        self._make = make
        self._count = max(1, BATCH_BYTES // slot_bytes)
        self._seen: tuple[Store, tuple[int, int]] | None = None  # when all was registered
        self._last_step = 0.0
        self._first = threading.Event()  # it has looked once
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixstore-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it has done what there is to be done at the start; WAIT_S at most."""
        self._first.wait(WAIT_S)

    def step(self) -> None:
        """The engine computes something: this goes on at half its speed, in one thread."""
        self._last_step = time.monotonic()

    def close(self, end: float) -> None:
        """End the thread by ``end`` (monotonic)."""
        self._closing.set()
        self._thread.join(max(0.0, end - time.monotonic()))

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        try:
            self._go_on()
        finally:
            self._first.set()

    def _go_on(self) -> None:
        while self._goes_on():
            store = self._handle.get()
            near = store.front if isinstance(store, FrontedStore) else store
            try:
                if isinstance(near, Store):
                    with suppress(StoreError):  # it was lost or closed, or does not answer
                        self._look(near)
            except Exception as error:  # thread loop: what is not done ahead is done when needed
                logger.warning("prefixstore: no slots ahead: %s: %s", type(error).__name__, error)
                return
            self._first.set()
            self._closing.wait(LOOK_S)

    def _look(self, store: Store) -> None:
        """Raises StoreError."""
        now = times_changed(store)
        if self._seen != (store, now):
            self._register_all(store)
            self._seen = store, now
        began, made = time.monotonic(), 0
        while self._make and self._goes_on():
            with held_new(store, self._slot_bytes, self._count) as new:
                self._make = self._do(store, new, self._slots.claim) and len(new) == self._count
                made += len(new)
        if made:
            size, took = format_bytes(made * self._slot_bytes), time.monotonic() - began
            logger.info("prefixstore: %s of the memory tier made in %.1f s", size, took)

    def _register_all(self, store: Store) -> None:
        """All slots with pages, the last ones first: the first free ones are what puts take."""
        known = self._slots.of(store.file_of(MEMORY, self._slot_bytes))
        rest = spaces(store, self._slot_bytes, known)[::-1]
        while rest and self._goes_on():
            some, rest = rest[: self._count], rest[self._count :]
            self._do(store, [one for one in some if not one.free], self._slots.register)
            free = [one.slot for one in some if one.free]
            with held_free(store, self._slot_bytes, free) as held:
                self._do(store, held, self._slots.claim)

    def _do(self, store: Store, some: Sequence[Space], register: Register) -> bool:
        """Register some; whether there was memory for all."""
        file, began = store.file_of(MEMORY, self._slot_bytes), time.monotonic()
        lent = [Lent(store, file, one.slot, one.version, _NO_SUMS) for one in some]
        done = [False] * len(lent)

        def one(n: int) -> None:
            try:
                if register(lent[n]) is not None:
                    self._slots.give_back([lent[n]])
                done[n] = True
            except OSError:  # no room
                pass

        busy = began - self._last_step < BUSY_S
        share_out(len(lent), one, store.helpers, 0 if busy else HELPERS)
        if busy:
            self._closing.wait(time.monotonic() - began)
        return all(done)

    def _goes_on(self) -> bool:
        return self._slots.possible and not self._closing.is_set()
