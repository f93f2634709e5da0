"""Migration: a store of an older format becomes one of a newer, or stays what it was.

All steps on the way are run in one transaction of the durable index, which also changes the format
version there. So kill -9, or a loss of power, leaves the old store or the new one. ``store.json``
is written after the commit; if that did not happen, who opens the store next does it (`formats`).
Payloads are not copied. The live index is begun anew, as after a reboot: what was in memory only is
let go.

A step that needs other files writes them beside the old ones, under names the old format does not
use, and syncs them before it returns; it may find what an earlier attempt left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixstore import config
from prefixstore.config import MIGRATE_DEADLINE_S, other_format, stored_version
from prefixstore.errors import ConfigError, FormatError
from prefixstore.formats import FORMAT, INDEX_TABLES, declare, index_format
from prefixstore.index import Environment, Txn
from prefixstore.liveness import Liveness
from prefixstore.opening import exclusive


@dataclass(frozen=True, slots=True)
class Step:
    """From one format version to the next."""

    come_from: int
    go_to: int
    what: str  # it does, for people
    work: Callable[[Txn, Path], None]  # may run more than once; changes only what its Txn does


STEPS: tuple[Step, ...] = ()  # version 1 is the first


@dataclass(frozen=True, slots=True)
class Migration:
    """What was done, or would be."""

    found: int
    target: int
    steps: tuple[Step, ...]
    done: bool


def way(folder: Path, found: int, target: int, steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps from a version to another. Raises FormatError and ConfigError."""
    if found > config.FORMAT_VERSION:
        raise other_format(folder, found)
    if target > config.FORMAT_VERSION:
        raise ConfigError(
            f"format version {target} is not known, only up to {config.FORMAT_VERSION}",
            "upgrade prefixstore",
        )
    if target < found:
        raise ConfigError(
            f"{folder} has format version {found}, and there is no way back to {target}",
            "give a copy made before, or a new folder: a store is a cache",
        )
    chosen: list[Step] = []
    at = found
    while at < target:
        step = next((s for s in steps if s.come_from == at and s.go_to <= target), None)
        if step is None:
            raise FormatError(
                f"{folder} has format version {found}, and no step leads from {at} to {target}",
                f"versions from {config.OLDEST_VERSION} on are known; give a new folder",
            )
        chosen.append(step)
        at = step.go_to
    return tuple(chosen)


def migrate(
    folder: Path,
    target: int | None = None,
    *,
    dry_run: bool = False,
    steps: Sequence[Step] | None = None,
) -> Migration:
    """Bring a store that nobody has open to a format version, the newest unless one is given.

    Raises ConfigError (no store, in use, or no such version), FormatError, StoreTimeoutError.
    """
    folder = folder.expanduser().absolute()
    target = config.FORMAT_VERSION if target is None else target
    if stored_version(folder) is None:
        raise ConfigError(f"{folder} holds no store", "check the path")
    with exclusive(folder / ".lock"):
        stored = stored_version(folder) or 0
        if stored > config.FORMAT_VERSION:  # its index may be of a form that must not be touched
            raise other_format(folder, stored)
        found = index_format(folder) or stored
        chosen = way(folder, found, target, STEPS if steps is None else steps)
        if dry_run or found == target == stored:
            return Migration(found, target, chosen, done=False)
        _require_closed(folder)
        if chosen:
            index = Environment(folder / "index", INDEX_TABLES, durable=True)
            try:
                index.write(lambda txn: _take(txn, folder, chosen), MIGRATE_DEADLINE_S)
            finally:
                index.close()
        declare(folder, target)
        return Migration(found, target, chosen, done=True)


def _take(txn: Txn, folder: Path, steps: Sequence[Step]) -> None:
    for step in steps:
        step.work(txn, folder)
    txn.put_int("meta", FORMAT, steps[-1].go_to)
    txn.delete("meta", b"incarnation")  # the live index speaks of records as they were


def _require_closed(folder: Path) -> None:
    liveness = Liveness(folder / "alive")
    try:
        if not liveness.alone():
            raise ConfigError(
                f"{folder} is open in another process", "end all that use the store, then try again"
            )
    finally:
        liveness.close()
