"""The live index: opened as it was left, or begun anew where it is of another boot or damaged."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from prefixstore.errors import DamagedError
from prefixstore.failpoints import reached
from prefixstore.index import Environment
from prefixstore.ledger import TABLES
from prefixstore.liveness import Liveness
from prefixstore.opening import revive_live_dir

logger = logging.getLogger("prefixstore")


def open_live(
    folder: Path, live_dir: Path, known: bytes | None, liveness: Liveness, *, walk: bool
) -> tuple[Environment, str | None]:
    """The live index, and what `revive_live_dir` says of it.

    One that is damaged is begun anew, as after a reboot: found so now (``walk``), or by a process
    before, which left a mark. Not while another process has it open: then DamagedError, or it is
    opened as it is.
    """
    mark = live_dir / "damaged"

    def opened() -> tuple[Environment, str | None]:
        incarnation = revive_live_dir(folder, live_dir, known, liveness)
        env = Environment(live_dir / "live", TABLES, durable=False, walk=walk, damaged=mark.touch)
        reached("open.live")
        return env, incarnation

    def disown(why: object) -> None:
        logger.warning("%s: the memory tier begins anew: %s", folder, why)
        (live_dir / "incarnation").unlink(missing_ok=True)  # so it is not that any more

    if mark.exists() and liveness.alone():
        disown("it was found to be damaged")
    try:
        return opened()
    except DamagedError as error:
        if not liveness.alone():
            raise
        disown(error)
        return opened()


def nobody_holds(live_dir: Path) -> bool:
    """Whether no process has the memory tier open. Under the store's lock it stays so."""
    try:
        held = os.open(live_dir / "held", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(held)
    return True
