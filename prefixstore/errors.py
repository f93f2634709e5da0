"""The exceptions of the store. Each carries one clear message and, where there is one, a remedy."""

from __future__ import annotations


class StoreError(Exception):
    """Base of all errors of the store; ``hint`` says what the user can do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.hint = hint


class ConfigError(StoreError):
    """A setting is missing, malformed or contradicts the store that is there."""


class FormatError(StoreError):
    """The bytes on disk are not of a format this version reads."""


class DamagedError(FormatError):
    """What a file of the store says cannot be: its bytes were changed."""


class LayoutError(StoreError):
    """A layout, region or buffer does not fit the namespace."""


class StoreTimeoutError(StoreError):
    """The store did not answer within the deadline; nothing was lost, the call may be retried."""


class StoreClosedError(StoreError):
    """The store was closed, or its folder was removed."""


class RetiredError(StoreClosedError):
    """The namespace was retired: its model has another one, in a store that goes on."""


class StoreFullError(StoreError):
    """No room: all slots are pinned, leased or not yet written to disk."""


class RemoteError(StoreError):
    """The server could not be reached, refused, or did not speak as it must."""
