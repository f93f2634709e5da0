"""The client processes of `benchmarks.serve`, and whatever else must end with it.

Owns processes that end with their standard input, so none outlives this one.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

STOP_S = 10
PROCESSES_MAX = 8
Child = subprocess.Popen[str]


@contextmanager
def child(*command: str) -> Iterator[Child]:
    """A process with pipes, which ends with its standard input."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as one:
        try:
            yield one
        finally:
            assert one.stdin is not None
            try:
                one.stdin.close()
                one.wait(STOP_S)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                one.kill()


def line_of(process: Child) -> str:
    """The next line a process prints. Raises RuntimeError when it has ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended")
    return line.strip()


class Clients:
    """Up to PROCESSES_MAX processes of one module, among which clients are shared out."""

    def __init__(self, stack: ExitStack, count: int, *command: str) -> None:
        self._processes = [
            stack.enter_context(child(*command)) for _ in range(min(count, PROCESSES_MAX))
        ]

    def open(self, name: str, clients: int, **task: Any) -> None:
        """Have so many clients ready to make calls; see `serve_tasks`."""
        used = self._used(clients)
        self._tell(
            used,
            [{"do": "open", "name": name, "clients": [*range(i, clients, len(used))], **task}
             for i in range(len(used))],
        )  # fmt: skip

    def run(self, name: str, clients: int, seconds: float) -> tuple[float, list[float]]:
        """Calls/s of all together, and the seconds of each call."""
        used = self._used(clients)
        told = self._tell(used, [{"do": "run", "name": name, "seconds": seconds}] * len(used))
        found = [json.loads(one) for one in told]
        return sum(one["rate"] for one in found), [t for one in found for t in one["calls"]]

    def close(self, name: str, clients: int) -> None:
        """Let go of what was opened."""
        used = self._used(clients)
        self._tell(used, [{"do": "close", "name": name}] * len(used))

    def _used(self, clients: int) -> list[Child]:
        return self._processes[:clients]

    @staticmethod
    def _tell(processes: Sequence[Child], tasks: Sequence[dict[str, Any]]) -> list[str]:
        for process, task in zip(processes, tasks, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        return [line_of(process) for process in processes]
