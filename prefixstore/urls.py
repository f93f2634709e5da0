"""How stores are named by URL, wherever one may be given. Pure, and imports next to nothing."""

from __future__ import annotations

from urllib.parse import urlsplit

SERVER_SCHEMES = ("http", "https", "unix")
POOL_SCHEMES = ("redis", "rediss", "s3", "mooncake")


def shown(url: str) -> str:
    """A URL as it may stand in a message: without user and password."""
    scheme, found, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{found}{host.rpartition('@')[2]}{slash}{path}"


def is_http(url: str) -> bool:
    """Whether it is a URL of HTTP, with a host that can be looked up."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:  # brackets or a port that are none, a name that none can look up
        return False
    # As it stands there: who goes by it takes "HTTPS" for another one, and asks in the open.
    return url.partition("://")[0] in ("http", "https") and host != "" and port != 0
