"""Stand-ins for what the store takes from Python: time, threads, queues, futures, a pool."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from typing import Any

from benchmarks.simulation.scheduler import Gate, Thread, active

_NS = 1_000_000_000


class Clock:
    """In place of the module ``time``."""

    @staticmethod
    def time() -> float:
        return active().wall_s()

    @staticmethod
    def monotonic() -> float:
        return active().now_ns / _NS

    @staticmethod
    def sleep(seconds: float) -> None:
        active().sleep(seconds)


class Future:
    """In place of `concurrent.futures.Future`."""

    def __init__(self) -> None:
        self._state = "pending"
        self._result: Any = None
        self._error: BaseException | None = None
        self._gate = Gate()

    def set_running_or_notify_cancel(self) -> bool:
        if self._state == "cancelled":
            return False
        self._state = "running"
        return True

    def running(self) -> bool:
        return self._state == "running"

    def cancel(self) -> bool:
        if self._state == "pending":
            self._state = "cancelled"
        return self._state == "cancelled"

    def set_result(self, result: Any) -> None:
        active().check_alive()
        self._result, self._state = result, "done"
        active().open(self._gate)

    def set_exception(self, error: BaseException) -> None:
        active().check_alive()
        self._error, self._state = error, "done"
        active().open(self._gate)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        active().step("future")
        while self._state != "done":
            if not active().wait(self._gate, timeout):
                raise TimeoutError
        return self._error

    def result(self, timeout: float | None = None) -> Any:
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._result


class Queue:
    """In place of `queue.Queue`."""

    def __init__(self, maxsize: int = 0) -> None:
        self._items: deque[Any] = deque()
        self._max = maxsize
        self._gate = Gate()

    def empty(self) -> bool:
        return not self._items

    def put_nowait(self, item: Any) -> None:
        active().check_alive()
        if 0 < self._max <= len(self._items):
            raise queue.Full
        self._items.append(item)
        active().open(self._gate)

    def put(self, item: Any, timeout: float | None = None) -> None:
        active().step("queue put")
        self.put_nowait(item)

    def get(self, timeout: float | None = None) -> Any:
        active().step("queue get")
        while not self._items:
            if not active().wait(self._gate, timeout):
                raise queue.Empty
        return self._items.popleft()


class SimThread:
    """In place of `threading.Thread`."""

    def __init__(
        self, target: Callable[[], object], name: str = "thread", daemon: bool = True
    ) -> None:
        self._target, self._name = target, name
        self._thread: Thread | None = None

    def start(self) -> None:
        scheduler = active()
        scheduler.check_alive()
        self._thread = scheduler.spawn(scheduler.running.process, self._name, self._target)

    def join(self, timeout: float | None = None) -> None:
        thread = self._thread
        if thread is not None and not thread.finished:
            active().wait(thread.ended, timeout)

    def is_alive(self) -> bool:
        return self._thread is not None and not self._thread.finished


class Pool:
    """In place of `ThreadPoolExecutor`: a thread for each piece of work."""

    def __init__(self, workers: int, thread_name_prefix: str = "") -> None:
        self._closed = False

    def submit(self, work: Callable[[], Any]) -> Future:
        if self._closed:
            raise RuntimeError("the pool was shut down")
        future = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:  # thread loop: its caller gets it
                    future.set_exception(error)

        SimThread(run, "helper").start()
        return future

    def shutdown(self, wait: bool = True) -> None:
        self._closed = True


class Lock:
    """In place of `threading.Lock`, where one is held over a step."""

    def __init__(self) -> None:
        self._held = False
        self._gate = Gate()

    def __enter__(self) -> None:
        while self._held:
            active().wait(self._gate)
        self._held = True

    def __exit__(self, *error: object) -> None:
        self._held = False
        active().open(self._gate)


class Condition(Lock):
    """In place of `threading.Condition`."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = Gate()

    def wait_for(self, holds: Callable[[], bool], timeout: float | None = None) -> bool:
        while not holds():
            self.__exit__()
            told = active().wait(self._changed, timeout)
            self.__enter__()
            if not told:
                return holds()
        return True

    def notify_all(self) -> None:
        active().open(self._changed)


class NoLock:
    """In place of a lock that is a process's own, where two simulated ones would share it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None
