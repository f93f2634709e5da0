"""A backend over Mooncake Store, by way of its client (``pip install 'prefixstore[mooncake]'``).

``mooncake://master:port[?metadata=P2PHANDSHAKE&admin_port=9003&protocol=tcp&devices=&host=..]``.
The memory is that of others' clients (``mooncake_client``, vLLM's nodes); ours lends none.

The client runs in a process of its own (`mooncake_process`), and payloads go through memory that
both have: in halves, so that one is copied while the other is on its way.

Mooncake has no times to live: they are in the objects (`mooncake_objects`). One that has one has a
marker beside it, and the pool one that says there are such: so that asking what is there costs
nothing where nobody uses them, and else no read of what has none.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from prefixstore.client.breaker import Breaker
from prefixstore.client.connection import BlockingConnection, finish
from prefixstore.errors import ConfigError, RemoteError
from prefixstore.pool.backend import ABSENT, LOST, Get, Put, Written
from prefixstore.pool.mooncake_objects import (
    ARENA_BYTES,
    HEAD_BYTES,
    KEYS_MAX,
    PAD_BYTES,
    fill,
    fits,
    parse_url,
    parts_of,
    runs_of,
    take_from,
)
from prefixstore.pool.mooncake_process import Process

PART_BYTES = 8 << 20
START_S = 10.0  # of the process; a call has no longer than its deadline for that either
LISTED_BYTES = 64 << 10  # of names at a time
_MARK = ".t"
_FULL = -200


class _Batch(NamedTuple):
    """A request, and what becomes of its answer."""

    request: dict[str, Any]
    keys: Sequence[str]
    take: Callable[[list[Any], memoryview], None]


class MooncakeBackend:
    """See the module docstring and `backend.Backend`."""

    part_bytes = PART_BYTES
    ask_first = False
    reads_short = False
    lists_late = False
    tells_news = False

    def __init__(self, url: str, password: str = "", ca_file: str | None = None) -> None:
        if password or ca_file:
            raise ConfigError("a token or a ca_file for Mooncake", "leave it out: it asks nobody")
        if importlib.util.find_spec("mooncake") is None:
            raise ConfigError(
                "a pool in Mooncake Store wants its client", "pip install 'prefixstore[mooncake]'"
            )
        self._settings, self._admin = parse_url(url)
        self.url = url
        self._breaker = Breaker()
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._closed = False

    @property
    def usable(self) -> bool:
        """See `Backend`."""
        return not self._breaker.is_open

    # ------------------------------------------------------------------ asking
    def _run(self, batches: Iterator[_Batch], deadline_s: float) -> None:
        """Ask one request while the answer of the one before is used. ``batches`` fills halves of
        the arena in turns. Raises RemoteError."""
        deadline = time.monotonic() + deadline_s
        if not self._lock.acquire(timeout=max(0.0, deadline_s)):
            raise RemoteError(f"no time was left to ask {self.url}")
        try:
            if not self._breaker.admits():
                raise RemoteError(f"{self.url} has not answered lately")
            done = False
            try:
                self._ask_all(batches, deadline)
                done = True
            except RemoteError as error:
                self._process = None
                self._breaker.failed()
                raise RemoteError(f"{self.url}: {error}") from error
            finally:
                # An answer may be left, which the next call would take for its own.
                if not done and self._process is not None:
                    self._process.kill()
                    self._process = None
                    self._breaker.undecided()
            self._breaker.succeeded()
        finally:
            self._lock.release()

    def _ask_all(self, batches: Iterator[_Batch], deadline: float) -> None:
        if self._closed:
            raise RemoteError("was closed")
        if self._process is None:
            begin = min(deadline, time.monotonic() + START_S)
            self._process = Process(self._settings, ARENA_BYTES, begin)
        process, waiting = self._process, None
        for batch in batches:
            process.ask(batch.request, batch.keys, deadline)
            if waiting is not None:
                waiting.take(self._answer(process, waiting, deadline), process.arena)
            waiting = batch
        if waiting is not None:
            waiting.take(self._answer(process, waiting, deadline), process.arena)

    def _answer(self, process: Process, batch: _Batch, deadline: float) -> list[Any]:
        told = process.hear(deadline)
        if not isinstance(told, list) or len(told) != len(batch.keys):
            process.kill()
            raise RemoteError(f"an answer as nobody can read: {told!r:.80}")
        return told

    def _simple(self, verb: str, keys: Sequence[str], deadline_s: float) -> list[Any]:
        found: list[Any] = []

        def batches() -> Iterator[_Batch]:
            for at in range(0, len(keys), KEYS_MAX):
                part = keys[at : at + KEYS_MAX]
                yield _Batch({"verb": verb}, part, lambda told, _: found.extend(told))

        if keys:
            self._run(batches(), deadline_s)
        return found

    # ------------------------------------------------------------------ what a backend does
    def put(
        self,
        puts: Sequence[Put],
        *,
        deadline_s: float,
        ttl_s: float | None = None,
        replace: bool = False,
    ) -> list[Written]:
        """See `Backend`. Objects of more than 19 MiB are not written."""
        end = time.monotonic() + deadline_s
        done = [Written.THERE] * len(puts)
        new = list(range(len(puts)))
        if not replace and puts:
            there = self.exist([one.name for one in puts], deadline_s=deadline_s)
            new = [i for i in new if not there[i]]
        expires_ms = 0 if ttl_s is None else int(1000 * (time.time() + ttl_s))
        sizes = {i: puts[i].num_bytes for i in new}
        if expires_ms and new:
            marks = [Put(name, [b"t"]) for name in (_MARK, *(puts[i].name + _MARK for i in new))]
            self._write(marks, [1] * len(marks), 0, True, end - time.monotonic())
        small = [i for i in new if fits(HEAD_BYTES + sizes[i] + PAD_BYTES)]
        written = self._write(
            [puts[i] for i in small], [sizes[i] for i in small], expires_ms, replace,
            end - time.monotonic(),
        )  # fmt: skip
        for i in new:
            done[i] = Written.NO
        for i, one in zip(small, written, strict=True):
            done[i] = one
        return done

    def _write(
        self, puts: Sequence[Put], sizes: Sequence[int], expires_ms: int, replace: bool,
        deadline_s: float,
    ) -> list[Written]:  # fmt: skip
        codes: list[Any] = []
        taken = [HEAD_BYTES + size + PAD_BYTES for size in sizes]

        def batches() -> Iterator[_Batch]:
            for part in parts_of(taken):
                for i, at in part:
                    assert self._process is not None
                    fill(self._process.arena[at : at + taken[i]], expires_ms, sizes[i], puts[i])
                request = {
                    "verb": "replace" if replace else "put", "to": [at for _, at in part],
                    "sizes": [taken[i] for i, _ in part],
                }  # fmt: skip
                names = [puts[i].name for i, _ in part]
                yield _Batch(request, names, lambda told, _: codes.extend(told))

        if puts:
            self._run(batches(), deadline_s)
        return [
            Written.YES if code == 0 else Written.FULL if code == _FULL else Written.NO
            for code in codes
        ]

    def get(self, gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        """See `Backend`."""
        came = [LOST] * len(gets)
        gone: list[str] = []
        sizes = [HEAD_BYTES + sum(out.nbytes for _, out in one.cuts) for one in gets]
        small = [i for i, size in enumerate(sizes) if fits(size)]

        def take(part: Sequence[tuple[int, int]]) -> Callable[[list[Any], memoryview], None]:
            def work(told: list[Any], arena: memoryview) -> None:
                for (n, at), codes in zip(part, told, strict=True):
                    i = small[n]
                    came[i] = take_from(gets[i], codes, arena[at : at + sizes[i]])
                    if came[i] == ABSENT and codes[0] > 0:
                        gone.append(gets[i].name)

            return work

        def batches() -> Iterator[_Batch]:
            for part in parts_of([sizes[i] for i in small]):
                runs = [runs_of(gets[small[n]]) for n, _ in part]
                lengths = [[size for _, size in run] for run in runs]
                request = {
                    "verb": "get",
                    "to": [list(accumulate(one[:-1], initial=at))
                           for (_, at), one in zip(part, lengths, strict=True)],
                    "at": [[start for start, _ in run] for run in runs], "sizes": lengths,
                }  # fmt: skip
                yield _Batch(request, [gets[small[n]].name for n, _ in part], take(part))

        if gets:
            end = time.monotonic() + deadline_s
            self._run(batches(), deadline_s)
            self._simple("remove", gone, end - time.monotonic())
        return came

    def exist(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """See `Backend`."""
        if not names:
            return []
        end = time.monotonic() + deadline_s
        *told, has_times = self._simple("exist", [*names, _MARK], deadline_s)
        there = [code == 1 for code in told]
        marked = [i for i, found in enumerate(there) if found and has_times == 1]
        marks = [names[i] + _MARK for i in marked]
        told = self._simple("exist", marks, end - time.monotonic())
        marked = [i for i, code in zip(marked, told, strict=True) if code == 1]
        heads = self.get([Get(names[i], []) for i in marked], deadline_s=end - time.monotonic())
        for i, came in zip(marked, heads, strict=True):
            there[i] = came >= 0
        return there

    def delete(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """See `Backend`."""
        both = [*names, *(name + _MARK for name in names)]
        return [code == 0 for code in self._simple("remove", both, deadline_s)[: len(names)]]

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[list[str]]:
        """See `Backend`: of the master's page of all keys."""
        page, rest = None, b""
        try:
            deadline = time.monotonic() + deadline_s
            page = BlockingConnection.connect(self._admin, deadline, None)
            page.deadline = deadline
            finish(page.ask("GET", "/get_all_keys", {}, ()))
            if page.status != 200:
                raise OSError(f"status {page.status}")
            while page.left:
                page.deadline = time.monotonic() + deadline_s
                data = rest + finish(page.read(min(page.left, LISTED_BYTES)))
                *lines, rest = data.split(b"\n") if page.left else (*data.split(b"\n"), b"")
                if len(rest) > LISTED_BYTES:
                    raise OSError(f"a name of {len(rest)} bytes")
                found = [line.decode("ascii", "replace") for line in lines]
                yield [one for one in found if one.startswith(prefix) and one[-2:] != _MARK]
        except OSError as error:
            raise RemoteError(f"no list of keys from {self._admin.name}: {error}") from error
        finally:
            if page is not None:
                page.close()

    def announce(self, topic: str, message: bytes, *, deadline_s: float) -> None:
        """It has none."""
        raise NotImplementedError

    def hear(self, topic: str, after: str, *, wait_s: float) -> tuple[str, list[bytes]]:
        """It has none."""
        raise NotImplementedError

    def check_open(self, deadline_s: float) -> None:
        """See `Backend`."""
        self._simple("exist", ["check"], deadline_s)

    def close(self) -> None:
        """See `Backend`. The process ends, whatever it does."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None:
            process.kill()
