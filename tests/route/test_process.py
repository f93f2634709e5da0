"""``prefixstore route`` as a process: its first line, signals, and errors of one line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from benchmarks.server_process import RouterProcess
from prefixstore.cli import main
from tests.store_helpers import wait_for

NOBODY = "http://127.0.0.1:9"


def test_it_starts_reads_its_file_again_and_stops(tmp_path: Path) -> None:
    file, log = tmp_path / "workers.json", tmp_path / "log"
    file.write_text(json.dumps([{"url": "http://127.0.0.1:7"}]))
    options = [f"--workers={file}", "--drain=5"]
    with RouterProcess([f"{NOBODY}=prefill"], *options, log=log) as router:

        def names() -> set[str]:
            workers = router.ask("GET", "/v1/workers")["workers"]
            return {f"{one['name']} {one['role']} {one['state']}" for one in workers}

        assert names() == {"127.0.0.1:9 prefill down", "127.0.0.1:7 both down"}
        file.write_text(json.dumps([{"url": "http://127.0.0.1:8"}]))
        router.signal(signal.SIGHUP)
        wanted = {"127.0.0.1:9 prefill down", "127.0.0.1:8 both down"}
        wait_for(lambda: names() == wanted, "the file is read again")
        file.write_text("nonsense")
        router.signal(signal.SIGHUP)
        wait_for(lambda: "the workers stay as they are" in log.read_text(), "the log says so")
        assert names() == wanted
        assert router.stop() == 0
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no workers (give --worker URL or --workers FILE)"),
        (["--worker", "a"], "'a' is no worker's URL (give http://host:port)"),
        (["--worker", f"{NOBODY}=boss"], "'boss' is no role (give both, prefill, decode)"),
        (["--worker", NOBODY, "--worker", NOBODY], "127.0.0.1:9 is a worker already"),
        (["--worker", NOBODY, "--host", "0.0.0.0"], "--host 0.0.0.0 without --admin-token-file"),
        (["--worker", NOBODY, "--port", "70000"], "--port 70000"),
        (["--worker", NOBODY, "--tls-cert", "x"], "one of --tls-cert and --tls-key"),
        (["--workers", "none.json"], "cannot read none.json"),
        (["--worker", NOBODY, "--admin-token-file", "none"], "cannot read the token file"),
        (["--worker", NOBODY, "--local-tokens", "-1"], "--local-tokens or --drain below 0"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["route", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("prefixstore: error: ")
    assert told in printed.err
    assert printed.err.count("\n") == 1
