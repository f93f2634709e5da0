"""Verdicts of `prefixstore blend-check` in a store's folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixstore import ModelIdentity, Store, verdict
from prefixstore.errors import ConfigError
from prefixstore.verdict import Verdict, digest_of, path_of, read, write
from tests.store_helpers import empty_store

IDENTITY = ModelIdentity(
    architecture="LlamaForCausalLM", num_layers=2, num_kv_heads=2, head_size=8, rope="{}",
    attention="{}", weights="w", model_dtype="float32", kv_dtype="float32", chunk_tokens=16,
    quantization='{"bits":4}',
)  # fmt: skip
PASSED = Verdict(
    passed=True, selector="staleness", budget=0.15, reason="it stays close", model="m",
    date="2026-11-22T00:00:00+00:00", texts={"prompts": 8},
    figures=[{"selector": "none", "kl_mean": 0.5}], versions={"torch": "2"},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return empty_store(tmp_path)


def test_a_verdict_comes_back(folder: Path) -> None:
    assert read(folder, IDENTITY) is None
    path = write(folder, IDENTITY, PASSED)
    assert path.parent == folder
    assert read(folder, IDENTITY) == PASSED
    failed = replace(PASSED, passed=False, selector="", budget=0.0)
    assert write(folder, IDENTITY, failed) == path
    assert read(folder, IDENTITY) == failed
    assert read(folder, replace(IDENTITY, weights="other")) is None
    assert [each.name for each in folder.glob("*verdict*")] == [path.name]


def test_the_store_does_not_mind_it(folder: Path) -> None:
    write(folder, IDENTITY, PASSED)
    with Store.open(folder) as store:
        assert store.namespaces() == []
    assert read(folder, IDENTITY) == PASSED


@pytest.mark.parametrize(
    "same",
    [
        {"kv_dtype": "bfloat16"}, {"kv_dtype": "fp8_e4m3", "kv_scales": "checkpoint"},
        {"chunk_tokens": 64}, {"model_dtype": "bfloat16"}, {"lora": "sampled:00"},
        {"quantization": 'gptq_marlin {"bits":4}'},
    ],
    ids=str,
)  # fmt: skip
def test_one_verdict_serves_all_engines_of_a_model(same: dict[str, Any]) -> None:
    assert replace(IDENTITY, **same).namespace != IDENTITY.namespace
    assert digest_of(replace(IDENTITY, **same)) == digest_of(IDENTITY)


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "x"}, {"num_layers": 3}, {"num_kv_heads": 1}, {"head_size": 16},
        {"architecture": "Qwen2ForCausalLM"}, {"rope": '{"rope_theta":5}'},
        {"attention": '{"attention_bias":true}'}, {"forward": '{"rms_norm_eps":1}'},
        {"quantization": '{"bits":8}'}, {"quantization": ""},
    ],
    ids=str,
)  # fmt: skip
def test_another_model_has_another_verdict(other: dict[str, Any]) -> None:
    assert digest_of(replace(IDENTITY, **other)) != digest_of(IDENTITY)


def test_it_is_written_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, IDENTITY, PASSED)

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write(folder, IDENTITY, replace(PASSED, budget=0.3))
    assert read(folder, IDENTITY) == PASSED
    assert len(list(folder.glob("*verdict*")) + list(folder.glob(".blend*"))) == 1


def test_it_is_on_the_disk_before_it_has_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(fd: int) -> None:
        order.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name.lstrip('.')[:13]}")
        fsync(fd)

    def renamed(one: Any, other: Any) -> None:
        order.append("rename")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write(folder, IDENTITY, PASSED)
    assert order == ["fsync blend-verdict", "rename", "fsync kv"]


def without(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda value: json.dumps({key: value[key] for key in value if key != name})


def having(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda value: json.dumps({**value, **changes})


DAMAGE: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda value: "",
    "half": lambda value: json.dumps(value)[:100],
    "no object": lambda value: "[1]",
    "deep": lambda value: "[" * 100_000,
    "bytes": lambda value: "\ud8ff",
    "large": lambda value: json.dumps(value) + " " * verdict.MAX_FILE_BYTES,
    "version": having(format_version=2),
    "model": having(model_digest="0" * 32),
    "more": having(color="red"),
    "less": without("reason"),
    "kind": having(passed="yes"),
    "budget": having(budget=1.5),
    "nan": having(budget=float("nan")),
    "no selector": having(selector=""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_none_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = write(folder, IDENTITY, PASSED)
    text = DAMAGE[name](json.loads(path.read_text()))
    path.write_bytes(text.encode(errors="surrogatepass"))
    with caplog.at_level(logging.WARNING, "prefixstore"):
        assert read(folder, IDENTITY) is None
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert "is ignored" in caplog.messages[0]


def test_a_file_that_cannot_be_read_is_none_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path_of(folder, IDENTITY).mkdir()
    assert read(folder, IDENTITY) is None
    assert "is ignored" in caplog.text


def test_only_a_store_takes_one(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="holds no store"):
            write(path, IDENTITY, PASSED)
    assert read(tmp_path / "none", IDENTITY) is None
    assert list(tmp_path.iterdir()) == []
