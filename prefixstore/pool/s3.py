"""A backend over S3-compatible object storage, by way of obstore (``pip install prefixstore[s3]``).

``s3://bucket[/prefix][?endpoint=http://host:port&region=...]``. Credentials are those of the
environment (``AWS_ACCESS_KEY_ID`` and the like) or of the machine's role. An object is a request,
so requests run on threads, as many as THREADS.

S3 has no time to live of an object's own: it stands in its metadata, an object that is out of date
is none, and is removed by whoever meets it. What must hold: no thread that is late writes into a
buffer of a caller, who may have given it to somebody else: what came is copied by the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

from prefixstore.client.breaker import Breaker
from prefixstore.errors import ConfigError, RemoteError
from prefixstore.pool.backend import ABSENT, LOST, Get, Put, Written

T = TypeVar("T")
PART_BYTES = 16 << 20
THREADS = 32
COALESCE_BYTES = 256 << 10  # a gap so small is read along: a request costs more
REQUEST_S = 30.0  # so long a thread may hang on a server, whatever its caller's deadline
CONNECT_S = 2.0
LISTED = 1000  # names at a time
_BEYOND = "InvalidRange"  # what S3 says of a range that begins behind an object's end
_EXPIRES = "prefixstore-expires"  # in an object's metadata: seconds since 1970


class _Came(NamedTuple):
    """A range of an object."""

    data: memoryview
    expires_s: float


class S3Backend:
    """See the module docstring and `backend.Backend`."""

    part_bytes = PART_BYTES
    ask_first = False
    reads_short = True
    lists_late = True
    tells_news = False

    def __init__(self, url: str, password: str = "", ca_file: str | None = None) -> None:
        if password or ca_file:
            raise ConfigError(
                "a token or a ca_file for object storage",
                "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, SSL_CERT_FILE in the environment",
            )
        self._obstore, self._store = open_bucket(url)
        self.url = url
        self._breaker = Breaker()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prefixstore-s3")

    @property
    def usable(self) -> bool:
        """See `Backend`."""
        return not self._breaker.is_open

    # ------------------------------------------------------------------ requests
    def _each(self, works: Sequence[Callable[[], T]], deadline_s: float) -> list[T | None]:
        """What each request gave, None for one that failed. Raises RemoteError if all did."""
        if not works:
            return []
        deadline = time.monotonic() + deadline_s
        if deadline_s <= 0:
            raise RemoteError(f"no time was left to ask {self.url}")
        if not self._breaker.admits():
            raise RemoteError(f"{self.url} has not answered lately")
        try:
            futures = [self._threads.submit(work) for work in works]
        except RuntimeError as error:
            raise RemoteError(f"{self.url} was closed") from error
        results: list[T | None] = []
        trouble: Exception | None = None
        for future in futures:
            try:
                results.append(future.result(max(0.0, deadline - time.monotonic())))
            except FutureTimeout:
                trouble = TimeoutError("no answer within the deadline")
                future.cancel()
                results.append(None)
            except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
                trouble = error
                results.append(None)
        if all(result is None for result in results):
            self._breaker.failed()
            text = " ".join(str(trouble).split())
            raise RemoteError(f"{self.url}: {text:.300}") from trouble
        self._breaker.succeeded()
        return results

    def _fetch(self, name: str, start: int, stop: int) -> _Came | None:
        """A range, of any length down to none; None: there is no such object. On a thread."""
        options: dict[str, Any] = {"range": (start, stop)} if stop > start else {"head": True}
        try:
            found = self._obstore.get(self._store, name, options=options)
            came = memoryview(found.bytes()) if stop > start else memoryview(b"")
        except FileNotFoundError:
            return None
        except self._obstore.exceptions.GenericError as error:
            if stop > start and _BEYOND in str(error):
                return self._fetch(name, 0, 0)
            raise
        expires_s = _expiry(found.attributes)
        if 0 < expires_s <= time.time():
            self._obstore.delete(self._store, name)
            return None
        return _Came(came, expires_s)

    def _write(self, name: str, data: bytes, expires_s: float, replace: bool) -> Written:
        """On a thread."""
        attributes = {_EXPIRES: f"{expires_s:.3f}"} if expires_s else {}
        send = partial(
            self._obstore.put, self._store, name, data, attributes=attributes, use_multipart=False
        )
        try:
            send(mode="overwrite" if replace else "create")
        except self._obstore.exceptions.AlreadyExistsError:
            if self._fetch(name, 0, 0) is not None:
                return Written.THERE
            send(mode="overwrite")  # it was out of date
        return Written.YES

    # ------------------------------------------------------------------ what a backend does
    def put(
        self,
        puts: Sequence[Put],
        *,
        deadline_s: float,
        ttl_s: float | None = None,
        replace: bool = False,
    ) -> list[Written]:
        """See `Backend`."""
        expires_s = 0.0 if ttl_s is None else time.time() + ttl_s
        works = [
            partial(self._write, one.name, b"".join(one.whole), expires_s, replace) for one in puts
        ]
        return [done or Written.NO for done in self._each(works, deadline_s)]

    def get(self, gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        """See `Backend`."""
        runs = [_runs(one) for one in gets]
        works = [
            partial(self._told, one.name, run[0][0], run[-1][0] + run[-1][1].nbytes)
            for one, found in zip(gets, runs, strict=True)
            for run in found
        ]
        told = iter(self._each(works, deadline_s))
        return [_take([(run, next(told)) for run in found]) for found in runs]

    def _told(self, name: str, start: int, stop: int) -> tuple[_Came | None]:
        """As `_fetch`, told apart from a request that failed."""
        return (self._fetch(name, start, stop),)

    def exist(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """See `Backend`."""
        told = self._each([partial(self._told, name, 0, 0) for name in names], deadline_s)
        return [one is not None and one[0] is not None for one in told]

    def delete(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """See `Backend`. S3 does not tell what was there: it is asked before."""
        there = self.exist(names, deadline_s=deadline_s)
        works = [
            partial(self._remove, name) for name, found in zip(names, there, strict=True) if found
        ]
        done = iter(self._each(works, deadline_s))
        return [found and bool(next(done)) for found in there]

    def _remove(self, name: str) -> bool:
        self._obstore.delete(self._store, name)
        return True

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[list[str]]:
        """See `Backend`; ``prefix`` ends with a slash."""
        stream = self._obstore.list(self._store, prefix=prefix, chunk_size=LISTED)
        while True:
            [part] = self._each([lambda: list(next(stream, []))], deadline_s)
            if not part:
                return
            yield [one["path"] for one in part]

    def announce(self, topic: str, message: bytes, *, deadline_s: float) -> None:
        """It has none."""
        raise NotImplementedError

    def hear(self, topic: str, after: str, *, wait_s: float) -> tuple[str, list[bytes]]:
        """It has none."""
        raise NotImplementedError

    def check_open(self, deadline_s: float) -> None:
        """See `Backend`. Lists: of a bucket that is not there any name is not there either."""
        for _ in self.names("check/", deadline_s=deadline_s):
            break

    def close(self) -> None:
        """See `Backend`."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def open_bucket(url: str) -> tuple[Any, Any]:
    """The package obstore, and the bucket of a URL. Raises ConfigError."""
    try:
        import obstore
        from obstore.store import S3Store
    except ImportError as error:
        raise ConfigError(
            "a pool in object storage wants the package obstore", "pip install 'prefixstore[s3]'"
        ) from error
    example = "give s3://bucket/prefix?endpoint=https://host:port&region=REGION"
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        unknown = options.keys() - {"endpoint", "region"}
        is_one = parts.hostname and "@" not in parts.netloc and not (unknown or parts.fragment)
    except ValueError:  # brackets that are none
        is_one = False
    if not is_one:
        raise ConfigError("this is no address of object storage", example)
    endpoint = options.get("endpoint")
    client = {
        "timeout": f"{REQUEST_S:.0f}s", "connect_timeout": f"{CONNECT_S:.0f}s",
        "allow_http": (endpoint or "").startswith("http://"),
    }  # fmt: skip
    try:
        store = S3Store(
            parts.hostname, prefix=parts.path.strip("/") or None, client_options=client,
            retry_config={"max_retries": 1}, **options,
        )  # fmt: skip
    except (obstore.exceptions.BaseError, ValueError, TypeError) as error:
        raise ConfigError(f"{url}: {error}", example) from error
    return obstore, store


def _expiry(attributes: Any) -> float:
    try:
        return float(attributes.get(_EXPIRES, 0))
    except ValueError:
        return 0.0


def _runs(one: Get) -> list[list[tuple[int, memoryview]]]:
    """The cuts of an object, those near each other as one."""
    runs: list[list[tuple[int, memoryview]]] = []
    stop = -COALESCE_BYTES - 1
    for start, out in one.cuts:
        if start - stop > COALESCE_BYTES:
            runs.append([])
        runs[-1].append((start, out))
        stop = start + out.nbytes
    return runs


def _take(told: Sequence[tuple[list[tuple[int, memoryview]], tuple[_Came | None] | None]]) -> int:
    """Copy what came of an object to where it is wanted; how many bytes, ABSENT or LOST."""
    came = 0
    for run, answer in told:
        if answer is None:
            return LOST
        if answer[0] is None:
            return ABSENT
        data, first = answer[0].data, run[0][0]
        for start, out in run:
            cut = data[start - first : start - first + out.nbytes]
            out[: cut.nbytes] = cut
            came += cut.nbytes
            if cut.nbytes < out.nbytes:
                return came
    return came
