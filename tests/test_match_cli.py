"""`prefixstore match`, and the command line of `warm`, with a real tokenizer and a filled store."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from prefixstore import Layout, ModelIdentity, Namespace, Store, admin, cli_warm
from prefixstore import warm as warm_module
from prefixstore.cli import OK, REFUSED, main
from prefixstore.client.token import TOKEN_VARIABLE
from prefixstore.errors import ConfigError
from prefixstore.staleness import note_staleness
from prefixstore.warm_address import Address
from prefixstore.warm_documents import Document
from prefixstore.warm_manifest import Entry, Manifest
from prefixstore.warm_report import Warmed, WarmReport
from prefixstore.warm_run import Progress
from prefixstore.warm_tokens import Tokens
from tests.engine.support import tiny_model
from tests.serve.support import ADMIN, ALICE, running, tokens_file
from tests.store_helpers import Place

pytest_plugins = ["tests.store_fixtures"]

SIZE = 64
LAYOUT = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=SIZE, head_bytes=256)
_WORDS = ["memory", "tier", "disk", "slow", "engine", "prompt", "token", "layer", "key", "value"]
TEXTS = [" ".join(random.Random(seed).choices(_WORDS, k=400)) + "." for seed in range(3)]
PREAMBLE = "Answer from these documents: "


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens(model: Path) -> Tokens:
    return Tokens(str(model))


@pytest.fixture
def folder(place: Place, model: Path, tokens: Tokens) -> Path:
    """Two documents warmed and one served, as engines would have stored them."""
    identity = ModelIdentity.from_folder(model, chunk_tokens=SIZE)
    with place.open(disk_bytes="64MiB", memory_bytes="64MiB") as store:
        namespace = store.namespace(identity, LAYOUT)
        before = tokens.preamble(PREAMBLE)
        entries = []
        for number in range(2):
            ids = tokens.document(TEXTS[number])
            keys = fill(namespace, before + ids, tag=f"tag{number}", alone=True)
            entries.append(Entry(f"doc{number}", f"tag{number}", f"d{number}", 0, len(ids), "p",
                                 len(before), keys))  # fmt: skip
        fill(namespace, before + tokens.document(TEXTS[2]), tag="served")
        Manifest.of(store.folder, identity.namespace).append(entries)
        assert store.flush()
        refs = namespace.chain(before + tokens.document(TEXTS[1])).refs()
        note_staleness(namespace, refs, np.ones((len(refs), SIZE)))
    return place.folder / "store"


def fill(namespace: Namespace, ids: Sequence[int], **labels: Any) -> list[str]:
    refs = namespace.chain(ids).refs()
    namespace.put(refs, [bytes(namespace.layout.payload_bytes)] * len(refs), **labels)
    return [ref.key.hex() for ref in refs]


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = OK) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    if code == REFUSED:
        assert err.count("\n") == 1
        assert err.startswith("prefixstore: error: ")
        return str(err)
    return str(out)


def test_every_part_of_a_prompt_is_told(
    folder: Path, model: Path, tokens: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = "Nobody has ever stored this sentence! " * 3 + "Now?"
    parts = [PREAMBLE, TEXTS[0], new, TEXTS[1], TEXTS[2], "What follows?"]
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(parts))
    found = json.loads(run(capsys, "match", folder, prompt, "--model", model, "--json"))
    ids = [tokens.document(part) for part in parts]
    lengths = [len(part) for part in ids]
    whole = [(lengths[0] + n) // SIZE * SIZE - lengths[0] for n in lengths]
    shown = [(p["kind"], p["start"], p["tokens"], p["source"]) for p in found["parts"]]
    at = lengths[0] + lengths[1] + lengths[2]
    assert shown == [
        ("exact", 0, lengths[0] + whole[1], "doc0"),
        ("new", lengths[0] + whole[1], lengths[1] - whole[1] + lengths[2], ""),
        ("segment", at, whole[3], "doc1"),
        ("new", at + whole[3], lengths[3] - whole[3], ""),
        ("segment", at + lengths[3], whole[4], "served"),
        ("new", at + lengths[3] + whole[4], lengths[4] - whole[4] + lengths[5], ""),
    ]
    exact, _, warmed, _, served, _ = found["parts"]
    assert (exact["source_offset"], exact["alone"], exact["measured_chunks"]) == (None, True, 0)
    assert (warmed["source_offset"], warmed["alone"]) == (0, True)
    assert warmed["measured_chunks"] == warmed["chunks"] == warmed["tiers"]["memory"]
    assert (served["alone"], served["measured_chunks"]) == (False, 0)
    assert served["source_offset"] == lengths[0]  # in its prompt: nobody knows its document
    assert found["tokens"] == sum(lengths)
    assert found["exact_tokens"] + found["segment_tokens"] + found["new_tokens"] == sum(lengths)
    computed = found["new_tokens"] + 0.15 * (whole[3] + whole[4])
    assert found["computed_tokens"] == pytest.approx(computed)
    assert found["computed_share"] == pytest.approx(computed / sum(lengths))
    assert found["computed_tokens_exact"] == sum(lengths) - exact["tokens"]
    chunks = sum(part["chunks"] for part in found["parts"])
    assert found["load_bytes"] == chunks * LAYOUT.payload_bytes

    text = run(capsys, "match", folder, prompt, "--model", model, "--budget", "0.5")
    assert "doc1" in text
    assert (
        f"cost with blending at 0.5: {found['new_tokens'] + (whole[3] + whole[4]) / 2:.0f}" in text
    )
    ids_file = tmp_path / "ids.json"
    ids_file.write_text(json.dumps([token for part in ids for token in part]))
    same = json.loads(run(capsys, "match", folder, ids_file, "--model", model, "--json"))
    assert same == found


def test_a_server_tells_what_its_folder_does(
    folder: Path, model: Path, tokens: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All but labels of chunks, which clients are not told: names are in a file of one's own."""
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps([PREAMBLE, TEXTS[0], "Never seen. " * 30, TEXTS[1], TEXTS[2]]))
    words = prompt, "--model", model, "--json"
    near = json.loads(run(capsys, "match", folder, *words))
    [names] = folder.glob("warm-*.jsonl")
    secret = tmp_path / "token"
    secret.write_text(ADMIN)
    who = "--token-file", secret
    with (
        Store.open(folder, create=False) as store,
        running(store, tokens=tokens_file(tmp_path)) as server,
    ):
        url = server.address
        # Another one, with other KV: more chunks, but none of this prompt.
        half = ModelIdentity.from_folder(model, chunk_tokens=SIZE, model_dtype="bfloat16")
        namespace = store.namespace(half, replace(LAYOUT, head_bytes=128))
        refs = namespace.chain(range(SIZE * 60)).refs()
        namespace.put(refs, [bytes(namespace.layout.payload_bytes)] * 60)
        far = json.loads(run(capsys, "match", url, *words, *who, "--manifest", names))
        assert (far.pop("store"), near.pop("store")) == (url, str(folder))
        exact = far["parts"][0]
        assert (exact["kind"], exact.pop("alone"), near["parts"][0].pop("alone")) == (
            "exact", None, True
        )  # fmt: skip
        [served] = [part for part in near["parts"] if part["source"] == "served"]
        served["source"] = ""  # its tag
        assert far == near
        text = run(capsys, "match", url, prompt, "--model", model, *who)
        assert "doc1" not in text
        assert f"namespace {near['namespace'][:12]}" in text
        wrong = run(capsys, "match", url, prompt, "--model", model, code=REFUSED)
        assert "wants a token (give --token-file)" in wrong
        monkeypatch.setenv(TOKEN_VARIABLE, ADMIN)
        assert run(capsys, "match", url, prompt, "--model", model) == text
        monkeypatch.setenv(TOKEN_VARIABLE, "no-token-of-this-server")  # a file has precedence
        assert run(capsys, "match", url, prompt, "--model", model, *who) == text
        wrong = run(capsys, "match", url, prompt, "--model", model, code=REFUSED)
        assert f"does not take the token in {TOKEN_VARIABLE}" in wrong
        secret.write_text(ALICE)
        wrong = run(capsys, "match", url, prompt, "--model", model, *who, code=REFUSED)
        assert "has nothing of this model (it is empty" in wrong
    wrong = run(capsys, "match", url, prompt, "--model", model, *who, code=REFUSED)
    assert f"cannot reach {url}" in wrong


@pytest.mark.parametrize(("store", "sent"), [
    ("http://h:1", "secret"), ("unix:/h", "secret"), ("redis://h", ""), ("s3://bucket", ""),
])  # fmt: skip
def test_the_token_of_the_environment_is_a_servers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, sent: str
) -> None:
    """A pool has a password of its own, or takes none."""
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    (tmp_path / "prompt").write_text("x")
    asked: list[str] = []

    def opened(address: Address, create: bool) -> Any:
        asked.append(address.token)
        raise ConfigError("planted", "nothing to do")

    monkeypatch.setattr("prefixstore.warm_store.open_target", opened)
    assert main(["match", store, str(tmp_path / "prompt"), "--model", str(model)]) == REFUSED
    assert asked == [sent]


def test_a_prompt_that_is_all_there_or_not_at_all(
    folder: Path, model: Path, tokens: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "ids.json"
    ids = tokens.preamble(PREAMBLE) + tokens.document(TEXTS[0])
    prompt.write_text(json.dumps(ids[: 3 * SIZE]))
    found = json.loads(run(capsys, "match", folder, prompt, "--model", model, "--json"))
    # The engine computes the last token in any case.
    assert [(p["kind"], p["tokens"]) for p in found["parts"]] == [("exact", 191), ("new", 1)]
    plain = tmp_path / "p.txt"
    plain.write_text("Nothing of this is there.")
    found = json.loads(run(capsys, "match", folder, plain, "--model", model, "--json"))
    assert [p["kind"] for p in found["parts"]] == ["new"]
    assert (found["computed_share"], found["load_bytes"]) == (1.0, 0)


@pytest.fixture
def words(folder: Path, model: Path, tmp_path: Path) -> tuple[object, ...]:
    """A command that asks the folder for a short prompt."""
    prompt = tmp_path / "p.txt"
    prompt.write_text("words")
    return "match", folder, prompt, "--model", model, "--json"


HALF = replace(LAYOUT, head_bytes=128)


def fill_much(store: Store, identity: ModelIdentity) -> None:
    """More chunks than the folder has of any other."""
    fill(store.namespace(identity, HALF), range(SIZE * 60))


def test_the_namespace_with_most_chunks_is_chosen(
    folder: Path, model: Path, words: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads(run(capsys, *words))["namespace"]
    half = ModelIdentity.from_folder(model, chunk_tokens=SIZE, model_dtype="bfloat16")
    other = replace(half, weights="sha256:another")
    with Store.open(folder, create=False) as store:
        for identity in (half, other):
            store.namespace(identity, HALF)
        assert json.loads(run(capsys, *words))["namespace"] == first
        fill_much(store, half)
        assert len(list(admin.list_chunks(store))) > 60
    found = json.loads(run(capsys, *words))
    assert (found["namespace"], found["kv_dtype"]) == (half.namespace_hex, "bfloat16")
    named = json.loads(run(capsys, *words, "--namespace", first[:8]))
    assert named["namespace"] == first


def test_the_namespace_of_a_codec_is_asked_for(
    folder: Path, model: Path, words: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What was rounded is told to those who round, however much there is of it."""
    first = json.loads(run(capsys, *words))["namespace"]
    told = run(capsys, *words, "--codec", "fp8", code=REFUSED)
    assert "nothing of this model rounded by fp8" in told
    assert "float32); give the --codec" in told
    rounded = ModelIdentity.from_folder(model, chunk_tokens=SIZE).with_codec("fp8")
    with Store.open(folder, create=False) as store:
        fill_much(store, rounded)
    assert json.loads(run(capsys, *words))["namespace"] == first
    found = json.loads(run(capsys, *words, "--codec", "fp8"))
    assert (found["namespace"], found["kv_dtype"]) == (rounded.namespace_hex, "float32, fp8")


def test_match_says_what_is_wrong(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, bad = tmp_path / "p.txt", tmp_path / "bad.json"
    prompt.write_text("words")
    rest = "--model", model
    wrong = run(capsys, "match", folder, tmp_path / "no.txt", *rest, code=REFUSED)
    assert "cannot read" in wrong
    for text, message in (
        ("[1, 2", "is no JSON"), ('{"a": 1}', "neither token ids nor texts"),
        ('["half \\ud800 a pair"]', "are no Unicode"),
        ("[1, true]", "neither token ids nor texts"), ("[]", "neither token ids nor texts"),
    ):  # fmt: skip
        bad.write_text(text)
        assert message in run(capsys, "match", folder, bad, *rest, code=REFUSED)
    assert "a budget of 2" in run(
        capsys, "match", folder, prompt, *rest, "--budget=2", code=REFUSED
    )
    other = tiny_model(seed=77)
    wrong = run(capsys, "match", folder, prompt, "--model", other, code=REFUSED)
    assert "has nothing of this model" in wrong
    assert "(LlamaForCausalLM, float32)" in wrong
    gone = run(capsys, "match", tmp_path / "none", prompt, *rest, code=REFUSED)
    assert "holds no store" in gone
    wrong = run(capsys, "match", folder, prompt, "--model", tmp_path / "gone", code=REFUSED)
    assert "cannot find the files of model" in wrong
    (tmp_path / "empty").mkdir()
    wrong = run(capsys, "match", folder, prompt, "--model", tmp_path / "empty", code=REFUSED)
    assert "config.json" in wrong
    bad.write_bytes(b"\xff")
    assert "is not UTF-8" in run(capsys, "match", folder, bad, *rest, code=REFUSED)
    prompt.write_text("")
    assert "the prompt has no tokens" in run(capsys, "match", folder, prompt, *rest, code=REFUSED)


# ---------------------------------------------------------------------- tokens
def test_special_tokens_come_once(model: Path, tokens: Tokens, tmp_path: Path) -> None:
    plain = tokens.preamble("Answer.")
    assert plain == tokens.document("Answer.")
    assert tokens.preamble() == []
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    made = Tokenizer.from_file(str(model / "tokenizer.json"))
    begin = "<|endoftext|>"
    made.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": begin}))
    with_begin = Tokens(str(tmp_path))
    first = made.token_to_id(begin)
    assert with_begin.preamble() == [first]
    assert with_begin.preamble("Answer.") == [first, *plain]
    assert with_begin.preamble(begin + "Answer.") == [first, *plain]
    assert with_begin.document("Answer.") == plain
    with pytest.raises(ConfigError, match="has no tokenizer"):
        Tokens(str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------- prefixstore warm
@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the library call; returns what it was called with."""
    called: dict[str, Any] = {}

    def fake(store: str, model: str, documents: Any, **options: Any) -> WarmReport:
        called.update(options, store=store, model=model, documents=list(documents))
        os.write(1, b"noise of an engine\n")
        lost = called.get("preamble") == "lose"
        one = Warmed("a.txt", 130, 1, 2, 1 if lost else 2, 2048, 2,
                     "incomplete" if lost else "stored", "measured")  # fmt: skip
        return WarmReport(store, model, "ab" * 16, 64, 1024, 3, bool(options["dry_run"]), [one],
                          500, 2.0, None if options["dry_run"] else 1.0, ["a note"])  # fmt: skip

    monkeypatch.setattr(warm_module, "warm", fake)
    return called


def test_warm_passes_all_its_options_on(
    warmed: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "pre.txt").write_text("Answer.")
    words = [
        "warm", "kv", "--model", "m", str(tmp_path / "a.txt"), "--preamble",
        str(tmp_path / "pre.txt"), "--tag", "t", "--ttl", "2h", "--pin", "--no-staleness",
        "--engine", '{"dtype": "bfloat16"}', "--memory", "1GiB", "--disk", "2GiB",
        "--memory-dir", "/tmp", "--chunk-tokens", "128", "--json", "--token-file", "t.txt",
        "--ca-file", "ca.pem", "--manifest", "names", "--codec", "auto",
    ]  # fmt: skip
    assert main(words) == OK
    out = capfd.readouterr().out  # nothing but the result
    found = json.loads(out)
    assert warmed.pop("progress")
    assert warmed == {
        "store": "kv", "model": "m", "documents": [Document(str(tmp_path / "a.txt"), "a text")],
        "preamble": "Answer.", "tag": "t", "ttl_s": 7200.0, "pin": True, "staleness": False,
        "engine": {"dtype": "bfloat16"}, "memory": "1GiB", "disk": "2GiB", "memory_dir": "/tmp",
        "token_file": "t.txt", "ca_file": "ca.pem", "manifest": "names", "chunk_tokens": 128,
        "codec": "auto",
        "dry_run": False,
    }  # fmt: skip
    assert found["totals"] == {
        "tokens": 130, "chunks": 2, "stored_chunks": 2, "bytes": 2048, "tail_tokens": 2
    }  # fmt: skip
    assert (found["tokens_per_s"], found["lost_chunks"]) == (250.0, 0)


def test_warm_prints_a_table(
    warmed: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a text")
    words = ["warm", "kv", "--model", "m", str(tmp_path / "a.txt")]
    assert main(words) == OK
    out = capfd.readouterr().out
    assert "note: a note" in out
    assert "2 chunks stored, 500 tokens computed in 0:02 (250 tokens/s)" in out
    assert main([*words, "--dry-run"]) == OK
    assert "2 chunks would be stored (2.0 KiB), 500 tokens computed" in capfd.readouterr().out
    (tmp_path / "lose").write_text("lose")
    assert main([*words, "--preamble", str(tmp_path / "lose")]) == REFUSED
    assert "1 chunks are not there" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "{"], "--engine is no JSON"),
        (["--engine", "[" * 100_000], "--engine is no JSON"),
        (["--engine", "[1]"], "--engine is [1]"),
        (["--ttl", "soon"], "'soon' is not an age"),
        (["--preamble", "/none"], "cannot read /none"),
    ],
)
def test_warm_says_what_is_wrong(
    warmed: dict[str, Any], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in run(capsys, "warm", "kv", "--model", "m", "doc", *words, code=REFUSED)


def test_the_bar_shows_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = cli_warm.Bar()
    bar.show(Progress(100, 1000, 2.0))
    bar.show(Progress(200, 1000, 4.0))  # too soon for another line
    bar.show(Progress(1000, 1000, 20.0))
    assert capsys.readouterr().err.splitlines() == [
        "prefixstore: 100 of 1000 tokens, 50 tokens/s, 0:18 left",
        "prefixstore: 1000 of 1000 tokens, 50 tokens/s, 0:00 left",
    ]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(cli_warm, "time", SimpleNamespace(monotonic=time.monotonic))
    bar = cli_warm.Bar()
    bar.show(Progress(500, 1000, 10.0))
    bar.show(Progress(1000, 1000, 20.0))
    shown = capsys.readouterr().err
    assert shown.startswith("\r[###############...............]  50% 500 of 1000 tokens")
    assert shown.endswith("\x1b[K\n")
