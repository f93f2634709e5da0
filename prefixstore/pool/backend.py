"""What a pool needs of an engine: objects by name, in batches, each call with a deadline.

A backend knows nothing of chunks. What must hold of each is in `testing_backend.BackendContract`:

- A call ends by its deadline. What an engine that is lost, slow or full did not do is told object
  by object: not there, or not written. Only when nothing at all could be asked a call raises
  RemoteError. So one lost node of a cluster costs the objects that are on it, no more.
- An object is there as a whole, or not at all. It need not stay: an engine may evict it.
- What is read is what the engine gave: nobody trusts it before it was checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from prefixstore.errors import ConfigError
from prefixstore.layout import Buffer
from prefixstore.urls import POOL_SCHEMES

ABSENT, LOST = -1, -2  # in place of a number of bytes
BEYOND_BYTES = 9 << 10  # so far a get may go past an object's end, whatever the engine


class Put(NamedTuple):
    """An object to be written: the bytes of ``parts``, one after the other, then the ``end_bytes``
    that ``end`` gives when it is their turn: sums, which are made while others are on their way."""

    name: str
    parts: Sequence[Buffer]
    end: Callable[[], Buffer] | None = None
    end_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of it."""
        return sum(memoryview(part).nbytes for part in self.parts) + self.end_bytes

    @property
    def whole(self) -> list[Buffer]:
        """All its parts."""
        return [*self.parts] if self.end is None else [*self.parts, self.end()]


class Get(NamedTuple):
    """What is to be read of an object: ``cuts`` are offsets in it, rising, and where to.

    Neighbours may touch, none overlap. The last may go BEYOND_BYTES past the object's end; what
    goes further, or others that do, are LOST where the engine has not ``reads_short``.
    """

    name: str
    cuts: Sequence[tuple[int, memoryview]]


class Written(Enum):
    """What became of one object of a put."""

    YES = "yes"
    THERE = "there"  # it was before, and stays as it is
    FULL = "full"  # the engine has no room
    NO = "no"  # not written, or nobody knows


class Backend(Protocol):
    """See the module docstring. Thread-safe. Names are letters, digits and ``/._-``,
    512 at most."""

    url: str  # where the engine is, without credentials
    part_bytes: int  # larger payloads are better stored as several objects; part of the format
    ask_first: bool  # whether it had better be asked what is there before all of it is sent
    tells_news: bool  # whether it has `announce` and `hear`; else they are not called
    reads_short: (
        bool  # whether a get of more than there is gives what is there; else it may be LOST
    )
    lists_late: bool  # whether a list that is some seconds old is better than a look-up

    @property
    def usable(self) -> bool:
        """Whether any part of the engine has answered lately, or it is time to ask again."""

    def put(
        self,
        puts: Sequence[Put],
        *,
        deadline_s: float,
        ttl_s: float | None = None,
        replace: bool = False,
    ) -> list[Written]:
        """Write objects that are not there, or with ``replace`` in any case. After ``ttl_s`` (None:
        never) they are gone, to the second."""

    def get(self, gets: Sequence[Get], *, deadline_s: float) -> list[int]:
        """Read; the bytes that came of each, cut after cut; ABSENT, or LOST if nobody knows. Fewer
        than asked for: the object ends there."""

    def exist(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """Which objects are there."""

    def delete(self, names: Sequence[str], *, deadline_s: float) -> list[bool]:
        """Remove objects; which were there."""

    def names(self, prefix: str, *, deadline_s: float) -> Iterator[list[str]]:
        """The names that begin so (it ends with a slash), some or none at a time; ``deadline_s``
        for each part. Raises RemoteError when it cannot go on: what came is then not all. A listing
        that has no end is the caller's to give up."""

    def announce(self, topic: str, message: bytes, *, deadline_s: float) -> None:
        """Tell whoever hears a topic something; the last thousands of messages are kept. Raises
        RemoteError."""

    def hear(self, topic: str, after: str, *, wait_s: float) -> tuple[str, list[bytes]]:
        """Messages behind a position, waited for so long, and the new position; ``after`` "" is the
        end, and is not waited for. Raises RemoteError."""

    def check_open(self, deadline_s: float) -> None:
        """Ask the engine something. Raises RemoteError that says why it cannot be used."""

    def close(self) -> None:
        """Let go of the connections."""


def open_backend(url: str, password: str = "", ca_file: str | None = None) -> Backend:
    """The backend of a URL; the engine need not be there yet. Raises ConfigError."""
    scheme = url.partition(":")[0]
    if scheme in ("redis", "rediss"):
        from prefixstore.pool.redis import RedisBackend

        return RedisBackend(url, password, ca_file)
    if scheme == "s3":
        from prefixstore.pool.s3 import S3Backend

        return S3Backend(url, password, ca_file)
    if scheme == "mooncake":
        from prefixstore.pool.mooncake import MooncakeBackend

        return MooncakeBackend(url, password, ca_file)
    raise ConfigError(f"{scheme!r} is no engine for a pool", f"known: {', '.join(POOL_SCHEMES)}")
