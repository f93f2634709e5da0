"""Slots of the memory tier that CUDA may read by itself: mapped once more and registered.

Registering pins the slot's pages, 0.05 to 0.1 ms for each MiB, less than the host would take to
copy it; it is done ahead (`ahead`) or when a slot is first loaded or saved, and lasts. A slot holds
a chunk when it is registered, or is claimed for one or held, so the tier takes no more memory than
the store gave out. When its space is given back, a thread lets go of it within LOOK_S, since CUDA
would hold the old pages; so it does of slots of which CUDA read something else than they hold, and
of those of files that were closed. They are registered anew when they are loaded again.

What must hold: what a load is reading is not let go of before it ends; memory CUDA cannot register
(a tier that is no tmpfs, no more to be pinned) makes loads slower, nothing else.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from connector.cudart import apart_from_captures
from prefixstore.errors import StoreError
from prefixstore.lending import Lent, keeps_its_pages, times_given_back, versions
from prefixstore.slots import SlotFile
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

LOOK_S = 1.0
LOOK_AGAIN = -1
SLOTS_MAX = 32768  # each is a mapping, of which a process has 65,530 by default


class Cuda:
    """What is asked of CUDA, for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> bool:
        """This thread is for that device: else it would take memory of the first one. Whether what
        it asks of CUDA does not end the capture of a graph by another thread."""
        torch.cuda.set_device(self._device)
        return apart_from_captures()

    def register(self, memory: torch.Tensor) -> bool:
        """Whether CUDA can read that memory by DMA from now on."""
        result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if result:
            with suppress(RuntimeError):  # the error would be the next launch's of this thread
                torch.zeros(1, device=self._device)
        return result == 0

    def unregister(self, memory: torch.Tensor) -> bool:
        """Whether it has let go of it. Nothing may be reading it."""
        return int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())) == 0


# Never unmapped: CUDA would take what is mapped there next for the memory it has registered.
_KEPT: list[torch.Tensor] = []


@dataclass
class _Registered:
    memory: torch.Tensor
    version: int  # of its pages: see `lending`
    readers: int = 0
    stale: bool = False  # to be let go of


class RegisteredSlots:
    """Used by threads that load and save. Slots stay registered while they have their pages."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._slots: dict[tuple[SlotFile, int], _Registered] = {}
        # Of each file its store, and `times_given_back` when looked, or LOOK_AGAIN.
        self._stores: dict[SlotFile, tuple[Store, int]] = {}
        self._possible = True
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._registering = threading.Lock()  # one thread at a time; taken before the other

    def begin(self) -> bool:
        """For a thread that registers in the background; see `Cuda.begin`."""
        return self._cuda.begin()

    @property
    def possible(self) -> bool:
        """Whether CUDA takes slots, as far as is known."""
        return self._possible and len(self._slots) < SLOTS_MAX

    def of(self, file: SlotFile) -> set[int]:
        """Slots of a file that are registered and up to date, as far as is known."""
        with self._lock:
            return {slot for (of, slot), one in self._slots.items() if of is file and not one.stale}

    def take(self, lent: Sequence[Lent]) -> list[torch.Tensor | None]:
        """Each slot's bytes, uint8 ``[slot_bytes]``, until `give_back`. None for one that is not
        registered or has other pages now."""
        with self._lock:
            return [self._take(one) for one in lent]

    def _take(self, lent: Lent) -> torch.Tensor | None:
        found = self._slots.get((lent.file, lent.slot))
        if found is None:
            return None
        if found.stale or found.version != lent.version:
            found.stale = True
            return None
        found.readers += 1
        return found.memory

    def register(self, lent: Lent) -> torch.Tensor | None:
        """`take`, and registered now if need be. None if CUDA cannot read it."""
        [memory] = self.take([lent])
        if memory is None and self._possible:
            try:
                if not keeps_its_pages(lent):
                    return None  # they would be made, and be more than the tier was given
                self._register(lent, claimed=False)
            except StoreError:  # closed
                return None
            [memory] = self.take([lent])
        return memory

    def claim(self, lent: Lent) -> torch.Tensor | None:
        """The same for a slot that the caller has claimed in order to have it written by CUDA: its
        pages are made. Raises OSError where there is no memory for them."""
        [memory] = self.take([lent])
        if memory is None and self._possible:
            self._register(lent, claimed=True)
            [memory] = self.take([lent])
        return memory

    def _start(self) -> None:
        """Not before a slot is registered: there is nothing to let go of."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="prefixstore-register", daemon=True
                )
                self._thread.start()

    def give_back(self, taken: Iterable[Lent]) -> None:
        """What was taken is not read any more."""
        with self._lock:
            for lent in taken:
                self._slots[lent.file, lent.slot].readers -= 1

    def distrust(self, lent: Lent) -> None:
        """What CUDA read there was not what the slot holds."""
        with self._lock:
            if (found := self._slots.get((lent.file, lent.slot))) is not None:
                found.stale = True

    def close(self, end: float) -> None:
        """End the thread by ``end`` (monotonic)."""
        self._possible = False
        self._closing.set()
        if self._thread is not None:
            self._thread.join(max(0.0, end - time.monotonic()))
        _KEPT.extend(found.memory for found in list(self._slots.values()))

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        self._cuda.begin()
        while not self._closing.wait(LOOK_S):
            try:
                self._look()
            except Exception as error:  # thread loop: what is not let go of is, the next time
                kind = type(error).__name__
                logger.warning("prefixstore: registered slots: %s: %s", kind, error)

    def _register(self, lent: Lent, *, claimed: bool) -> None:
        """Unless it is; what is stale there goes first. Raises StoreError, and OSError for a slot
        that is claimed and has no memory."""
        self._start()
        file, slot = lent.file, lent.slot
        if len(self._slots) >= SLOTS_MAX:
            return
        try:
            # Mapping its pages takes most of the time, and several threads can.
            memory = torch.frombuffer(file.map_slot(slot), dtype=torch.uint8)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                if claimed:
                    raise
                return
            if not file.closed:  # its store was lost meanwhile, which says nothing about the next
                self._give_up(file, str(error))
            return
        with self._registering:
            self._let_go((file, slot))
            if (file, slot) in self._slots or file.closed or self._closing.is_set():
                return
            if not claimed and not keeps_its_pages(lent):  # it may have waited for long
                return
            why = "CUDA does not register it"
            try:
                self._cuda.begin()  # this thread may be any
                done = self._cuda.register(memory)
            except RuntimeError as error:
                done, why = False, str(error)
            if not done:
                self._give_up(file, why)
                return
            with self._lock:
                self._stores[file] = lent.store, LOOK_AGAIN  # its version may be older than that
                self._slots[file, slot] = _Registered(memory, lent.version)

    def _give_up(self, file: SlotFile, why: str) -> None:
        if self._possible:
            logger.warning("prefixstore: %s goes by way of the host: %s", file.path, why)
        self._possible = False

    def _look(self) -> None:
        """Let go of what has lost its pages or its file, or was distrusted."""
        with self._lock:
            stores = list(self._stores.items())
        for file, (store, seen) in stores:
            with self._lock:
                ours = [(slot, one) for (of, slot), one in self._slots.items() if of is file]
            with suppress(StoreError):  # closed: its file is, too, or will be
                self._compare(file, store, seen, ours)
            for _, one in ours:
                one.stale |= file.closed
            if file.closed and not ours:
                with self._lock:
                    del self._stores[file]
        with self._lock:
            stale = [name for name, one in self._slots.items() if one.stale]
        for name in stale:  # one by one: who registers need not wait for all
            with self._registering:
                self._let_go(name)

    def _compare(
        self, file: SlotFile, store: Store, seen: int, ours: list[tuple[int, _Registered]]
    ) -> None:
        """Mark those whose pages were given back. Raises StoreError."""
        now = times_given_back(store)
        if now == seen or file.closed:
            return
        current = versions(store, file.slot_bytes, [slot for slot, _ in ours])
        for (_, one), version in zip(ours, current, strict=True):
            one.stale |= version != one.version
        with self._lock:
            if self._stores.get(file) == (store, seen):  # else one was registered meanwhile
                self._stores[file] = store, now

    def _let_go(self, name: tuple[SlotFile, int]) -> None:
        """Of one that is stale and that nobody reads."""
        with self._lock:
            found = self._slots.get(name)
            if found is None or not found.stale or found.readers:
                return
            del self._slots[name]
        if not self._cuda.unregister(found.memory):
            _KEPT.append(found.memory)
