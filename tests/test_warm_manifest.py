"""The manifest: what was appended is read again, whatever a crash did to the end of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prefixstore.errors import ConfigError
from prefixstore.warm_manifest import Entry, Manifest

ENTRY = Entry("a.txt", "tag", "d1", 0, 128, "p", 3, ["00" * 16, "01" * 16])


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    manifest = Manifest.of(tmp_path, bytes(16))
    assert manifest.read() == []
    manifest.append([])
    assert not manifest.path.exists()
    other = replace(ENTRY, name="b é", digest="d2")
    manifest.append([ENTRY])
    manifest.append([other])
    assert manifest.read() == [ENTRY, other]
    newer = replace(ENTRY, name="renamed")
    manifest.append([newer])
    assert {entry.name for entry in manifest.read()} == {"renamed", "b é"}
    assert Manifest.of(tmp_path, bytes([1] * 16)).read() == []


def test_a_file_can_be_of_several_namespaces(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "names")
    other = replace(ENTRY, keys=["02" * 16, "03" * 16])
    manifest.append([ENTRY, other])
    assert manifest.read() == [ENTRY, other]


def test_a_file_that_cannot_be_is_told_before(tmp_path: Path) -> None:
    Manifest(tmp_path / "names").check()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"cannot write .*give a file in a folder"):
        Manifest(tmp_path / "none" / "names").check()
    with pytest.raises(ConfigError, match=r"cannot read .*directory"):
        Manifest(tmp_path).check()


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "names")
    manifest.append([ENTRY])
    whole = manifest.path.read_bytes()
    other = replace(ENTRY, digest="d2")
    for cut in range(len(whole)):
        manifest.path.write_bytes(whole + whole[:cut])
        assert manifest.read() == [ENTRY]
        manifest.append([other])
        assert manifest.read() == [ENTRY, other]


def test_lines_of_something_else_are_not_read(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "names")
    manifest.append([ENTRY])
    with manifest.path.open("ab") as file:
        file.write(b'[1]\n{"name": 1}\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
        file.write(manifest.path.read_bytes().replace(b'"start": 0', b'"start": "0"'))
    assert manifest.read() == [ENTRY]
