"""Filling a slot of the memory tier: begin, copy, finish. The order of a write lives here.

``begin`` claims slots (evicting if needed) and leaves a Pending record; the caller copies its bytes
into the slots and checksums its own source; ``finish`` merges the checksums and, when every piece
has arrived, writes the trailer and then the row. A row exists only for bytes that are there. A
writer that dies in between leaves a Pending record that ``Ledger.reap`` frees.

Several writers of one group (the tensor- or pipeline-parallel ranks of one engine) fill one slot
together; a writer of another group finds the chunk busy and does nothing, so that a chunk is never
a mix of two engines' rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from prefixstore.config import PENDING_S, TAG_BYTES_MAX, TTL_S_MAX
from prefixstore.errors import ConfigError
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.layout import Layout, Sums, checksum
from prefixstore.ledger import DISK, MEMORY, Entry, Ledger
from prefixstore.quota import Quota
from prefixstore.rows import FLAG_ALONE, FLAG_PAYLOAD_SUM, FLAG_PINNED, Pending, Row
from prefixstore.segment_index import enter
from prefixstore.slots import SlotFile

PROMOTER = 2**64 - 1  # the group of `promote`, which no engine has


class PutState(Enum):
    """What became of one chunk of a put."""

    STORED = "stored"  # complete: every piece has arrived and the row is committed
    PARTIAL = "partial"  # our pieces are there, other ranks' are not yet
    EXISTS = "exists"  # it was there before: nothing was done
    BUSY = "busy"  # another engine is writing it now, or this put is already: nothing was done
    FULL = "full"  # no slot could be freed
    QUOTA = "quota"  # its namespace or salt has used its bytes
    LOST = "lost"  # the slot was taken back before the copy ended (deadline)
    WRITING = "writing"  # between begin and finish


@dataclass(frozen=True, slots=True)
class Labels:
    """What a writer may say about its chunks."""

    expires_s: int = 0
    tag: bytes = b""
    pinned: bool = False
    alone: bool = False  # its text was encoded alone, behind nothing but a fixed preamble


def labels_for(
    ttl_s: float | None = None, tag: str = "", pin: bool = False, alone: bool = False
) -> Labels:
    """Labels from what a caller may say. Raises ConfigError."""
    if ttl_s is not None and not 0 < ttl_s < TTL_S_MAX:
        raise ConfigError(f"ttl_s={ttl_s}", "give seconds above 0 and below 2**31, or leave it out")
    try:
        data = tag.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"a tag with half a character: {tag!a}", "give valid text") from None
    if len(data) > TAG_BYTES_MAX:
        raise ConfigError(f"a tag of {len(data)} bytes", f"give at most {TAG_BYTES_MAX}")
    expires_s = 0 if ttl_s is None else int(time.time() + ttl_s) + 1
    return Labels(expires_s, data, pin, alone)


def check_numbers(refs: Iterable[ChunkRef], group: int) -> None:
    """Whether the records of a put can hold what its caller names. Raises ConfigError."""
    if not 0 <= group < PROMOTER:
        raise ConfigError(f"group={group}", "give 0 to 2**64 - 2")
    for ref in refs:
        if not 0 <= ref.depth < 2**32:
            raise ConfigError(f"a chunk of depth {ref.depth}", "give 0 to 2**32 - 1")


@dataclass(frozen=True, slots=True)
class Part:
    """One writer's share of one chunk, copied and summed."""

    ref: ChunkRef
    slot: int
    piece_indices: Sequence[int]
    sums: Sequence[int] | Sums
    payload_sum: bytes | None = None  # these two when the part is the whole chunk;
    trailer: bytes | None = None  # it is in the slot already


@dataclass(frozen=True, slots=True)
class Putting:
    """The rules of a put for one namespace; each method works inside one live transaction."""

    ledger: Ledger
    layout: Layout
    namespace: bytes
    group: int
    has_disk: bool

    def begin(
        self,
        txn: Txn,
        refs: Sequence[ChunkRef],
        pieces: Sequence[int],
        quota: Quota,
        now_s: float,
    ) -> list[tuple[PutState, int]]:
        """Claim a slot for each chunk that is not there, to write those pieces of it. As long as
        the caller does, they are in ``Ledger.filling``; `ended` takes them out.

        Returns (state, slot) for each chunk. One that stands twice in a put, as two requests of one
        step may bring it, is claimed once.
        """
        standing = [self._standing(txn, ref, pieces, now_s) for ref in refs]
        pairs = list(zip(refs, standing, strict=True))
        absent = {ref.key for ref, found in pairs if found is None}
        claimed: dict[bytes, PutState] = {}
        result: list[tuple[PutState, int]] = []
        for ref, found in pairs:
            if found is None and ref.key in claimed:
                again = claimed[ref.key]
                found = PutState.BUSY if again is PutState.WRITING else again, 0
            elif found is None:
                left = (len(absent) - len(claimed)) * self.layout.slot_bytes
                found = self._claim(txn, ref, quota, now_s, left)
                claimed[ref.key] = found[0]
            result.append(found)
        return result

    def _standing(
        self, txn: Txn, ref: ChunkRef, pieces: Sequence[int], now_s: float
    ) -> tuple[PutState, int] | None:
        """How a chunk stands before this put, None: absent; joins one our engine is filling."""
        ledger, key = self.ledger, ref.key
        entry = ledger.entry(txn, MEMORY, key)
        if entry is not None and 0 < entry.expires_s <= now_s:
            ledger.drop_memory(txn, key)
            entry = None
        if entry is None and self.has_disk:
            entry = ledger.entry(txn, DISK, key)
        if entry is not None and not 0 < entry.expires_s <= now_s:
            return PutState.EXISTS, 0
        record = txn.get("pending", key)
        if record is None:
            return None
        pending = Pending.unpack(record)
        whole = len(pieces) == self.layout.num_pieces
        if pending.group != self.group or whole or ledger.owner in pending.writers:
            return PutState.BUSY, 0
        if pending.present and all(pending.present[piece] for piece in pieces):
            return PutState.PARTIAL, 0  # ours are there: writing again could follow the commit
        ledger.filling.add((key, pending.slot))
        joined = replace(pending, writers=(*pending.writers, ledger.owner))
        txn.put("pending", key, joined.pack())
        return PutState.WRITING, pending.slot

    def _claim(
        self,
        txn: Txn,
        ref: ChunkRef,
        quota: Quota,
        now_s: float,
        wanted_bytes: int,
    ) -> tuple[PutState, int]:
        ledger, size = self.ledger, self.layout.slot_bytes
        over = quota.over(txn, MEMORY, size, self.namespace, ref.salt)
        if over is not None:
            given = ledger.victims(txn, MEMORY, over[1], over[0])
            if sum(entry.slot_bytes for _, entry in given) < over[1]:
                return PutState.QUOTA, 0
            for victim, _ in given:
                ledger.drop_memory(txn, victim)
        slot = ledger.claim_slot(txn, MEMORY, size)
        if slot is None:
            yielding = quota.yielding(self.namespace)
            for victim, _ in ledger.victims(txn, MEMORY, wanted_bytes, yielding):
                ledger.drop_memory(txn, victim)
            slot = ledger.claim_slot(txn, MEMORY, size)
        if slot is None:
            return PutState.FULL, 0
        deadline_s = now_s + PENDING_S
        pending = Pending(
            slot, size, self.group, deadline_s, self.namespace, ref.salt, (ledger.owner,), b"", b""
        )
        ledger.filling.add((ref.key, slot))
        ledger.begin_pending(txn, ref.key, pending)
        return PutState.WRITING, slot

    def finish(
        self, txn: Txn, parts: Sequence[Part], labels: Labels, file: SlotFile, now_s: int
    ) -> list[PutState]:
        """Record parts whose bytes are in their slots; commit the chunks they complete."""
        return [self._finish_one(txn, part, labels, file, now_s) for part in parts]

    def _finish_one(
        self, txn: Txn, part: Part, labels: Labels, file: SlotFile, now_s: int
    ) -> PutState:
        key, layout = part.ref.key, self.layout
        record = txn.get("pending", key)
        if record is None:
            return PutState.LOST
        pending = Pending.unpack(record)
        if (pending.group, pending.slot) != (self.group, part.slot):
            return PutState.LOST
        if part.trailer is not None:
            trailer = part.trailer
        else:
            present, sums = self._merge(pending, part)
            if 0 in present:
                writers = tuple(w for w in pending.writers if w != self.ledger.owner)
                merged = replace(pending, writers=writers, present=present, sums=sums)
                txn.put("pending", key, merged.pack())
                return PutState.PARTIAL
            trailer = layout.trailer(key, sums)
            try:
                file.write(part.slot, layout.padded(trailer), layout.payload_bytes)
            except OSError:  # no memory behind the last page of the slot
                self.ledger.end_pending(txn, key, pending)
                self.ledger.free_slot(txn, MEMORY, pending.slot_bytes, pending.slot)
                return PutState.FULL
        size, depth, salt = pending.slot_bytes, part.ref.depth, part.ref.salt
        self.ledger.end_pending(txn, key, pending)
        entry = Entry(size, part.slot, depth, labels.expires_s, self.namespace, salt)
        self.ledger.insert(txn, MEMORY, key, entry)
        flags = FLAG_PAYLOAD_SUM if part.payload_sum is not None else 0
        flags |= FLAG_ALONE if labels.alone else 0
        if labels.pinned and self.ledger.set_pinned(txn, MEMORY, key, True):
            flags |= FLAG_PINNED
        row = Row(
            flags=flags,
            depth=depth,
            slot=part.slot,
            slot_bytes=size,
            created_s=now_s,
            expires_s=labels.expires_s,
            namespace=self.namespace,
            salt=salt,
            trailer_sum=checksum(trailer),
            payload_sum=part.payload_sum or bytes(16),
            tag=labels.tag,
            preimage=part.ref.preimage,
        )
        txn.put("chunk", key, row.pack())
        if self.has_disk:
            txn.put("dirty", key, self.ledger.mark)
        else:
            enter(txn, key, self.layout.chunk_tokens)
        return PutState.STORED

    def _merge(self, pending: Pending, part: Part) -> tuple[bytes, bytes]:
        pieces = self.layout.num_pieces
        present = np.frombuffer(bytearray(pending.present or bytes(pieces)), np.uint8)
        sums = np.frombuffer(bytearray(pending.sums or bytes(8 * pieces)), "<u8")
        present[part.piece_indices] = 1
        sums[part.piece_indices] = part.sums
        return present.tobytes(), sums.tobytes()

    def ended(self, claims: Iterable[tuple[bytes, int]]) -> None:
        """This process fills those, keys and slots, no more, whatever became of them."""
        self.ledger.filling.difference_update(claims)

    def abandon(self, txn: Txn, claims: Sequence[tuple[ChunkRef, int]]) -> None:
        """Give up claims of `begin`, each with its slot, whose copy failed. Those that another
        thread of this process has of the same chunk stay: it is still writing."""
        for ref, slot in claims:
            record = txn.get("pending", ref.key)
            if record is None:
                continue
            pending = Pending.unpack(record)
            if (pending.group, pending.slot) != (self.group, slot):
                continue
            writers = tuple(w for w in pending.writers if w != self.ledger.owner)
            if writers or 1 in pending.present:
                txn.put("pending", ref.key, replace(pending, writers=writers).pack())
            else:
                self.ledger.end_pending(txn, ref.key, pending)
                self.ledger.free_slot(txn, MEMORY, pending.slot_bytes, pending.slot)
