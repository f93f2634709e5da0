"""How stores are named by URL, wherever one may be given. Pure, and imports nothing."""

from __future__ import annotations

SERVER_SCHEMES = ("http", "https", "unix")
POOL_SCHEMES = ("redis", "rediss", "s3", "mooncake")


def shown(url: str) -> str:
    """A URL as it may stand in a message: without user and password."""
    scheme, found, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"
