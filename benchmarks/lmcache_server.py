"""An LMCache server, owned by a process of the Python that has LMCache.

``python -m benchmarks.lmcache_server LOG [OPTION ...]`` starts a server with such options, prints
its port, and ends it with standard input, whichever way that ends.  What must hold: nothing of the
server is left running or in shared memory.  Keeps its log only.

LMCache is used as its documentation describes, with what was fastest: the multi-process server,
transfers driven by the server (over shared memory from a CPU, over CUDA IPC from a GPU); telemetry
off.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
SERVER_DEADLINE_S = 180.0
QUIET = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1", "LMCACHE_DISABLE_BANNER": "1"}


@contextlib.contextmanager
def server(log: Path, *options: str) -> Iterator[int]:
    """An LMCache server; its port. Killed at the end, its shared memory unlinked."""
    port, http, prometheus = _free_ports(3)
    command = [
        sys.executable, "-m", "lmcache.cli.main", "server",
        "--host", "127.0.0.1", "--port", str(port),
        "--http-host", "127.0.0.1", "--http-port", str(http), "--prometheus-port", str(prometheus),
        "--chunk-size", "256", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto",
        *options,
    ]  # fmt: skip
    before = set(SHARED_MEMORY.iterdir())
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={**os.environ, **QUIET},
        )  # fmt: skip
        try:
            _wait_until_healthy(process, http, log)
            yield port
        finally:
            ours = mapped(process.pid) - before
            process.kill()
            for path in ours:  # before its memory is torn down, which takes long
                path.unlink(missing_ok=True)
            process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], http: int, log: Path) -> None:
    deadline = time.monotonic() + SERVER_DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{http}/healthcheck", timeout=1.0):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the LMCache server did not start:\n{tail}") from None
            time.sleep(0.2)


def mapped(pid: int) -> set[Path]:
    """The files of /dev/shm that a process has mapped.

    By inode: glibc makes a semaphore under another name and renames it, and maps keep the first.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended
        return set()
    words = (line.split() for line in maps.splitlines() if f"{SHARED_MEMORY}/" in line)
    inodes = {int(word[4]) for word in words}
    return {Path(entry) for entry in os.scandir(SHARED_MEMORY) if entry.inode() in inodes}


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on now; another process may take one before the server does."""
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(count)]
        for entry in found:
            entry.bind(("127.0.0.1", 0))
        return [int(entry.getsockname()[1]) for entry in found]


if __name__ == "__main__":
    os.setsid()  # with all it starts: see `lmcache_peer`
    with server(Path(sys.argv[1]), *sys.argv[2:]) as own_port:
        print(own_port, flush=True)
        sys.stdin.read()
