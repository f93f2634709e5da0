"""Opening a store: the lock, the settings, and a live folder that may be from before a reboot."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from prefixstore import config, folders
from prefixstore.config import Settings, load_settings, new_settings, parse_bytes, save_settings
from prefixstore.errors import ConfigError, StoreError, StoreTimeoutError
from prefixstore.failpoints import reached
from prefixstore.formats import settle_version
from prefixstore.liveness import Liveness

logger = logging.getLogger("prefixstore")

# Of what the live index and the memory tier hold. One of another format is not read but started
# fresh: it is memory, and a record read by the wrong rule could give a slot to two chunks. Raise it
# with every change of a record in there (`rows.Pending`, `rows.Claim`, `ledger`, `leases`).
LIVE_FORMAT = b"live-2"
UNSEEN_S = 7 * 86400.0  # since it was opened, by somebody who sees its store


def revive_live_dir(
    folder: Path, live_dir: Path, known: bytes | None, liveness: Liveness
) -> str | None:
    """Make the live folder usable. ``known`` is the incarnation the durable index remembers.

    Returns None if the folder is that incarnation, of this boot and of LIVE_FORMAT; else it was
    wiped, and the result is the name of the new one. Raises ConfigError when another process has
    the store open with another live folder, or is of a version with another format: both would
    hand out the same disk slots.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    marker = live_dir / "incarnation"
    same = known is not None and marker.is_file() and marker.read_bytes() == known
    # The format stands last, where versions before it look for the boot: they start fresh as well.
    if same and known is not None and known.endswith(b" %s %s" % (boot.encode(), LIVE_FORMAT)):
        note_origin(folder, live_dir)
        return None
    other = same and known is not None and boot.encode() in known  # only its format is another
    formats = f"its live index has format {_live_format(known)}, ours {LIVE_FORMAT.decode()}"
    if not liveness.alone():
        if other:
            raise ConfigError(
                f"{folder} is open in a process of another version of prefixstore: {formats}",
                "end that process; its chunks on disk stay, those in memory only are let go",
            )
        raise ConfigError(
            f"{folder} is open in a process with another memory tier than {live_dir}",
            "containers that share a store must share its memory_dir (such as /dev/shm) too",
        )
    if other:
        logger.warning("%s: the memory tier begins anew: %s", folder, formats)
    remove_stale(live_dir.parent)
    shutil.rmtree(live_dir, ignore_errors=True)
    try:
        live_dir.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"cannot create the memory tier {live_dir}: {error.strerror}",
            "give memory_dir a writable folder in memory, such as /dev/shm",
        ) from error
    note_origin(folder, live_dir)
    reached("open.wiped")
    return f"{secrets.token_hex(8)} {boot} {LIVE_FORMAT.decode()}"


def _live_format(known: bytes | None) -> str:
    """The third word of an incarnation; the first version wrote none."""
    words = (known or b"").split()
    return words[2].decode(errors="replace") if len(words) > 2 else "live-1"


def settle_settings(
    folder: Path,
    memory_bytes: int | str | None,
    disk_bytes: int | str | None,
    memory_dir: str | None,
) -> Settings:
    """Read the settings, create them, or apply the changes asked for."""
    settle_version(folder)
    there = load_settings(folder)
    memory = None if memory_bytes is None else parse_bytes(memory_bytes)
    disk = None if disk_bytes is None else parse_bytes(disk_bytes)
    for partial in folder.glob(f".{config.SETTINGS_FILE}.*"):
        partial.unlink()  # a process was killed while it wrote them
    if there is None:
        others = [entry for entry in os.listdir(folder) if entry not in (".lock", "alive")]
        if others:
            raise ConfigError(
                f"{folder} is not empty and holds no store (found {others[0]!r})",
                "give an empty or new folder",
            )
        settings = new_settings(
            config.DEFAULT_MEMORY_BYTES if memory is None else memory,
            config.DEFAULT_DISK_BYTES if disk is None else disk,
            memory_dir or config.default_memory_dir(),
        )
    else:
        settings = replace(
            there,
            memory_bytes=there.memory_bytes if memory is None else memory,
            disk_bytes=there.disk_bytes if disk is None else disk,
            memory_dir=there.memory_dir if memory_dir is None else memory_dir,
        )
    if settings != there:
        save_settings(folder, settings)
        reached("open.settings")
    return settings


def make_folder(path: Path) -> None:
    """Make the folder of a store, if it is not there. Raises ConfigError."""
    try:
        folders.make_folder(path)
    except OSError as error:
        raise ConfigError(
            f"cannot create {path}: {error.strerror}", "give a writable folder"
        ) from error


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """What the system says against opening the store, as an error of ours."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
        raise StoreError(
            f"cannot open the store {path}: {error}",
            "this user must be able to read and write it and its memory tier, their disks must not "
            "be full, nor too many files open or threads running",
        ) from error


def note_origin(folder: Path, live_dir: Path) -> None:
    """Say whose a live folder is, for `remove_stale`: at each opening, since a store may have been
    moved, or be mounted elsewhere. Where there is no room to say so, the folder stays."""
    with contextlib.suppress(OSError):
        told = {"ancestors": " ".join(map(_name_of, folder.parents)), "origin": str(folder)}
        for name, text in told.items():
            path = live_dir / name
            if not path.is_file() or path.read_text() != text:
                partial = live_dir / f"{name}.new"
                partial.write_text(text)
                partial.replace(path)
        os.utime(live_dir / "origin")


def _name_of(folder: Path) -> str:
    at = folder.stat()
    return f"{at.st_dev:x}-{at.st_ino:x}"


def remove_stale(memory_dir: Path) -> None:
    """Free the memory of stores whose folder is gone and that no process holds."""
    for path in memory_dir.glob("prefixstore-*-*-*"):
        with contextlib.suppress(OSError, StoreError):
            if not _is_stale(path):
                continue
            held = os.open(path / "held", os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)


def _is_stale(live_dir: Path) -> bool:
    """Whether its store is gone. A container that shares the memory sees other folders: there a
    folder that is not found says nothing, unless what it should be in is the same. Raises OSError,
    StoreError."""
    noted = live_dir / "origin"
    origin = Path(noted.read_text())
    settings = load_settings(origin) if origin.is_dir() else None
    if settings is not None and settings.live_dir(origin) == live_dir:
        return False
    if time.time() - noted.stat().st_mtime > UNSEEN_S:
        return True
    names = (live_dir / "ancestors").read_text().split()
    there = (one for one in zip(origin.parents, names, strict=False) if one[0].is_dir())
    nearest = next(there, None)
    return nearest is not None and _name_of(nearest[0]) == nearest[1]


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file; raises StoreTimeoutError when another process keeps it too long."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + config.OPEN_DEADLINE_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise StoreTimeoutError(
                        f"{path.parent} is locked since {config.OPEN_DEADLINE_S:.0f} s by another "
                        "process that is opening it",
                        "wait for it, or end it",
                    ) from None
                time.sleep(0.005)
        reached("open.folder")
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too
        os.close(fd)
