"""Drive a real vLLM engine in a process of its own, which may be killed with SIGKILL.

Owns the child process, its log and the pipe to it.  What must hold: every wait has a deadline; no
way of leaving (close, kill, an exception, the parent's own SIGKILL) leaves a process behind.  The
child leads a session of its own, so one signal to its group takes the TP workers too; and it kills
that group itself when the command pipe ends, which the kernel does for a parent that dies in any
way.  PR_SET_PDEATHSIG was rejected: it fires when the *thread* that started the child ends, and it
does not reach the workers.

Requests and answers are JSON lines on two pipes; everything vLLM prints goes to the log.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.engine_process import (
    KILL_WAIT_S,
    EngineDied,
    child_environment,
    has_exited,
    llm_arguments,
    shared_memory_of,
    spawn,
    temporary_log,
    wait_for_session_end,
)
from benchmarks.messages import Answer, Request

__all__ = ["Answer", "Engine", "EngineDied", "EngineError", "Request"]

LOG_TAIL_LINES = 40
MAX_REPLY_BYTES = 1 << 28
POLL_S = 0.05
DEFAULT_KV_CACHE_GIB = 1.0

_LIVE: weakref.WeakSet[Engine] = weakref.WeakSet()


class EngineError(RuntimeError):
    """The child refused one command and lives on; carries its exception's type and message."""


class Engine:
    """A vLLM engine in a child process; started by the constructor, ended by leaving the context.

    ``llm_kwargs`` are any of vLLM's ``LLM``, as JSON values (``kv_transfer_config`` is a dict).
    Defaults that differ from vLLM's: ``enforce_eager=True``, statistics on, a KV cache of
    ``kv_cache_gib`` GiB (fractions allowed; ignored if the kwargs size the cache themselves), and
    the engine core inside the child (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), which makes its steps
    deterministic.  ``env`` is added last, so it overrides all of this.  ``log`` None means a
    temporary file that goes away with a clean close.  ``forked`` starts it from a process that has
    imported vLLM already (`engine_nursery`), which is faster; ``python`` by another interpreter.

    Raises EngineDied if the engine does not come up within ``start_timeout_s``.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        log: str | Path | None = None,
        start_timeout_s: float = 180.0,
        kv_cache_gib: float = DEFAULT_KV_CACHE_GIB,
        env: Mapping[str, str] | None = None,
        forked: bool = False,
        python: Path | None = None,
        **llm_kwargs: Any,
    ) -> None:
        kwargs = llm_arguments(str(model), kv_cache_gib, llm_kwargs)
        sizes = kwargs.get("tensor_parallel_size", 1), kwargs.get("pipeline_parallel_size", 1)
        workers, eager = int(sizes[0]) * int(sizes[1]), bool(kwargs["enforce_eager"])
        self._own_log = log is None
        self.log = Path(log) if log is not None else temporary_log()
        self._commands = 0
        self._buffer = b""
        self._call_lock = threading.Lock()  # held while the pipes are in use
        self._end_lock = threading.Lock()
        self._pipes_open = True
        self._shared: set[Path] = set()  # what its processes share since they started
        self._process, self._to_child, self._from_child = spawn(
            self.log, child_environment(workers, eager, env), forked=forked, python=python
        )
        self.pid = self._process.pid
        _LIVE.add(self)
        began = time.perf_counter()
        with contextlib.ExitStack() as undo:
            undo.callback(self.kill)
            try:
                self._call("start", start_timeout_s, kwargs=kwargs)
            except EngineError as error:
                tail = self.log_tail()
                raise EngineDied(f"the engine did not start: {error}\n{tail}") from None
            undo.pop_all()
        self._shared = shared_memory_of(self.pid)
        self.start_s = time.perf_counter() - began

    def __enter__(self) -> Engine:
        """The engine is already up."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close cleanly, or kill when leaving with an exception; an ended engine stays ended."""
        if exc_type is None:
            self.close()
        else:
            self.kill()

    @property
    def alive(self) -> bool:
        """Whether the child still runs (a zombie does not)."""
        return self._process.returncode is None and not has_exited(self.pid)

    def generate(
        self,
        prompts: Sequence[str | list[int]] | str,
        *,
        max_tokens: int = 16,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        kv_transfer_params: Sequence[dict[str, Any] | None] | None = None,
        cache_salt: str | None = None,
        lora: tuple[str, int, str] | None = None,
        timeout_s: float = 120.0,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer the prompts as one batch, in their order; see `Request` for the arguments.

        ``kv_transfer_params`` has one entry per prompt.  Raises EngineError for a request the
        engine refuses, EngineDied if the child is gone or ``timeout_s`` passes.
        """
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        params = list(kv_transfer_params) if kv_transfer_params else [None] * len(batch)
        if len(params) != len(batch):
            raise ValueError(f"{len(params)} kv_transfer_params for {len(batch)} prompts")
        return self.submit(
            [
                Request(
                    prompt=prompt,
                    max_tokens=max_tokens,
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    kv_transfer_params=entry,
                    cache_salt=cache_salt,
                    lora=lora,
                    sampling=sampling,
                )
                for prompt, entry in zip(batch, params, strict=True)
            ],
            timeout_s=timeout_s,
        )

    def submit(self, requests: Sequence[Request], *, timeout_s: float = 120.0) -> list[Answer]:
        """Run a batch with staggered arrivals and aborts; answers come in the order given.

        Raises as `generate` does.
        """
        result = self._call("submit", timeout_s, requests=[asdict(entry) for entry in requests])
        return [Answer.from_json(value) for value in result]

    def settle(self, timeout_s: float = 30.0) -> bool:
        """Step until the scheduler waits for nothing (a connector's saves of ended requests).

        Returns False if it still did after ``timeout_s``.  Always True when the engine core runs in
        its own process, which then steps by itself.
        """
        return bool(self._call("settle", timeout_s + 30.0, seconds=timeout_s))

    def reset_prefix_cache(self, *, reset_connector: bool = False, timeout_s: float = 30.0) -> bool:
        """Drop vLLM's own prefix cache; False if vLLM refused (blocks in use)."""
        return bool(self._call("reset_prefix_cache", timeout_s, reset_connector=reset_connector))

    def metrics(self, *contains: str, timeout_s: float = 30.0) -> dict[str, float]:
        """Prometheus samples of the child whose name contains one of ``contains``.

        The default is prefixstore and external_prefix_cache.  Keys are ``name`` or
        ``name{label="value",...}`` without the labels ``engine`` and ``model_name``.
        """
        names = list(contains) or ["prefixstore", "external_prefix_cache"]
        result = self._call("metrics", timeout_s, contains=names)
        return {str(name): float(value) for name, value in result.items()}

    def kill(self) -> None:
        """SIGKILL the child and its workers, and wait until they are gone.

        Safe from another thread (a generate there raises EngineDied) and on an ended engine.
        Raises EngineDied if a process outlives SIGKILL for ``KILL_WAIT_S``.
        """
        with self._end_lock:
            if self._process.returncode is not None:
                return
            leftovers = self._shared | shared_memory_of(self.pid)
            # Before the child is reaped: until then its pid, which names the group, is not reused.
            os.killpg(self.pid, signal.SIGKILL)
            wait_for_session_end(self.pid)
            for path in leftovers:
                path.unlink(missing_ok=True)
            self._reap()

    def close(self, timeout_s: float = 30.0) -> None:
        """Shut the engine down cleanly; what does not end within ``timeout_s`` is killed.

        Raises EngineDied if it had to be killed or ended with an error.
        """
        if self._process.returncode is not None:
            return
        try:
            self._call("shutdown", timeout_s)
        except EngineError as error:
            tail = self.log_tail()
            self.kill()
            raise EngineDied(f"the engine did not shut down: {error}\n{tail}") from None
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline:
            time.sleep(POLL_S)
        tail, in_time = self.log_tail(), not self.alive
        self.kill()  # reaps, and takes with it whatever of the group is left
        if not in_time:
            raise EngineDied(f"the engine did not end within {timeout_s:g} s\n{tail}")
        if self._process.returncode != 0:
            raise EngineDied(f"the engine ended with status {self._process.returncode}\n{tail}")
        if self._own_log:
            self.log.unlink(missing_ok=True)

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of what the child and its workers printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _reap(self) -> None:
        self._process.wait(timeout=KILL_WAIT_S)
        _LIVE.discard(self)
        self._close_pipes()

    def _close_pipes(self) -> None:
        """Close them unless a call is using them; that call then does it on its way out."""
        if self._call_lock.acquire(blocking=False):
            try:
                if self._pipes_open:
                    self._pipes_open = False
                    os.close(self._to_child)
                    os.close(self._from_child)
            finally:
                self._call_lock.release()

    def _call(self, command: str, timeout_s: float, **arguments: Any) -> Any:
        """One command and its reply; on a missed deadline the child is killed, so none is stale."""
        deadline = time.monotonic() + timeout_s
        try:
            with self._call_lock:
                self._commands += 1
                message = {"id": self._commands, "command": command, **arguments}
                self._send((json.dumps(message) + "\n").encode(), deadline, command)
                reply = json.loads(self._receive(deadline, command))
        finally:
            if self._process.returncode is not None:
                self._close_pipes()
        if not reply["ok"]:
            raise EngineError(str(reply["error"]))
        return reply["result"]

    def _send(self, data: bytes, deadline: float, command: str) -> None:
        """The child reads in a thread of its own, so this blocks only if that thread is stuck."""
        while data:
            self._check(deadline, command)
            if select.select([], [self._to_child], [], POLL_S)[1]:
                try:
                    data = data[os.write(self._to_child, data) :]
                except BrokenPipeError:
                    self._give_up(f"{command}: the engine is gone")

    def _receive(self, deadline: float, command: str) -> bytes:
        while b"\n" not in self._buffer:
            ended = not self.alive  # before the read: what it wrote last is still in the pipe
            if select.select([self._from_child], [], [], POLL_S)[0]:
                data = os.read(self._from_child, 1 << 20)
                self._buffer += data
                if data:
                    continue
            if ended:
                self._give_up(f"{command}: the engine died")
            if len(self._buffer) > MAX_REPLY_BYTES:
                self._give_up(f"{command}: a reply of more than {MAX_REPLY_BYTES} bytes")
            self._check(deadline, command)
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _check(self, deadline: float, command: str) -> None:
        if self._process.returncode is not None:
            self._give_up(f"{command}: the engine has ended")
        if time.monotonic() > deadline:
            self._give_up(f"{command}: no reply before the deadline; the engine was killed")

    def _give_up(self, reason: str) -> None:
        self.kill()
        raise EngineDied(f"{reason}; status {self._process.returncode}\n{self.log_tail()}")


@atexit.register
def _kill_all() -> None:
    for engine in list(_LIVE):
        engine.kill()
