"""One store of `corruption_peers`, driven through its own code, each use in a process of its own.

``python -m benchmarks.corruption_peer_host PEER``, by the Python that has the peer installed. Reads
uses, one JSON line each, from standard input and answers each with one. The peer is imported once;
each use is a fork, so that a crash is that use's, and what a use reads was opened afresh.

Imports nothing but the standard library and the peer: LMCache's environment has not our packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

CHUNK_BYTES = 256 * 1024
DEADLINE_S = 60.0  # of one use
MODULES = {
    "prefixstore": "benchmarks.corruption_ours",
    "vllm-fs": "benchmarks.corruption_vllm",
    "lmcache-fs": "benchmarks.corruption_lmcache",
    "lmcache-fs_native": "benchmarks.corruption_lmcache",
}


class Peer(Protocol):
    """A store on disk, opened. Chunks have numbers."""

    def put(self, number: int, data: bytes) -> bool:
        """Store one; whether the peer says that it is stored."""

    def get(self, numbers: Sequence[int]) -> list[bytes | None]:
        """Look chunks up and read those that are found; None for what the peer says is missing."""

    def place(self, number: int) -> tuple[str, int, int]:
        """Path, offset and length of a chunk's bytes on disk."""

    def close(self) -> None:
        """Let go."""


Open = Callable[[str, Path, int], Peer]


def content_of(number: int) -> bytes:
    """What a chunk holds."""
    return hashlib.shake_128(b"chunk %d" % number).digest(CHUNK_BYTES)


# ---------------------------------------------------------------- uses, each in a fork
def fill(peer: Peer, use: dict[str, Any], tell: Callable[[Any], None]) -> None:
    """Store all chunks, and say of each when the peer says it is stored."""
    for number in range(use["count"]):
        if peer.put(number, content_of(number)):
            tell(number)


def places(peer: Peer, use: dict[str, Any], tell: Callable[[Any], None]) -> None:
    """Where the bytes are."""
    tell([peer.place(number) for number in range(use["count"])])


def check(peer: Peer, use: dict[str, Any], tell: Callable[[Any], None]) -> None:
    """Read all chunks; with ``again``, first store again what is missing."""
    found = _judge(peer, use["count"])
    if use.get("again"):
        for number in found["missing"]:
            peer.put(number, content_of(number))
        found = _judge(peer, use["count"])
    tell(found)


def _judge(peer: Peer, count: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"right": [], "missing": [], "wrong": []}
    for number, data in enumerate(peer.get(range(count))):
        as_stored = data is not None and data == content_of(number)
        found["missing" if data is None else "right" if as_stored else "wrong"].append(number)
    return found


USES = {"fill": fill, "places": places, "check": check}


# ---------------------------------------------------------------- the host
def run_use(open_peer: Open, name: str, use: dict[str, Any]) -> dict[str, Any]:
    """Fork, do it, and say how it ended. ``kill_after``: SIGKILL when it has told so many things,
    and ``kill_delay_s`` more have passed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(open_peer, name, use, writer)
    os.close(writer)
    data, ended, arrived = _listen(reader, use.get("kill_after"))
    if not ended and "kill_after" in use:
        time.sleep(use["kill_delay_s"])
    os.kill(pid, signal.SIGKILL)
    while part := os.read(reader, 65536):  # what was said before the kill
        data += part
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = [json.loads(line) for line in data.split(b"\n")[:-1]]
    errors = [entry["error"] for entry in told if isinstance(entry, dict) and "error" in entry]
    how = "done" if ended else "killed" if "kill_after" in use else "hang"
    if ended and (errors or status not in (0, -signal.SIGKILL)):
        how = "exception" if errors else f"crash ({status})"
    return {"ended": how, "told": told, "error": "".join(errors), "telling_s": arrived}


def _listen(reader: int, lines: int | None) -> tuple[bytes, bool, float]:
    """What a use tells until it has ended, has told so many lines, or its time is over; whether it
    has ended; seconds from the first that it told to the last."""
    end = time.monotonic() + DEADLINE_S
    data, first, last = b"", 0.0, 0.0
    while lines is None or data.count(b"\n") < lines:
        left = end - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return data, False, last - first
        part = os.read(reader, 65536)
        if not part:
            return data, True, last - first
        last = time.monotonic()
        first, data = first or last, data + part
    return data, False, last - first


def _child(open_peer: Open, name: str, use: dict[str, Any], writer: int) -> None:
    def tell(value: Any) -> None:
        os.write(writer, json.dumps(value).encode() + b"\n")

    code = 1
    try:
        peer = open_peer(name, Path(use["folder"]), use["count"])
        USES[use["do"]](peer, use, tell)
        peer.close()
        code = 0
    except Exception as error:  # request loop: the parent counts it
        with contextlib.suppress(OSError):
            tell({"error": f"{type(error).__name__}: {error}"[:300]})
    finally:
        os._exit(code)


def main() -> None:
    """See the module docstring."""
    [name] = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    open_peer: Open = import_module(MODULES[name]).open_peer
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_use(open_peer, name, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
