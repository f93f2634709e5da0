"""The journal: the last chunks that entered or left a tier, for whoever follows a store.

Written by the ledger in the transaction that makes the change, by whichever process makes it, so it
is never ahead of the index nor behind it. Owns table ``change`` of the live index: a ring of the
last changes (CHANGES_MAX, fewer in a small tier), and the counter ``changes`` of all there were. A
follower keeps the number of the last it has seen; one that falls further behind than the ring is
told how many it missed. A reboot begins anew, with the live index.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from prefixstore.index import Txn

CHANGES_MAX = 8192  # 0.8 MiB of the memory tier; some seconds of the fastest puts
CHANGES_MIN, CAP_BYTES_A_CHANGE = 256, 3200  # of a small tier the ring takes a thirtieth
TABLES = ("change",)
_NUMBER = b"changes"
_CHANGE = struct.Struct("<BBBBII16s16s")
MEMORY, DISK = 1, 2  # as in the ledger, which imports this module


class Change(NamedTuple):
    """One chunk that entered or left a tier."""

    entered: bool
    tier: int
    elsewhere: bool  # whether it was in the other tier at that time
    slot_bytes: int
    depth: int
    namespace: bytes
    key: bytes

    @property
    def kind(self) -> str:
        """What it is to a follower: stored (new to the store), promoted (disk to memory), written
        (memory to disk) or removed (from that tier)."""
        if not self.entered:
            return "removed"
        if not self.elsewhere:
            return "stored"
        return "promoted" if self.tier == MEMORY else "written"


def note(
    txn: Txn, entered: bool, tier: int, key: bytes, namespace: bytes, slot_bytes: int, depth: int
) -> None:
    """Enter a change."""
    number = txn.add_int("meta", _NUMBER, 1)
    elsewhere = txn.get("heat", b"%c" % (DISK if tier == MEMORY else MEMORY) + key) is not None
    data = _CHANGE.pack(entered, tier, elsewhere, 0, slot_bytes, depth, namespace, key)
    txn.put("change", number.to_bytes(8, "big"), data)
    cap_bytes = txn.get_int("meta", b"cap%d" % MEMORY)
    most = min(CHANGES_MAX, max(CHANGES_MIN, cap_bytes // CAP_BYTES_A_CHANGE))
    if number > most:
        txn.delete("change", (number - most).to_bytes(8, "big"))


def newest(txn: Txn) -> int:
    """Number of the last change; 0 if there was none."""
    return txn.get_int("meta", _NUMBER)


def since(txn: Txn, seen: int) -> tuple[list[Change], int, int]:
    """Changes after number ``seen``: (those that are still known, number of the last, how many are
    no longer known)."""
    last = newest(txn)
    if last <= seen:
        return [], last, 0
    found = [
        Change(bool(entered), tier, bool(elsewhere), slot_bytes, depth, namespace, key)
        for entered, tier, elsewhere, _, slot_bytes, depth, namespace, key in (
            _CHANGE.unpack(data)
            for _, data in txn.scan("change", start=(seen + 1).to_bytes(8, "big"))
        )
    ]
    return found, last, last - seen - len(found)
