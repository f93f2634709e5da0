"""Where Redis servers are and how they are greeted: the URL of a pool over Redis. Pure."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from prefixstore.errors import ConfigError
from prefixstore.pool.redis_node import Login

_PORT = 6379


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL says."""

    seeds: list[tuple[str, int]]
    login: Login

    @classmethod
    def parse(cls, url: str, password: str = "", ca_file: str | None = None) -> Address:
        """Read a URL. Raises ConfigError, OSError for the file."""
        try:
            parts = urlsplit(url)
            user, hosts = "", parts.netloc
            if "@" in hosts:
                named, _, hosts = hosts.rpartition("@")
                user, _, given = named.partition(":")
                user, password = unquote(user), password or unquote(given)
            seeds = [_host(one) for one in hosts.split(",")] if hosts else [(parts.path, 0)]
            database = int(parts.path.strip("/") or 0) if hosts else 0
            if not hosts and not parts.path.startswith("/"):
                raise ValueError
            if parts.query or parts.fragment or database < 0:
                raise ValueError
        except ValueError:
            # Not the URL itself, which may hold a password.
            raise ConfigError(
                "this is no address of a Redis server",
                "give redis://host:port/database, rediss://host:port or redis:///path/of/socket",
            ) from None
        tls = None
        if parts.scheme == "rediss":
            tls = ssl.create_default_context(cafile=ca_file)
        elif ca_file:
            raise ConfigError("a ca_file for a server without TLS", "give rediss://")
        return cls(seeds, Login(user, password, database, tls))


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError
    return parts.hostname, parts.port or _PORT
