"""Who may ask what: tokens, tenants, and the namespaces that keep tenants apart.

A tenant's KV lives in namespaces of its own: the identity it names, with a mark that is an HMAC of
the tenant's name under a key only this store has (``serve.key`` in its folder). So all that the
library keeps apart by namespace (keys, segments, staleness, quotas) is apart by tenant, and no key
of a tenant can be computed without the mark. A tenant learns its own namespaces' ids, which reveal
nothing of others'. The tenant `LOCAL` has no mark: it shares with the engines of the host, and it
alone may read metrics and drain. Without a tokens file everybody is `LOCAL`.

A lost ``serve.key`` makes tenants' chunks unreachable until they are evicted; nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from prefixstore.config import parse_bytes
from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity, canonical_json
from prefixstore.ledger import DISK, MEMORY
from prefixstore.registry import GENERATION_FIELD
from prefixstore.serve.limits import QUOTA_SHARE, TENANTS_MAX, TOKEN_CHARS_MIN
from prefixstore.serve.refusal import RefusedError
from prefixstore.store import Store

LOCAL = "local"
MARK_FIELD = "prefixstore_tenant"
_KEY_FILE = "serve.key"
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_HERE = re.compile(r"(localhost|[0-9.]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?")
_TOKEN = re.compile(r"[\x21-\x39\x3b-\x7e]+")  # printable, no space, no colon


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody with a token."""

    name: str
    mark: str  # "" for LOCAL
    token_digest: bytes = b""
    quota_bytes: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether it shares with the engines of the host."""
        return not self.mark

    @property
    def group(self) -> bytes:
        """16 bytes that name its quota."""
        return hashlib.blake2b(self.mark.encode(), digest_size=16).digest()

    def marked(self, identity: ModelIdentity) -> ModelIdentity:
        """The identity under which its KV is kept. Raises ConfigError for one that has what only
        the store may add."""
        forward = json.loads(identity.forward)
        for name in (MARK_FIELD, GENERATION_FIELD):
            if name in forward:
                raise ConfigError(f"the identity has a field {name}", "leave it to the server")
        if self.is_local:
            return identity
        return replace(identity, forward=canonical_json({**forward, MARK_FIELD: self.mark}))

    def owns(self, identity: ModelIdentity) -> bool:
        """Whether KV of that identity is its own."""
        return self.has_mark(mark_of(identity))

    def has_mark(self, mark: str) -> bool:
        """Whether what has this mark is its own."""
        return hmac.compare_digest(mark.encode(), self.mark.encode())


def mark_of(identity: ModelIdentity) -> str:
    """The mark of the tenant an identity belongs to; "" for LOCAL."""
    return str(json.loads(identity.forward).get(MARK_FIELD, ""))


class Tenants:
    """Those who may ask."""

    def __init__(self, tenants: Sequence[Tenant], quotas: dict[str, dict[int, int]]) -> None:
        self.tenants, self._quotas = list(tenants), quotas
        self.open = not tenants
        self._anyone = Tenant(LOCAL, "")

    def authenticate(self, header: str) -> Tenant | None:
        """The tenant of an ``Authorization`` header; None if there is none.

        Compares digests, all of them, whichever fits: the time tells nothing.
        """
        if self.open:
            return self._anyone
        scheme, _, token = header.partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for tenant in self.tenants:
            if hmac.compare_digest(tenant.token_digest, digest):
                found = tenant
        return found if scheme.lower() == "bearer" else None

    def limit(self, store: Store, tenant: Tenant, *namespaces: bytes) -> None:
        """Put namespaces under their tenant's quota."""
        limits = self._quotas.get(tenant.name, {}).items()
        store.quotas.set_groups(
            [(tier, most, tenant.group, name) for tier, most in limits for name in namespaces]
        )

    def limit_known(self, store: Store) -> None:
        """Do so for all the namespaces there are: the quotas are those of the tokens file now.

        Of tenants that are no longer in it nothing may enter, and what is there gives way.
        """
        by_mark: dict[str, list[bytes]] = {}
        for record in store.namespaces():
            by_mark.setdefault(mark_of(record.identity), []).append(record.identity.namespace)
        known = {tenant.mark: tenant for tenant in self.tenants}
        for mark, names in by_mark.items():
            if mark in known:
                self.limit(store, known[mark], *names)
            elif mark:
                group = Tenant("", mark).group
                tiers = (MEMORY, DISK)
                store.quotas.set_groups([(tier, 0, group, n) for tier in tiers for n in names])


def check_origin(headers: Mapping[str, str], is_open: bool) -> None:
    """A page of another site may have a browser of this host send requests, which need no token
    where there are none. Raises RefusedError.

    Pages of this server have its address as their origin; without tokens it must be a number or
    ``localhost``, because any site may have its own name mean this host.
    """
    origin = headers.get("Origin")
    if origin is None:
        return
    host = origin.partition("://")[2]
    if host != headers.get("Host") or (is_open and not _HERE.fullmatch(host)):
        raise RefusedError(403, "origin", "a page of another site has asked", "ask it directly")


def read_tokens(path: Path, store: Store) -> Tenants:
    """Read ``tenant:token[:quota]`` lines. Raises ConfigError, which never shows a token."""
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "give a tokens file") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} has mode {stat.S_IMODE(mode):o}: others may read the tokens", "chmod 600 it"
        )
    key = _store_key(store.folder)
    tenants = [
        _parse(line.strip(), f"{path}:{number}", key)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    for what in ([t.name for t in tenants], [t.token_digest for t in tenants]):
        if len(set(what)) != len(what):
            raise ConfigError(f"{path} has a tenant or a token twice", "give each its own")
    if not 0 < len(tenants) <= TENANTS_MAX:
        raise ConfigError(f"{path} has {len(tenants)} tenants", f"give 1 to {TENANTS_MAX}")
    return Tenants(tenants, _quotas(tenants, store, path))


def _parse(line: str, where: str, key: bytes) -> Tenant:
    name, *rest = line.split(":")
    if not _NAME.fullmatch(name) or not 1 <= len(rest) <= 2 or not _TOKEN.fullmatch(rest[0]):
        raise ConfigError(f"{where}: not a line of a tokens file", "write tenant:token[:quota]")
    if len(rest[0]) < TOKEN_CHARS_MIN:
        raise ConfigError(
            f"{where}: the token has {len(rest[0])} characters",
            f"give at least {TOKEN_CHARS_MIN}, for example of `openssl rand -hex 32`",
        )
    try:
        quota_bytes = parse_bytes(rest[1]) if len(rest) == 2 else None
    except ConfigError:  # what stands there may be the end of a token that has a colon
        raise ConfigError(f"{where}: the quota is not a size", "write for example 8GiB") from None
    if quota_bytes is not None and (name == LOCAL or quota_bytes <= 0):
        raise ConfigError(f"{where}: a quota of {rest[1]}", f"above 0, and none for {LOCAL}")
    mark = "" if name == LOCAL else hmac.new(key, name.encode(), "sha256").hexdigest()[:32]
    return Tenant(name, mark, hashlib.sha256(rest[0].encode()).digest(), quota_bytes)


def _quotas(tenants: Sequence[Tenant], store: Store, path: Path) -> dict[str, dict[int, int]]:
    """Bytes of each tier for each tenant, in all less than the tier: so that nobody's chunks ever
    have to give way to another's. Who has no quota gets an equal share of what is left."""
    settings = store.settings
    main = settings.disk_bytes or settings.memory_bytes
    guests = [tenant for tenant in tenants if not tenant.is_local]
    given = sum(tenant.quota_bytes or 0 for tenant in guests)
    left = int(QUOTA_SHARE * main) - given
    equal = [tenant for tenant in guests if tenant.quota_bytes is None]
    if left < 0 or (equal and left < len(equal)):
        raise ConfigError(
            f"{path}: the quotas are {given} bytes of {main}",
            f"they may be {QUOTA_SHARE:.0%} of the tier together, so that tenants do not evict "
            "each other's chunks",
        )
    quotas = {}
    for tenant in guests:
        share = (tenant.quota_bytes or left // len(equal)) / main
        quotas[tenant.name] = {MEMORY: int(share * settings.memory_bytes)}
        if settings.disk_bytes:
            quotas[tenant.name][DISK] = int(share * settings.disk_bytes)
    return quotas


def _store_key(folder: Path) -> bytes:
    """The key of the marks, made by the first server of a store."""
    path = folder / _KEY_FILE
    with suppress(FileExistsError):
        partial = folder / f".{_KEY_FILE}.{os.getpid()}"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # whole or not at all, and the first one wins
        finally:
            partial.unlink()
    key = path.read_bytes()
    if len(key) != 32:
        raise ConfigError(f"{path} is not the key of a store", "delete it: tenants begin anew")
    return key
