"""Sizes and settings: what is read, what is refused, and that a crash leaves whole files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prefixstore.config import (
    GIB,
    KIB,
    MIB,
    SETTINGS_FILE,
    Settings,
    format_bytes,
    load_settings,
    new_settings,
    parse_bytes,
    save_settings,
)
from prefixstore.errors import ConfigError, FormatError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("1048576", MIB), (5, 5), ("8GiB", 8 * GIB), ("500M", 500 * MIB), ("1.5k", 1536),
     (" 2 mib ", 2 * MIB), ("3TB", 3 * 1024 * GIB), ("7B", 7)],
)  # fmt: skip
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 G G", "8 apples", "1e9", "0x10", "x1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("count", [0, 1, KIB, 5 * MIB, 8 * GIB, 3 * 1024 * GIB])
def test_a_written_size_reads_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == count


def test_settings_round_trip(tmp_path: Path) -> None:
    assert load_settings(tmp_path) is None
    settings = new_settings(8 * MIB, 0, "/dev/shm")
    save_settings(tmp_path, settings)
    assert load_settings(tmp_path) == settings
    assert os.listdir(tmp_path) == [SETTINGS_FILE]


def test_two_new_stores_have_two_names() -> None:
    assert len({new_settings(MIB, 0, "/x").store_id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("memory", "disk"),
    [(MIB - 1, 0), (0, MIB), (-1, 0), (MIB, -1), (MIB, 1 << 61), (1 << 61, 0)],
)
def test_tiers_that_cannot_work_are_refused(memory: int, disk: int) -> None:
    with pytest.raises(ConfigError):
        Settings("id", memory, disk, "/dev/shm")


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_version_is_refused(tmp_path: Path, version: int) -> None:
    save_settings(tmp_path, new_settings(MIB, 0, "/x"))
    path = tmp_path / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": version}))
    with pytest.raises(FormatError, match=f"version {version}"):
        load_settings(tmp_path)


def test_the_live_folder_belongs_to_the_folder_not_to_its_path(tmp_path: Path) -> None:
    settings = new_settings(MIB, 0, "/dev/shm")
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(one)
    assert settings.live_dir(one) == settings.live_dir(tmp_path / "link")
    assert settings.live_dir(one) != settings.live_dir(other)
    before = settings.live_dir(one)
    one.rename(tmp_path / "moved")
    assert settings.live_dir(tmp_path / "moved") == before
