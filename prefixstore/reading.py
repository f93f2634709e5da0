"""Reading a slot and checking what was read against its row; many of them on several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

from prefixstore import config
from prefixstore.layout import TRAILER_HEAD_BYTES, TRAILER_MAGIC, Layout, Roi, checksum
from prefixstore.rows import FLAG_PAYLOAD_SUM, Row
from prefixstore.slots import SlotFile, aligned_buffer


def read_checked(
    file: SlotFile, layout: Layout, key: bytes, row: Row, out: memoryview, roi: Roi
) -> bool:
    """Read a region of a slot into ``out``; whether it is what its row says. Raises OSError.

    It checks the copy, not the slot, so nothing can change between check and use. The whole payload
    is checked by one hash if its row has it, a region by those of its pieces.
    """
    file.read(row.slot, layout.runs(roi), out)
    if roi == layout.whole and row.flags & FLAG_PAYLOAD_SUM:
        return checksum(out) == row.payload_sum
    return pieces_match(layout, key, row, out, roi, read_trailer(file, layout, row))


def read_trailer(file: SlotFile, layout: Layout, row: Row) -> memoryview:
    """The trailer of a slot, not checked. Raises OSError."""
    tail = aligned_buffer(layout.tail_run.num_bytes)
    file.read(row.slot, [layout.tail_run], tail)
    return tail[: layout.trailer_bytes]


def pieces_match(
    layout: Layout, key: bytes, row: Row, out: memoryview, roi: Roi, trailer: memoryview
) -> bool:
    """Whether a region agrees with the checksums in its trailer, and that one with the row."""
    table = trusted_sums(key, row, trailer)
    if table is None:
        return False
    return [table[i] for i in layout.piece_indices(roi)] == layout.piece_sums(out)


def trusted_sums(key: bytes, row: Row, trailer: memoryview) -> memoryview | None:
    """The checksums of all pieces, as u64; None if the trailer is not the one the row speaks of."""
    if checksum(trailer) != row.trailer_sum or trailer[:24] != TRAILER_MAGIC + key:
        return None
    return trailer[TRAILER_HEAD_BYTES:].cast("Q")


def helpers_for(num_bytes: int) -> int:
    """How many threads of a store's are worth having for a copy of so many bytes."""
    return min(config.HELPERS, num_bytes // config.HELPER_BYTES)


def share_out(
    count: int,
    work: Callable[[int], None],
    pool: Executor,
    helpers: int,
    progress: Callable[[], None] | None = None,
) -> None:
    """Do ``work(i)`` for each ``i < count``, in this thread and up to ``helpers`` of a pool.

    Each takes the next number when it is free, so a busy or closed pool makes this slower but does
    not hold it up; no helper is at work any more when it returns. ``progress`` is called in this
    thread after each piece of work it did itself. When one fails the others end their piece, then
    its exception is raised.
    """
    changed = threading.Condition()
    numbers, at_work = iter(range(count)), 0
    errors: list[BaseException] = []

    def take() -> int | None:
        nonlocal at_work
        with changed:
            number = next(numbers, None)
            at_work += number is not None
            return number

    def do(number: int) -> None:
        nonlocal at_work
        try:
            work(number)
        except BaseException as error:  # thread loop: raised by who shares the work out
            errors.append(error)
            raise
        finally:
            with changed:
                if errors:
                    for _ in numbers:
                        pass
                at_work -= 1
                changed.notify_all()

    def help_out() -> None:
        with suppress(BaseException):  # it is among the errors
            while (number := take()) is not None:
                do(number)

    futures = []
    # The pool was shut down, for the store is being closed; or it can start no thread, and one of
    # its own may do later what it has queued all the same.
    with suppress(RuntimeError):
        for _ in range(min(helpers, count - 1)):
            futures.append(pool.submit(help_out))
    try:
        while (number := take()) is not None:
            do(number)
            if progress is not None:
                progress()
    finally:
        with changed:
            for _ in numbers:
                pass
            changed.wait_for(lambda: not at_work)
        for future in futures:
            future.cancel()
    if errors:
        raise errors[0]
