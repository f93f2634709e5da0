"""A process that has imported vLLM and forks engines: one starts in 3 s instead of 13.

``python -m benchmarks.engine_nursery SOCKET_FD``; started by `Nursery` only. Importing vLLM takes
ten seconds of a core, and tests start a hundred engines; a server with its engine core imports it
twice (`benchmarks.vllm_server`). A fork has the imports and nothing else:
no engine was ever made in the nursery. It has the nursery's environment, so each environment needs
a nursery of its own, and its hash seed; where a process of its own is the point, ask for one.

What must hold: a child ends with its parent's pipes as any other does (`engine_child`), and a
nursery with its socket. A child's pid stays taken until the parent has asked how it ended.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import engine_child

START_S = 120.0
ANSWER_S = 30.0
MESSAGE_BYTES = 4096
NURSERIES_MAX = 3  # in one process; they take 600 MB each
# What an engine imports when it is made, over what `vllm` alone does.
PRELOADED = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.llama",
)
# What a server and its engine core import besides; for the first server, before it is forked.
PRELOADED_FOR_SERVERS = (
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
)


class Forked:
    """A child of a nursery: what of `subprocess.Popen` its callers use."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """The exit status, once it has ended (negative: by that signal). Raises TimeoutError."""
        if self.returncode is None:
            try:
                self.returncode = self._nursery.ask({"reap": self.pid}, timeout)
            except OSError as error:
                if isinstance(error, TimeoutError):
                    raise
                self.returncode = -signal.SIGKILL  # as good as any: who could tell is gone
        return self.returncode


class Nursery:
    """The parent's side: one nursery process. Used by one thread at a time."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine_nursery", str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=dict(env), pass_fds=(theirs.fileno(),), start_new_session=True,
            )  # fmt: skip
        self._wait_s = START_S  # the first answer comes when it has imported

    def ask(self, message: dict[str, Any], wait_s: float, fds: tuple[int, ...] = ()) -> int:
        """Have it do something. Raises OSError when it is gone, TimeoutError."""
        self._socket.settimeout(wait_s)
        socket.send_fds(self._socket, [json.dumps(message).encode()], list(fds))
        answer = self._socket.recv(MESSAGE_BYTES)
        if not answer:
            raise ConnectionError("the process that forks engines is gone")
        return int(json.loads(answer))

    def fork(self, log: int, source: int, sink: int) -> Forked:
        """A new engine child in its own session, with these for its log and its pipes."""
        return self._child({"fork": 0}, (log, source, sink))

    def fork_server(self, log: int, words: Sequence[str]) -> Forked:
        """A new ``vllm serve`` in its own session; ``words`` are those of its command line."""
        return self._child({"serve": list(words)}, (log,))

    def _child(self, message: dict[str, Any], fds: tuple[int, ...]) -> Forked:
        wait_s, self._wait_s = self._wait_s, ANSWER_S
        return Forked(self, self.ask(message, wait_s, fds))

    def close(self) -> None:
        """End it; engines that still run go with the pipes their parent has."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ANSWER_S)


_nurseries: dict[tuple[tuple[str, str], ...], Nursery] = {}


def nursery_for(env: Mapping[str, str]) -> Nursery:
    """The nursery of that environment; made if there is none, the oldest goes if there are many."""
    key = tuple(sorted(env.items()))
    if key not in _nurseries or _nurseries[key].process.poll() is not None:
        while len(_nurseries) >= NURSERIES_MAX:
            _nurseries.pop(next(iter(_nurseries))).close()
        _nurseries[key] = Nursery(env)
    return _nurseries[key]


def close_all() -> None:
    """End all nurseries of this process."""
    while _nurseries:
        _nurseries.popitem()[1].close()


atexit.register(close_all)


# ---------------------------------------------------------------------- in the nursery
def _fork(job: Callable[[], object], log: int, parent: socket.socket) -> int:
    """A child that does its job and ends; its pid, once it leads a session."""
    leads, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        parent.close()
        os.close(leads)
        os.close(told)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            job()
            status = 0
        finally:
            if status:
                traceback.print_exc()  # to its log, where it is looked for
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(status)  # taking vLLM's modules apart takes seconds and is of no use
    os.close(told)
    os.read(leads, 1)
    os.close(leads)
    return pid


def _serve(words: list[str]) -> None:
    """Be ``vllm serve``."""
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm serve", *words]
    main()


def main() -> None:
    """Import, then do what is asked until nobody is there to ask."""
    import vllm.utils.system_utils

    # On a CPU vLLM has its engine core and its workers spawned, and each imports it once more.
    vllm.utils.system_utils.get_mp_context = partial(multiprocessing.get_context, "fork")
    for name in PRELOADED:
        __import__(name)
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        while True:
            data, fds, _, _ = socket.recv_fds(parent, MESSAGE_BYTES, 3)
            if not data:
                return
            message = json.loads(data)
            if "reap" in message:
                answer = os.waitstatus_to_exitcode(os.waitpid(message["reap"], 0)[1])
            elif "serve" in message:
                for name in PRELOADED_FOR_SERVERS:
                    __import__(name)
                answer = _fork(partial(_serve, message["serve"]), fds[0], parent)
            else:
                log, source, sink = fds
                answer = _fork(partial(engine_child.serve, source, sink), log, parent)
            for fd in fds:
                os.close(fd)
            parent.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main()
