"""The checks of ``prefixstore connect``, in order: server, token, model, bytes there and back.

Each ends well or with one StoreError that says what to do. What must hold: nothing that others use
is changed; the chunks that are sent have a salt nobody else knows, are deleted again, and expire if
a crash leaves them.
"""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefixstore.client.caller import RefusedError
from prefixstore.client.remote import RemoteStore
from prefixstore.client.token import TOKEN_VARIABLE
from prefixstore.codec import NONE
from prefixstore.codec.form import FLOATS, from_float32
from prefixstore.connect import ModelFacts
from prefixstore.errors import ConfigError, RemoteError, StoreError, StoreTimeoutError
from prefixstore.interface import StoreLike
from prefixstore.layout import Layout
from prefixstore.pool.choosing import Choice, judge, measure
from prefixstore.pool.namespace import PooledNamespace
from prefixstore.putting import PutState

DEADLINE_S = 5.0
_ROUND_TRIPS, _READS = 20, 3
_CHUNKS_MAX, _BYTES_MAX = 8, 32 << 20
_TTL_S = 60.0
_TAG = "prefixstore connect"


@dataclass
class Found:
    """What came out, in the order of the checks; a name of its own for each."""

    url: str
    token: str = "none"
    read_only: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    namespace: str = ""
    was_known: bool = False
    round_trip_ms: float | None = None
    put_gb_s: float | None = None
    get_gb_s: float | None = None
    sent_bytes: int = 0
    codec_pays: bool | None = None  # the lossless one, in gets of this pool
    codec_why: str = ""
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def ask(store: RemoteStore, path: str) -> dict[str, Any]:
    """GET something that is JSON. Raises StoreError."""
    return store.caller.json("GET", path, {}, deadline_s=DEADLINE_S)


def check_server(store: RemoteStore, found: Found) -> None:
    """Reachable, a server of this kind, ready."""
    other = f"{found.url} answers, but not like a prefixstore server"
    try:
        health = ask(store, "/healthz")
    except RefusedError as error:
        raise RemoteError(f"{other}: {error}", "check host and port") from error
    except (RemoteError, StoreTimeoutError) as error:
        problem = str(error).removeprefix(f"{found.url}: ").removesuffix(f" ({error.hint})")
        raise RemoteError(f"cannot reach {found.url}: {problem}", _advice(problem)) from error
    if health != {"status": "ok"}:
        raise RemoteError(other, "check host and port")
    try:
        found.read_only = bool(ask(store, "/readyz").get("read_only"))
    except StoreError as error:
        raise RemoteError(f"{found.url} is not ready: {error}", "wait, or start it anew") from error
    if found.read_only:
        found.notes.append("the server takes nothing new (--read-only): engines only load")


def _advice(problem: str) -> str:
    """What to do about a connection that failed."""
    for words, advice in (
        ("WRONG_VERSION_NUMBER", "the server speaks no TLS: try http://"),
        ("certificate", "give the certificates it is signed by as --ca-file"),
        ("not an answer of HTTP", "something else listens there"),
        ("closed the connection", "a server with TLS wants https://"),
        ("Name or service", "check the host's name"),
        ("No such file", "check the path of the socket"),
        ("Permission denied", "the socket is for the user that runs the server"),
        ("refused", "start it: prefixstore serve DIR; by itself it listens on its own host only"),
    ):
        if words in problem:
            return advice
    return "check address and firewall; by itself a server listens on its own host only"


def check_token(
    store: RemoteStore, token: str, ca_file: str | None, found: Found
) -> list[dict[str, Any]]:
    """The token's namespaces. Raises RemoteError for one that is not taken."""
    try:
        listed: list[dict[str, Any]] = ask(store, "/v1/namespaces")["namespaces"]
    except RefusedError as error:
        if error.code != "token":
            raise
        if token:
            raise RemoteError(
                f"{found.url} does not take this token",
                "compare it with the server's --tokens file; a change there needs a restart",
            ) from error
        raise RemoteError(
            f"{found.url} wants a token", f"give --token-file, or set {TOKEN_VARIABLE}"
        ) from error
    if not token:
        return listed
    found.token = "taken"
    with RemoteStore(found.url, deadline_s=DEADLINE_S, ca_file=ca_file) as stranger:
        try:
            ask(stranger, "/v1/namespaces")
        except StoreError:
            return listed
    found.token = "not asked for"
    found.notes.append("the server asks nobody for a token: whoever reaches it reads and writes")
    return listed


def check_model(facts: ModelFacts, listed: list[dict[str, Any]], found: Found) -> Layout | None:
    """Compare the model with what the server has; the layout of its chunks, if it is known."""
    same = [one for one in listed if facts.is_of(one["identity"])]
    found.was_known = bool(same)
    if same:
        found.namespace = same[0]["namespace"]
        if facts.layout is not None and same[0]["layout"] != facts.layout.to_json():
            raise ConfigError(
                f"the server keeps this model's KV as {same[0]['layout']}, "
                f"not {facts.layout.to_json()}",
                "give the arguments of your engine as --engine, or upgrade the older side",
            )
    elif nearest := facts.nearest(one["identity"] for one in listed):
        found.notes.append(f"nothing of this model is stored yet; the nearest differs in {nearest}")
    if found.read_only and not same:
        found.notes.append("it will find nothing there")
    return facts.layout


def there_and_back(store: StoreLike, facts: ModelFacts, layout: Layout, found: Found) -> None:
    """Put, match, get and delete chunks of made-up numbers under a salt of our own; of a pool find
    out whether a codec would pay; what is rounded has no other."""
    namespace = store.namespace(facts.identity, layout)
    if isinstance(namespace, PooledNamespace):
        namespace.choice = Choice(NONE)  # the network is measured, and every byte compared
        namespace.meets_coded = False
    found.namespace = namespace.name.hex()
    count = max(1, min(_CHUNKS_MAX, _BYTES_MAX // layout.payload_bytes))
    salt, size = secrets.token_bytes(16), layout.payload_bytes
    refs = namespace.chain(range(count * layout.chunk_tokens), salt=salt).refs()
    payloads = [_like_kv(facts.identity.kv_dtype, size) for _ in refs]
    outs = [memoryview(bytearray(size)) for _ in refs]
    measure_round_trip(lambda: namespace.match(refs[:1]), found)
    try:
        began = time.perf_counter()
        states = namespace.put(refs, payloads, ttl_s=_TTL_S, tag=_TAG)
        found.put_gb_s = count * size / (time.perf_counter() - began) / 1e9
        if set(states) != {PutState.STORED}:
            raise ConfigError(
                f"the server did not store {count} chunks of {size} bytes: "
                f"{', '.join(sorted({state.value for state in states}))}",
                "full: give it a larger --memory; quota: the tenant's, in its --tokens file",
            )
        matched, seconds = namespace.match(refs).num_chunks, []
        for _ in range(_READS):
            began = time.perf_counter()
            tiers = namespace.get(refs, outs)
            seconds.append(time.perf_counter() - began)
        whole = all(out == one for out, one in zip(outs, payloads, strict=True))
        if matched != count or 0 in tiers or not whole:
            raise RemoteError(
                f"of {count} chunks that were stored {matched} were found and "
                f"{sum(tier > 0 for tier in tiers)} came back",
                "is the memory tier too small, or something between here and there that changes "
                "bytes? see the server's log",
            )
        found.get_gb_s = count * size / min(seconds) / 1e9
        found.sent_bytes = count * size
        if isinstance(namespace, PooledNamespace) and not facts.identity.codec:
            figures = measure(namespace, refs, [memoryview(one) for one in payloads])
            if figures is not None:
                found.codec_pays, found.codec_why = judge(figures)
    finally:
        try:
            deleted = namespace.delete(refs)
        except StoreError:
            deleted = 0  # what went wrong before is the better message
    if deleted != count:
        found.notes.append(f"{count - deleted} chunks were not deleted; they expire in a minute")


def _like_kv(dtype: str, num_bytes: int) -> bytes:
    """Numbers of a normal distribution: no KV, but exponents that are as much alike."""
    if dtype not in FLOATS:
        return os.urandom(num_bytes)
    count = -(-num_bytes // FLOATS[dtype])
    values = np.random.default_rng().standard_normal(count, np.float32)
    return from_float32(values, dtype).tobytes()[:num_bytes]


def measure_round_trip(call: Callable[[], object], found: Found) -> None:
    """Median time of a call."""
    seconds = []
    for _ in range(_ROUND_TRIPS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    found.round_trip_ms = 1000 * statistics.median(seconds)
