"""Threads shared out among tenants: who has asked for much waits behind who has asked for little.

A `Pool` gives a free thread to the tenant that has the fewest of them; where there are several
tenants, one never has more than its share. What waits is bounded by what may be asked at once
(`State`). What must hold: a thread that has begun is heard to the end, also when nobody waits for
it any more, so that what it took can be given back.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """Work for a thread, and what came of it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.begun = False

    def give_up(self, undo: Callable[[T], object] | None = None) -> None:
        """Nobody waits for it any more: it does not begin, or is undone when it has ended."""
        if not self.begun:
            self.future.cancel()
        elif undo is not None:
            self.future.add_done_callback(partial(_undo, undo))


def _undo(undo: Callable[[T], object], future: asyncio.Future[T]) -> None:
    if not future.cancelled() and future.exception() is None:
        undo(future.result())


class Pool:
    """See the module docstring. Used on the event loop's thread only."""

    def __init__(self, name: str, threads: int, share: Callable[[int], int]) -> None:
        self.executor = ThreadPoolExecutor(threads, f"prefixstore-{name}")
        self._threads, self._share = threads, share
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[Job[Any]]] = {}

    def submit(self, tenant: str, work: Callable[[], T]) -> Job[T]:
        """Do it on a thread, as soon as there is one for that tenant."""
        job = Job(work)
        self._waiting.setdefault(tenant, deque()).append(job)
        self._start()
        return job

    def _start(self) -> None:
        most = max(1, self._share(self._threads))
        while self._running.total() < self._threads:
            free = [name for name in self._waiting if self._running[name] < most]
            if not free:
                return
            name = min(free, key=self._running.__getitem__)
            job = self._waiting[name].popleft()
            # To the end, so that among those with as many threads each has its turn.
            queue = self._waiting.pop(name)
            if queue:
                self._waiting[name] = queue
            if job.future.cancelled():
                continue
            job.begun = True
            self._running[name] += 1
            loop = asyncio.get_running_loop()
            done = self.executor.submit(job.work)
            done.add_done_callback(partial(self._hear, loop, name, job))

    def _hear(
        self, loop: asyncio.AbstractEventLoop, name: str, job: Job[Any], done: Future[Any]
    ) -> None:
        try:
            loop.call_soon_threadsafe(self._ended, name, job, done)
        except RuntimeError:  # the loop was closed: the process is about to end
            return

    def _ended(self, name: str, job: Job[Any], done: Future[Any]) -> None:
        self._running[name] -= 1
        if not self._running[name]:
            del self._running[name]
        if not job.future.done():
            if done.cancelled():
                job.future.cancel()
            elif (error := done.exception()) is not None:
                job.future.set_exception(error)
                job.future.exception()  # who asked may have gone
            else:
                job.future.set_result(done.result())
        self._start()

    def close(self) -> None:
        """Begin nothing more."""
        for queue in self._waiting.values():
            for job in queue:
                job.future.cancel()
        self._waiting.clear()
