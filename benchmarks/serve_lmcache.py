"""LMCache's server as the peer of `benchmarks.serve`, through the client of its own benchmark.

Run by the Python of LMCache's environment (`lmcache_peer`): a client process with the tasks of
`serve_tasks`.

Addresses: ``lmcache:MODE:PORT``. Mode ``engine_driven`` is its way over the network (payloads are
pickled into messages over TCP), ``lmcache_driven`` its shared memory. As in ``lmcache bench
server``, what counts of a get is RETRIEVE and of a put STORE that found room: the LOOKUP that each
needs before, and the end of its session, do not. It compares no checksums.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from contextlib import ExitStack
from importlib import import_module
from typing import Any

from benchmarks.serve_tasks import CALL_CHUNKS, Call, answer_tasks

CHUNK_TOKENS, BLOCK_TOKENS = 256, 16
LAYER_KIB = 1024  # of a chunk: 256 tokens, K and V, 8 heads of 128 bfloat16
FULL_TRIES, FULL_S = 50, 0.1
_SERIAL = itertools.count()


def opened(stack: ExitStack, task: dict[str, Any]) -> list[Call]:
    """See `serve_tasks`."""
    _, mode, port = task["address"].split(":")
    return [_call(stack, mode, port, client, task) for client in task["clients"]]


def _call(stack: ExitStack, mode: str, port: str, client: int, task: dict[str, Any]) -> Call:
    bench = "lmcache.cli.commands.bench.server_bench"  # of another environment
    helpers: Any = import_module(f"{bench}.helpers")
    client_class = import_module(f"{bench}.client").ServerBenchClient
    config_class = import_module(f"{bench}.config").BenchConfig

    op, each = task["op"], CALL_CHUNKS[task["op"]]
    blocks = CHUNK_TOKENS // BLOCK_TOKENS * task["chunks"]
    config = config_class(
        rpc_url=f"tcp://127.0.0.1:{port}", http_url="", mode="cpu", transfer_mode=mode, tp_size=1,
        use_mla=False, num_tokens=each * CHUNK_TOKENS, num_blocks=blocks, block_size=BLOCK_TOKENS,
        kvcache_shape_spec=f"(2,{blocks + 16},16,8,128):bfloat16:{task['kib'] // LAYER_KIB}",
    )  # fmt: skip
    # Its benchmark is one process of one client: all would register under the same number.
    helpers._INSTANCE_ID_BASE = os.getpid() * 1000 + next(_SERIAL)
    made = client_class(config, lambda _: None)
    made.start()
    stack.callback(made.close)
    first = random.randrange(1 << 30, 1 << 31) if op == "put" else client * 100_000
    numbers = itertools.count(first)
    uses = itertools.count()

    def request(sequence: int) -> Any:
        one = made.create_request(sequence, f"{os.getpid()}-{client}-{op}-{mode}-{next(uses)}", op)
        return one, made.lookup(one).hit_chunks

    def put() -> float:
        for _ in range(FULL_TRIES):
            one, hits = request(next(numbers))
            done = made.store(one, hits * CHUNK_TOKENS, one.num_full_tokens - hits * CHUNK_TOKENS)
            made.end_session(one)
            if done is not None and done.succeeded:
                return float(done.latency_ms) / 1e3
            time.sleep(FULL_S)  # it makes room once a second
        raise RuntimeError(f"LMCache did not store: {done}")

    if op == "put":
        return put
    stored = [next(numbers) for _ in range(task["chunks"] // each)]
    turns = itertools.cycle(stored)

    def get() -> float:
        one, hits = request(next(turns))
        if hits != one.total_chunks:
            raise RuntimeError(f"LMCache has {hits} of {one.total_chunks} chunks")
        done = made.retrieve(one, 0, one.num_full_tokens)
        made.end_session(one)
        if not done.succeeded:
            raise RuntimeError(f"LMCache did not retrieve: {done}")
        return float(done.latency_ms) / 1e3

    for sequence in stored:
        one, hits = request(sequence)
        made.store(one, hits * CHUNK_TOKENS, one.num_full_tokens - hits * CHUNK_TOKENS)
        made.end_session(one)
    return get


if __name__ == "__main__":
    answer_tasks(opened)
