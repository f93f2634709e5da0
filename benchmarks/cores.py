"""Which cores engines run on that are compared.

The same loop takes twice as long on one core as on another, and on the same core a second later,
where a machine is lent out in parts (two of its processors may share one core's units). A step that
launches kernels one by one is as slow as its core. So engines that are compared take turns on the
core that is the quickest just then, and what else they run is on the next ones. Engines whose
workers are processes of their own are stepped by several threads, and are not for this.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from benchmarks.engine import Engine
from benchmarks.engine_process import descendants

LOOPS, STEPS = 5, 2000
OTHERS = 4  # cores for the threads that do not step an engine


def seconds_of_loops() -> dict[int, float]:
    """By core this thread may run on: what a loop of Python takes there, at best."""
    allowed = os.sched_getaffinity(0)
    found = {}
    try:
        for core in sorted(allowed):
            os.sched_setaffinity(0, {core})
            found[core] = min(_loop() for _ in range(LOOPS))
    finally:
        os.sched_setaffinity(0, allowed)
    return found


def _loop() -> float:
    began, count = time.perf_counter(), 0
    for number in range(STEPS):
        count += number
    return time.perf_counter() - began


def share_quickest(engines: Iterable[Engine]) -> dict[int, float]:
    """Bind the threads that step these engines, which are at rest, to the core that is the quickest
    now, and all others of processes that this one has started to the next ones; returns
    `seconds_of_loops`."""
    found = seconds_of_loops()
    first, *others = sorted(found, key=found.__getitem__)
    stepping = {engine.pid for engine in engines}  # of a process its first thread
    for pid in descendants():
        for thread in _threads(pid) - stepping:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(thread, set(others[:OTHERS]) or {first})
    for thread in stepping:
        os.sched_setaffinity(thread, {first})
    return found


def _threads(pid: int) -> set[int]:
    try:
        return {int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()}
    except OSError:  # it has ended
        return set()
