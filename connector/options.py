"""What a user may set: once for the engine, and for each request. Unknown names are errors.

Engine: ``kv_connector_extra_config`` of ``--kv-transfer-config``. A mistake there stops the start.
Request: ``kv_transfer_params: {"prefixstore": {...}}``. A mistake there reaches the client as
``kv_transfer_params.prefixstore.error`` of the response; the request is served without the store,
because a connector has no way to refuse one and must never stop the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

from prefixstore.codec import NONE, check_engine_choice
from prefixstore.config import MIB, SALT_BYTES_MAX, TAG_BYTES_MAX, parse_bytes
from prefixstore.errors import ConfigError
from prefixstore.urls import POOL_SCHEMES, SERVER_SCHEMES, shown

REQUEST_KEY = "prefixstore"
STAGING_STEPS = 2  # the next one is under way while the first one's chunks leave the ring
STAGING_BYTES_MIN, STAGING_BYTES_MAX = 64 * MIB, 2048 * MIB
WAIT_MS_MAX = 60_000
LOAD_POLICIES = ("auto", "both", "always", "never")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of one engine. Sizes are bytes or text such as "8GiB"."""

    dir: str = ""
    memory: int | str | None = None  # None: what the store has
    disk: int | str | None = None
    memory_dir: str | None = None
    chunk_tokens: int = 64  # raised to a multiple of the engine's block size
    load: str = "auto"  # only what is faster to load than to compute; both: see `LoadPlanner.front`
    save: bool = True
    prepare: bool = True  # on CUDA: make the memory tier's pages at the start, not when needed
    staging: int | str | None = None  # device memory between KV cache and store; None: two steps'
    device: int | str = 0  # GPU memory for chunks that are loaded again and again
    load_threads: int = 1
    stall_ms: int = 100  # longest time a stalled store may cost one request
    bypass_s: float = 10.0  # how long a stalled store is left alone
    blend: Any = None  # true or an object: see `blend_options`
    url: str | None = None  # of a server or a pool: alone, or with the folder in front of it
    token_file: str | None = None
    ca_file: str | None = None
    codec: str = NONE  # see `prefixstore.codec`

    @property
    def where(self) -> str:
        """The store, in messages."""
        return " behind ".join(filter(None, (self.dir, self.url and shown(self.url))))

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> EngineOptions:
        """Read ``kv_connector_extra_config``. Raises ConfigError naming the entry."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConfigError(
                f"kv_connector_extra_config has unknown entries {unknown}",
                f"known: {', '.join(sorted(known))}",
            )
        for name in ("dir", "url", "token_file", "ca_file"):
            if not isinstance(given.get(name, ""), str | None):
                raise ConfigError(f"{name!r} is {given[name]!r}", "give text")
        options = cls(**given)
        if not options.where:
            raise ConfigError(
                "kv_connector_extra_config has neither 'dir' nor 'url'",
                'give the folder of the store, for example {"dir": "/var/cache/kv"}, or the '
                'address of a server, for example {"url": "http://10.0.0.7:7575"}',
            )
        options._check_address()
        for name, least in (("memory", 1), ("disk", 0), ("staging", 1), ("device", 0)):
            value = getattr(options, name)
            if (value is not None or name == "device") and not _is_size(value, least):
                raise ConfigError(f"{name}={value!r:.80}", 'give bytes or text such as "8GiB"')
        if options.load not in LOAD_POLICIES:
            raise ConfigError(f"load={options.load!r}", f"give one of {', '.join(LOAD_POLICIES)}")
        for name in ("chunk_tokens", "load_threads", "stall_ms"):
            value = getattr(options, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r:.80}", "give a whole number above 0")
        if not _is_number(options.bypass_s) or not 0 < options.bypass_s < 2**31:
            raise ConfigError(f"bypass_s={options.bypass_s!r}", "give seconds above 0")
        for name in ("save", "prepare"):
            value = getattr(options, name)
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r:.80}", "give true or false")
        if options.memory_dir is not None and not isinstance(options.memory_dir, str):
            raise ConfigError(f"memory_dir={options.memory_dir!r}", "give a folder")
        return options

    @property
    def _scheme(self) -> str:
        return (self.url or "").partition(":")[0]

    def _check_address(self) -> None:
        schemes = (*SERVER_SCHEMES, *POOL_SCHEMES)
        if self.url and self._scheme not in schemes:
            pools = ", ".join(f"{one}://" for one in POOL_SCHEMES)
            raise ConfigError(
                f"url={shown(self.url)!r}",
                f"give http://host:port, https://..., unix:/path; of a pool {pools}",
            )
        check_engine_choice(self.codec, has_pool=self._scheme in POOL_SCHEMES)
        if not self.url and (self.token_file or self.ca_file):
            raise ConfigError("token_file or ca_file without a url", "they are for a server")
        if not self.dir and (self.memory, self.disk, self.memory_dir) != (None, None, None):
            raise ConfigError(
                "memory, disk or memory_dir without a dir", "the server has its own; see `serve`"
            )

    @property
    def splits(self) -> bool:
        """Whether a prefix may be loaded and computed at once."""
        return self.load == "both"

    @property
    def weighs(self) -> bool:
        """Whether loading is compared with computing."""
        return self.load in ("auto", "both")

    @property
    def device_bytes(self) -> int:
        """Size of the device tier of each worker; 0: there is none."""
        return parse_bytes(self.device)

    def staging_bytes(self, step_bytes: int) -> int:
        """Size of the staging ring; by default it holds what STAGING_STEPS of the largest steps can
        complete."""
        if self.staging is not None:
            return parse_bytes(self.staging)
        return min(max(STAGING_STEPS * step_bytes, STAGING_BYTES_MIN), STAGING_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What one request asks of the store."""

    read: bool = True
    write: bool = True
    salt: str = ""
    pin: bool = False
    alone: bool = False  # its text stands behind a fixed preamble only: good to reuse elsewhere
    ttl_s: float | None = None
    tag: str = ""
    max_load_tokens: int | None = None
    blend: Any = None  # true, false or an object: see `blend_options`
    wait_ms: int = 0  # for chunks of the prompt that another engine is about to have stored

    @classmethod
    def parse(cls, params: Any) -> RequestOptions:
        """Read ``kv_transfer_params`` of a request. Raises ConfigError naming the entry."""
        if params is not None and not isinstance(params, Mapping):
            raise ConfigError(f"kv_transfer_params is {params!r:.80}", "give an object")
        given = (params or {}).get(REQUEST_KEY)
        if given is None:
            return cls()
        if not isinstance(given, Mapping):
            raise ConfigError(f"{REQUEST_KEY} is {given!r:.80}", "give an object")
        unknown = sorted(set(given) - set(_CHECKS))
        if unknown:
            raise ConfigError(
                f"{REQUEST_KEY} has unknown entries {unknown}", f"known: {', '.join(_CHECKS)}"
            )
        for name, value in given.items():
            check, expected = _CHECKS[name]
            if not check(value):
                raise ConfigError(f"{REQUEST_KEY}.{name} is {value!r:.80}", f"give {expected}")
        return cls(**given)


def _is_size(value: Any, least: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return False
    try:
        return parse_bytes(value) >= least
    except ConfigError:
        return False


def _is_text(value: Any, bytes_max: int) -> bool:
    try:
        return isinstance(value, str) and len(value.encode()) <= bytes_max
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "read": (lambda v: isinstance(v, bool), "true or false"),
    "write": (lambda v: isinstance(v, bool), "true or false"),
    "salt": (
        lambda v: _is_text(v, SALT_BYTES_MAX),
        f"text of at most {SALT_BYTES_MAX} bytes",
    ),
    "pin": (lambda v: isinstance(v, bool), "true or false"),
    "alone": (lambda v: isinstance(v, bool), "true or false"),
    "ttl_s": (lambda v: v is None or (_is_number(v) and 0 < v < 2**31), "seconds above 0"),
    "tag": (
        lambda v: _is_text(v, TAG_BYTES_MAX),
        f"text of at most {TAG_BYTES_MAX} bytes",
    ),
    "max_load_tokens": (
        lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 0),
        "a whole number of tokens, or null",
    ),
    "blend": (lambda v: isinstance(v, bool | Mapping), "true, false or an object"),
    "wait_ms": (
        lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= WAIT_MS_MAX,
        f"a whole number of milliseconds up to {WAIT_MS_MAX}",
    ),
}


def full_salt(cache_salt: str | None, salt: str, epoch: bytes = b"") -> bytes:
    """The salt of a request's keys: a digest of vLLM's own ``cache_salt``, ours, and the epoch."""
    if not cache_salt and not salt and not epoch:
        return b""
    first = (cache_salt or "").encode(errors="surrogatepass")
    parts = len(first).to_bytes(4, "little") + first + len(epoch).to_bytes(4, "little") + epoch
    return blake2b(parts + salt.encode(), digest_size=32).digest()
