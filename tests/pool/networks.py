"""Networks of their own for processes of a test, on one bridge: as hosts are. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

WAIT_S = 30.0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=WAIT_S)


class Networks:
    """A bridge, and networks on it that may be cut off."""

    def __init__(self) -> None:
        self._tag = f"{os.getpid() % 100_000:05}"
        self._subnet = f"10.203.{os.getpid() % 250 + 1}"
        self.bridge, self.address = f"psb{self._tag}", f"{self._subnet}.1"
        self._made: list[str] = []

    def up(self) -> None:
        """Make the bridge."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def add(self) -> tuple[list[str], str]:
        """Make a network: what a command in it begins with, and its address."""
        number = len(self._made) + 2
        name, near, far = f"ps{self._tag}-{number}", f"psv{self._tag}{number}", "eth0"
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _ip("link", "set", near, "master", self.bridge, "up")
        address = f"{self._subnet}.{number}"
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", far)
        _ip("-n", name, "link", "set", far, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return ["ip", "netns", "exec", name], address

    def cut(self, address: str, connected: bool = False) -> None:
        """Have all that is sent to and from a network be lost, or no more."""
        number = address.rpartition(".")[2]
        _ip("link", "set", f"psv{self._tag}{number}", "up" if connected else "down")

    def down(self) -> None:
        """Remove all."""
        for name in self._made:
            with suppress(subprocess.SubprocessError):
                _ip("netns", "del", name)
        with suppress(subprocess.SubprocessError):
            _ip("link", "del", self.bridge)


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
