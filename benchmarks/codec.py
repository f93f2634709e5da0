"""What the lossless codec saves and costs, and when a get through a slow network becomes faster.

``python -m benchmarks.codec [--json] [--check] [--quick] [--model FOLDER]``

On the KV that a trained model has of its task's prompts, in chunks of 64 tokens. One table. First,
for each dtype: bytes that are left of one, GB (of KV) that a thread encodes and decodes in a second
of its own CPU time. Then gets of all chunks, in bfloat16, from a real Redis behind a network of so
many MB/s, a proxy in this process: ms, with and without the codec, in turns. What comes back is
compared, byte by byte. ``auto`` says what it chose there by itself.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.fault_proxy import between
from benchmarks.pool_servers import redis
from benchmarks.quality.__main__ import MODELS
from benchmarks.quality.cases import load
from benchmarks.quality.codecs import CHUNK_TOKENS, context_of, make_prompts
from benchmarks.store_sizes import identity_for
from benchmarks.table import Bar, add_arguments, report
from blend import reference
from blend.reference import KeyValues
from prefixstore.codec import AUTO, LOSSLESS, NONE, POOL_CHOICES, lossless
from prefixstore.codec.form import Form, from_float32
from prefixstore.found import REMOTE
from prefixstore.layout import Layout
from prefixstore.pool.backend import open_backend
from prefixstore.pool.store import PooledStore
from prefixstore.putting import PutState

DTYPES = ("bfloat16", "float16", "float32")
NETWORKS_MB_S = (25, 125, 400)  # 0.2, 1 and 3.2 Gbit/s
PROMPTS = 4  # of 1,024 tokens: 16 MiB of KV in bfloat16
Array = npt.NDArray[np.float32]
Row = dict[str, object]
EMPTY: Row = {
    "what": "", "dtype": "bfloat16", "codec": "", "left": None, "encode_gb_s": None,
    "decode_gb_s": None, "network_mb_s": None, "get_ms": None, "of_none": None,
}  # fmt: skip


def form_of(key_values: KeyValues, dtype: str) -> Form:
    """Of chunks of this KV."""
    _, heads, _, size = key_values[0][0].shape
    width = {"float32": 4}.get(dtype, 2)
    return Form(Layout(len(key_values), 2, heads, CHUNK_TOKENS, size * width), dtype)


def chunks(key_values: KeyValues) -> Iterator[Array]:
    """Whole chunks of each prompt in turn: float32 [layer, plane, head, token, dim]."""
    pairs = [torch.stack(pair, 1) for pair in key_values]
    for layers in torch.stack(pairs, 1).float().cpu().numpy():
        for at in range(0, layers.shape[3] - CHUNK_TOKENS + 1, CHUNK_TOKENS):
            yield np.ascontiguousarray(layers[:, :, :, at : at + CHUNK_TOKENS])


def payload_of(chunk: Array, dtype: str) -> memoryview:
    """A chunk's bytes in a pool, before a codec."""
    return memoryview(from_float32(chunk, dtype).tobytes())


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


def speeds(form: Form, payloads: Sequence[memoryview], rounds: int) -> Row:
    """What a thread does with chunks of one dtype. RuntimeError for a wrong byte."""
    total = sum(one.nbytes for one in payloads)
    coded = [lossless.encode(form, one) for one in payloads]
    if None in coded:
        raise RuntimeError(f"a chunk of {form.dtype} gets no smaller")
    views = [[memoryview(piece) for piece in pieces or ()] for pieces in coded]
    outs = [memoryview(bytearray(one.nbytes)) for one in payloads]

    def encode() -> None:
        for payload in payloads:
            lossless.encode(form, payload)

    def decode() -> None:
        for pieces, out in zip(views, outs, strict=True):
            lossless.decode(form, pieces, out)

    encode_s, decode_s = (timed(work, rounds, time.thread_time) for work in (encode, decode))
    if outs != list(payloads):
        raise RuntimeError("wrong bytes")
    return {
        **EMPTY, "what": "codec", "dtype": form.dtype, "codec": LOSSLESS,
        "left": sum(piece.nbytes for pieces in views for piece in pieces) / total,
        "encode_gb_s": total / encode_s / 1e9, "decode_gb_s": total / decode_s / 1e9,
    }  # fmt: skip


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
        self.codec, self._payloads = codec, list(payloads)
        self.store = PooledStore(
            open_backend(url), deadline_s=60.0, codec=codec, prefix=f"prefixstore/bench/{codec}"
        )
        identity = replace(identity_for(form.layout), kv_dtype=form.dtype)
        self.ns = self.store.namespace(identity, form.layout)
        tokens = np.arange(len(payloads) * form.layout.chunk_tokens, dtype=np.int32)
        self.refs = self.ns.chain(tokens).refs()
        self._outs = [memoryview(bytearray(one.nbytes)) for one in payloads]
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
        if self._outs != self._payloads:
            raise RuntimeError("wrong bytes")


def gets(form: Form, payloads: Sequence[memoryview], rounds: int, mb_s: int) -> Iterator[Row]:
    """Gets through one network, by all hosts in turns."""
    with ExitStack() as stack:
        server = stack.enter_context(redis())
        url = stack.enter_context(network(server.url, 1e6 * mb_s))
        hosts = [Host(url, codec, form, payloads) for codec in POOL_CHOICES]
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
    """A quarter of bfloat16 is saved, and gets become faster on the slowest network;
    ``auto`` makes none slower by more than noise."""
    made = []
    for row in rows:
        if (row["what"], row["dtype"]) == ("codec", "bfloat16"):
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
    rows = [speeds(form, payloads, rounds) for form, payloads in kv.values()]
    form, payloads = kv["bfloat16"]
    for mb_s in networks:
        rows += gets(form, payloads, rounds, mb_s)
    size = sum(one.nbytes for one in payloads) / 2**20
    title = f"The lossless codec on KV of {folders[0].name}, {size:.0f} MiB in bfloat16"
    report(title, rows, [] if args.quick else bars_of(rows), args)


if __name__ == "__main__":
    main()
