"""Slots of the memory tier registered with CUDA before anybody loads or saves there.

Registering a slot for the first time takes several times as long as its copy, and making its pages
as long again; and both hold up the engine while it computes. So a thread does it when the engine
starts, which waits for it: it registers what other processes have left or made, and makes the rest
of the tier, as far as it was given memory, a few slots at a time. Later it registers what others
make. What it has not come to yet is done when it is needed.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from connector.handle import StoreHandle
from connector.registered import RegisteredSlots
from prefixstore.config import HELPERS, MIB, format_bytes
from prefixstore.errors import StoreError
from prefixstore.fronted import FrontedStore
from prefixstore.holding import Space, held_free, held_new, spaces, times_changed
from prefixstore.ledger import MEMORY
from prefixstore.lending import Lent
from prefixstore.reading import share_out
from prefixstore.slots import SlotFile
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

LOOK_S, START_LOOK_S = 0.25, 0.02  # between two looks; as long as the engine's start waits
BATCH_BYTES = 128 * MIB  # held at once
WAIT_S = 60.0  # that the engine's start waits for it
BUSY_S = 1.0  # since a step began: it may be a long one

Register = Callable[[Lent], object]


class Ahead:
    """See the module docstring. ``make``: also make slots, not only register what there is."""

    def __init__(
        self, slots: RegisteredSlots, handle: StoreHandle, slot_bytes: int, *, make: bool
    ) -> None:
        self._slots, self._handle, self._slot_bytes = slots, handle, slot_bytes
        self._make = make
        self._count = max(1, BATCH_BYTES // slot_bytes)
        self._made: Store | None = None  # as far as it has room
        self._seen: tuple[Store, tuple[int, int]] | None = None  # when all was registered
        self._last_step = -math.inf
        self._ready, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixstore-ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it has done what there is to be done at the start; WAIT_S at most."""
        self._ready.wait(WAIT_S)
        self._ready.set()  # what is left is done at its leisure

    def step(self) -> None:
        """The engine begins a step: this goes on at half its speed, in one thread."""
        self._last_step = time.monotonic()

    def end(self) -> None:
        """Have the thread end, soon."""
        self._closing.set()

    def close(self, end: float) -> None:
        """End the thread by ``end`` (monotonic)."""
        self.end()
        self._thread.join(max(0.0, end - time.monotonic()))

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        try:
            if not self._slots.begin():  # vLLM captures graphs before its first step
                self._ready.set()
                while self._last_step < 0 and not self._closing.wait(LOOK_S):
                    pass
            while self._goes_on():
                with suppress(StoreError, OSError):  # lost or closed, or does not answer: again
                    if self._look():
                        self._ready.set()
                self._closing.wait(LOOK_S if self._ready.is_set() else START_LOOK_S)
        except Exception as error:  # thread loop: what is not done ahead is done when needed
            logger.warning("prefixstore: no slots ahead: %s: %s", type(error).__name__, error)
        finally:
            self._ready.set()

    def _look(self) -> bool:
        """Whether there is nothing to do now. Raises StoreError, OSError."""
        store = self._handle.get()
        if isinstance(store, FrontedStore):
            store = store.front
        if not isinstance(store, Store):
            return True
        now = times_changed(store)
        if self._seen != (store, now):
            there = spaces(store, self._slot_bytes, self._slots.of(self._file_of(store)))
            if not self._register_all(store, there.found) or there.held:
                return False
            if not there.filling:  # else it looks again, and nothing waits for that
                self._seen = store, now
            if there.found:  # others may have made more meanwhile
                return False
        if self._make and self._made is not store:
            self._make_all(store)
            return False
        return True

    def _make_all(self, store: Store) -> None:
        """As many slots as there is room for. Raises StoreError, OSError."""
        began, made = time.monotonic(), 0
        while self._made is not store and self._goes_on():
            with held_new(store, self._slot_bytes, self._count) as new:
                new.unmade.update(self._do(store, new.spaces, self._slots.claim))
                made += len(new.spaces) - len(new.unmade)
                if new.unmade or len(new.spaces) < self._count:
                    self._made = store
        if made:
            size, took = format_bytes(made * self._slot_bytes), time.monotonic() - began
            logger.info("prefixstore: %s of the memory tier made in %.1f s", size, took)

    def _register_all(self, store: Store, rest: list[Space]) -> bool:
        """Slots with pages; False if somebody else held one. Raises StoreError, OSError."""
        complete = True
        at = os.getpid() * self._count % len(rest) if rest else 0  # ranks would collide else
        rest = rest[at:] + rest[:at]
        while rest and self._goes_on():
            some, rest = rest[: self._count], rest[self._count :]
            self._do(store, [one for one in some if not one.free], self._slots.register)
            if free := [one.slot for one in some if one.free]:
                with held_free(store, self._slot_bytes, free) as held:
                    held.unmade.update(self._do(store, held.spaces, self._slots.claim))
                    complete &= len(held.spaces) == len(free)
        return complete

    def _do(self, store: Store, some: Sequence[Space], register: Register) -> set[int]:
        """Register some; those that were not."""
        file, began = self._file_of(store), time.monotonic()
        lent = [Lent(store, file, one.slot, one.version) for one in some]
        lost: set[int] = set()

        def one(n: int) -> None:
            try:
                done = register(lent[n]) is not None
            except OSError:  # no memory
                done = False
            if done:
                self._slots.give_back([lent[n]])
            else:
                lost.add(lent[n].slot)

        busy = began - self._last_step < BUSY_S
        share_out(len(lent), one, store.helpers, 0 if busy else HELPERS)
        if busy:
            self._closing.wait(time.monotonic() - began)
        return lost

    def _file_of(self, store: Store) -> SlotFile:
        return store.file_of(MEMORY, self._slot_bytes)

    def _goes_on(self) -> bool:
        return self._slots.possible and not self._closing.is_set()
