"""Networks of their own for processes of a test, on one bridge: as hosts are. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count

import pytest

WAIT_S = 30.0
_NUMBERS = count()  # networks go when their last process has, so each has a name of its own


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=WAIT_S)


class Networks:
    """A bridge, and networks on it that may be cut off."""

    def __init__(self) -> None:
        number = next(_NUMBERS)
        self._tag = f"{os.getpid() % 100_000:05}{chr(97 + number % 26)}"
        self._subnet = f"10.{200 + number % 50}.{os.getpid() % 250 + 1}"
        self.bridge, self.address = f"psb{self._tag}", f"{self._subnet}.1"
        self._numbers: list[int] = []

    def up(self) -> None:
        """Make the bridge."""
        # An address of its own: else it has the lowest of its ports', another one with each, and
        # who has asked before sends to nobody.
        _ip("link", "add", self.bridge, "address", "02:00:00:00:00:01", "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def add(self) -> tuple[list[str], str]:
        """Make a network: what a command in it begins with, and its address."""
        number = len(self._numbers) + 2
        name, near, far = self._name(number), self._near(number), "eth0"
        self._numbers.append(number)
        _ip("netns", "add", name)
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("link", "set", near, "master", self.bridge, "up")
        address = f"{self._subnet}.{number}"
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", far)
        _ip("-n", name, "link", "set", far, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return ["ip", "netns", "exec", name], address

    def cut(self, address: str, connected: bool = False) -> None:
        """Have all that is sent to and from a network be lost, or no more."""
        near = self._near(int(address.rpartition(".")[2]))
        _ip("link", "set", near, "up" if connected else "down")

    def down(self) -> None:
        """Remove all."""
        removed = [("link", "del", self._near(number)) for number in self._numbers]
        removed += [("netns", "del", self._name(number)) for number in self._numbers]
        for words in (*removed, ("link", "del", self.bridge)):
            with suppress(subprocess.SubprocessError):
                _ip(*words)

    def _name(self, number: int) -> str:
        return f"ps{self._tag}-{number}"

    def _near(self, number: int) -> str:
        """The end of a network's cable that is on the bridge."""
        return f"psv{self._tag}{number}"


@contextmanager
def networks() -> Iterator[Networks]:
    """None yet, on a bridge; skips where this may not be made."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("networks are made by root, with iproute2")
    made = Networks()
    try:
        try:
            made.up()
            made.add()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no networks can be made here: {error.stderr.decode().strip()}")
        yield made
    finally:
        made.down()
