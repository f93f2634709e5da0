"""What each client process of `benchmarks.serve` does: opens calls, and times them when told to.

One JSON line a task on standard input, one line of answer on standard output:

    {"do": "open", "name", "address", "op", "kib", "clients": [numbers], "chunks"} -> "ready"
    {"do": "run", "name", "seconds"} -> {"rate": calls/s of all clients, "calls": seconds of each}
    {"do": "close", "name"} -> "ready"

A client of the list is a thread with calls of its own. Runs in the peers' environments as well, so
it imports nothing but the standard library. Ends, and closes everything, with its standard input.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import Any

Call = Callable[[], float]  # makes one call; the seconds that count of it
Open = Callable[[ExitStack, dict[str, Any]], list[Call]]  # one for each client of a task
START_S = 60.0
CALL_CHUNKS = {"get": 1, "get of 8": 8, "put": 1, "match": 1}  # in one call


def timed(work: Callable[[], object]) -> Call:
    """A call of which everything counts."""

    def call() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return call


def repeat(call: Call, seconds: float) -> tuple[float, list[float]]:
    """Calls/s while it is called for so many seconds, and the time of each call.

    What the last call takes beyond the end does not count: others may have stopped by then and left
    it the machine. Nor does time that a call itself leaves out.
    """
    took, left_out, share = [], 0.0, 1.0
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        took.append(call())
        whole = time.perf_counter() - began
        share = min(1.0, (end - began) / whole)
        left_out += share * max(0.0, whole - took[-1])
    return (len(took) - 1 + share) / (seconds - left_out), took


def run(calls: list[Call], seconds: float) -> dict[str, Any]:
    """All clients at once."""
    if len(calls) == 1:
        found = [repeat(calls[0], seconds)]
    else:
        start = Barrier(len(calls))

        def one(call: Call) -> tuple[float, list[float]]:
            start.wait(START_S)
            return repeat(call, seconds)

        with ThreadPoolExecutor(len(calls)) as threads:
            found = list(threads.map(one, calls))
    return {"rate": sum(rate for rate, _ in found), "calls": [t for _, took in found for t in took]}


def answer_tasks(opened: Open) -> None:
    """Answer tasks until standard input ends."""
    stacks: dict[str, ExitStack] = {}
    calls: dict[str, list[Call]] = {}
    out = sys.stdout
    sys.stdout = sys.stderr  # what a library prints is no answer
    with ExitStack() as everything:
        for line in sys.stdin:
            task, answer = json.loads(line), "ready"
            name = task["name"]
            if task["do"] == "open":
                stacks[name] = everything.enter_context(ExitStack())
                calls[name] = opened(stacks[name], task)
                for call in calls[name]:
                    call()
            elif task["do"] == "run":
                answer = json.dumps(run(calls[name], task["seconds"]))
            else:
                del calls[name]
                stacks.pop(name).close()
            print(answer, file=out, flush=True)
