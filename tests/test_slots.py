"""Slot files: what is written is read, space comes and goes as it is told to."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from benchmarks.store_peers import drop_page_cache, resident_share
from prefixstore.config import MIB
from prefixstore.layout import Run
from prefixstore.slots import SlotFile, _libc, aligned_buffer
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]
SLOT = 32768


def blocks(path: Path) -> int:
    return os.stat(path).st_blocks * 512


@pytest.fixture(params=["mapped", "positioned"])
def slots(request: pytest.FixtureRequest, place: Place) -> Iterator[SlotFile]:
    mapped = request.param == "mapped"
    folder = place.memory_dir if mapped else place.folder
    file = SlotFile(folder / "test.slots", SLOT, mapped=mapped)
    yield file
    file.close()


def fill(file: SlotFile, slot: int, data: bytes) -> None:
    file.allocate(slot)
    file.write(slot, memoryview(data))


def test_slots_read_back_and_do_not_touch(slots: SlotFile) -> None:
    rng = random.Random(1)
    data = {slot: rng.randbytes(SLOT) for slot in (0, 1, 2, 17, 5)}
    for slot, content in data.items():
        fill(slots, slot, content)
    for slot, content in data.items():
        out = memoryview(bytearray(SLOT))
        slots.read(slot, [Run(0, 0, SLOT)], out)
        assert out == content
        runs = [Run(100, 0, 50), Run(30000, 50, 2768)]
        out = memoryview(bytearray(2818))
        slots.read(slot, runs, out)
        assert out == content[100:150] + content[30000:32768]


def test_a_mapping_makes_the_pages_of_its_slot_or_says_that_there_are_none(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SlotFile(place.memory_dir / "test.slots", SLOT, mapped=True)
    mapping = file.map_slot(2)
    assert blocks(file.path) == SLOT
    mapping[:3] = b"abc"
    assert bytes(file.view(2)[:4]) == b"abc\0"
    fill(file, 1, b"y" * SLOT)
    assert file.map_slot(1)[:] == b"y" * SLOT
    for code, made in ((errno.EINVAL, SLOT), (errno.EFAULT, None)):  # an old kernel, no memory
        monkeypatch.setattr(_libc, "madvise", lambda *_, code=code: ctypes.set_errno(code) or -1)
        before = blocks(file.path)
        with nullcontext() if made else pytest.raises(OSError, match="No space left"):
            file.map_slot(0 if made else 2)
        assert blocks(file.path) == before + (made or 0)
    file.close()


def test_a_peek_makes_no_pages(place: Place) -> None:
    file = SlotFile(place.memory_dir / "test.slots", SLOT, mapped=True)
    fill(file, 1, b"abc" + bytes(SLOT - 3))
    assert file.peek(1, 1, 3) == b"bc\0"
    file.punch(1)
    assert file.peek(1, 0, 3) == bytes(3)
    assert blocks(file.path) == 0
    file.close()


def test_mappings_take_no_descriptors_and_go_with_their_views(place: Place) -> None:
    """There is one for each slot of a tier, and a process may have a thousand descriptors."""
    file = SlotFile(place.memory_dir / "test.slots", SLOT, mapped=True)

    def counted() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count(str(file.path))
        return len(os.listdir("/proc/self/fd")), maps

    before = counted()
    views = [file.map_slot(2 * slot) for slot in range(50)]
    assert counted() == (before[0], before[1] + 50)
    kept = np.frombuffer(views[7], np.uint8)
    views.clear()
    assert counted() == (before[0], before[1] + 1)
    kept[:3] = 7
    assert bytes(file.view(14)[:4]) == b"\7\7\7\0"
    file.close()
    assert int(kept[2]) == 7
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.map_slot(0)


def test_allocate_takes_space_and_punch_gives_it_back(slots: SlotFile) -> None:
    for slot in range(8):
        fill(slots, slot, b"x" * SLOT)
    full = blocks(slots.path)
    assert full >= 8 * SLOT
    size = os.stat(slots.path).st_size
    for slot in (1, 6):
        slots.punch(slot)
    assert blocks(slots.path) == full - 2 * SLOT
    assert os.stat(slots.path).st_size == size
    out = memoryview(bytearray(SLOT))
    slots.read(0, [Run(0, 0, SLOT)], out)
    assert out == b"x" * SLOT
    fill(slots, 1, b"y" * SLOT)
    slots.read(1, [Run(0, 0, SLOT)], out)
    assert out == b"y" * SLOT


def test_a_read_past_the_end_is_an_error(slots: SlotFile) -> None:
    fill(slots, 0, b"x" * SLOT)
    with pytest.raises(OSError, match=r"ends|has"):
        slots.read(1000, [Run(0, 0, SLOT)], memoryview(bytearray(SLOT)))


def test_a_file_cut_short_is_an_error(place: Place) -> None:
    """On disk, where it can happen; the memory file's owner is this host's kernel."""
    file = SlotFile(place.folder / "cut.slots", SLOT, mapped=False)
    fill(file, 0, b"x" * SLOT)
    os.truncate(file.path, SLOT // 2)
    with pytest.raises(OSError, match="ends"):
        file.read(0, [Run(0, 0, SLOT)], memoryview(bytearray(SLOT)))
    file.close()


def test_views_stay_valid_while_the_file_grows(place: Place) -> None:
    file = SlotFile(place.memory_dir / "grow.slots", SLOT, mapped=True)
    fill(file, 0, b"a" * SLOT)
    early = file.view(0)
    for slot in range(1, 64):
        fill(file, slot, bytes([slot]) * SLOT)
    assert early == b"a" * SLOT
    file.write(0, memoryview(b"late"))
    file.close()
    assert bytes(early[:4]) == b"late"


def test_two_processes_see_one_file(place: Place) -> None:
    """Two openings of the file, one grown after the other was mapped."""
    one = SlotFile(place.memory_dir / "both.slots", SLOT, mapped=True)
    fill(one, 0, b"1" * SLOT)
    other = SlotFile(place.memory_dir / "both.slots", SLOT, mapped=True)
    assert other.view(0) == b"1" * SLOT
    fill(one, 40, b"2" * SLOT)
    assert other.view(40) == b"2" * SLOT
    one.close()
    other.close()


def test_mapping_ahead_takes_no_space(place: Place) -> None:
    """A file may be longer than its slots, not larger: a page for each time it grew."""
    file = SlotFile(place.memory_dir / "ahead.slots", SLOT, mapped=True)
    for slot in range(64):
        fill(file, slot, bytes(SLOT))
    assert blocks(file.path) <= 64 * SLOT + 8 * 4096
    file.close()


@pytest.fixture
def on_disk(place: Place) -> Iterator[SlotFile]:
    """A slot of 1 MiB that is in no page cache."""
    file = SlotFile(place.folder / "disk.slots", MIB, mapped=False)
    fill(file, 0, random.Random(3).randbytes(MIB))
    drop_page_cache([file.path])
    yield file
    file.close()


def test_a_cold_slot_is_read_past_the_page_cache(on_disk: SlotFile) -> None:
    runs = [Run(0, 0, 65536), Run(MIB - 65536, 65536, 65536)]
    out = aligned_buffer(131072)
    on_disk.read(0, runs, out)
    data = random.Random(3).randbytes(MIB)
    assert out == data[:65536] + data[-65536:]
    try:
        os.close(os.open(on_disk.path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("a file system without O_DIRECT")
    with open(on_disk.path, "rb") as file:
        assert resident_share(file.fileno()) == 0.0


@pytest.mark.parametrize(("skip", "length"), [(1, 70000), (512, 65536), (0, 65537), (0, 100)])
def test_what_is_not_aligned_is_read_too(on_disk: SlotFile, skip: int, length: int) -> None:
    for offset in (0, 1, 4096):
        drop_page_cache([on_disk.path])
        out = aligned_buffer(2 * 65536)[skip : skip + length]
        on_disk.read(0, [Run(offset, 0, length)], out)
        assert out == random.Random(3).randbytes(MIB)[offset : offset + length]


def test_what_somebody_has_just_written_is_what_is_read(on_disk: SlotFile) -> None:
    """Without O_DIRECT, and not on the disk yet: in the page cache, all of the slot or a part."""
    for page in range(0, MIB, 65536):
        with open(on_disk.path, "r+b") as file:
            file.seek(page)
            file.write(b"new" * 1000)
        out = aligned_buffer(MIB)
        on_disk.read(0, [Run(0, 0, MIB)], out)
        assert out[page : page + 3000] == b"new" * 1000
