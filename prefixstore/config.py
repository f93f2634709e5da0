"""Settings and limits: every queue, batch, wait and size of the store has its name here.

The settings of one store live in ``store.json`` in its folder, written once by the process that
creates it and changed only by an explicit ``resize``. All processes of a host read the same file,
so two engines cannot disagree about a cap.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefixstore.errors import ConfigError, FormatError
from prefixstore.folders import write_whole

FORMAT_VERSION = 1  # of a store; what it covers, and how it is raised: `formats`, `migrating`
OLDEST_VERSION = 1  # that `prefixstore migrate` can start from
SETTINGS_FILE = "store.json"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEFAULT_MEMORY_BYTES = 4 * GIB
DEFAULT_DISK_BYTES = 32 * GIB
MEMORY_BYTES_MIN = MIB
TIER_BYTES_MAX = 1 << 60

PAGE_BYTES = 4096  # slots are aligned to it: O_DIRECT, hole punching and mmap all want it
INDEX_MAP_BYTES = 16 * GIB  # virtual; the file grows with its rows only
INDEX_READERS_MAX = 1024
# Commits after which readers that were killed are looked for: until then an index takes new pages
# for each commit, and keeps them.
READERS_CHECKED_EVERY = 16
# Lock table, markers, kept speeds, a page ahead of each mapping; part of the cap.
SMALL_FILES_BYTES = 128 * KIB

SPARE_PAGES = 256  # that a live index may have beside twice its pages in use, when it is opened

LANE_QUEUE_MAX = 1024  # operations waiting for the index writer of one process
LANE_BATCH_MAX = 64  # operations in one commit
OP_DEADLINE_S = 10.0  # default bound of a library call that writes the index
OPEN_DEADLINE_S = 30.0
LOCK_WAIT_S = 5.0  # for the writer lock when an index is opened
MIGRATE_DEADLINE_S = 3600.0  # of the one transaction in which a store gets another format

BATCH_CHUNKS_MAX = 64  # chunks whose slots are claimed or committed in one transaction
# Threads of a process that copy chunks, besides those that ask for it.
HELPERS = min(max(3, len(os.sched_getaffinity(0)) // 2), 8)
HELPER_BYTES = MIB  # a get or put takes one of them for each so many bytes
SPILL_BATCH_BYTES = 64 * MIB  # written to disk under one fdatasync and one commit
JOBS_MAX = 65536  # keys waiting for the keeper thread (spill, promote)
SUSPECTS_MAX = 1024  # rows that could not be used, waiting for it to look
KEEPER_PERIOD_S = 1.0
QUIET_S = 0.1  # promotions wait until nothing was read for so long
SWEEP_ROWS_MAX = 16384  # rows one housekeeping pass may look at in each table

LEASE_S = 60.0  # bound of a lease, if its process lives that long
PUNCH_AFTER_S = 0.5  # a freed memory slot keeps its space so long: late readers, see the ledger
TTL_S_MAX = 2**31
PENDING_S = 60.0  # a chunk some rank never completed is given up after this
HIGH_SHARE, LOW_SHARE = 0.98, 0.95  # background eviction starts above, stops below
PIN_SHARE_MAX = 0.5  # of a tier's bytes
TAG_BYTES_MAX = 64
SALT_BYTES_MAX = 1024

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*$", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Read a size such as ``"8GiB"``, ``"500M"`` or ``1048576`` (all units are powers of 1024)."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"{text!r} is not a size", "give a whole number, or text such as 8GiB")
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"{text!r} is not a size", "write for example 8GiB, 500MiB or 1048576")
    count = float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " ")
    if count == math.inf:
        raise ConfigError(f"{text[:20]}... is not a size", "more than there can be")
    return int(count)


def format_bytes(count: float) -> str:
    """Write a size the way `parse_bytes` reads it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``store.json`` holds."""

    store_id: str
    memory_bytes: int
    disk_bytes: int
    memory_dir: str
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "disk_bytes", "format_version"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}", "give a whole number")
        if not isinstance(self.store_id, str) or not re.fullmatch("[0-9a-f]{8}", self.store_id):
            raise ConfigError(f"store_id is {self.store_id!r}", "8 hex digits are expected")
        if not isinstance(self.memory_dir, str) or not self.memory_dir:
            raise ConfigError(f"memory_dir is {self.memory_dir!r}", "give a folder")
        if self.memory_bytes < MEMORY_BYTES_MIN:
            raise ConfigError(
                f"memory tier of {self.memory_bytes} bytes is too small",
                f"give at least {format_bytes(MEMORY_BYTES_MIN)}: every chunk goes there first",
            )
        if self.disk_bytes < 0:
            raise ConfigError(f"disk tier of {self.disk_bytes} bytes", "0 turns the tier off")
        if max(self.memory_bytes, self.disk_bytes) > TIER_BYTES_MAX:  # sums of such are kept
            raise ConfigError(
                f"a tier of {max(self.memory_bytes, self.disk_bytes)} bytes is too large",
                f"give at most {format_bytes(TIER_BYTES_MAX)}",
            )

    def live_dir(self, folder: Path) -> Path:
        """The folder of the memory tier and of the state that need not survive a reboot.

        Its name holds the folder's device and inode, so that a copied store does not share the
        memory of the one it was copied from, while a bind mount of the same folder does.
        """
        at = folder.stat()
        return Path(self.memory_dir) / f"prefixstore-{self.store_id}-{at.st_dev:x}-{at.st_ino:x}"


def stored_version(folder: Path) -> int | None:
    """The format version in ``store.json``; None when the folder holds no store yet."""
    fields = load_fields(folder)
    return None if fields is None else int(fields["format_version"])


def load_fields(folder: Path) -> dict[str, Any] | None:
    """What ``store.json`` holds, of whatever format version. Raises FormatError."""
    path = folder / SETTINGS_FILE
    try:
        fields = json.loads(path.read_bytes())
        if type(fields["format_version"]) is not int:
            raise ValueError(f"format_version is {fields['format_version']!r}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"{path} is not a settings file of a store: {error}",
            "restore the file, or give an empty folder",
        ) from error
    return dict(fields)


def other_format(folder: Path, found: int) -> FormatError:
    """What is said of a store of another format version than this code reads."""
    known = f"this prefixstore reads {FORMAT_VERSION}; nothing was changed"
    if found > FORMAT_VERSION:
        remedy = "upgrade prefixstore, or give another folder"
    elif found >= OLDEST_VERSION:
        remedy = f"run `prefixstore migrate {folder}`, or use the prefixstore that wrote it"
    else:
        remedy = f"there is no version before {OLDEST_VERSION}: restore {SETTINGS_FILE}"
    return FormatError(f"{folder} has format version {found}, {known}", remedy)


def load_settings(folder: Path) -> Settings | None:
    """Read ``store.json``; None when the folder holds no store yet. Raises FormatError."""
    fields = load_fields(folder)
    if fields is None:
        return None
    if fields["format_version"] != FORMAT_VERSION:
        raise other_format(folder, fields["format_version"])
    try:
        return Settings(**fields)
    except TypeError as error:
        raise FormatError(
            f"{folder / SETTINGS_FILE}: {error}", "restore the file, or give an empty folder"
        ) from error


def save_settings(folder: Path, settings: Settings) -> None:
    """Write ``store.json`` so that a crash leaves the old file or the new one, never half of it."""
    # Its name is synced before anything else is there: a folder without settings is refused.
    write_whole(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=1).encode())


def new_settings(memory_bytes: int, disk_bytes: int, memory_dir: str) -> Settings:
    """Settings of a store that is created now."""
    return Settings(secrets.token_hex(4), memory_bytes, disk_bytes, memory_dir)


def default_memory_dir() -> str:
    """Where the memory tier goes: shared memory if there is any, else the temporary folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
