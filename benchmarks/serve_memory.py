"""The memory of a server whose clients are slow: 64 of them, each 1 MiB a second.

Three kinds: gets (``sendfile``), gets that are checked by the server first, and puts. For each the
most that the server's process had while it went on, RSS and PSS without the pages of the memory
tier, beside what `prefixstore.serve.limits` allows for it. Who is told 429 or 503 comes again when
told to. Owns a server with a store of its own, in folders that are the caller's to remove.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import xxhash

import prefixstore
from benchmarks.server_process import ServerProcess
from benchmarks.store_sizes import LAYOUTS
from prefixstore import wire
from prefixstore.interface import NamespaceLike
from prefixstore.serve import limits
from prefixstore.testing_data import identity_for

MIB = 1 << 20
CLIENTS = 64
KIB, CHUNKS = 8192, 2  # of one get or put
RATE_BYTES_S = MIB
PART_BYTES = 64 << 10
SOCKET_BYTES = 128 << 10  # so that the kernel does not take what the client does not
SAMPLE_S = 0.2
WAIT_S = 30.0
ARRIVED_BYTES = CLIENTS * 2 * limits.READ_BYTES
BOUNDS_BYTES = {
    "slow gets": ARRIVED_BYTES,
    "slow checked gets": ARRIVED_BYTES + limits.CHECKED_BYTES_MAX + CLIENTS * limits.INLINE_BYTES,
    "slow puts": ARRIVED_BYTES + limits.PUT_BYTES_MAX,
}
Row = dict[str, object]


def used_bytes(pid: int, tier: Path) -> tuple[int, int]:
    """RSS and PSS of a process, without what it has mapped of files below ``tier``."""
    rss = pss = 0
    counts = True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # a mapping begins
            counts = str(tier) not in line
        elif counts and name == "Rss:":
            rss += int(rest.split()[0]) << 10
        elif counts and name == "Pss:":
            pss += int(rest.split()[0]) << 10
    return rss, pss


class Slow:
    """Clients that take, or give, a little at a time."""

    def __init__(self, url: str, ns: NamespaceLike) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._place, self._ns = (host, int(port)), ns
        self.stopped = threading.Event()
        self.moved, self.ended, self.refused = [0] * CLIENTS, [0] * CLIENTS, [0] * CLIENTS
        self._payload = bytes(LAYOUTS[KIB].payload_bytes)
        self._sum = xxhash.xxh3_128_digest(self._payload)
        self._seeds = count(time.monotonic_ns() % 2**30)
        self.refs = self._fresh()

    def _fresh(self) -> list[prefixstore.ChunkRef]:
        tokens = range(CHUNKS * LAYOUTS[KIB].chunk_tokens - 1)
        return self._ns.chain([next(self._seeds), *tokens]).refs()

    def fill(self) -> None:
        """Store what is got later."""
        states = self._ns.put(self.refs, [self._payload] * CHUNKS, pin=True)
        assert {state.value for state in states} == {"stored"}

    def client(self, kind: str, number: int) -> None:
        """One client, until all are stopped."""
        while not self.stopped.is_set():
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
                sock.settimeout(WAIT_S)
                sock.connect(self._place)
                status = self._put(sock, number) if "put" in kind else self._get(sock, kind, number)
            if status in (429, 503):
                self.refused[number] += 1
                self.stopped.wait(limits.RETRY_AFTER_S)
            elif self.stopped.is_set():
                return
            elif status == 200:
                self.ended[number] += 1
            else:
                raise RuntimeError(f"{kind}: the server answered {status}")

    def _get(self, sock: socket.socket, kind: str, number: int) -> int:
        fields = {"namespace": self._ns.name.hex(), "keys": True}
        body = wire.pack_request(fields, b"".join(ref.key for ref in self.refs))
        query = "?checked=1" if "checked" in kind else ""
        sock.sendall(_head(f"/v1/get{query}", len(body)) + body)
        head = sock.recv(PART_BYTES)
        status, left = _status(head), _length(head)
        if status == 200:
            left -= len(head.partition(b"\r\n\r\n")[2])
            self._paced(number, left, lambda most: len(sock.recv(most)))
        return status

    def _put(self, sock: socket.socket, number: int) -> int:
        refs = self._fresh()
        fields = {"namespace": self._ns.name.hex()}
        block = wire.pack_request(fields, wire.pack_refs(refs))
        data = b"".join((block, *[self._sum, self._payload] * CHUNKS))
        sock.sendall(_head("/v1/put", len(data)))
        at = 0

        def send(most: int) -> int:
            nonlocal at
            sent = sock.send(data[at : at + most])
            at += sent
            return sent

        try:
            self._paced(number, len(data), send)
            return _status(sock.recv(PART_BYTES)) if at == len(data) else 0
        except (BrokenPipeError, ConnectionResetError):  # refused before it had everything
            return 503

    def _paced(self, number: int, left: int, step: Callable[[int], int]) -> None:
        began, moved = time.monotonic(), 0
        while moved < left and not self.stopped.is_set():
            moved_now = step(min(PART_BYTES, left - moved))
            if not moved_now:
                raise ConnectionResetError("the server closed the connection")
            moved += moved_now
            self.moved[number] += moved_now
            self.stopped.wait(max(0.0, began + moved / RATE_BYTES_S - time.monotonic()))


def _head(path: str, length: int) -> bytes:
    kind = wire.CONTENT_TYPE
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nConnection: close\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def _status(head: bytes) -> int:
    return int(head.split(maxsplit=2)[1]) if head.count(b" ") > 1 else 503


def _length(head: bytes) -> int:
    for line in head.partition(b"\r\n\r\n")[0].lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def memory_rows(folder: Path, tier: Path, options: tuple[str, ...], seconds: float) -> list[Row]:
    """RSS and PSS for each kind; ``mib_max`` is what the server had before and may have by then."""
    rows: list[Row] = []
    with ServerProcess(folder, *options) as server, prefixstore.open(server.url) as store:
        layout = LAYOUTS[KIB]
        ns = store.namespace(identity_for("bench", layout), layout)
        filling = Slow(server.url, ns)
        filling.fill()
        idle = used_bytes(server.pid, tier)
        for kind, bound in BOUNDS_BYTES.items():
            slow = Slow(server.url, ns)
            slow.refs = filling.refs
            most = [0, 0]
            with ThreadPoolExecutor(CLIENTS) as threads:
                jobs = [threads.submit(slow.client, kind, number) for number in range(CLIENTS)]
                end = time.monotonic() + seconds
                while time.monotonic() < end and not any(job.done() for job in jobs):
                    most = np.maximum(most, used_bytes(server.pid, tier)).tolist()
                    time.sleep(SAMPLE_S)
                slow.stopped.set()
            for job in jobs:
                job.result()
            rate = sum(slow.moved) / seconds / 1e9
            for name, before, value in zip(("RSS", "PSS"), idle, most, strict=True):
                rows.append(
                    {"case": f"{CLIENTS} {kind}", "kib": KIB, "clients": CLIENTS,
                     "variant": f"server's {name}", "gb_s": rate, "of_limit": None, "p50_ms": None,
                     "p99_ms": None, "calls": sum(slow.ended), "mib": value / MIB,
                     "mib_max": (before + bound) / MIB}
                )  # fmt: skip
    return rows
