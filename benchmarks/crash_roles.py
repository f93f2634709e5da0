"""What processes that will be killed do with a store, and the diary of what they were told.

Each role goes on until it is killed. What a chunk holds follows from its key (`content_of`), so
everybody can tell a wrong byte. The diary is one file that all append to; a line is there before
what it announces is begun, or after what it acknowledges was done. It outlives its writers.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.corruption import LAYOUT
from prefixstore import PutState, Store, admin, failpoints, owned
from prefixstore.config import MIB
from prefixstore.keys import ChunkRef
from prefixstore.layout import Roi
from prefixstore.namespace import MISS, Namespace
from prefixstore.testing_data import content_of, identity_for, outputs, region_of

SHARED, DEPTH = 60, 6  # prompts of everybody, which may be evicted and removed at any time
OWN = 1_000_000  # prompts of one process begin at a multiple of it
PAUSE_S = 0.004


@dataclass(frozen=True)
class Scene:
    """Sizes of a store. ``roomy``: its disk holds all that is put, so nothing is ever evicted.

    The live index, which is part of the memory tier, grows while somebody reads and others write;
    where it takes half of a tier, pinned chunks give way to it.
    """

    name: str
    memory_bytes: int
    disk_bytes: int
    roomy: bool


SCENES = (
    Scene("roomy", 4 * MIB, 512 * MIB, True),
    Scene("tight", 4 * MIB, 6 * MIB, False),
    Scene("memory only", 12 * MIB, 0, False),
)


class WrongBytes(Exception):  # noqa: N818  (what was found)
    """The one thing that must never happen."""


class Diary:
    """Lines of words. Each is one write to a file opened for appending, so whole or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def say(self, *words: object) -> None:
        """Append a line."""
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())

    def close(self) -> None:
        os.close(self._fd)

    def lines(self) -> Iterator[list[str]]:
        """All whole lines."""
        return lines_of(self.path.read_bytes())


def lines_of(data: bytes) -> Iterator[list[str]]:
    """The whole lines of a diary."""
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        yield line.decode().split(" ")


def open_store(folder: Path, memory_dir: Path, scene: Scene) -> Store:
    """Open the store of a scene, or make it."""
    return Store.open(
        folder,
        memory_bytes=scene.memory_bytes,
        disk_bytes=scene.disk_bytes,
        memory_dir=str(memory_dir),
    )


def refs_of(ns: Namespace, prompt: int, chunks: int) -> list[ChunkRef]:
    """Chunks of a prompt that no other number shares."""
    return ns.chain([prompt, *range(1, chunks * LAYOUT.chunk_tokens)]).refs()


def put(ns: Namespace, refs: list[ChunkRef], **options: object) -> list[PutState]:
    """Put what `content_of` says."""
    data = [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs]
    return ns.put(refs, data, **options)  # type: ignore[arg-type]


def read(ns: Namespace, refs: list[ChunkRef]) -> list[int]:
    """Read chunks; the tier of each. Raises WrongBytes."""
    outs = outputs(LAYOUT, len(refs))
    tiers = ns.get(refs, outs)
    for ref, tier, out in zip(refs, tiers, outs, strict=True):
        if tier != MISS and out != content_of(ref.key, LAYOUT.payload_bytes):
            raise WrongBytes(f"chunk {ref.key.hex()} from tier {tier}")
    return tiers


class Worker:
    """A process at work on a store."""

    def __init__(
        self, number: int, seed: int, where: tuple[Path, Path, Scene], diary: Diary, armed: str = ""
    ) -> None:
        self.number, self.rng, self.where, self.diary = number, random.Random(seed), where, diary
        self.armed, self.left = armed, 1 if armed.startswith("open.") else self.rng.randint(1, 3)
        self.own: list[tuple[int, int]] = []
        self.putting = (0, 0)

    def run(self, role: str, steps: int | None = None) -> None:
        """Work until killed, or for some steps."""
        if self.armed:
            failpoints.set_action(self._at)
        self.store = open_store(*self.where)
        self.ns = self.store.namespace(identity_for("a", LAYOUT), LAYOUT)
        step: Callable[[int], None] = getattr(self, role)
        for number in count() if steps is None else range(steps):
            step(number)
            time.sleep(PAUSE_S)
        self.store.close()

    def _at(self, name: str) -> None:
        if name == self.armed:
            self.left -= 1
            if self.left == 0:
                if name == "put.finished":
                    self._say_stored()
                self.diary.say("died", self.number, name)
                os.kill(os.getpid(), signal.SIGKILL)

    def _say_stored(self) -> None:
        """The put that has just been committed, if it was of all chunks and their last part."""
        prompt, chunks = self.putting
        with self.store.live.read() as txn:
            rows = [txn.get("chunk", ref.key) for ref in refs_of(self.ns, prompt, chunks)]
        if None not in rows:
            self.diary.say("stored", self.number, prompt, chunks, "plain")

    # ------------------------------------------------------------------ roles
    def writer(self, step: int) -> None:
        """Puts prompts of its own: whole, in parts, pinned; removes some."""
        prompt, chunks = OWN * (self.number + 1) + step, self.rng.randint(1, DEPTH)
        refs = refs_of(self.ns, prompt, chunks)
        kind = self.rng.choice(["whole", "whole", "whole", "parts", "parts", "pinned"])
        # A put that waits for room is several: what one that died has stored would be unknown.
        wait = not self.armed.startswith("put.")
        self.putting = prompt, chunks
        self.diary.say("putting", self.number, *self.putting)
        if kind == "parts":
            for heads in ((0, 1), (1, 2)):
                roi = Roi(0, LAYOUT.num_layers, *heads)
                data = [content_of(ref.key, LAYOUT.payload_bytes) for ref in refs]
                parts = [region_of(one, LAYOUT, roi) for one in data]
                states = self.ns.put(refs, parts, roi=roi, group=self.number + 1, wait=wait)
        else:
            states = put(self.ns, refs, pin=kind == "pinned", group=self.number + 1, wait=wait)
        if any(state is not PutState.STORED for state in states):
            return
        pinned = kind == "pinned" and self._pinned(refs)
        self.diary.say("stored", self.number, prompt, chunks, "pinned" if pinned else "plain")
        self.own.append((prompt, chunks))
        if self.rng.random() < 0.3 and self.store.flush(30):
            self.diary.say("flushed", self.number, prompt)
        if self.rng.random() < 0.2:
            self._remove_own()

    def _pinned(self, refs: list[ChunkRef]) -> bool:
        """Whether the pin was granted: a tier has only so much room for pins."""
        with self.store.live.read() as txn:
            heat = [txn.get("heat", b"\1" + ref.key) for ref in refs]
        return all(one is not None and one[:8] == b"\xff" * 8 for one in heat)

    def _remove_own(self) -> None:
        prompt, chunks = self.own.pop(self.rng.randrange(len(self.own)))
        self.diary.say("removing", self.number, prompt)
        refs = refs_of(self.ns, prompt, chunks)
        if self.rng.random() < 0.5:
            self.ns.delete(refs)
        else:
            for ref in refs:
                admin.remove(self.store, admin.Selection(key=ref.key))
        self.diary.say("removed", self.number, prompt, chunks)

    def reader(self, step: int) -> None:
        """Matches, leases and reads what everybody puts; promotes by reading and by asking."""
        refs = refs_of(self.ns, self.rng.randrange(SHARED), DEPTH)
        found = self.ns.match(refs)
        lease, held = self.ns.lease(refs[: found.num_chunks], found.tiers)
        if MISS in read(self.ns, refs[:held]):
            raise WrongBytes("a leased chunk was a miss")
        if self.rng.random() < 0.3:
            owned.prefetch(self.ns, refs)
            time.sleep(0.12)  # promotions wait until it is quiet
        if self.rng.random() < 0.8:
            self.ns.release(lease)

    def evictor(self, step: int) -> None:
        """Puts, removes, pins and empties, on prompts of everybody."""
        put(self.ns, refs_of(self.ns, self.rng.randrange(SHARED), DEPTH), group=self.number + 1)
        refs = refs_of(self.ns, self.rng.randrange(SHARED), DEPTH)
        if self.rng.random() < 0.1:
            admin.empty_memory(self.store)
        if self.rng.random() < 0.3:
            for ref in refs:
                admin.remove(self.store, admin.Selection(key=ref.key))
        if self.rng.random() < 0.2:
            owned.pin(self.ns, refs, True)
            owned.pin(self.ns, refs, False)

    def warmer(self, step: int) -> None:
        """Puts with a time to live, changes it, prefetches; retires models."""
        prompt, chunks = OWN * (self.number + 1) + step, self.rng.randint(1, DEPTH)
        refs = refs_of(self.ns, prompt, chunks)
        self.putting = prompt, chunks
        self.diary.say("putting", self.number, *self.putting)
        states = put(self.ns, refs, ttl_s=3600, group=self.number + 1, wait=False)
        if all(state is PutState.STORED for state in states):
            self.diary.say("stored", self.number, prompt, chunks, "plain")
        if self.rng.random() < 0.3:
            self.diary.say("removing", self.number, prompt)
            self.ns.set_ttl(refs, 0.1)
            self.diary.say("expires", self.number, prompt, chunks, int(time.time()) + 2)
        elif self.rng.random() < 0.5:
            self.ns.set_ttl(refs, None)
        owned.pin(self.ns, refs[:1], True)
        owned.pin(self.ns, refs[:1], False)
        owned.prefetch(self.ns, refs_of(self.ns, self.rng.randrange(SHARED), DEPTH))
        if step % 4 == 1:
            label = f"{self.number}-{step}"
            mine = self.store.namespace(identity_for(label, LAYOUT), LAYOUT)
            put(mine, refs_of(mine, 1, chunks))
            mine.retire()
            self.diary.say("retired", self.number, mine.name.hex())

    def opener(self, step: int) -> None:
        """Closes the store and opens it again."""
        put(self.ns, refs_of(self.ns, self.rng.randrange(SHARED), DEPTH), group=self.number + 1)
        self.store.close()
        self.store = open_store(*self.where)
        self.ns = self.store.namespace(identity_for("a", LAYOUT), LAYOUT)


ROLES = ("writer", "writer", "reader", "evictor", "warmer", "opener")
# Who reaches which step; whatever is not here, everybody does.
ROLES_OF = {
    "open": ("opener", "reader", "writer"),
    "put": ("writer",),
    "spill": ("writer", "evictor"),
    "evict": ("evictor", "writer"),
    "drop": ("evictor",),
    "give_back": ("evictor",),
    "promote": ("reader",),
    "ttl": ("warmer",),
    "pin": ("warmer", "evictor"),
    "retire": ("warmer",),
    "reap": ("writer", "reader", "opener"),
}
