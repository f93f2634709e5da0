"""The real servers of the engines that pools are made of, as processes of this one: for
`benchmarks.pool` and for tests.

Owns the processes and their folders, which end with the context. One that is not installed raises
NotInstalledError, which says how it is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from prefixstore.pool.resp import Command, Connection

WAIT_S = 30.0
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


class NotInstalledError(RuntimeError):
    """A server is not there."""


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(process: subprocess.Popen[bytes], port: int, host: str = "127.0.0.1") -> None:
    """Until a server listens."""
    end = time.monotonic() + WAIT_S
    while True:
        try:
            socket.create_connection((host, port), 1.0).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server on port {port} does not start") from None
            time.sleep(0.02)


class Redis:
    """One Redis server without persistence, that may be killed and started again."""

    def __init__(self, port: int, *options: str, wrap: Sequence[str] = ()) -> None:
        found = shutil.which("redis-server")
        if found is None:
            raise NotInstalledError(
                "redis-server is not installed (Debian: apt install redis-server)"
            )
        self.port, self.host = port, "127.0.0.1"
        self._command = [
            *wrap, found, "--port", str(port), "--save", "", "--appendonly", "no",
            "--loglevel", "warning", *options,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}"

    def start(self, wait: bool = True) -> None:
        self.folder = tempfile.mkdtemp(prefix="prefixstore-redis-")
        self.process = subprocess.Popen(
            [*self._command, "--dir", self.folder],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if wait:
            wait_for_port(self.process, self.port, self.host)

    def kill(self) -> None:
        """As by kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process = None
            shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, *words: str | bytes) -> object:
        """The answer to a command."""
        with socket.create_connection((self.host, self.port), WAIT_S) as sock:
            line = [word.encode() if isinstance(word, str) else word for word in words]
            [reply] = Connection(sock).run([Command(line)], time.monotonic() + WAIT_S)
        return reply


@contextmanager
def redis(*options: str) -> Iterator[Redis]:
    """A Redis server."""
    server = Redis(free_ports(1)[0], "--bind", "127.0.0.1", *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


Places = Sequence[tuple[str, Sequence[str]]]  # addresses, and what a command there begins with
LOCAL: Places = [("127.0.0.1", [])] * 3


@contextmanager
def redis_cluster(places: Places = LOCAL) -> Iterator[list[Redis]]:
    """A cluster of masters."""
    count = len(places)
    ports = free_ports(2 * count)
    servers = []
    for (host, enter), port, bus in zip(places, ports[:count], ports[count:], strict=True):
        servers.append(Redis(
            port, "--bind", host, "--cluster-enabled", "yes", "--cluster-port", str(bus),
            "--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no",
            "--protected-mode", "no", wrap=enter,
        ))  # fmt: skip
        servers[-1].host = host
    try:
        for server in servers:
            server.start()
        for at, server in enumerate(servers):
            first, last = at * 16384 // count, (at + 1) * 16384 // count - 1
            assert server.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)) == "OK"
            for other, bus in zip(servers[:at], ports[count : count + at], strict=True):
                words = ("CLUSTER", "MEET", other.host, str(other.port), str(bus))
                assert server.ask(*words) == "OK"
        end = time.monotonic() + WAIT_S
        while not all(_sees(server, count) for server in servers):
            assert time.monotonic() < end, "the cluster does not come together"
            time.sleep(0.05)
        yield servers
    finally:
        for server in servers:
            server.kill()


def _sees(server: Redis, nodes: int) -> bool:
    info = server.ask("CLUSTER", "INFO")
    slots = server.ask("CLUSTER", "SLOTS")
    assert isinstance(info, bytes)
    assert isinstance(slots, list)
    return b"cluster_state:ok" in info and len(slots) == nodes


class S3:
    """One moto server, an S3 in memory."""

    bucket = "kvbucket"

    def __init__(self, port: int) -> None:
        for package in ("obstore", "moto", "flask"):
            if importlib.util.find_spec(package) is None:
                raise NotInstalledError(f"{package} is not installed (pip install -e .[test])")
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/pool?endpoint=http://127.0.0.1:{self.port}&region=us-east-1"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_port(self.process, self.port)
        self.request("PUT", "")

    def kill(self) -> None:
        """As by kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process = None

    def request(self, method: str, name: str, data: bytes | None = None) -> bytes:
        """What it answers; moto takes anybody's credentials."""
        where = f"http://127.0.0.1:{self.port}/{self.bucket}/{name}".rstrip("/")
        headers = {"Content-Type": "application/octet-stream"}
        if name:
            headers["Authorization"] = "AWS test:test"
        asked = urllib.request.Request(where, data=data, method=method, headers=headers)
        with urllib.request.urlopen(asked, timeout=WAIT_S) as answer:
            body = answer.read()
            assert isinstance(body, bytes)
            return body


@contextmanager
def s3() -> Iterator[S3]:
    """An S3 server with a bucket, and credentials in the environment."""
    server = S3(free_ports(1)[0])
    before = {name: os.environ.get(name) for name in _CREDENTIALS}
    os.environ.update(dict.fromkeys(_CREDENTIALS, "test"))
    try:
        server.start()
        yield server
    finally:
        server.kill()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Mooncake:
    """A Mooncake master, and nodes that lend memory; each may be killed."""

    def __init__(self, nodes: int, node_bytes: int = 512 << 20) -> None:
        found = importlib.util.find_spec("mooncake")
        if found is None or not found.submodule_search_locations:
            raise NotInstalledError(
                "Mooncake is not installed (pip install mooncake-transfer-engine-non-cuda)"
            )
        self._program = f"{found.submodule_search_locations[0]}/mooncake_master"
        self._check()
        self.port, self.admin_port = free_ports(2)
        self._node_bytes, self._count = node_bytes, nodes
        self.master: subprocess.Popen[bytes] | None = None
        self.nodes: list[subprocess.Popen[bytes]] = []

    def _check(self) -> None:
        """It wants libraries of the system."""
        told = subprocess.run(
            [sys.executable, "-c", "import mooncake.store"], capture_output=True, timeout=WAIT_S
        )
        if told.returncode:
            last = told.stderr.decode().strip().rpartition("\n")[2]
            raise NotInstalledError(f"Mooncake cannot run here: {last}")

    @property
    def url(self) -> str:
        return f"mooncake://127.0.0.1:{self.port}?admin_port={self.admin_port}"

    def start(self) -> None:
        """The master, then the nodes."""
        self.start_master()
        for _ in range(self._count):
            code = (
                "import sys, time; from mooncake.store import MooncakeDistributedStore as Store; "
                "store = Store(); code = store.setup('127.0.0.1', 'P2PHANDSHAKE', "
                f"{self._node_bytes}, 1 << 20, 'tcp', '', '127.0.0.1:{self.port}'); "
                "print(code, flush=True); sys.stdin.read()"
            )
            node = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self.nodes.append(node)
            assert node.stdout is not None
            if node.stdout.readline() != b"0\n":
                raise RuntimeError("a node of Mooncake does not start")

    def start_master(self) -> None:
        """Anew, if it was killed: it knows nothing then."""
        self.master = subprocess.Popen(
            [self._program, "-rpc_port", str(self.port), "-metrics_port", str(self.admin_port),
             "-client_ttl", "5"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_port(self.master, self.port)
        wait_for_port(self.master, self.admin_port)

    def kill_master(self) -> None:
        """As by kill -9."""
        if self.master is not None:
            self.master.kill()
            self.master.wait(WAIT_S)
            self.master = None

    def kill_node(self) -> None:
        """The last one, as by kill -9."""
        node = self.nodes.pop()
        node.kill()
        node.communicate()

    def kill(self) -> None:
        """All."""
        while self.nodes:
            self.kill_node()
        self.kill_master()


@contextmanager
def mooncake(nodes: int = 1) -> Iterator[Mooncake]:
    """A Mooncake with as many nodes."""
    server = Mooncake(nodes)
    try:
        server.start()
        yield server
    finally:
        server.kill()
