"""Named steps of the order of writes, where a test may end the process.

Each step after which the files of a store are in another state, on disk or in shared memory, calls
`reached` with its name; those whose name ends in ``ing`` lie inside a transaction, which is then
never committed. Unless a test has set an action that is a call and a comparison with None.
"""

from __future__ import annotations

from collections.abc import Callable

# In the order in which they are reached.
NAMES = (
    "open.folder", "open.settings", "open.wiped", "open.live", "open.truncated", "open.rebuilding",
    "open.rebuilt", "open.declaring", "open.declared", "open.marked", "open.owner",
    "put.claiming", "put.claimed", "put.copied", "put.finishing", "put.finished",
    "spill.claiming", "spill.claimed", "spill.allocated", "spill.copied", "spill.synced",
    "spill.entering", "spill.entered", "spill.settling", "spill.settled",
    "evict.claiming", "evict.claimed", "evict.deleting", "evict.deleted", "evict.freeing",
    "evict.freed", "drop.begun", "drop.deleted", "drop.settling", "give_back.punching",
    "promote.claimed", "promote.copied", "promote.committing", "promote.committed",
    "ttl.announced", "ttl.rows", "ttl.settling", "pin.flagged", "retire.named", "retire.dropping",
    "reap.reaping",
)  # fmt: skip

_action: Callable[[str], None] | None = None


def reached(name: str) -> None:
    """A step was taken."""
    if _action is not None:
        _action(name)


def set_action(action: Callable[[str], None] | None) -> None:
    """What to do at each step in this process; None: nothing. For tests."""
    global _action
    _action = action
