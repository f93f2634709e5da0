"""What a Redis server answers, made into what a backend says; ranges that are read as one. Pure.

What must hold: no answer makes anything but a RemoteError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from prefixstore.errors import RemoteError
from prefixstore.pool.backend import ABSENT, LOST, Get, Written
from prefixstore.pool.redis_node import Node
from prefixstore.pool.resp import Command, RespError

# What a server says that cannot answer just now, besides what `redis_node` takes for that.
_LATER = re.compile("BUSY|TRYAGAIN|(ERR )?max number of clients", re.IGNORECASE)


def is_moved(answer: object) -> bool:
    """Whether another server of the cluster has the key."""
    return isinstance(answer, RespError) and answer.kind == "MOVED"


def is_no_cluster(answer: object) -> bool:
    """Whether a server that was asked for slots says that it stands alone, in whatever words: each
    kind of server and proxy has its own. Refusals that pass say nothing of that."""
    return isinstance(answer, RespError) and not _LATER.match(str(answer))


def written_of(answer: object) -> Written:
    """What became of an object that was put."""
    if answer == "OK":
        return Written.YES
    if answer is None:
        return Written.THERE
    if isinstance(answer, RespError) and answer.kind == "OOM":
        return Written.FULL
    return Written.NO


def came_of(answers: Sequence[tuple[Command, object]]) -> int:
    """The bytes that came of an object, of the answers to its commands in order."""
    came = 0
    for command, answer in answers:
        if not isinstance(answer, int):
            return LOST
        came += answer
        if answer < sum(out.nbytes for out in command.outs):
            break
    return came or ABSENT


def runs_of(one: Get) -> list[tuple[int, list[memoryview]]]:
    """Its cuts, those that touch as one."""
    runs: list[tuple[int, list[memoryview]]] = []
    stop = -1
    for start, out in one.cuts:
        if start == stop:
            runs[-1][1].append(out)
        else:
            runs.append((start, [out]))
        stop = start + out.nbytes
    return runs


def entries_of(reply: Any) -> list[tuple[str, bytes]]:
    """Number and message of each entry of a stream."""
    try:
        return [(number.decode(), bytes(fields[1])) for number, fields in reply]
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise RemoteError(f"news as nobody can read: {reply!s:.80}") from error


class Page(NamedTuple):
    """A part of a listing, and where it goes on."""

    cursor: bytes
    names: list[str]


def page_of(node: Node, reply: Any) -> Page:
    """Read a part of a listing. Raises RemoteError."""
    try:
        cursor, names = reply
        return Page(bytes(cursor), [name.decode("ascii", "replace") for name in names])
    except (TypeError, ValueError, AttributeError) as error:
        raise RemoteError(f"{node} lists its keys as nobody can read: {reply!s:.80}") from error
