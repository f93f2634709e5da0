"""Processes of `benchmarks.engine`: how a child is started, watched and known to be gone.

Owns no state.  What must hold: a child leads a session of its own (so one signal reaches all of
it), and `wait_for_session_end` returns only when no process of that session runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.engine_nursery import Forked, nursery_for

REPO_ROOT = Path(__file__).resolve().parents[1]
KILL_WAIT_S = 10.0

# As multiprocessing.shared_memory names its segments, and vLLM's CPU workers theirs.
_SEGMENTS = ("/dev/shm/psm_", "/dev/shm/vllm_dist_")
_CHILD = ("-m", "benchmarks.engine_child")


class EngineDied(RuntimeError):  # noqa: N818  (what happened, not what was wrong)
    """The child is gone, or was killed for missing a deadline; ends with its last log lines."""


def child_environment(
    workers: int = 1, eager: bool = True, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The child's environment: this process's own, offline and quiet, importing from this checkout.

    ``eager`` turns torch.compile off everywhere: vLLM's enforce_eager leaves the sampler's, and the
    first request with logprobs then waits 22 s for a C++ compiler.  OpenMP threads sleep at
    barriers unless the caller's environment says otherwise: with spinning ones, two busy processes
    on two cores made a decode step take 200 ms instead of 20.  vLLM binds the threads of each CPU
    worker to cores; the usable cores are split evenly.
    """
    env = dict(os.environ)
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and it would override our kwargs
    env.pop("PYTEST_CURRENT_TEST", None)  # another for each test: no two could share a nursery
    path = [str(REPO_ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env.update(
        PYTHONPATH=os.pathsep.join(path),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL=env.get("VLLM_LOGGING_LEVEL", "INFO"),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    env.setdefault("OMP_WAIT_POLICY", "passive")
    if eager:
        env["TORCH_COMPILE_DISABLE"] = "1"
    if workers > 1:
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // workers)
        parts = [cores[rank * share : (rank + 1) * share] for rank in range(workers)]
        bind = "|".join(",".join(map(str, part)) for part in parts)
        env["VLLM_CPU_OMP_THREADS_BIND"] = bind if all(parts) else "nobind"
    env.update(extra or {})
    return env


def connector_config(folder: Path | None, **options: Any) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` for the store in a folder, or where the options say."""
    where = {} if folder is None else {"dir": str(folder)}
    return {
        "kv_connector": "PrefixStoreConnector",
        "kv_connector_module_path": "connector.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {**where, **options},
    }


def native_config(cpu_bytes: int) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` for its own offloading to host memory; it needs a GPU."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": cpu_bytes},
    }


def llm_arguments(model: str, kv_cache_gib: float, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of vLLM's LLM: ours, then the caller's; ValueError unless they are JSON."""
    path = Path(model)
    kwargs: dict[str, Any] = {
        "model": str(path.resolve()) if path.exists() else model,
        "enforce_eager": True,
        "disable_log_stats": False,
        **given,
    }
    if not {"kv_cache_memory_bytes", "num_gpu_blocks_override"} & given.keys():
        if kv_cache_gib <= 0:
            raise ValueError(f"kv_cache_gib is {kv_cache_gib}; it must be more than 0")
        kwargs["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    try:
        json.dumps(kwargs)
    except TypeError as error:
        raise ValueError(f"the engine's arguments must be JSON values: {error}") from None
    return kwargs


def temporary_log() -> Path:
    """A new empty file for an engine's log."""
    handle, name = tempfile.mkstemp(prefix="engine-", suffix=".log")
    os.close(handle)
    return Path(name)


def spawn(
    log: Path, env: Mapping[str, str], *, forked: bool = False, python: Path | None = None
) -> tuple[subprocess.Popen[bytes] | Forked, int, int]:
    """Start the child in its own session; returns it and our ends of the two pipes.

    ``forked``: from a process that has imported vLLM (`engine_nursery`), else by ``python`` or
    this interpreter.
    """
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        child_reads, we_write = os.pipe()
        we_read, child_writes = os.pipe()
        for descriptor in (child_reads, child_writes):
            theirs.callback(os.close, descriptor)
        for descriptor in (we_write, we_read):
            ours.callback(os.close, descriptor)
        log.parent.mkdir(parents=True, exist_ok=True)
        process: subprocess.Popen[bytes] | Forked
        with log.open("wb") as sink:
            if forked:
                process = nursery_for(env).fork(sink.fileno(), child_reads, child_writes)
            else:
                process = subprocess.Popen(
                    [str(python or sys.executable), *_CHILD, str(child_reads), str(child_writes)],
                    stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=dict(env),
                    pass_fds=(child_reads, child_writes), start_new_session=True,
                )  # fmt: skip
        ours.pop_all()  # the caller's from here on
    os.set_blocking(we_write, False)
    return process, we_write, we_read


def has_exited(pid: int) -> bool:
    """Whether a child has exited, without reaping it (its pid stays taken until that is done)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def session_members(session: int) -> list[int]:
    """Ids of the live processes of a session, zombies not counted, from /proc."""
    return [pid for pid, _, member_of in _live_processes() if member_of == session]


def descendants() -> list[int]:
    """Ids of the live processes that this one has started, or that these have."""
    parents = {pid: parent for pid, parent, _ in _live_processes()}
    found, last = [], [os.getpid()]
    while last := [pid for pid, parent in parents.items() if parent in last]:
        found += last
    return found


def _live_processes() -> Iterator[tuple[int, int, int]]:
    """Each one's id, its parent's, and its session."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended while we looked
            continue
        # The name, in parentheses, may hold spaces; behind it: state, ppid, pgrp, session.
        state, parent, _, session = stat.rpartition(")")[2].split()[:4]
        if state not in "ZX":
            yield int(entry.name), int(parent), int(session)


def shared_memory_of(session: int) -> set[Path]:
    """The segments in /dev/shm that a session has mapped, to talk among its processes.

    Tensor-parallel workers have some of 250 MB (sparse) that a SIGKILL leaves nobody to unlink, and
    some that nobody unlinks in any case.
    """
    found = set()
    for pid in session_members(session):
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:  # it ended while we looked
            continue
        words = (line.split()[-1] for line in maps.splitlines() if "/dev/shm/" in line)
        found |= {Path(word) for word in words if word.startswith(_SEGMENTS)}
    return found


def wait_for_session_end(session: int) -> None:
    """Wait until a killed session has no live process left; EngineDied after ``KILL_WAIT_S``."""
    deadline = time.monotonic() + KILL_WAIT_S
    while members := session_members(session):
        if time.monotonic() > deadline:
            raise EngineDied(f"processes {members} outlived SIGKILL for {KILL_WAIT_S:g} s")
        time.sleep(0.01)
