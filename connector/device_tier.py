"""The device tier: chunks that are loaded again and again, kept in GPU memory.

Slots hold a rank's region of a chunk as the store gave it, K not rotated, so it serves exact
prefixes and pieces of blends. Nothing is copied: one launch hashes all slots of a load, one writes
them to the pages. A chunk comes in when it was loaded and checked (who: `residents`).

What must hold: a load names only chunks that a look-up has just found in the store, so what expired
or was deleted there is not asked for here; what a slot has is compared with the sums it came in
with each time, and dropped if it is something else; a slot is not filled while it is read, nor read
before it is filled. It is this process's own, and empty when that starts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from connector.direct import Sums
from connector.rank import Rank, mark
from connector.residents import Resident, Residents
from connector.sending import sent
from connector.tally import Tally
from prefixstore.config import MIB
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout

logger = logging.getLogger("vllm.prefixstore")

DEVICE = 4  # beside the store's tiers
HEADROOM_BYTES = 1024 * MIB  # left free: loads and saves take device memory for a moment

Name = tuple[bytes, bytes]  # namespace, key
Write = Callable[[Sequence[int], Sequence[int]], bool]


@dataclass(frozen=True)
class Missing:
    """What of a load is to come from the store."""

    namespace: bytes
    refs: Sequence[ChunkRef]
    numbers: Sequence[int]  # of each, in the load
    wanted: frozenset[int] = frozenset()  # those of ``refs`` that should be admitted then


class HostSums:
    """`sum_kernel.SumKernel` for a device that is the host."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __call__(
        self, data: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor | None = None
    ) -> None:
        """Hash rows of ``data``, uint8 ``[n, bytes]``; all without ``rows``."""
        chosen = data if rows is None else (data[row] for row in rows.tolist())
        for chunk, out in zip(chosen, sums, strict=True):
            found = np.array(self._layout.piece_sums(memoryview(chunk.numpy())), np.uint64)
            out.copy_(torch.from_numpy(found.view(np.int64)))

    def compare(
        self, data: torch.Tensor, sums: torch.Tensor, wanted: torch.Tensor, wrong: torch.Tensor
    ) -> None:
        """Hash ``data``, and note which rows have other sums than are ``wanted``."""
        self(data, sums)
        wrong.copy_((sums != wanted).any(1))


class DeviceTier:
    """See the module docstring. Thread-safe; work is enqueued on the current stream."""

    def __init__(
        self, device: torch.device, layout: Layout, unit_bytes: int, num_slots: int, sums: Sums,
        counts: Tally,
    ) -> None:  # fmt: skip
        """Raises RuntimeError where there is no memory for it."""
        pieces = unit_bytes // layout.piece_bytes
        self.chunks = torch.empty((num_slots, unit_bytes), dtype=torch.uint8, device=device)
        self._sums = torch.zeros((num_slots, pieces), dtype=torch.int64, device=device)
        self._hash, self._device = sums, device
        self._residents = Residents(num_slots, counts)
        self._filled: torch.cuda.Event | None = None  # when all fills up to now are done
        self._lock = threading.Lock()

    def load(self, namespace: bytes, refs: Sequence[ChunkRef], write: Write) -> Missing:
        """Load what is here of these chunks; returns what is not.

        ``write(numbers, slots)`` enqueues writing the chunks of those numbers, in those rows of
        ``chunks``, to their pages; False gives the load up. Raises RuntimeError and what ``write``
        does; nothing is on its way to the pages when this returns or raises.
        """
        names = [(namespace, ref.key) for ref in refs]
        with self._lock:
            found, wanted = self._residents.take(names)
        wrong: list[int] = []
        try:
            if found:
                wrong = self._load(found, write)
        finally:
            with self._lock:
                for number in wrong:
                    self._residents.drop(names[number], found[number])
                self._residents.give_back(found.values())
        if wrong:
            logger.warning("prefixstore: %d chunks in the device tier were damaged", len(wrong))
        numbers = [i for i in range(len(refs)) if i not in found or i in wrong]
        places = (place for place, i in enumerate(numbers) if i in wanted or i in wrong)
        return Missing(namespace, [refs[i] for i in numbers], numbers, frozenset(places))

    def _load(self, found: dict[int, Resident], write: Write) -> list[int]:
        """Have them written and wait for that; the numbers of those that are not right."""
        numbers, slots = list(found), [held.slot for held in found.values()]
        try:
            self._behind_fills()
            rows = self._on_device(slots)
            wanted = self._sums[rows]
            sums = torch.empty_like(wanted)
            self._hash(self.chunks, sums, rows)
            wrong = (sums != wanted).any(1)
            if not write(numbers, slots):
                return []
            flags = wrong.tolist()
        finally:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        return [number for number, flag in zip(numbers, flags, strict=True) if flag]

    def admit(
        self,
        missing: Missing,
        at: int,
        rows: Iterable[int],
        chunks: torch.Tensor,
        sums: torch.Tensor | None = None,
    ) -> None:
        """Take in what is wanted of ``rows`` of ``chunks``, which are the missing ones from ``at``
        on, and were checked.

        ``chunks``: uint8 ``[n, unit_bytes]``, on the device or in host memory; ``sums``: int64
        ``[n, pieces]``, on the device, if they are known. Raises RuntimeError.
        """
        chosen = [row for row in rows if at + row in missing.wanted]
        if not chosen:
            return
        with self._lock:
            self._behind_fills()
            try:
                for row in chosen:
                    name = (missing.namespace, missing.refs[at + row].key)
                    self._fill(name, chunks[row], None if sums is None else sums[row])
            finally:
                # Others read it without the lock: an event that is not recorded waits for nothing.
                self._filled = mark(self._device)

    def _fill(self, name: Name, chunk: torch.Tensor, sums: torch.Tensor | None) -> None:
        slot, filled = self._residents.place(name), False
        if slot is None:
            return
        try:
            self.chunks[slot].copy_(chunk, non_blocking=True)
            if sums is None:
                self._hash(self.chunks[slot : slot + 1], self._sums[slot : slot + 1])
            else:
                self._sums[slot].copy_(sums, non_blocking=True)
            filled = True
        finally:
            if filled:
                self._residents.enter(name, slot)
            else:
                self._residents.free(slot)

    def _behind_fills(self) -> None:
        """What this stream does next waits for them."""
        if self._filled is not None:
            torch.cuda.current_stream(self._device).wait_event(self._filled)

    def _on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        return sent(torch.tensor(numbers, dtype=torch.int64), self._device)


def tier_for(
    rank: Rank, num_bytes: int, share: float | None, counts: Tally, others_bytes: int = 0
) -> DeviceTier | None:
    """A tier of so many bytes beside what vLLM was given, a ``share`` of the device's memory (None:
    not known), and ``others_bytes`` that loads and saves will take; None where it cannot be: one
    warning says what to do."""
    if not num_bytes:
        return None
    sums: Sums | None = rank.sum_kernel
    if sums is None and rank.device.type == "cpu":
        sums = HostSums(rank.layout)
    slot_bytes = rank.unit_bytes + 8 * (rank.unit_bytes // rank.layout.piece_bytes)
    num_slots, why = num_bytes // slot_bytes, ""
    room = None if rank.device.type != "cuda" else _room(rank.device, share) - others_bytes
    if sums is None:
        why = "it needs Triton, to check what is in it"
    elif not num_slots:
        why = f"a chunk takes {slot_bytes} bytes: give it as many at least"
    elif room is not None and num_bytes > room:
        why = f"vLLM leaves {max(room, 0)} bytes: lower gpu_memory_utilization, or 'device'"
    else:
        try:
            told = counts if rank.leads else Tally()  # one rank counts for all
            return DeviceTier(rank.device, rank.layout, rank.unit_bytes, num_slots, sums, told)
        except (RuntimeError, ValueError) as error:
            why = f"{error}: lower gpu_memory_utilization, or 'device'"
    logger.warning("prefixstore: there is no device tier of %d bytes: %s", num_bytes, why)
    return None


def _room(device: torch.device, share: float | None) -> int:
    """What it may take: vLLM has measured its KV cache, and still needs all that it was given."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free, free if share is None else int((1 - share) * total)) - HEADROOM_BYTES
