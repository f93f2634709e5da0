"""Which model identities a store knows, the layout of their chunks, and under which names.

A namespace's name is the digest of its identity. One that was retired is never used again: the
identity gets a number more (``GENERATION_FIELD``), and with it another name, when it is entered the
next time. Of as many as are remembered and not in use the oldest is forgotten; identities that are
not known get a number from then on as high as any that was forgotten, for they may be those. Owns
tables ``namespace`` (name -> record) and, in ``meta``, the numbers, the highest one forgotten, and
how many times anything was retired. Each change is one durable transaction.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, replace

from prefixstore.errors import DamagedError, FormatError, LayoutError
from prefixstore.identity import ModelIdentity, canonical_json
from prefixstore.index import Environment, Txn
from prefixstore.layout import Layout

GENERATION_FIELD = "prefixstore_generation"
GENERATIONS_MAX = 4096  # numbers that are remembered, unless more are in use
_GENERATION, _FORGOTTEN, _RETIRED = b"generation", b"forgotten", b"retired"
# What comes of a record whose bytes were changed.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, LayoutError)


@dataclass(frozen=True, slots=True)
class NamespaceRecord:
    """An identity that the store knows, with the layout of its chunks."""

    identity: ModelIdentity
    layout: Layout
    given_forward: str = ""  # of the identity as its owner gives it, if that is another

    @property
    def given(self) -> ModelIdentity:
        """The identity as its owner gives it: without a number of ours."""
        return replace(self.identity, forward=self.given_forward or self.identity.forward)

    def pack(self) -> bytes:
        """Encode as JSON."""
        fields = {"identity": self.identity.to_json(), "layout": self.layout.to_json()}
        if self.given_forward:
            fields["given_forward"] = self.given_forward
        return json.dumps(fields).encode()

    @classmethod
    def unpack(cls, data: bytes) -> NamespaceRecord:
        """Decode. Raises DamagedError."""
        try:
            fields = json.loads(data)
            layout = Layout(**fields["layout"])
            identity = ModelIdentity.from_json(fields["identity"])
            record = cls(identity, layout, str(fields.get("given_forward", "")))
            _ = record.given  # is checked as it is made
        except _DAMAGE as error:
            raise DamagedError(
                f"the index holds no model where it should: {error}",
                "end what uses the store and remove its folder `index`: it, a cache, begins anew",
            ) from error
        return record

    @classmethod
    def register(
        cls, index: Environment, identity: ModelIdentity, layout: Layout
    ) -> NamespaceRecord:
        """Enter an identity, or compare the layout with the one it was entered with."""
        with index.read() as txn:
            data = txn.get("namespace", current(txn, identity).namespace)
        if data is None:
            data = index.write(lambda txn: cls._enter(txn, identity, layout))
        record = cls.unpack(data)
        if record.layout != layout:
            raise LayoutError(
                f"namespace {identity.namespace_hex} has layout {record.layout}, not {layout}",
                "a difference that changes the layout belongs into the identity",
            )
        return record

    @classmethod
    def _enter(cls, txn: Txn, identity: ModelIdentity, layout: Layout) -> bytes:
        number = _number(txn, identity)
        known = _numbered(identity, number)
        there = txn.get("namespace", known.namespace)
        if there is not None:
            return there  # another process was first
        data = cls(known, layout, identity.forward if number else "").pack()
        txn.put("namespace", known.namespace, data)
        if number:  # one of the forgotten is of this identity from now on
            txn.put_int("meta", _GENERATION + identity.namespace, number)
        return data

    @classmethod
    def retire(cls, index: Environment, name: bytes) -> NamespaceRecord:
        """Take a name out of use, for ever. Returns what it stood for. Raises FormatError."""

        def work(txn: Txn) -> bytes | None:
            data = txn.get("namespace", name)
            if data is None:
                return None
            record = cls.unpack(data)
            number = _GENERATION + record.given.namespace
            # A time, so that the oldest are known.
            generation = max(txn.get_int("meta", number) + 1, int(time.time()))
            txn.put("meta", number, generation.to_bytes(8, "little"))
            txn.add_int("meta", _RETIRED, 1)
            txn.delete("namespace", name)
            _forget(txn)
            return data

        data = index.write(work)
        if data is None:
            raise FormatError(f"namespace {name.hex()} is not in the index", "it was retired")
        return cls.unpack(data)


def current(txn: Txn, identity: ModelIdentity) -> ModelIdentity:
    """The identity under which KV of one is kept now: itself, until it was retired."""
    return _numbered(identity, _number(txn, identity))


def _number(txn: Txn, identity: ModelIdentity) -> int:
    """That which an identity is given here; 0 if it keeps its name, since it was never retired."""
    number = txn.get_int("meta", _GENERATION + identity.namespace)
    # One that has a number was given it elsewhere, by a server.
    numbered = GENERATION_FIELD in json.loads(identity.forward or "{}")
    if number or numbered or txn.get("namespace", identity.namespace) is not None:
        return number
    return txn.get_int("meta", _FORGOTTEN)


def _numbered(identity: ModelIdentity, number: int) -> ModelIdentity:
    if not number:
        return identity
    forward = {**json.loads(identity.forward), GENERATION_FIELD: number}
    return replace(identity, forward=canonical_json(forward))


def _forget(txn: Txn) -> None:
    """Forget the oldest numbers, if they are too many; not those of names that are in use."""
    known = {name: int.from_bytes(value, "little") for name, value in txn.scan("meta", _GENERATION)}
    too_many = len(known) - GENERATIONS_MAX
    if too_many <= 0:
        return
    for _, data in txn.scan("namespace"):
        known.pop(_GENERATION + NamespaceRecord.unpack(data).given.namespace, None)
    for name in sorted(known, key=known.__getitem__)[:too_many]:
        txn.delete("meta", name)
        if known[name] > txn.get_int("meta", _FORGOTTEN):
            txn.put_int("meta", _FORGOTTEN, known[name])


class Names:
    """The names that are in use, as far as this process has opened them. Thread-safe."""

    def __init__(self, index: Environment) -> None:
        self._index = index
        with index.read() as txn:
            self._seen = txn.get_int("meta", _RETIRED)
        self._known: frozenset[bytes] | None = None  # None: nothing was retired since
        self._lock = threading.Lock()  # what is entered while the index is read must not get lost

    def refresh(self) -> None:
        """Look for what was retired, by any process."""
        with self._lock, self._index.read() as txn:
            seen = txn.get_int("meta", _RETIRED)
            if seen != self._seen:
                self._known = frozenset(name for name, _ in txn.scan("namespace"))
                self._seen = seen

    def entered(self, name: bytes) -> None:
        """One was opened, after a look at the index."""
        with self._lock:
            if self._known is not None:
                self._known |= {name}

    def is_retired(self, name: bytes) -> bool:
        """Whether one that was opened has been retired since."""
        known = self._known
        return known is not None and name not in known
