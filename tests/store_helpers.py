"""What the tests of the store share: places for stores, raw looks at files, child processes.

The fixture that goes with it is in `tests.store_fixtures`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import lmdb
import pytest

from prefixstore import Layout, Namespace, Store
from prefixstore.keys import ChunkRef
from prefixstore.namespace import MISS
from prefixstore.putting import PutState
from prefixstore.testing_data import content_of, identity_for, outputs

ROOT = Path(__file__).resolve().parent.parent
# 32 pieces of 1008 bytes and a trailer: a slot of exactly 32 KiB.
LAYOUT = Layout(num_layers=4, num_planes=2, num_heads=4, chunk_tokens=8, head_bytes=126)
WAIT_S = 30.0


@dataclass(frozen=True)
class Place:
    """Where a test keeps its stores: a folder on disk and one in memory."""

    folder: Path
    memory_dir: Path

    def open(
        self,
        memory_bytes: int | str | None = "4MiB",
        disk_bytes: int | str | None = "16MiB",
        name: str = "store",
    ) -> Store:
        """Open a store of this place."""
        return Store.open(
            self.folder / name,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
            memory_dir=str(self.memory_dir),
        )


class Panics:
    """An environment of LMDB that had an error while it wrote its first page."""

    def __init__(self, env: object) -> None:
        self.env = env

    def begin(self, *_: object, **__: object) -> object:
        raise lmdb.PanicError("planted")

    def __getattr__(self, name: str) -> object:
        return getattr(self.env, name)


def empty_store(parent: Path) -> Path:
    """The folder of a small new store that nobody has open; its memory is in ``parent`` too."""
    memory, folder = parent / "memory", parent / "kv"
    memory.mkdir()
    Store.open(folder, memory_bytes="4MiB", disk_bytes="4MiB", memory_dir=str(memory)).close()
    return folder


def namespace_in(store: Store, label: str = "a", layout: Layout = LAYOUT) -> Namespace:
    """The namespace of a label."""
    return store.namespace(identity_for(label, layout), layout)


def refs_of(namespace: Namespace, seed: int, count: int, salt: bytes = b"") -> list[ChunkRef]:
    """Chunks of a prompt that no other seed shares."""
    size = namespace.layout.chunk_tokens
    tokens = [seed, *range(1, count * size)]
    return namespace.chain(tokens, salt=salt).refs()


def put_content(
    namespace: Namespace, refs: Sequence[ChunkRef], **options: object
) -> list[PutState]:
    """Put what `content_of` says."""
    data = [content_of(ref.key, namespace.layout.payload_bytes) for ref in refs]
    return namespace.put(refs, data, **options)  # type: ignore[arg-type]


def read_content(namespace: Namespace, refs: Sequence[ChunkRef]) -> list[int]:
    """Get chunks; every hit must be what `content_of` says. Returns the tiers."""
    outs = outputs(namespace.layout, len(refs))
    tiers = namespace.get(refs, outs)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        expected = content_of(ref.key, namespace.layout.payload_bytes)
        assert tier == MISS or out == expected, f"wrong bytes for {ref.key.hex()} from tier {tier}"
    return tiers


def on_keeper(store: Store, job: Callable[[], object]) -> None:
    """Run something where the store itself would."""
    store.keeper.submit(job).result(WAIT_S)


def wait_for(condition: Callable[[], object], what: str, wait_s: float = 15) -> None:
    """Poll until a condition holds; fails after a time no healthy run needs."""
    end = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end, f"waited {wait_s} s in vain for {what}"
        time.sleep(0.01)


def space_taken(folder: Path) -> int:
    """Bytes the files below a folder occupy, holes not counted."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def start_child(module: str, *arguments: object, log: Path | None = None) -> subprocess.Popen[str]:
    """Run a module of the tests in a process of its own, its stderr in a pipe or appended to a log.

    Nobody empties the pipe while the child runs, so one that may say much needs a log.
    """
    with ExitStack() as stack:
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", module, *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if log is None else stack.enter_context(open(log, "a")),
            text=True,
        )


@contextmanager
def writer_lock_held(index_folder: Path) -> Iterator[Callable[[], None]]:
    """Have another process hold an index's writer lock. Call what is yielded to end it early."""
    with start_child("tests.crash.lock_holder", index_folder) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"

        def let_go() -> None:
            assert child.stdin is not None
            assert child.stdout is not None
            if not child.stdin.closed:
                child.stdin.write("\n")
                child.stdin.close()
                assert child.stdout.readline() == "released\n"

        try:
            yield let_go
        finally:
            let_go()


def no_thread(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have the system refuse to start threads of that name."""
    start = threading.Thread.start

    def refused(self: threading.Thread) -> None:
        if self.name == name:
            raise RuntimeError("can't start new thread")
        start(self)

    patch.setattr(threading.Thread, "start", refused)


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own of that size; skips the test where mounting is not permitted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
