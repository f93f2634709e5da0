"""The workers: who they are, what they may be given, and what they have under way.

A worker is added, drained, removed and given another role while requests run; those under way on it
end as they would have. Used on the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from prefixstore.client.breaker import Breaker
from prefixstore.client.connection import Address
from prefixstore.errors import ConfigError
from prefixstore.route import limits
from prefixstore.route.known import Known
from prefixstore.route.prompt import Prompt
from prefixstore.serve.refusal import RefusedError
from prefixstore.urls import is_http

_NAME = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")


class Role(str, Enum):
    """What a worker is given: whole requests, or one of two legs."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What an operator says of a worker. ``url``: of its OpenAI API. ``kv_events``, ``replay``: the
    endpoints of its KV events, if it has any. ``store``: the URL of the server of the store that it
    loads from. ``identity``: that of its KV, if it does not say so itself."""

    url: str
    role: Role = Role.BOTH
    kv_events: str | None = None
    replay: str | None = None
    store: str | None = None
    identity: str = ""

    @property
    def name(self) -> str:
        """Its host and port: what it is called in answers and paths."""
        return urlsplit(self.url).netloc

    @classmethod
    def parse(cls, given: Any, by_api: bool = False) -> WorkerSpec:
        """Read an object of JSON; one that came ``by_api`` names no files of this host. Raises
        ConfigError naming what is wrong."""
        if not isinstance(given, dict):
            raise ConfigError(f"a worker is {given!r:.80}", 'give an object: {"url": ..}')
        names = [one.name for one in fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(f"a worker has unknown entries {unknown}", f"known: {names}")
        for name, value in given.items():
            if not isinstance(value, str):
                raise ConfigError(f"{name} of a worker is {value!r:.80}", "give text")
        url = str(given.get("url", "")).rstrip("/")
        netloc = urlsplit(url).netloc if is_http(url) else ""
        if not netloc or url.partition("://")[2] != netloc:
            raise ConfigError(f"{url!r:.80} is no worker's URL", "give http://host:port")
        if not _NAME.fullmatch(netloc):
            raise ConfigError(f"{url!r:.80} has no host", "give http://host:port")
        for name in ("kv_events", "replay"):
            known = ("tcp://",) if by_api else ("tcp://", "ipc://")
            if not str(given.get(name, "tcp://")).startswith(known):
                raise ConfigError(f"{name} is {given[name]!r:.80}", "give tcp://host:port")
        if "store" in given and Address.parse(given["store"]).scheme == "unix" and by_api:
            raise ConfigError(f"store is {given['store']!r:.80}", "give http://host:port")
        try:
            role = Role(given.get("role", "both"))
        except ValueError:
            raise ConfigError(
                f"{given['role']!r:.80} is no role", f"give {', '.join(Role)}"
            ) from None
        return cls(**{**given, "url": url, "role": role})

    @classmethod
    def read(cls, path: Path) -> list[WorkerSpec]:
        """The list of workers in a file of JSON. Raises ConfigError."""
        try:
            with path.open("rb") as file:
                data = file.read(limits.FILE_BYTES_MAX + 1)
            told = json.loads(data) if len(data) <= limits.FILE_BYTES_MAX else None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read {path}: {error}", "give a list of workers") from error
        if not isinstance(told, list):
            raise ConfigError(f"{path} does not hold a list", 'write [{"url": ..}, ..]')
        specs = [cls.parse(one) for one in told]
        if len({one.name for one in specs}) < len(specs):
            raise ConfigError(f"{path} holds a worker twice", "one entry for each host and port")
        return specs


@dataclass(slots=True)
class Load:
    """What a worker's ``/metrics`` said last, and how many requests of ours it may have counted."""

    running: float = 0.0
    waiting: float = 0.0
    cache_share: float = 0.0
    ours: int = 0


@dataclass(eq=False, slots=True)
class Worker:
    """A worker there is."""

    spec: WorkerSpec
    known: Known = field(default_factory=Known)
    load: Load = field(default_factory=Load)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)  # cards, by name
    identity: str = ""
    named_s: float = 0.0  # when they were read
    draining: bool = False
    answers: bool = False  # to the polls
    failed_polls: int = 0
    started_s: float = 0.0  # as it says
    requests: int = 0  # of ours, under way
    most_requests: int = 0  # since it was polled
    prefill_tokens: int = 0  # of those, that it has yet to compute
    breaker: Breaker = field(default_factory=Breaker)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """See `WorkerSpec.name`."""
        return self.spec.name

    @property
    def state(self) -> str:
        """``draining``, ``down`` or ``ready``."""
        if self.draining:
            return "draining"
        return "ready" if self.answers and not self.breaker.is_open else "down"

    @property
    def cost(self) -> float:
        """What a request more would wait for there, in tokens of prefill."""
        load = self.load
        others = max(0.0, load.running + load.waiting - load.ours)
        waiting = min(load.waiting, others)
        full = max(0.0, load.cache_share - limits.FULL_SHARE) / (1 - limits.FULL_SHARE)
        return (
            self.prefill_tokens
            + limits.RUNNING_TOKENS * (self.requests + others - waiting)
            + limits.WAITING_TOKENS * waiting
            + limits.FULL_TOKENS * full
        )

    @contextmanager
    def serving(self, prompt: Prompt, tokens: int) -> Iterator[Serving]:
        """It has a request of whose prompt it must compute so many tokens."""
        self.known.send(prompt.keys(self.known.block_tokens))
        serving = Serving(self, tokens)
        self.requests += 1
        self.most_requests = max(self.most_requests, self.requests)
        self.prefill_tokens += tokens
        try:
            yield serving
        finally:
            serving.began()
            self.requests -= 1

    def to_json(self) -> dict[str, Any]:
        """As ``GET /v1/workers`` shows it."""
        spec, load = self.spec, self.load
        return {
            "name": self.name, "url": spec.url, "role": spec.role.value, "state": self.state,
            "identity": self.identity, "models": sorted(self.models), "store": spec.store,
            "kv_events": spec.kv_events, "hears_events": self.known.tells,
            "requests": self.requests, "prefill_tokens": self.prefill_tokens,
            "running": load.running, "waiting": load.waiting, "cache_share": load.cache_share,
            "known_blocks": len(self.known), "block_tokens": self.known.block_tokens,
        }  # fmt: skip


class Serving:
    """One request on a worker."""

    def __init__(self, worker: Worker, tokens: int) -> None:
        self._worker, self._tokens = worker, tokens

    def began(self) -> None:
        """The answer has begun: the prompt is computed."""
        self._worker.prefill_tokens -= self._tokens
        self._tokens = 0


class Pool:
    """The workers by name."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers.values())

    def get(self, name: str) -> Worker:
        """One of them. Raises RefusedError."""
        try:
            return self.workers[name]
        except KeyError:
            raise RefusedError(
                404, "worker", f"no worker {name[:255]!r}", "GET /v1/workers"
            ) from None

    def add(self, spec: WorkerSpec) -> Worker:
        """Add one. Raises RefusedError."""
        if spec.name in self.workers:
            raise RefusedError(409, "exists", f"{spec.name} is a worker already", "PATCH it")
        if len(self.workers) >= limits.WORKERS_MAX:
            raise RefusedError(409, "full", f"{limits.WORKERS_MAX} workers", "remove one")
        worker = self.workers[spec.name] = Worker(spec, identity=spec.identity)
        return worker

    def remove(self, name: str) -> Worker:
        """Forget one; its requests under way end as they would have. Raises RefusedError."""
        worker = self.get(name)
        del self.workers[name]
        for task in worker.tasks:
            task.cancel()
        return worker
