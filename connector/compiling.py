"""What Triton's compilers raise, as one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError

from triton.errors import TritonError


@contextmanager
def compiling() -> Iterator[None]:
    """For a launch, the first of which compiles. Raises RuntimeError if that fails."""
    try:
        yield
    except (TritonError, CalledProcessError) as error:
        raise RuntimeError(f"the kernel does not compile: {error}") from error
