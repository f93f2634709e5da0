"""How a request is refused: one JSON object with a stable code, a message and a hint."""

from __future__ import annotations

from typing import Any

from prefixstore.errors import (
    ConfigError,
    FormatError,
    LayoutError,
    RetiredError,
    StoreError,
    StoreFullError,
    StoreTimeoutError,
)
from prefixstore.serve.limits import RETRY_AFTER_S

# The first that fits counts.
_STATUS: tuple[tuple[type[StoreError], int, str], ...] = (
    (LayoutError, 400, "layout"),
    (ConfigError, 400, "config"),
    (StoreTimeoutError, 503, "timeout"),
    (StoreFullError, 503, "full"),
    (RetiredError, 503, "closed"),  # to a client its namespace is, not a store that is opened again
    (FormatError, 503, "damaged"),
)


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.hint = status, code, hint

    @classmethod
    def of(cls, error: StoreError) -> RefusedError:
        """What an error of the library is to a client."""
        for kind, status, code in _STATUS:
            if isinstance(error, kind):
                return cls(status, code, str(error))
        return cls(503, "store", str(error))

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        if self.status in (429, 503):
            return {"Retry-After": str(RETRY_AFTER_S)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def to_json(self) -> dict[str, Any]:
        """The body."""
        return {"error": {"code": self.code, "message": str(self), "hint": self.hint}}


def busy(what: str, status: int = 503, code: str = "busy") -> RefusedError:
    """Too much at once: try again later."""
    return RefusedError(status, code, what, "try again after Retry-After seconds")
