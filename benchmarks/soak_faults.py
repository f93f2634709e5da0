"""What `benchmarks.soak` does to a server beside ordinary load: rude clients, damage, kills."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from benchmarks.server_process import ServerProcess
from benchmarks.soak_client import LAYOUT, SIZE
from prefixstore import wire
from prefixstore.client.remote import RemoteStore
from prefixstore.layout import checksum
from prefixstore.testing_data import content_of, identity_for, tokens_of

CONNECT_S, WAIT_S = 2.0, 60.0


class Server(ServerProcess):
    """A server whose memory tier is in the folder, and what a look at its process tells."""

    stop_s = WAIT_S

    def __init__(
        self,
        folder: Path,
        tokens: Path,
        memory: str,
        disk: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        (folder / "memory").mkdir()
        self.environment = environment
        self.log = folder / "log"
        options = f"--tokens={tokens}", f"--memory={memory}", f"--disk={disk}"
        memory_dir = f"--memory-dir={folder / 'memory'}"
        super().__init__(folder / "store", *options, memory_dir, log=self.log)

    def restart(self) -> None:
        """As a crash does, at any moment."""
        self.kill()
        self.start()

    def resident_kib(self) -> int:
        """Memory of its own: without the tiers and indexes, which it shares with their files."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
        raise RuntimeError("no RssAnon in /proc")

    def files(self) -> int:
        """Descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def faults_logged(self) -> int:
        """Tracebacks in its log."""
        return self.log.read_text().count("Traceback")


# ---------------------------------------------------------------------- rude clients
def request_of(token: str, path: str, body: bytes) -> bytes:
    """A POST as it goes over the wire."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: {wire.CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def connect(server: Server) -> socket.socket:
    """A connection to it."""
    return socket.create_connection(("127.0.0.1", server.port), CONNECT_S)


class Rude:
    """Clients nobody wishes for, one after the other, on a thread. Its namespace is its own."""

    def __init__(self, server: Server, token: str, seed: int) -> None:
        self.server, self.token, self.rng = server, token, random.Random(seed)
        self.done: Counter[str] = Counter()
        with RemoteStore(server.url, token=token) as store:
            self.ns = store.namespace(identity_for("rude", LAYOUT), LAYOUT)

    def _refs(self) -> tuple[bytes, list[bytes]]:
        refs = self.ns.chain(tokens_of(self.rng.randrange(20), 60, LAYOUT)).refs()
        payloads = [content_of(ref.key, SIZE) for ref in refs]
        return wire.pack_request({"namespace": self.ns.name.hex()}, wire.pack_refs(refs)), payloads

    def dies_in_a_body(self) -> None:
        """The first part of a put, then nothing."""
        head, payloads = self._refs()
        data = request_of(
            self.token, "/v1/put",
            head + b"".join(checksum(one) + one for one in payloads),
        )  # fmt: skip
        with connect(self.server) as sock:
            sock.sendall(data[: self.rng.randrange(len(data))])
            if self.rng.random() < 0.5:  # a reset, as of a process that was killed
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def reads_slowly(self) -> None:
        """A get whose answer is taken a few bytes at a time, and not to its end."""
        head, _ = self._refs()
        with connect(self.server) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(request_of(self.token, "/v1/get?checked=1", head))
            for _ in range(self.rng.randrange(20)):
                sock.recv(512)
                time.sleep(0.02)

    def speaks_nonsense(self) -> None:
        """Bytes of all kinds."""
        head, _ = self._refs()
        whole = bytearray(request_of(self.token, "/v1/match", head))
        for _ in range(self.rng.randrange(1, 30)):
            whole[self.rng.randrange(len(whole))] = self.rng.randrange(256)
        with connect(self.server) as sock:
            sock.sendall(whole)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(4096)

    def holds_on(self) -> None:
        """Many connections that say little."""
        socks = []
        with suppress(OSError):
            for _ in range(30):
                socks.append(connect(self.server))
                socks[-1].sendall(b"GET /healthz HTTP/1.1\r\nHo"[: self.rng.randrange(25)])
        time.sleep(0.2)
        for sock in socks:
            sock.close()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Be rude for the length of the block."""
        stop = threading.Event()
        kinds: list[Callable[[], None]] = [
            self.dies_in_a_body, self.reads_slowly, self.speaks_nonsense, self.holds_on,
        ]  # fmt: skip

        def work() -> None:
            while not stop.wait(0.05):
                kind = self.rng.choice(kinds)
                with suppress(OSError):  # the server has been killed, or has had enough
                    kind()
                self.done[kind.__name__] += 1

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(WAIT_S)


def damage(folder: Path, rng: random.Random, count: int, pattern: str = "disk-*.slots") -> int:
    """Change bytes of a tier (the disk's) behind the store's back; how many places."""
    done = 0
    for path in folder.glob(pattern):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            for _ in range(count if size else 0):
                file.seek(rng.randrange(size))
                file.write(rng.randbytes(8))
                done += 1
    return done
