"""What a router has while it runs: workers and who watches them, room for requests, counters."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import ClientSession, DummyCookieJar, TCPConnector, web

from prefixstore.client.token import read_token
from prefixstore.errors import ConfigError
from prefixstore.route import limits
from prefixstore.route.events import Follower, make_context
from prefixstore.route.proxy import Proxy
from prefixstore.route.stores import Stores
from prefixstore.route.watch import watch
from prefixstore.route.workers import Pool, Worker, WorkerSpec
from prefixstore.serve.answering import too_large
from prefixstore.serve.metrics import Metrics
from prefixstore.serve.refusal import RefusedError, busy

if TYPE_CHECKING:
    from zmq.asyncio import Context

logger = logging.getLogger("prefixstore")
COUNTERS = {
    "requests_total": ("counter", "requests answered"),
    "refused_total": ("counter", "requests refused by the router itself"),
    "routed_total": ("counter", "requests given to a worker, by its role"),
    "retried_total": ("counter", "workers that gave no byte of an answer"),
    "cut_total": ("counter", "answers that ended early because the worker was gone"),
    "first_legs_total": ("counter", "prompts given to a prefill worker, by what came of it"),
    "prompt_tokens_total": ("counter", "tokens of prompts"),
    "known_tokens_total": ("counter", "of those, tokens the chosen worker was known to have"),
    "untokenized_total": ("counter", "prompts whose tokens are not known, by why"),
}


@dataclass(frozen=True, slots=True)
class Routing:
    """How to route. ``workers``: at the start; ``file``: of more, read again on SIGHUP."""

    workers: tuple[WorkerSpec, ...] = ()
    file: str | None = None
    admin_token_file: str | None = None
    worker_token_file: str | None = None
    store_token_file: str | None = None
    store_ca_file: str | None = None
    segments: bool = False
    local_tokens: int = 256
    seed: int | None = None


class State:
    """See the module docstring. Raises ConfigError."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self.token = _token(routing.admin_token_file)
        self._worker_token = _token(routing.worker_token_file)
        self.pool, self.metrics = Pool(), Metrics(COUNTERS, "prefixstore_route")
        self.stores = Stores(
            _token(routing.store_token_file), routing.store_ca_file, routing.segments
        )
        self.draining = False
        self.proxy: Proxy | None = None
        self._watching: ClientSession | None = None
        self._zmq: Context | None = None
        self._of_file: set[str] = set()
        self._requests = self._bytes = 0
        for spec in routing.workers:
            self._enter(spec)
        self.reload()

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """What is there while the application runs."""
        known = {"Authorization": f"Bearer {self._worker_token}"} if self._worker_token else {}
        connector = TCPConnector(limit=0, keepalive_timeout=limits.KEEP_S)
        async with (
            ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                read_bufsize=limits.CHUNK_BYTES,
            ) as session,
            ClientSession(headers=known, cookie_jar=DummyCookieJar()) as self._watching,
        ):  # fmt: skip
            rng = random.Random(self._routing.seed)
            self.proxy = Proxy(
                session, self.pool, self.stores, self.metrics, rng, self._routing.local_tokens
            )
            for worker in self.pool:
                self._attend(worker)
            yield
            tasks = [task for worker in self.pool for task in worker.tasks]
            for worker in list(self.pool):
                self.pool.remove(worker.name)
            await asyncio.gather(*tasks, return_exceptions=True)
            self.stores.close()
            if self._zmq is not None:
                self._zmq.destroy(linger=0)

    # ------------------------------------------------------------------ workers
    def add(self, spec: WorkerSpec) -> Worker:
        """Add a worker. Raises RefusedError, ConfigError."""
        self._can_hear(spec)
        worker = self.pool.add(spec)
        if self._watching is not None:
            self._attend(worker)
        return worker

    def _can_hear(self, *specs: WorkerSpec) -> None:
        """Have what it takes to follow their events. Raises ConfigError."""
        if self._zmq is None and any(one.kv_events is not None for one in specs):
            self._zmq = make_context()

    def _enter(self, spec: WorkerSpec) -> None:
        try:
            self.add(spec)
        except RefusedError as error:
            raise ConfigError(str(error), error.hint) from error

    def _attend(self, worker: Worker) -> None:
        assert self._watching is not None
        worker.tasks.append(asyncio.create_task(watch(self._watching, worker)))
        if worker.spec.kv_events is not None:
            assert self._zmq is not None
            worker.tasks.append(asyncio.create_task(Follower(self._zmq, worker).run()))

    def reload(self) -> None:
        """Have the workers be those of the file: new ones are added, those no longer in it
        removed, roles changed. Raises ConfigError, and then nothing has changed."""
        if self._routing.file is None:
            return
        specs = {one.name: one for one in WorkerSpec.read(Path(self._routing.file))}
        gone = (self._of_file - specs.keys()) & self.pool.workers.keys()
        count = len((self.pool.workers.keys() - gone) | specs.keys())
        if count > limits.WORKERS_MAX:
            raise ConfigError(f"{count} workers", f"at most {limits.WORKERS_MAX}")
        self._can_hear(*specs.values())
        for name in gone:
            self.pool.remove(name)
        for name, spec in specs.items():
            worker = self.pool.workers.get(name)
            if worker is not None and replace(worker.spec, role=spec.role) == spec:
                worker.spec = spec
                continue
            if worker is not None:
                self.pool.remove(name)
            self._enter(spec)
        self._of_file = set(specs)

    def reload_or_say(self) -> None:
        """As `reload`, on a signal: a mistake in the file leaves the workers as they are."""
        try:
            self.reload()
        except ConfigError as error:
            logger.warning("the workers stay as they are: %s", error)

    # ------------------------------------------------------------------ requests
    @contextmanager
    def room(self) -> Iterator[Callable[[int], None]]:
        """Room for a request; call what it gives with how many bytes it takes, whenever that is
        another number. Both raise RefusedError."""
        if self._requests >= limits.REQUESTS_MAX:
            raise busy(f"{limits.REQUESTS_MAX} requests at once")
        taken = 0

        def is_of(num_bytes: int) -> None:
            nonlocal taken
            if num_bytes > limits.BODIES_BYTES_MAX:
                raise too_large(f"{num_bytes} bytes once it is parsed", limits.BODIES_BYTES_MAX)
            if num_bytes > taken and self._bytes - taken + num_bytes > limits.BODIES_BYTES_MAX:
                raise busy("too many bytes of requests at once")
            self._bytes += num_bytes - taken
            taken = num_bytes

        self._requests += 1
        try:
            yield is_of
        finally:
            self._requests -= 1
            self._bytes -= taken

    def metrics_page(self) -> str:
        """All counters, and what there is now."""
        states = [worker.state for worker in self.pool]
        gauges = {f"workers_{name}": states.count(name) for name in ("ready", "down", "draining")}
        return self.metrics.text({
            **gauges, "requests": self._requests, "request_bytes": self._bytes,
            "workers_hearing_events": sum(worker.known.tells for worker in self.pool),
        })  # fmt: skip


def _token(file: str | None) -> str:
    return "" if file is None else read_token(file)


STATE = web.AppKey("state", State)
