"""What codecs save, what they cost, and when a get through a slow network becomes faster.

``python -m benchmarks.codec [--json] [--check] [--quick] [--model FOLDER]``

On the KV that a trained model has of its task's prompts, in chunks of 64 tokens. One table. First,
for each dtype and codec: bytes that are left of one, GB (of KV) that a thread encodes and decodes
in a second of its own CPU time, relative error. Then gets of all chunks, in bfloat16, from a real
Redis behind a network of so many MB/s, a proxy in this process: ms, without a codec and with each,
in turns. Each get is compared, byte by byte, with what it must give. ``auto`` says what it chose
there by itself.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.fault_proxy import between
from benchmarks.pool_servers import redis
from benchmarks.quality.__main__ import MODELS
from benchmarks.quality.cases import load
from benchmarks.quality.codecs import (
    chunks,
    context_of,
    form_of,
    make_prompts,
    payload_of,
    there_and_back,
)
from benchmarks.store_sizes import identity_for
from benchmarks.table import Bar, add_arguments, report
from blend import reference
from prefixstore.codec import AUTO, LOSSLESS, LOSSY_NAMES, NONE
from prefixstore.codec.form import Codec, Form
from prefixstore.codec.lossy import to_float32
from prefixstore.codec.registry import BY_NAME
from prefixstore.found import REMOTE
from prefixstore.pool.backend import open_backend
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState

DTYPES = ("bfloat16", "float16", "float32")
NETWORKS_MB_S = (25, 125, 400)  # 0.2, 1 and 3.2 Gbit/s
CODED = (LOSSLESS, *LOSSY_NAMES)
PROMPTS = 4  # of 1,024 tokens: 16 MiB of KV in bfloat16
Row = dict[str, object]
EMPTY: Row = {
    "what": "", "dtype": "bfloat16", "codec": "", "left": None, "encode_gb_s": None,
    "decode_gb_s": None, "error": None, "network_mb_s": None, "get_ms": None, "of_none": None,
}  # fmt: skip


def timed(
    work: Callable[[], object], times: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(times):
        began = clock()
        work()
        seconds.append(clock() - began)
    return statistics.median(seconds)


def speeds(form: Form, payloads: Sequence[memoryview], rounds: int) -> Iterator[Row]:
    """What a thread does with chunks of one dtype. RuntimeError for a wrong byte."""
    total = sum(one.nbytes for one in payloads)
    for name in CODED:
        codec = BY_NAME[name]
        coded = [codec.encode(form, one) or [one] for one in payloads]
        outs = [memoryview(bytearray(one.nbytes)) for one in payloads]
        views = [[memoryview(piece) for piece in pieces] for pieces in coded]
        encode_s = timed(partial(encode_all, codec, form, payloads), rounds, time.thread_time)
        decode_s = timed(partial(decode_all, codec, form, views, outs), rounds, time.thread_time)
        error = error_of(form, payloads, outs)
        if codec.is_exact and error:
            raise RuntimeError("wrong bytes")
        yield {
            **EMPTY, "what": "codec", "dtype": form.dtype, "codec": name,
            "left": sum(piece.nbytes for pieces in views for piece in pieces) / total,
            "encode_gb_s": total / encode_s / 1e9, "decode_gb_s": total / decode_s / 1e9,
            "error": error,
        }  # fmt: skip


def encode_all(codec: Codec, form: Form, payloads: Sequence[memoryview]) -> None:
    """All chunks."""
    for payload in payloads:
        codec.encode(form, payload)


def decode_all(
    codec: Codec,
    form: Form,
    coded: Sequence[Sequence[memoryview]],
    outs: Sequence[memoryview],
) -> None:
    """All chunks."""
    for pieces, out in zip(coded, outs, strict=True):
        codec.decode(form, range(len(pieces)), pieces, out)


def error_of(form: Form, payloads: Sequence[memoryview], outs: Sequence[memoryview]) -> float:
    """Relative error of what came back."""
    wrong = size = 0.0
    for payload, out in zip(payloads, outs, strict=True):
        truth, found = (
            to_float32(np.frombuffer(one, np.uint8), form.dtype) for one in (payload, out)
        )
        wrong += float(np.square(found - truth, dtype=np.float64).sum())
        size += float(np.square(truth, dtype=np.float64).sum())
    return float((wrong / size) ** 0.5)


@contextmanager
def network(url: str, bytes_s: float) -> Iterator[str]:
    """The URL of a server behind a network that brings so many bytes a second, over all
    connections together."""
    lock, free_at = threading.Lock(), time.monotonic()

    def pass_on(data: bytes, seen: int) -> bytes:
        nonlocal free_at
        with lock:
            free_at = max(free_at, time.monotonic()) + len(data) / bytes_s
            wait = free_at - time.monotonic()
        time.sleep(max(0.0, wait))
        return data

    with between(url.partition("://")[2], pass_on) as proxy:
        yield f"redis://{proxy.partition('://')[2]}"


class Host:
    """A host with a codec, whose chunks are in the pool. RuntimeError if one is not."""

    def __init__(self, url: str, codec: str, form: Form, payloads: Sequence[memoryview]) -> None:
        self.codec, self._payloads = codec, payloads
        self.store = PooledStore(
            open_backend(url), deadline_s=60.0, codec=codec, prefix=f"prefixstore/bench/{codec}"
        )
        identity = replace(identity_for(form.layout), kv_dtype=form.dtype)
        self.ns = self.store.namespace(identity, form.layout)
        tokens = np.arange(len(payloads) * form.layout.chunk_tokens, dtype=np.int32)
        self.refs = self.ns.chain(tokens).refs()
        self._outs = [memoryview(bytearray(one.nbytes)) for one in payloads]
        lossy = None if codec not in LOSSY_NAMES else BY_NAME[codec]
        self._wanted = list(payloads)
        if lossy is not None:
            self._wanted = [
                payload_of(there_and_back(lossy, form, p), form.dtype) for p in payloads
            ]
        first = len(payloads) // 4  # what ``auto`` measures with
        for at, stop in ((0, first), (first, len(payloads))):
            states = self.ns.put(self.refs[at:stop], payloads[at:stop], deadline_s=60.0)
            if set(states) != {PutState.STORED}:
                raise RuntimeError(f"a put gave {states}")

    def get(self) -> None:
        """All chunks. RuntimeError if one is missing."""
        if set(self.ns.get(self.refs, self._outs)) != {REMOTE}:
            raise RuntimeError("a get did not give all chunks")

    def check(self) -> None:
        """Every byte of the last get. RuntimeError."""
        if self._outs != self._wanted:
            raise RuntimeError("wrong bytes")


def gets(form: Form, payloads: Sequence[memoryview], rounds: int, mb_s: int) -> Iterator[Row]:
    """Gets through one network, by all hosts in turns."""
    with ExitStack() as stack:
        server = stack.enter_context(redis())
        url = stack.enter_context(network(server.url, 1e6 * mb_s))
        hosts = [Host(url, codec, form, payloads) for codec in (NONE, *CODED, AUTO)]
        for host in hosts:
            stack.callback(host.store.close)
        seconds: dict[str, list[float]] = {host.codec: [] for host in hosts}
        for turn in range(rounds + 1):
            for host in hosts:
                took = timed(host.get, 1)
                host.check()
                if turn:  # the first warms connections and memory
                    seconds[host.codec].append(took)
        plain = statistics.median(seconds[NONE])
        for host in hosts:
            verdict, name = host.ns.choice.verdict, host.codec
            if host.codec == AUTO:
                name = f"{AUTO}: {LOSSLESS if verdict and verdict.pays else NONE}"
            median = statistics.median(seconds[host.codec])
            yield {
                **EMPTY, "what": "get", "codec": name, "network_mb_s": mb_s,
                "get_ms": 1000 * median, "of_none": median / plain,
            }  # fmt: skip


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """What is lossless saves a quarter of bfloat16, and gets become faster on the slowest network;
    ``auto`` makes none slower by more than noise."""
    made = []
    for row in rows:
        if (row["what"], row["dtype"], row["codec"]) == ("codec", "bfloat16", LOSSLESS):
            made.append(Bar("lossless: left of bfloat16", float(str(row["left"])), 0.75, "<="))
        if row["what"] == "get" and row["network_mb_s"] == NETWORKS_MB_S[0]:
            name, most = str(row["codec"]), 1.0 if row["codec"] == NONE else 0.9
            made.append(Bar(f"{name}: get at {NETWORKS_MB_S[0]} MB/s of that without",
                            float(str(row["of_none"])), most, "<="))  # fmt: skip
        elif row["what"] == "get" and str(row["codec"]).startswith(AUTO):
            made.append(Bar(f"{row['codec']}: get at {row['network_mb_s']} MB/s of that without",
                            float(str(row["of_none"])), 1.1, "<="))  # fmt: skip
    return made


@torch.inference_mode()
def kv_of(folder: Path, prompts: int) -> dict[str, tuple[Form, list[memoryview]]]:
    """Chunks of the KV of a model's prompts, by dtype."""
    model = load(folder, "cpu")
    spec, _, ids = make_prompts("B", prompts, 0)
    found = [reference.forward(model, one[None]).key_values for one in ids]
    exact = [context_of(spec, one) for one in found]
    return {
        dtype: (
            form_of(exact[0], dtype),
            [payload_of(chunk, dtype) for one in exact for chunk in chunks(one)],
        )
        for dtype in DTYPES
    }


def main(argv: Sequence[str] | None = None) -> None:
    """See the module docstring."""
    parser = add_arguments(argparse.ArgumentParser(prog="python -m benchmarks.codec"))
    parser.add_argument("--model", type=Path, help="folder; default: the first in models/")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a moment's work, to see it run")
    args = parser.parse_args(argv)
    folders = [args.model] if args.model else sorted(
        path.parent for path in MODELS.glob("*/model.safetensors")
    )  # fmt: skip
    if not folders:
        raise SystemExit(f"no model in {MODELS}: train one with python -m benchmarks.quality.train")
    rounds, prompts = (1, 1) if args.quick else (args.rounds, PROMPTS)
    networks = (400,) if args.quick else NETWORKS_MB_S
    kv = kv_of(folders[0], prompts)
    rows = [row for form, payloads in kv.values() for row in speeds(form, payloads, rounds)]
    form, payloads = kv["bfloat16"]
    for mb_s in networks:
        rows += gets(form, payloads, rounds, mb_s)
    size = sum(one.nbytes for one in payloads) / 2**20
    title = f"Codecs on KV of {folders[0].name}, {size:.0f} MiB in bfloat16"
    report(title, rows, [] if args.quick else bars_of(rows), args)


if __name__ == "__main__":
    main()
