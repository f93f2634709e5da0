"""``prefixstore top``: piped, in a terminal, once; with a server that goes and comes back."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefixstore import Store, cli
from prefixstore.cli_top_show import frame
from prefixstore.serve import follower
from prefixstore.testing_data import CONTRACT_LAYOUT, content_of, identity_for, tokens_of
from tests.serve.support import ADMIN, ALICE, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]
WAIT_S = 30.0
MAIN = "from prefixstore.cli import main; raise SystemExit(main())"


@pytest.fixture(autouse=True)
def many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "SAMPLE_S", 0.2)
    monkeypatch.delenv("PREFIXSTORE_TOKEN", raising=False)


@pytest.fixture
def store(place: Place) -> Iterator[Store]:
    with place.open("4MiB", "4MiB") as store:
        ns = store.namespace(identity_for("a"), CONTRACT_LAYOUT)
        refs = ns.chain(tokens_of(1, 3)).refs()
        ns.put(refs, [content_of(ref.key, CONTRACT_LAYOUT.payload_bytes) for ref in refs])
        assert store.flush(10)
        yield store


@contextmanager
def top(*arguments: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", MAIN, "top", *arguments]
    with subprocess.Popen(command, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def read_until(descriptor: int, words: bytes) -> bytes:
    """What comes, up to some words."""
    end, data = time.monotonic() + WAIT_S, b""
    while words not in data:
        assert time.monotonic() < end, f"no {words!r} in {data[-300:]!r}"
        if select.select([descriptor], [], [], 0.2)[0]:
            data += os.read(descriptor, 65536)
    return data


def test_once_shows_a_server_and_its_folder(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(store) as server:
        deadline = time.monotonic() + WAIT_S
        while True:
            assert cli.main(["top", server.address, "--once", "--json"]) == 0
            told = json.loads(capsys.readouterr().out)
            if told["namespaces"]:
                break
            assert time.monotonic() < deadline
        assert cli.main(["top", server.address, "--once"]) == 0
        shown = capsys.readouterr().out
    assert told["namespaces"][0]["chunks"] == {"memory": 3, "disk": 3}
    for words in ("memory  [", "disk    [", "ContractModel a", "nothing was looked up"):
        assert words in shown
    assert "\x1b" not in shown
    assert cli.main(["top", str(store.folder), "--once", "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert local.keys() <= told.keys()
    assert local["namespaces"] == told["namespaces"]
    assert local["tiers"]["disk"]["used_bytes"] == told["tiers"]["disk"]["used_bytes"]


def test_a_token_is_taken_from_a_file_or_the_environment(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with running(store, tokens=tokens_file(tmp_path)) as server:
        assert cli.main(["top", server.address]) == cli.REFUSED  # and does not try for ever
        (tmp_path / "mine").write_text(ADMIN + "\n")
        assert cli.main(["top", server.address, "--once", f"--token-file={tmp_path}/mine"]) == 0
        monkeypatch.setenv("PREFIXSTORE_TOKEN", ALICE)
        assert cli.main(["top", server.address]) == cli.REFUSED
        assert "tenant 'local'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--interval", "0"], ["--token-file", "/nowhere"]])
def test_mistakes_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "http://127.0.0.1:1", *arguments]) == cli.REFUSED
    assert cli.main(["top", "http://127.0.0.1:1", "--once"]) == cli.REFUSED
    assert capsys.readouterr().err.count("prefixstore: error: ") == 2


def test_a_pipe_gets_a_block_each_time_and_ctrl_c_ends_it_well(store: Store) -> None:
    with (
        running(store) as server,
        top(server.address, "--interval=0.5", "--json", stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        told = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert told[0]["time_s"] < told[1]["time_s"]
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0


def test_a_terminal_is_refreshed_and_put_back_and_told_when_the_server_goes(
    store: Store, free_port: int
) -> None:
    ours, its = pty.openpty()
    address = f"http://127.0.0.1:{free_port}"
    with top(address, "--interval=0.5", stdout=its, stderr=its) as process:
        os.close(its)
        shown = read_until(ours, b"no answer, trying again")
        assert shown.startswith(b"\x1b[?1049h\x1b[?25l\x1b[H")
        with running(store, port=free_port):
            read_until(ours, b"memory  [")
        shown = read_until(ours, b"no answer, trying again")
        with running(store, port=free_port):
            read_until(ours, b"watched for")
            process.send_signal(signal.SIGINT)
            assert read_until(ours, b"\x1b[?1049l").count(b"Traceback") == 0
            assert process.wait(WAIT_S) == 0
    os.close(ours)


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_a_frame_keeps_to_its_width_and_takes_no_commands_from_texts() -> None:
    text = {"key": "ab" * 16, "tag": "\x1b[2Jevil\n", "namespace": "0" * 32, "tenant": "local",
            "prompts": 3, "found_tokens": 9, "longest_tokens": 9}  # fmt: skip
    tier = {"cap_bytes": 100, "used_bytes": 40, "unwritten_chunks": 2}
    flows = ("stored_s", "promoted_s", "removed_memory_s")
    rates = (*flows, "sent_bytes_s", "received_bytes_s", "requests_s")
    told = {
        "time_s": 100.0, "started_s": 0.0, "namespaces": [], "tiers": {"memory": tier},
        "rates": dict.fromkeys(rates, 1234567.8),
        "found_lately": {"memory": 1, "disk": 1, "missing": 2}, "listeners": 0, "routes": [{
            "route": "/v1/get", "requests_lately": 1, "failed": 0, "p50_ms": 1, "p90_ms": None,
            "p99_ms": 3}],
        "misses": [], "texts": [text], "clients": [],
    }  # fmt: skip
    for width in (20, 79, 200):
        lines = frame(told, "http://x\x1b", width)
        assert max(map(len, lines)) <= width
        assert all(line.isprintable() for line in lines)
    assert any("50%" in line for line in lines)
    assert any("?[2Jevil?" in line for line in lines)
