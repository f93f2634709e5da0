"""Slots of the memory tier that CUDA may read by itself: mapped once more and registered.

Registering pins the slot's pages, 0.1 ms for each MiB. For a save it is done at once, for a load on
a thread of its own: the first load of a slot goes by way of the host, later ones do not. A slot
holds a chunk when it is registered, or is claimed for one, so the tier takes no more memory than
the store gave out. When its space is given back, it is let
go of within LOOK_S, since CUDA would hold the old pages; so are slots of which CUDA read something
else than they hold, and those of files that were closed. They are registered anew when they are
loaded again.

What must hold: no load waits for CUDA here; what a load is reading is not let go of
before it ends; memory CUDA cannot register (a tier that is no tmpfs, no more to be pinned) makes
loads slower, nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from prefixstore.errors import StoreError
from prefixstore.lending import Lent, keeps_its_pages, times_given_back, versions
from prefixstore.slots import SlotFile
from prefixstore.store import Store

logger = logging.getLogger("vllm.prefixstore")

QUEUE_MAX = 4096
LOOK_S = 1.0
LOOK_AGAIN = -1


class Cuda:
    """What is asked of CUDA, for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> None:
        """This thread is for that device: else it would take memory of the first one."""
        torch.cuda.set_device(self._device)

    def register(self, memory: torch.Tensor) -> bool:
        """Whether CUDA can read that memory by DMA from now on."""
        result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
        return int(result) == 0

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
        self._stores: dict[
            SlotFile, tuple[Store, int]
        ] = {}  # and `times_given_back` when looked, or LOOK_AGAIN
        self._wanted: queue.Queue[Lent | None] = queue.Queue(QUEUE_MAX)
        self._possible = True
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._registering = threading.Lock()  # one thread at a time; taken before the other

    def take(self, lent: Lent) -> torch.Tensor | None:
        """The slot's bytes, uint8 ``[slot_bytes]``, until `give_back`. None if CUDA cannot read it
        (yet)."""
        memory = self._take(lent)
        if memory is None:
            self.ask_for(lent)
        return memory

    def claim(self, lent: Lent) -> torch.Tensor | None:
        """`take` for a slot that the caller has claimed in order to have it written by CUDA. It is
        registered now, with pages made for it; OSError where there is no memory for them."""
        memory = self._take(lent)
        if memory is None and self._possible:
            self._start()
            lent.file.allocate(lent.slot)
            # Making pages takes most of the time, and several threads can.
            made = torch.frombuffer(lent.file.map_slot(lent.slot, populate=True), dtype=torch.uint8)
            with self._registering:
                self._register(lent, made)
            memory = self._take(lent)
        return memory

    def _take(self, lent: Lent) -> torch.Tensor | None:
        with self._lock:
            found = self._slots.get((lent.file, lent.slot))
            if found is not None and not found.stale and found.version == lent.version:
                found.readers += 1
                return found.memory
            if found is not None:
                found.stale = True
        return None

    def ask_for(self, lent: Lent) -> None:
        """Have a slot registered, if it is not."""
        found = self._slots.get((lent.file, lent.slot))
        if not self._possible or (found is not None and not found.stale):
            return
        self._start()
        with suppress(queue.Full):
            self._wanted.put_nowait(lent)

    def _start(self) -> None:
        """Not before the first load or save: vLLM has captured its CUDA graphs by then, and what
        another thread asks of CUDA meanwhile would end that."""
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

    def wait(self, deadline_s: float) -> bool:
        """Wait until all that was asked for is registered or refused; whether it is."""
        end = time.monotonic() + deadline_s
        while self._wanted.unfinished_tasks:
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def close(self, end: float) -> None:
        """End the thread by ``end`` (monotonic)."""
        self._possible = False
        with suppress(queue.Full):  # then it ends with the process
            self._wanted.put_nowait(None)
        if self._thread is not None:
            self._thread.join(max(0.0, end - time.monotonic()))
        _KEPT.extend(found.memory for found in list(self._slots.values()))

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        self._cuda.begin()
        next_look = time.monotonic() + LOOK_S
        while True:
            if time.monotonic() >= next_look:
                self._try(self._look)
                next_look = time.monotonic() + LOOK_S
            try:
                wanted = self._wanted.get(timeout=max(0.0, next_look - time.monotonic()))
            except queue.Empty:
                continue
            if wanted is None:
                return
            if self._possible:
                self._try(partial(self._add, wanted))
            self._wanted.task_done()

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # thread loop: what goes by way of the host is slower
            logger.warning("prefixstore: registering slots: %s: %s", type(error).__name__, error)

    def _add(self, lent: Lent) -> None:
        with self._registering, suppress(StoreError):  # closed
            if keeps_its_pages(lent):  # else they would be made, and be more than the tier has
                self._register(lent)

    def _register(self, lent: Lent, memory: torch.Tensor | None = None) -> None:
        """Unless it is; what is stale there goes first."""
        file, slot = lent.file, lent.slot
        self._let_go([(file, slot)])
        if (file, slot) in self._slots or file.closed:
            return  # or its store was lost meanwhile, which says nothing about the next
        try:
            if memory is None:
                memory = torch.frombuffer(file.map_slot(slot), dtype=torch.uint8)
            if self._cuda.register(memory):
                self._stores[file] = lent.store, LOOK_AGAIN  # its version may be older than that
                self._slots[file, slot] = _Registered(memory, lent.version)
                return
            why = "CUDA does not register it"
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error)
        self._possible = False
        logger.warning("prefixstore: %s goes by way of the host: %s", file.path, why)

    def _look(self) -> None:
        """Let go of what has lost its pages or its file, or was distrusted."""
        for file, (store, seen) in list(self._stores.items()):
            ours = [(slot, one) for (of, slot), one in self._slots.items() if of is file]
            try:
                now = times_given_back(store)
                if now != seen and not file.closed:
                    current = versions(store, file.slot_bytes, [slot for slot, _ in ours])
                    for (_, one), version in zip(ours, current, strict=True):
                        one.stale |= version != one.version
                    self._stores[file] = store, now
            except StoreError:  # closed: its file is, too, or will be
                pass
            for _, one in ours:
                one.stale |= file.closed
            if file.closed and not ours:
                del self._stores[file]
        with self._registering:
            self._let_go([name for name, one in list(self._slots.items()) if one.stale])

    def _let_go(self, names: Iterable[tuple[SlotFile, int]]) -> None:
        """Of those that are stale and that nobody reads."""
        for name in names:
            with self._lock:
                found = self._slots.get(name)
                if found is None or not found.stale or found.readers:
                    continue
                del self._slots[name]
            if not self._cuda.unregister(found.memory):
                _KEPT.append(found.memory)
