"""Settings of engines and requests: what is taken, and that each error names its entry."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from connector.options import (
    STAGING_BYTES_MAX,
    STAGING_BYTES_MIN,
    EngineOptions,
    RequestOptions,
    full_salt,
)
from prefixstore.config import SALT_BYTES_MAX, TAG_BYTES_MAX
from prefixstore.errors import ConfigError


def test_engine_defaults() -> None:
    options = EngineOptions.parse({"dir": "/cache"})
    assert options == EngineOptions(dir="/cache")
    assert options.memory is None
    assert options.disk is None
    assert options.save is True
    assert options.load == "auto"
    assert options.device_bytes == 0


def test_engine_settings_are_taken() -> None:
    given: dict[str, Any] = {
        "dir": "/cache", "memory": "1GiB", "disk": 1 << 30, "memory_dir": "/dev/shm",
        "chunk_tokens": 128, "load": "never", "save": False, "staging": "3MiB",
        "load_threads": 2, "stall_ms": 50, "bypass_s": 0.5, "device": "2GiB",
    }  # fmt: skip
    options = EngineOptions.parse(given)
    assert {name: getattr(options, name) for name in given} == given
    assert options.staging_bytes(1 << 30) == 3 << 20
    assert options.device_bytes == 2 << 30


def test_staging_holds_what_two_steps_complete_within_bounds() -> None:
    options = EngineOptions.parse({"dir": "/cache"})
    between = (STAGING_BYTES_MIN + STAGING_BYTES_MAX) // 2
    assert options.staging_bytes(between // 2) == between // 2 * 2
    assert options.staging_bytes(0) == STAGING_BYTES_MIN
    assert options.staging_bytes(1 << 50) == STAGING_BYTES_MAX


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "'dir'"),
        ({"dir": ""}, "'dir'"),
        ({"dir": 7}, "'dir'"),
        ({"dir": "/c", "memmory": "1GiB"}, "memmory"),
        ({"dir": "/c", "load": "sometimes"}, "load='sometimes'"),
        ({"dir": "/c", "chunk_tokens": 0}, "chunk_tokens=0"),
        ({"dir": "/c", "chunk_tokens": 64.0}, "chunk_tokens=64.0"),
        ({"dir": "/c", "load_threads": -1}, "load_threads=-1"),
        ({"dir": "/c", "stall_ms": "100"}, "stall_ms='100'"),
        ({"dir": "/c", "memory": "lots"}, "memory='lots'"),
        ({"dir": "/c", "disk": "8 parsecs"}, "disk='8 parsecs'"),
        ({"dir": "/c", "staging": "-1MiB"}, "staging='-1MiB'"),
        ({"dir": "/c", "device": "all"}, "device='all'"),
    ],
)
def test_engine_mistakes_are_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="(?s)" + named.replace(".", r"\.")) as caught:
        EngineOptions.parse(given)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", "lots"), ("memory", 1.5), ("memory", [1]), ("memory", True),
        ("disk", "lots"), ("disk", 1.5), ("disk", {}),
        ("staging", "lots"), ("staging", True), ("staging", 0), ("staging", -5),
        ("device", "lots"), ("device", True), ("device", -5), ("device", None), ("device", 1.5),
        ("memory_dir", 5), ("memory_dir", True),
        ("save", "yes"), ("save", 1), ("save", None),
        ("load", ["auto"]), ("load", None), ("load", True),
        ("bypass_s", "10"), ("bypass_s", -1), ("bypass_s", None), ("bypass_s", 0),
        ("bypass_s", float("nan")),
        ("chunk_tokens", True), ("stall_ms", True), ("load_threads", True),
    ],
)  # fmt: skip
def test_every_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions.parse({"dir": "/c", name: value})
    assert name in str(caught.value)


# ---------------------------------------------------------------------- requests
@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"prefixstore": None}])
def test_request_defaults(params: Any) -> None:
    assert RequestOptions.parse(params) == RequestOptions()
    assert RequestOptions() == RequestOptions(True, True, "", False, False, None, "", None)


def test_request_settings_are_taken() -> None:
    given: dict[str, Any] = {
        "read": False, "write": False, "salt": "s", "pin": True, "alone": True, "ttl_s": 1.5,
        "tag": "t",
        "max_load_tokens": 0,
    }  # fmt: skip
    assert RequestOptions.parse({"prefixstore": given}) == RequestOptions(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("read", 1), ("read", "true"), ("read", None), ("write", 0), ("write", "no"),
        ("salt", b"x"), ("salt", None), ("salt", "x" * (SALT_BYTES_MAX + 1)),
        ("pin", 1), ("pin", None), ("ttl_s", 0), ("ttl_s", -1), ("ttl_s", "60"),
        ("ttl_s", True), ("ttl_s", float("nan")), ("ttl_s", float("inf")), ("ttl_s", 2**31),
        ("tag", 1), ("tag", None), ("tag", "ä" * (TAG_BYTES_MAX // 2 + 1)),
        ("max_load_tokens", -1), ("max_load_tokens", 1.0), ("max_load_tokens", True),
        ("unknown", 1),
    ],
)  # fmt: skip
def test_request_mistakes_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        RequestOptions.parse({"prefixstore": {name: value}})
    assert name in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("value", [[], "read", 1, True])
def test_request_settings_that_are_no_object(value: Any) -> None:
    with pytest.raises(ConfigError, match="give an object"):
        RequestOptions.parse({"prefixstore": value})


@pytest.mark.parametrize("params", [[1], "text", 7, True])
def test_request_params_that_are_no_object(params: Any) -> None:
    """Nothing but ConfigError may come out: the engine's thread is the one that parses."""
    with pytest.raises(ConfigError, match="kv_transfer_params"):
        RequestOptions.parse(params)


@pytest.mark.parametrize("name", ["salt", "tag"])
def test_text_that_is_no_unicode(name: str) -> None:
    """JSON can carry half of a surrogate pair, which has no bytes in UTF-8."""
    with pytest.raises(ConfigError, match=name):
        RequestOptions.parse({"prefixstore": {name: "\ud800"}})


def test_salts_of_different_pairs_differ() -> None:
    parts = ["", "a", "b", "ab", "aa", "\0", "\x01\0\0\0a"]
    salts = {full_salt(ours or None, vllms) for ours, vllms in itertools.product(parts, parts)}
    assert len(salts) == len(parts) ** 2
    assert full_salt(None, "") == full_salt("", "") == b""


def test_salts_of_different_epochs_differ() -> None:
    salts = {
        full_salt(vllms, ours, epoch)
        for vllms, ours, epoch in itertools.product((None, "a"), ("", "a"), (b"", b"a", b"b"))
    }
    assert len(salts) == 12


@pytest.mark.parametrize("vllms", ["y", "y" * 1_000_000, "\ud800"])
def test_any_salts_fit_into_a_key(vllms: str) -> None:
    most = "x" * SALT_BYTES_MAX
    RequestOptions.parse({"prefixstore": {"salt": most}})
    assert 0 < len(full_salt(vllms, most, b"epoch")) <= SALT_BYTES_MAX
