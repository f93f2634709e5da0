"""The stores this process has open, one a folder; a child that is forked has none of them.

What must hold: an environment of LMDB is opened once a process and not used behind a fork, where
its threads are missing besides. So what a child inherits says at once that it is of no use. Nor can
the child open the same folder: to LMDB it is open in it, and closing what is inherited could end a
transaction of the parent's. A process that was started anew can.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixstore.store import Store

REOPEN = "close it and open it again"
INHERITED = "was open in the process this one was forked from"
stores: dict[tuple[int, int], Store] = {}  # by the folder's device and inode
lock = threading.Lock()


def remedy(lost: str) -> str:
    """What to do about a store that is of no use any more."""
    anew = "use it in a process that is started anew (spawn, exec)"
    return anew if lost == INHERITED else REOPEN


def _after_fork() -> None:
    """In the child. Another thread may have held any lock: none is taken here."""
    global lock
    for store in stores.values():
        store.forsake(INHERITED)
    lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
