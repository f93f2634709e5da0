"""The command line, mostly against what the library says of the same store."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import prefixstore
from connector.options import EngineOptions
from prefixstore import Layout, ModelIdentity, PutState, Store, admin
from prefixstore.cli import OK, PIPE_CLOSED, REFUSED, UNSOUND, main
from prefixstore.config import parse_bytes
from prefixstore.identity import canonical_json
from prefixstore.index import Txn
from prefixstore.keys import ChunkRef
from prefixstore.rows import Row
from prefixstore.serve.auth import MARK_FIELD

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=16, head_bytes=32)
COMMAND = [sys.executable, "-c", "import sys; from prefixstore.cli import main; sys.exit(main())"]


def identity(weights: str = "w") -> ModelIdentity:
    return ModelIdentity(
        architecture="LlamaForCausalLM", num_layers=2, num_kv_heads=2, head_size=8, rope="{}",
        attention="{}", weights=weights, model_dtype="float32", kv_dtype="float32", chunk_tokens=16,
    )  # fmt: skip


def fill(store: Store, chunks: int, *, weights: str = "w", **labels: Any) -> list[ChunkRef]:
    namespace = store.namespace(identity(weights), LAYOUT)
    first = sum(weights.encode())
    refs = namespace.chain(range(first, first + 16 * chunks)).refs()
    payloads = [bytes([i % 256]) * LAYOUT.payload_bytes for i in range(chunks)]
    assert set(namespace.put(refs, payloads, **labels)) == {PutState.STORED}
    assert store.flush(10.0)
    return refs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Iterator[Store]:
    memory_dir = str(tmp_path / "memory")
    Path(memory_dir).mkdir()
    with Store.open(folder, memory_bytes="8MiB", disk_bytes="8MiB", memory_dir=memory_dir) as it:
        yield it


class Cli:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object, code: int = OK) -> str:
        """Run a command; returns standard output. A failure must be one line on standard error."""
        self._capsys.readouterr()
        try:
            got = main([str(word) for word in words])
        except SystemExit as ended:
            got = int(ended.code or 0)
        out, err = self._capsys.readouterr()
        assert got == code, err
        if code == REFUSED:
            assert err.count("\n") == 1
            assert "error: " in err
            return str(err)
        return str(out)

    def json(self, *words: object, code: int = OK) -> Any:
        return json.loads(self(*words, "--json", code=code))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- starting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["verify", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from prefixstore.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'numpy', 'lmdb', 'torch', 'vllm', 'xxhash', 'connector', 'prefixstore.store'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("HEAVY []\n"), done.stdout + done.stderr
    assert "usage: prefixstore" in done.stdout


def test_config_needs_no_torch_and_no_index(folder: Path) -> None:
    code = (
        "import sys; from prefixstore.cli import main\n"
        "for name in ('torch', 'vllm', 'lmdb', 'numpy', 'xxhash'): sys.modules[name] = None\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "config", str(folder), "--memory", "1MiB"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == OK, done.stderr
    assert "PrefixStoreConnector" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["no-such-verb"],
        ["stats"],
        ["stats", "{folder}", "--dir", "{folder}"],
        ["stats", "{folder}"],
        ["ls", "{folder}", "--limit", "x"],
        ["rm", "{folder}"],
        ["rm", "{folder}", "--key", "xyz"],
        ["pin", "{folder}", "--all", "--tag", "a"],
        ["gc", "{folder}", "--older-than", "soon"],
        ["config", "{folder}", "--chunk-tokens", "0"],
        ["config", "{folder}", "--memory", "lots"],
        ["config", "{folder}", "--memory", "4KiB"],
        ["config", "{folder}", "--load", "sometimes"],
        ["config", "{folder}", "--memory-dir", "{folder}/none"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_code_2(cli: Cli, folder: Path, words: list[str]) -> None:
    cli(*(word.format(folder=folder) for word in words), code=REFUSED)
    assert not folder.exists()


def test_a_folder_without_a_store_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("b")
    for verb in ("stats", "ls", "verify", "gc", "config"):
        assert "holds no store" in cli(verb, tmp_path, code=REFUSED)
    assert os.listdir(tmp_path) == ["a"]


def test_settings_that_are_no_json_are_reported_as_damage(cli: Cli, folder: Path) -> None:
    folder.mkdir()
    (folder / "store.json").write_text("{")
    cli("stats", folder, code=UNSOUND)


# --- showing -------------------------------------------------------------------------------------


def test_stats_says_what_the_library_says(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 5, weights="aaa")
    fill(store, 3, weights="bbb")
    found = cli.json("stats", folder)
    assert found == admin.stats(store) | {"counters": found["counters"]}
    assert found["tiers"]["memory"]["chunks"] == 8
    text = cli("stats", "--dir", folder)
    assert "8.0 MiB" in text
    for entry in found["namespaces"]:
        assert entry["namespace"][:12] in text


def test_stats_tells_tenants_of_one_model_apart(cli: Cli, store: Store, folder: Path) -> None:
    marks = "", "1a" * 16, "2b" * 16
    for mark in marks:
        of_tenant = replace(identity(), forward=canonical_json({MARK_FIELD: mark} if mark else {}))
        store.namespace(of_tenant, LAYOUT)
    lines = [line for line in cli("stats", folder).splitlines() if "LlamaForCausalLM" in line]
    shown = sorted(line.partition("LlamaForCausalLM")[2].partition("float32")[0] for line in lines)
    assert [one.split() for one in shown] == [
        ["w"], ["w", "of", "tenant", "1a1a1a1a"], ["w", "of", "tenant", "2b2b2b2b"]
    ]  # fmt: skip


def test_ls_selects_and_limits(cli: Cli, store: Store, folder: Path) -> None:
    refs = fill(store, 6, weights="aaa", tag="one")
    fill(store, 2, weights="bbb", tag="two", ttl_s=1000, pin=True)
    keys = {item["key"] for item in cli.json("ls", folder, "--tag", "one")["chunks"]}
    assert keys == {ref.key.hex() for ref in refs}
    name = identity("bbb").namespace_hex
    of_model = cli.json("ls", folder, "--namespace", name[:8])["chunks"]
    assert [item["tiers"] for item in of_model] == [["memory", "disk"]] * 2
    assert all(item["pinned"] and item["expires_s"] for item in of_model)
    [one] = cli.json("ls", folder, "--key", refs[3].key.hex()[:14])["chunks"]
    assert one["depth"] == 3
    limited = cli.json("ls", folder, "--limit", 5)
    assert (len(limited["chunks"]), limited["not_shown"]) == (5, 3)
    assert cli.json("ls", folder, "--limit", 0)["not_shown"] == 0
    lines = cli("ls", folder, "--limit", 7).splitlines()
    assert len(lines) == 2 + 7 + 1
    assert "1 more" in lines[-1]
    assert cli("ls", folder, "--tag", "none") == "No such chunks.\n"


def test_columns_are_aligned(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 11, tag="x")
    head, rule, *rows = cli("ls", folder).splitlines()
    starts = [i for i, char in enumerate(rule) if char == "-" and (i == 0 or rule[i - 1] == " ")]
    assert [line[i - 1] for line in (head, *rows) for i in starts[1:]] == [" "] * 12 * 9
    assert all(line.endswith("x") for line in rows)


# --- verifying -----------------------------------------------------------------------------------


def damage(store: Store, ref: ChunkRef) -> None:
    """Flip one byte of a chunk on disk."""
    with store.index.read() as txn:
        data = txn.get("chunk", ref.key)
    assert data is not None
    row = Row.unpack(data)
    path = store.folder / f"disk-{row.slot_bytes}.slots"
    with open(path, "r+b") as file:
        file.seek(row.slot * row.slot_bytes + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_finds_drops_and_is_content(cli: Cli, store: Store, folder: Path) -> None:
    refs = fill(store, 4)
    assert cli.json("verify", folder)["sound"]
    damage(store, refs[2])
    found = cli.json("verify", folder, code=UNSOUND)
    assert [(d["key"], d["tier"]) for d in found["damaged"]] == [(refs[2].key.hex(), "disk")]
    text = cli("verify", folder, code=UNSOUND)
    assert refs[2].key.hex() in text
    assert "--fix" in text
    fixed = cli.json("verify", folder, "--fix")
    assert (fixed["fixed"], fixed["sound"]) == (1, True)
    assert "The store is sound." in cli("verify", folder)


def test_verify_says_what_it_could_not_read(cli: Cli, store: Store, folder: Path) -> None:
    """A file without permission to read it (root may read all, so here: one that is none) is not
    called sound, and what is in it is not dropped."""
    fill(store, 4)
    assert store.flush()
    chunks = admin.stats(store)["tiers"]["disk"]["chunks"]
    assert chunks > 0
    store.close()
    [path] = folder.glob("disk-*.slots")
    kept = path.rename(path.with_suffix(".kept"))
    path.mkdir()
    for words in ((), ("--fix",)):
        found = cli.json("verify", folder, *words, code=UNSOUND)
        assert (len(found["unread"]), found["damaged"], found["sound"]) == (chunks, [], False)
    text = cli("verify", folder, code=UNSOUND)
    assert f"unread: {found['unread'][0]['key']} in the disk tier" in text
    assert "was not checked" in text
    path.rmdir()
    kept.rename(path)
    assert cli.json("verify", folder)["chunks"]["disk"] == chunks


def test_verify_says_that_segments_are_wrong(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 4)
    assert store.flush()

    def lose(txn: Txn) -> None:
        for key, _ in list(txn.scan("indexed")):
            txn.delete("indexed", key)

    store.index.write(lose)
    found = cli.json("verify", folder, code=UNSOUND)
    assert sum(found["segments"].values()) > 0
    text = cli("verify", folder, code=UNSOUND)
    assert "segments: " in text
    assert "--fix` mends it" in text
    assert cli.json("verify", folder, "--fix")["sound"]
    assert cli.json("verify", folder)["sound"]


def test_verify_has_a_bar_on_a_terminal_only(store: Store, folder: Path) -> None:
    fill(store, 4)
    assert run("verify", folder).stderr == ""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "verify", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs
    ) as child:
        assert child.wait(60) == OK
    os.close(theirs)
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    assert "100 % of 8" in shown


# --- changing ------------------------------------------------------------------------------------


def count(store: Store) -> int:
    return len(list(admin.list_chunks(store)))


def test_rm_deletes_what_is_selected_and_no_more(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 6, weights="aaa", tag="one")
    refs = fill(store, 2, weights="bbb", tag="two")
    size = 6 * LAYOUT.slot_bytes * 2
    planned = cli.json("rm", folder, "--tag", "one", "--dry-run")
    assert planned == {"chunks": 6, "bytes": size, "dry_run": True}
    assert count(store) == 8
    assert cli.json("rm", folder, "--tag", "one") == planned | {"dry_run": False}
    assert {item.key for item in admin.list_chunks(store)} == {ref.key for ref in refs}
    assert cli("rm", folder, "--namespace", identity("bbb").namespace_hex).startswith("2 chunks")
    assert count(store) == 0
    assert admin.verify(store).sound


def test_rm_all_asks_a_person_or_wants_yes(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 3)
    assert "--yes" in cli("rm", folder, "--all", code=REFUSED)
    assert count(store) == 3
    for answer, left in (("n\n", 3), ("y\n", 0)):
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [*COMMAND, "rm", str(folder), "--all"], cwd=ROOT, stdin=theirs, stderr=theirs,
            stdout=subprocess.DEVNULL,
        ) as child:  # fmt: skip
            asked = b""
            while b"[y/N]" not in asked:
                asked += os.read(ours, 4096)
            os.write(ours, answer.encode())
            assert child.wait(60) == (OK if left == 0 else REFUSED)
        os.close(ours)
        os.close(theirs)
        assert b"all 3 chunks" in asked
        assert count(store) == left
    fill(store, 3)
    assert cli.json("rm", folder, "--all", "--yes")["chunks"] == 3


def test_pin_and_unpin(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 4, weights="aaa", tag="keep")
    fill(store, 4, weights="bbb")
    assert cli.json("pin", folder, "--tag", "keep", "--dry-run")["chunks"] == 4
    assert not any(item.row.pinned for item in admin.list_chunks(store))
    assert cli.json("pin", folder, "--tag", "keep") == {
        "chunks": 4, "refused": 0, "dry_run": False,
    }  # fmt: skip
    pinned = {item.key for item in admin.list_chunks(store) if item.row.pinned}
    assert len(pinned) == 4
    assert cli("pin", folder, "--all", "--yes", "--off") == "8 chunks unpinned\n"
    assert not any(item.row.pinned for item in admin.list_chunks(store))


def test_a_pin_that_finds_no_room_is_an_error(cli: Cli, folder: Path, tmp_path: Path) -> None:
    limits = {"memory_bytes": "1MiB", "disk_bytes": 0, "memory_dir": str(tmp_path)}
    with Store.open(folder, **limits) as store:  # type: ignore[arg-type]
        with store.live.read() as txn:
            room = store.ledger.cap(txn, 1) // LAYOUT.slot_bytes
        fill(store, room * 3 // 4)
        text = cli("pin", folder, "--all", "--yes", code=REFUSED)
        assert "50% of a tier" in text
        assert any(item.row.pinned for item in admin.list_chunks(store))


# --- collecting ----------------------------------------------------------------------------------


def test_gc_gives_back_the_space_of_deleted_chunks(cli: Cli, store: Store, folder: Path) -> None:
    refs = fill(store, 40)
    slots = folder / f"disk-{LAYOUT.slot_bytes}.slots"
    full = slots.stat().st_blocks
    cli("rm", folder, "--all", "--yes")
    assert slots.stat().st_blocks == full
    done = cli.json("gc", folder)
    assert done["freed_bytes"] == dict.fromkeys(("memory", "disk"), 40 * LAYOUT.slot_bytes)
    assert slots.stat().st_blocks < full // 10
    assert admin.verify(store).sound
    assert fill(store, 40) == refs


def test_gc_drops_the_expired_and_the_models_of_old(
    cli: Cli, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real - 40 * 86400)
    fill(store, 3, weights="old")
    fill(store, 5, weights="used")
    monkeypatch.setattr(time, "time", lambda: real)
    namespace = store.namespace(identity("used"), LAYOUT)
    more = namespace.chain(range(5000, 5016)).refs()
    namespace.put(more, [bytes(LAYOUT.payload_bytes)])
    assert store.flush(10.0)
    assert cli.json("gc", folder, "--older-than", "60d")["dropped_namespaces"] == []
    done = cli.json("gc", folder, "--older-than", "30d")
    assert done["dropped_namespaces"] == [identity("old").namespace_hex]
    assert done["dropped_chunks"] == 3
    assert count(store) == 6
    assert cli.json("gc", folder)["dropped_namespaces"] is None


def test_gc_empties_memory_only_when_told(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 7)
    assert cli.json("gc", folder)["memory_emptied_chunks"] is None
    assert admin.stats(store)["tiers"]["memory"]["chunks"] == 7
    assert cli.json("gc", folder, "--memory")["memory_emptied_chunks"] == 7
    tiers = admin.stats(store)["tiers"]
    assert (tiers["memory"]["chunks"], tiers["disk"]["chunks"]) == (0, 7)
    assert "memory tier emptied" in cli("gc", folder, "--memory")


def test_gc_brings_a_store_under_a_lower_cap(cli: Cli, store: Store, folder: Path) -> None:
    fill(store, 300)
    with Store.open(folder, disk_bytes=100 * LAYOUT.slot_bytes):
        cli("gc", folder)
        disk = cli.json("stats", folder)["tiers"]["disk"]
        assert 0 < disk["chunks"] < 100
        assert disk["allocated_bytes"] + disk["index_bytes"] <= disk["cap_bytes"]


# --- the option for vllm serve -------------------------------------------------------------------


def test_config_survives_the_shell(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "it's a $HOME `store`"
    line = cli("config", folder, "--memory", "2MiB", "--disk", "9GiB", "--chunk-tokens", 32)
    assert line.count("\n") == 1
    told = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert told[0] == "--kv-transfer-config"
    value = json.loads(told[1])
    assert value == cli.json("config", folder, "--memory=2MiB", "--disk=9GiB", "--chunk-tokens=32")
    assert shlex.split(line)[1] == told[1]
    options = EngineOptions.parse(value["kv_connector_extra_config"])
    assert (options.dir, options.chunk_tokens, options.save) == (str(folder), 32, True)
    assert parse_bytes(options.memory or 0) == 2 << 20


def test_config_has_every_engine_option(cli: Cli, folder: Path, tmp_path: Path) -> None:
    words = [
        "--memory=2MiB", "--disk=0", f"--memory-dir={tmp_path}", "--chunk-tokens=128",
        "--load=always", "--no-save", "--no-prepare", "--staging=64MiB", "--device=1GiB",
        "--load-threads=2",
        "--stall-ms=50", "--bypass-s=3.5", "--blend", "--url=redis://localhost:7575",
        "--token-file=token", "--ca-file=ca.pem", "--codec=lossless",
    ]  # fmt: skip
    extra = cli.json("config", folder, *words)["kv_connector_extra_config"]
    assert set(extra) == {field.name for field in fields(EngineOptions)}
    options = EngineOptions.parse(extra)
    default = EngineOptions(dir="")
    assert all(getattr(options, f.name) != getattr(default, f.name) for f in fields(options))


def test_config_warns_when_a_tier_does_not_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", str(folder), "--memory=900T", f"--memory-dir={tmp_path}"]) == OK
    assert "--shm-size" in capsys.readouterr().err
    assert main(["config", str(folder / "not" / "there"), "--memory=4M", "--disk=9000T"]) == OK
    told = capsys.readouterr().err
    assert "less than the disk tier of" in told
    assert "memory tier" not in told


# --- ending --------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_error(store: Store, folder: Path) -> None:
    fill(store, 200)
    with subprocess.Popen(
        [*COMMAND, "ls", str(folder), "--limit=0"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.wait(60) == PIPE_CLOSED
        assert child.stderr.read() == b""


def test_without_an_output_it_is_no_error(store: Store, folder: Path) -> None:
    words = ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "stats", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (OK, b"")


def test_it_says_its_version() -> None:
    words = [sys.executable, "-m", "prefixstore", "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (OK, f"prefixstore {prefixstore.__version__}\n")


def test_ctrl_c_ends_with_one_line(store: Store, folder: Path) -> None:
    fill(store, 3)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "rm", str(folder), "--all"], cwd=ROOT, stdin=theirs, stderr=theirs,
        stdout=subprocess.DEVNULL,
    ) as child:  # fmt: skip
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(ours, 4096)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    os.close(theirs)
    shown += os.read(ours, 4096)
    os.close(ours)
    assert b"interrupted" in shown
    assert b"Traceback" not in shown
    assert count(store) == 3
