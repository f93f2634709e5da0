"""The exceptions of blending. Each carries one clear message and, where there is one, a remedy."""

from __future__ import annotations


class BlendError(Exception):
    """Base of all errors of blending; ``hint`` says what the user can do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.hint = hint


class UnsupportedModelError(BlendError):
    """The K of this model cannot be moved to another position by one plain rotation."""
