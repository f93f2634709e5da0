"""How fast engines like this one compute a prompt, kept in the store's folder.

An engine that has just started has not computed anything. Without this it would load whatever is
stored, from however slow a disk, until it has.

One file for all engines of a folder, ``prefill-speeds.json``: ``format_version``, and ``speeds`` in
tokens/s by the name of what computes (`name_of`), the one that was written longest ago first.

What must hold: nothing here raises into the engine or holds a step up. The file is read when an
engine starts, and that is waited for no longer than READ_WAIT_S; a thread writes it, seldom, whole
(a crash leaves the old one or the new one) and one process at a time. One that cannot be read as
such is one that is not there, and is replaced. A wrong speed lasts until the engine's first own
measurement (`connector.plan.Speeds`).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

from prefixstore.config import load_settings
from prefixstore.errors import StoreError
from prefixstore.folders import write_whole
from prefixstore.identity import ModelIdentity
from prefixstore.opening import exclusive

logger = logging.getLogger("vllm.prefixstore")

FILE = "prefill-speeds.json"
FORMAT_VERSION = 1
SPEEDS_MAX = 32  # with names of NAME_CHARS_MAX less than 8 KiB: see `config.SMALL_FILES_BYTES`
NAME_CHARS_MAX = 160
FILE_BYTES_MAX = 16 << 10
TOKENS_PER_S_MIN, TOKENS_PER_S_MAX = 0.01, 1e9
READ_WAIT_S = 1.0
WRITE_EVERY_S = 5.0  # at most
WRITE_WAIT_S_MAX = 3600.0  # where it cannot be written
MOVED = 1.2  # times as fast or as slow as what is kept: worth writing
CLOSE_WAIT_S = 1.0


def name_of(identity: ModelIdentity, computed_by: str) -> str:
    """What a speed is of: a model, and what computes it (`compat.computed_by`)."""
    name = f"{identity.namespace_hex} {computed_by}"
    return name.encode("ascii", "replace").decode()[:NAME_CHARS_MAX]


def parse(data: bytes) -> dict[str, float]:
    """What a file holds, tokens/s by name. Raises ValueError, RecursionError."""
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"it has more than {FILE_BYTES_MAX} bytes")
    value = json.loads(data)
    if not isinstance(value, dict) or not isinstance(value.get("speeds"), dict):
        raise ValueError("it holds no object with speeds")
    if value.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"it has version {value.get('format_version')!r:.20}")
    speeds: dict[str, float] = {}
    for name, speed in value["speeds"].items():
        is_number = isinstance(speed, int | float) and not isinstance(speed, bool)
        if not is_number or not TOKENS_PER_S_MIN <= speed <= TOKENS_PER_S_MAX:
            raise ValueError(f"a speed is {speed!r:.60}")
        speeds[name] = float(speed)
    return speeds


def read(folder: Path) -> dict[str, float]:
    """The speeds kept in a folder; none if they cannot be read, which is logged."""
    try:
        with open(folder / FILE, "rb") as file:
            return parse(file.read(FILE_BYTES_MAX + 1))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.info("prefixstore: %s is ignored, and will be replaced: %s", folder / FILE, error)
        return {}


def write(folder: Path, name: str, tokens_per_s: float) -> None:
    """Keep a speed, in a folder that holds a store. Raises StoreError, OSError."""
    if load_settings(folder) is None:
        raise StoreError(f"{folder} holds no store", "nothing is kept until it does")
    with exclusive(folder / ".lock"):
        for partial in folder.glob(f".{FILE}.*"):
            partial.unlink()  # a process was killed while it wrote
        speeds = read(folder)
        speeds.pop(name, None)
        kept = [*speeds.items(), (name, tokens_per_s)][-SPEEDS_MAX:]
        value = {"format_version": FORMAT_VERSION, "speeds": dict(kept)}
        write_whole(folder / FILE, json.dumps(value, indent=1).encode())


class KeptSpeed:
    """One engine's speed, as it was kept and as it is to be; `heard` and `close` are called by the
    scheduler's thread."""

    def __init__(self, folder: str, name: str) -> None:
        self.tokens_per_s: float | None = None  # of engines like this one, before it measured
        self._folder, self._name = Path(folder).expanduser(), name
        self._kept: float | None = None  # what the file holds
        self._heard: float | None = None
        self._next_write, self._wait_s = 0.0, WRITE_EVERY_S
        self._thread = threading.Thread(target=self._read, name="prefixstore-speed", daemon=True)
        self._thread.start()
        self._thread.join(READ_WAIT_S)
        self.tokens_per_s = self._kept

    def heard(self, tokens_per_s: float) -> None:
        """The engine computes at that speed now: keep it, if that is worth it and not too soon."""
        self._heard = tokens_per_s
        if time.monotonic() >= self._next_write:
            self._keep()

    def close(self) -> None:
        """Keep what was heard last."""
        self._thread.join(CLOSE_WAIT_S)
        self._keep()
        self._thread.join(CLOSE_WAIT_S)

    def _keep(self) -> None:
        speed, kept = self._heard, self._kept
        if speed is None or self._thread.is_alive():
            return
        if kept is not None and max(speed / kept, kept / speed) <= MOVED:
            return
        self._next_write = time.monotonic() + self._wait_s
        self._thread = threading.Thread(
            target=self._write, args=(speed,), name="prefixstore-speed", daemon=True
        )
        self._thread.start()

    def _read(self) -> None:
        """On the thread."""
        self._kept = read(self._folder).get(self._name)

    def _write(self, tokens_per_s: float) -> None:
        """On the thread."""
        try:
            write(self._folder, self._name, tokens_per_s)
        except (StoreError, OSError) as error:
            if self._wait_s == WRITE_EVERY_S:  # once for one trouble, however long it lasts
                logger.info("prefixstore: the speed of computing was not kept: %s", error)
            self._wait_s = min(2 * self._wait_s, WRITE_WAIT_S_MAX)
            return
        self._kept, self._wait_s = tokens_per_s, WRITE_EVERY_S
