"""What a parser may be asked and may answer: the terms of the fuzzing in `benchmarks.fuzz`.

A target takes bytes from a stranger. Its contract is the exceptions it may raise for them; a
``parse`` also compares what it was given back (AssertionError). Anything else is a finding. The
changes made to inputs are seeded, so a run without a fuzzer repeats exactly.
"""

from __future__ import annotations

import base64
import json
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from prefixstore.errors import StoreError

CORPORA = Path(__file__).parent / "fuzz_corpora"
INPUT_BYTES_MAX = 4096
KEPT_INPUT_BYTES_MAX, KEPT_INPUTS_MAX, KEPT_BYTES_MAX = 512, 60, 3072  # of a corpus in the tree
PACKAGES = ("prefixstore", "connector")
_ROOT = Path(__file__).resolve().parent.parent
_NUMBERS = (0, 1, -1, 2, 127, 128, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, 10**400)
_SCALARS: tuple[Any, ...] = (
    None, True, False, *_NUMBERS, 0.5, 1e308, float("inf"), float("nan"), "", "0", "a:b", "\0",
    "\ud800", "9" * 400 + "G", "8GiB", "ff", [], {}, [[]], "é", "\u2028",
)  # fmt: skip
_DEEP = (8, 300, *range(900, 1000, 4))  # levels; JSON of some 980 can be read, but not written


@dataclass(frozen=True, slots=True)
class Finding:
    """An input that a parser did not take as it must."""

    where: str  # the same for all inputs that fail alike
    text: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Target:
    """One parser. ``form`` is json or bytes: how its inputs are changed."""

    name: str
    parse: Callable[[bytes], object]
    contract: tuple[type[Exception], ...]
    seeds: Callable[[], Sequence[bytes]]
    form: str = "bytes"

    def check(self, data: bytes) -> Finding | None:
        """Give the parser an input."""
        try:
            self.parse(data)
        except self.contract as error:
            if isinstance(error, StoreError) and not str(error).strip():
                return Finding(f"{type(error).__name__} without a message", "", data)
        except Exception as error:  # request loop: whatever else is raised is what is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if Path(f.filename).is_relative_to(_ROOT)] or frames
            at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            text = "".join(traceback.format_exception(error)[-12:])
            return Finding(f"{type(error).__name__} at {at}", text, data)
        return None

    def corpus(self) -> list[bytes]:
        """The seeds, and the inputs that are kept in the tree."""
        return [*self.seeds(), *read_corpus(self.name)]

    def changed(self, data: bytes, rng: random.Random) -> bytes:
        """An input that is a little different."""
        if self.form == "json" and rng.random() < 0.8:
            try:
                value = json.loads(data)
                for _ in range(rng.randrange(1, 3)):
                    value = change_json(value, rng)
                return json.dumps(value).encode()
            except (ValueError, RecursionError):
                pass
        return change_bytes(data, rng)


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, insert, cut or repeat somewhere."""
    out = bytearray(data or b"\0")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(_NUMBERS[:-1]) % (1 << (8 * width))
            out[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            del out[at : at + rng.randrange(1, 17)]
        elif kind == 4:
            del out[at:]
        else:
            out[at:at] = out[rng.randrange(len(out) + 1) :][: rng.randrange(1, 33)]
    return bytes(out[:INPUT_BYTES_MAX])


def change_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one entry changed, somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {key: one for key, one in value.items() if key != name}
        if rng.random() < 0.1:
            return {**value, rng.choice(("", "x", name + "_", "\ud800")): rng.choice(_SCALARS)}
        return {**value, name: change_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(value[at], rng), *value[at + rng.randrange(2) :]]
    if isinstance(value, str) and value and rng.random() < 0.4:
        try:  # JSON in a text of JSON
            return json.dumps(change_json(json.loads(value), rng))
        except (ValueError, RecursionError):
            return change_bytes(value.encode(errors="replace"), rng).decode("latin-1")
    if rng.random() < 0.1:
        for _ in range(rng.choice(_DEEP)):
            value = [value]
        return value
    return rng.choice(_SCALARS)


# ---------------------------------------------------------------------- corpora
def read_corpus(name: str) -> list[bytes]:
    """The inputs of a target that are kept: one a line, in base64."""
    path = CORPORA / f"{name}.txt"
    lines = path.read_text("ascii").split() if path.exists() else []
    return [base64.b64decode(line) for line in lines]


def write_corpus(name: str, inputs: Sequence[bytes]) -> None:
    """Keep inputs, in a stable order."""
    ordered = sorted(set(inputs), key=lambda data: (len(data), data))
    text = "".join(base64.b64encode(data).decode() + "\n" for data in ordered)
    (CORPORA / f"{name}.txt").write_text(text, "ascii")


def smallest_cover(target: Target, inputs: Sequence[bytes]) -> list[bytes]:
    """Few and short inputs that between them take every step of ours that all of them do, beside
    the corpus, which stays: it has what once was a finding."""
    kept: list[bytes] = []
    seen = set[tuple[CodeType, int, int]]()
    for data in target.corpus():
        seen |= _steps(target, data)
    total = 0
    for data in sorted(set(inputs), key=lambda data: (len(data), data)):
        if len(data) > KEPT_INPUT_BYTES_MAX or not data:
            continue
        steps = _steps(target, data)
        if steps - seen and total + len(data) <= KEPT_BYTES_MAX and len(kept) < KEPT_INPUTS_MAX:
            kept.append(data)
            total += len(data)
            seen |= steps
    return kept


def _steps(target: Target, data: bytes) -> set[tuple[CodeType, int, int]]:
    """The pairs of lines, one run after the other, of an input's way through the code."""
    found = set[tuple[CodeType, int, int]]()
    last: dict[FrameType, int] = {}
    roots = tuple(str(_ROOT / package) for package in PACKAGES)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call" and not frame.f_code.co_filename.startswith(roots):
            return None
        if event == "line":
            found.add((frame.f_code, last.get(frame, 0), frame.f_lineno))
            last[frame] = frame.f_lineno
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        target.check(data)
    finally:
        sys.settrace(before)
    return found
