"""Slots of the memory tier that CUDA may read by itself: mapped once more and registered.

Registering pins the slot's pages, 0.1 ms for each MiB, on a thread of its own: the first load of a
slot goes by way of the host, later ones do not. A slot holds a chunk when it is registered, so its
pages exist and the tier takes no more memory than before. Were its space given back since, CUDA
would go on reading the old pages: what it reads is checked, and the slot is not used again
(`distrust`).

What must hold: nothing waits for CUDA here but the thread; memory CUDA cannot register (a tier that
is no tmpfs, no more to be pinned) makes loads slower, nothing else.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress

import torch

from prefixstore.slots import SlotFile

logger = logging.getLogger("vllm.prefixstore")

QUEUE_MAX = 4096


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

    def unregister(self, memory: torch.Tensor) -> None:
        """It no longer reads it; waits for what it is reading."""
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


# Never unmapped: CUDA would take what is mapped there next for the memory it has registered.
_KEPT: list[torch.Tensor] = []


class RegisteredSlots:
    """Used by threads that load. Slots stay registered as long as their file is in use."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._slots: dict[tuple[SlotFile, int], torch.Tensor | None] = {}  # None: do not use it
        self._files: set[SlotFile] = set()
        self._wanted: queue.Queue[tuple[SlotFile, int] | None] = queue.Queue(QUEUE_MAX)
        self._possible = True
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def get(self, file: SlotFile, slot: int) -> torch.Tensor | None:
        """The slot's bytes, uint8 ``[slot_bytes]``. None if CUDA cannot read it (yet)."""
        found = self._slots.get((file, slot))
        if found is None and (file, slot) not in self._slots and self._possible:
            # Not before the first load: vLLM has captured its CUDA graphs by then, and what
            # another thread asks of CUDA meanwhile would end that.
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="prefixstore-register", daemon=True
                    )
                    self._thread.start()
            with suppress(queue.Full):
                self._wanted.put_nowait((file, slot))
        return found

    def distrust(self, file: SlotFile, slot: int) -> None:
        """What CUDA read there was not what the slot holds: never use it again."""
        memory, self._slots[file, slot] = self._slots.get((file, slot)), None
        if memory is not None:
            _KEPT.append(memory)

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
        _KEPT.extend(memory for memory in list(self._slots.values()) if memory is not None)

    def _run(self) -> None:
        self._cuda.begin()
        while (wanted := self._wanted.get()) is not None:
            if self._possible and wanted not in self._slots:
                self._add(*wanted)
            self._wanted.task_done()

    def _add(self, file: SlotFile, slot: int) -> None:
        if file not in self._files:
            self._let_go_of_closed()
            self._files.add(file)
        if file.closed:  # its store was lost meanwhile, and says nothing about the next
            return
        try:
            memory = torch.frombuffer(file.map_slot(slot), dtype=torch.uint8)
            if self._cuda.register(memory):
                self._slots[file, slot] = memory
                return
            why = "CUDA does not register it"
        except (OSError, RuntimeError, ValueError) as error:
            why = str(error)
        self._possible = False
        logger.warning("prefixstore: %s is read by way of the host: %s", file.path, why)

    def _let_go_of_closed(self) -> None:
        """When another file comes: the store of those was closed or lost, and opened anew."""
        self._files = {file for file in self._files if not file.closed}
        for file, slot in list(self._slots):
            if file.closed:
                memory = self._slots.pop((file, slot))
                if memory is not None:
                    self._cuda.unregister(memory)
