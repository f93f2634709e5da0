"""Faults of a server and of the network before it, for `benchmarks.faults`.

Each has a server process of its own, and clients in this one: `soak_client` over `RemoteStore`,
through a proxy that misbehaves; or for overload bare sockets, which cost less than the server.
"""

from __future__ import annotations

import resource
import selectors
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from errno import EIO
from functools import partial
from pathlib import Path

from benchmarks.fault_proxy import between
from benchmarks.fault_shim import Shim
from benchmarks.faults_inside import RECOVER_S, Load, Outcome
from benchmarks.soak_client import LAYOUT, SIZE
from benchmarks.soak_faults import Server, connect, request_of
from prefixstore import wire
from prefixstore.client.remote import RemoteStore
from prefixstore.config import OP_DEADLINE_S
from prefixstore.errors import StoreError
from prefixstore.namespace import MISS
from prefixstore.testing_data import content_of, identity_for, outputs, tokens_of

TOKEN = "fault-" + "f" * 26
DEADLINE_S = 1.0
CALLS_MAX = 5  # of one operation of `soak_client`
SLOW_BYTES_S = 64 << 10
AT_CAPACITY, OVERLOAD = 64, 640  # clients: as many as the server answers at once, and ten times
GOODPUT_SHARE_MIN = 0.8
LATENCY_S_MAX = 5.0
GROWTH_KIB_MAX = 64 << 10
SPARE_FILES = 2
BROKEN_S = 0.01
ROUNDS, PART_S_MIN = 3, 1.5


@contextmanager
def a_server(*, shimmed: bool = False) -> Iterator[Server]:
    """A small one."""
    with tempfile.TemporaryDirectory(prefix="prefixstore-fault-") as name:
        tokens = Path(name, "tokens")
        tokens.write_text(f"local:{TOKEN}\n")
        tokens.chmod(0o600)
        shim = Shim(Path(name, "control"), Path(name, "store")) if shimmed else None
        environment = {} if shim is None else shim.environment
        with Server(Path(name), tokens, "4MiB", "8MiB", environment) as server:
            yield server


def ended_well(server: Server, outcome: Outcome, *, may_complain: bool = False) -> None:
    """Stop it; what it says then is part of the outcome."""
    code, faults = server.stop(), 0 if may_complain else server.faults_logged()
    if code or faults:
        outcome.wrong += 1
        tail = server.log.read_text()[-1500:]
        outcome.detail += f" exit code {code}, {faults} tracebacks: {tail}"


def recovered(url: str) -> str:
    """Wait until a client that comes now can put and get; "" when it can."""
    end, told, seed = time.monotonic() + RECOVER_S, "?", 0
    with RemoteStore(url, token=TOKEN, deadline_s=DEADLINE_S) as store:
        while told and time.monotonic() < end:
            seed += 1
            try:
                ns = store.namespace(identity_for("after", LAYOUT), LAYOUT)
                refs = ns.chain(tokens_of(seed, 4, LAYOUT)).refs()
                expected = [content_of(ref.key, SIZE) for ref in refs]
                ns.put(refs, expected)
                outs = outputs(LAYOUT, len(refs))
                tiers = ns.get(refs, outs)
                right = MISS not in tiers and [bytes(out) for out in outs] == expected
                told = "" if right else f"read from {tiers}"
            except StoreError as error:
                told = str(error)
            time.sleep(0.1 if told else 0.0)
    return told


@dataclass
class Network:
    """What happens to answers, and to who connects."""

    state: str = "whole"

    def change(self, data: bytes, _: int) -> bytes | None:
        """Of an answer's bytes."""
        if self.state == "cut":
            return None
        if self.state == "slow":
            time.sleep(len(data) / SLOW_BYTES_S)
        return b"" if self.state == "half-open" else data

    def admits(self) -> bool:
        """Whether a connection is made."""
        return self.state != "cut"


def under_load(url: str, seconds: float, seed: int, fault: Callable[[float], None]) -> Outcome:
    """Clients before, in and behind a fault."""
    outcome = Outcome()
    with RemoteStore(url, token=TOKEN, deadline_s=DEADLINE_S) as store:
        load = Load(store, seed)
        time.sleep(seconds / 3)
        fault(seconds / 3)
        time.sleep(seconds / 3)
        counts, outcome.stuck = load.end()
    wrong = {name: count for name, count in counts.items() if name.startswith("wrong")}
    outcome.operations, outcome.wrong = counts["operations"], sum(wrong.values())
    outcome.errors = sum(c for n, c in counts.items() if n.startswith(("error", "refused")))
    outcome.longest_s = load.longest_s
    outcome.detail = "; ".join([*map(str, wrong.items()), told := recovered(url)])
    outcome.recovered = not told
    return outcome


def network(state: str, seconds: float, seed: int) -> Outcome:
    """A network in that state."""
    net = Network()

    def fault(seconds: float) -> None:
        net.state = state
        time.sleep(seconds)
        net.state = "whole"

    with a_server() as server:
        with between(server.url, net.change, net.admits) as url:
            outcome = under_load(url, seconds, seed, fault)
        limit = OP_DEADLINE_S + CALLS_MAX * DEADLINE_S  # a put has a deadline of its own
        outcome.bars = [(f"longest operation, network {state}, s", outcome.longest_s, limit, "<=")]
        ended_well(server, outcome)
    return outcome


def no_descriptors(seconds: float, seed: int) -> Outcome:
    """A server that may open no more files, and many who want to connect."""

    def fault(seconds: float) -> None:
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        few = (server.files() + SPARE_FILES, limits[1])
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, few)
        try:
            with ExitStack() as stack, suppress(OSError):
                for _ in range(10 * SPARE_FILES):
                    stack.enter_context(connect(server))
                time.sleep(seconds)
        finally:
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)

    with a_server() as server:
        outcome = under_load(server.url, seconds, seed, fault)
        ended_well(server, outcome)
    return outcome


def device_errors(seconds: float, seed: int) -> Outcome:
    """The device of a server's folder fails, and is back: LMDB gives its index up meanwhile."""
    with a_server(shimmed=True) as server:
        shim = Shim(server.log.with_name("control"), server.log.with_name("store"))

        def fault(seconds: float) -> None:
            """On and off: LMDB gives up where its first page cannot be written but others can."""
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                with shim.during(read_errno=EIO, write_errno=EIO):
                    time.sleep(BROKEN_S)
                time.sleep(BROKEN_S)

        outcome = under_load(server.url, seconds, seed, fault)
        outcome.wrong += not shim.hits
        outcome.detail += f" opened again {server.log.read_text().count('is usable again')} times"
        ended_well(server, outcome, may_complain=True)
    return outcome


# ---------------------------------------------------------------------- overload
@dataclass
class Answers:
    """What bare clients got."""

    seconds: float = 0.0
    good: list[float] = field(default_factory=list)  # how long each took
    refused: int = 0
    lost: int = 0
    wrong: int = 0

    def __add__(self, other: Answers) -> Answers:
        return Answers(
            self.seconds + other.seconds, self.good + other.good, self.refused + other.refused,
            self.lost + other.lost, self.wrong + other.wrong,
        )  # fmt: skip

    @property
    def rate(self) -> float:
        """Good ones a second."""
        return len(self.good) / self.seconds


class Bare:
    """One client that asks the same again as soon as it is answered, or turned away."""

    def __init__(self, server: Server, request: bytes, answer: bytes, found: Answers) -> None:
        self._server, self._request, self._expected, self._found = server, request, answer, found
        self.sock = self._ask(connect(server))

    def _ask(self, sock: socket.socket) -> socket.socket:
        self._data, self._began = b"", time.monotonic()
        sock.sendall(self._request)
        return sock

    def close(self) -> None:
        """Let go of its connection."""
        self.sock.close()

    def receive(self) -> bool:
        """Take what has come; False when the connection is another one now."""
        found, data = self._found, b""
        with suppress(OSError):
            data = self.sock.recv(65536)
        self._data += data
        head, _, body = self._data.partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length: ")
        if data and (at < 0 or len(body) < int(head[at + 16 :].split(b"\r\n")[0])):
            return True
        if not data:
            found.lost += 1
        elif head[9:12] != b"200":
            found.refused += 1
        else:
            found.good.append(time.monotonic() - self._began)
            found.wrong += body != self._expected
        if data and b"connection: close" not in head.lower():
            self._ask(self.sock)
            return True
        self.sock.close()
        self.sock = self._ask(connect(self._server))
        return False


def ask_for(server: Server, request: bytes, answer: bytes, clients: int, seconds: float) -> Answers:
    """So many clients at once."""
    found = Answers(seconds)
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as ready, ExitStack() as stack:
        all_of_them = [Bare(server, request, answer, found) for _ in range(clients)]
        for one in all_of_them:
            stack.callback(Bare.close, one)
            ready.register(one.sock, selectors.EVENT_READ, one)
        while time.monotonic() < end:
            for key, _ in ready.select(0.1):
                old = key.fileobj
                if not key.data.receive():
                    ready.unregister(old)
                    ready.register(key.data.sock, selectors.EVENT_READ, key.data)
    return found


def overload(seconds: float, seed: int) -> Outcome:
    """Ten times as many clients as the server answers at once; none of them waits."""
    with a_server() as server:
        with RemoteStore(server.url, token=TOKEN) as store:
            ns = store.namespace(identity_for("overload", LAYOUT), LAYOUT)
            refs = ns.chain(tokens_of(seed, 16, LAYOUT)).refs()
            ns.put(refs, [content_of(ref.key, SIZE) for ref in refs])
            body = wire.pack_request({"namespace": ns.name.hex()}, wire.pack_refs(refs))
        request = request_of(TOKEN, "/v1/match", body)
        with connect(server) as sock:
            sock.sendall(request)
            answer = sock.recv(65536).partition(b"\r\n\r\n")[2]
        ask = partial(ask_for, server, request, answer)
        part_s = max(PART_S_MIN, seconds / 8)
        ask(AT_CAPACITY, part_s)
        ask(OVERLOAD, part_s)  # buffers grow to what so many connections take
        memory = server.resident_kib()
        before, during, shares = Answers(), Answers(), []
        for _ in range(ROUNDS):  # in turn: what else the machine does meets both
            parts = [ask(clients, part_s) for clients in (AT_CAPACITY, OVERLOAD)]
            shares.append(parts[1].rate / max(parts[0].rate, 1 / part_s))
            before, during = before + parts[0], during + parts[1]
        growth = server.resident_kib() - memory
        outcome = Outcome(operations=len(before.good) + len(during.good))
        outcome.errors = during.refused + during.lost + before.refused + before.lost
        outcome.wrong = before.wrong + during.wrong
        outcome.of_before = statistics.median(shares)
        outcome.longest_s = max(during.good, default=0.0)
        told = recovered(server.url)
        outcome.recovered = not told
        p99 = statistics.quantiles([0.0, *during.good, 0.0], n=100)[-1]
        outcome.detail = (
            f"{before.rate:.0f}/s by {AT_CAPACITY} clients, {during.rate:.0f}/s by {OVERLOAD}, "
            f"refused {during.refused}, p99 {1e3 * p99:.0f} ms, memory {growth:+d} KiB {told}"
        )
        outcome.bars = [
            ("goodput under overload", outcome.of_before, GOODPUT_SHARE_MIN, ">="),
            ("longest answer under overload, s", outcome.longest_s, LATENCY_S_MAX, "<="),
            ("memory under overload, KiB", float(growth), float(GROWTH_KIB_MAX), "<="),
        ]
        ended_well(server, outcome)
    return outcome


SERVER_FAULTS: dict[str, Callable[[float, int], Outcome]] = {
    "network cut": partial(network, "cut"),
    "network half-open": partial(network, "half-open"),
    "network slow": partial(network, "slow"),
    "server without descriptors": no_descriptors,
    "server, EIO": device_errors,
    "server overloaded": overload,
}
