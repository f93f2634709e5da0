"""`prefixstore blend-check` from texts and a model folder to a verdict in the store."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from benchmarks.model import demo_text, make_model, tokenize
from prefixstore import ModelIdentity, cli_blend_texts, identity, verdict
from prefixstore.cli import FAILED, OK, REFUSED, main
from prefixstore.identity import IdentityError
from prefixstore.verdict import Verdict
from prefixstore.warm_tokens import Tokens
from tests.store_helpers import empty_store

SMALL = [
    "--prompts=2", "--texts-per-prompt=3", "--tokens=64", "--compared=8", "--budgets", "0.2", "0.5",
    "--device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """The tensors are tiny: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: every text changes all that follow."""
    folder = tmp_path_factory.mktemp("models") / "mixing"
    return make_model(folder, text=demo_text(), layers=3, hidden=64, heads=2, kv_heads=1)


@pytest.fixture(scope="module")
def apart(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without attention's output: no text changes another."""
    folder = tmp_path_factory.mktemp("models") / "apart"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((model / name).read_text())
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name:
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of eight texts, and what must not be read as one."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    text = demo_text()
    for number in range(8):
        name = f"{number}.txt" if number % 2 else f"more/{number}.md"
        (folder / name).write_text(text[number * 600 : number * 600 + 500])
    (folder / ".hidden").write_text(text)
    (folder / "picture.dat").write_bytes(b"\0\1" * 5000)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return empty_store(tmp_path)


def run(*arguments: Any) -> int:
    return main(["blend-check", *map(str, arguments)])


def test_a_model_that_fails(
    model: Path, texts: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--model", model, "--texts", texts, *SMALL) == FAILED
    out = capsys.readouterr().out
    found = verdict.read(folder, ModelIdentity.from_folder(model))
    assert found is not None
    assert (found.passed, found.selector, found.budget) == (False, "", 0.0)
    lines = {line.split()[0]: line.split() for line in out.splitlines()[2:6]}
    assert list(lines) == ["rounding", "none", "all", "staleness"]
    [none] = [row for row in found.figures if row["selector"] == "none"]
    assert lines["none"][3] == f"{none['kl_mean']:.2g}"
    assert lines["none"][-1] == "no"
    assert lines["all"][-1] == "yes"
    assert "Few positions" in out
    assert "verdict: failed." in out
    assert '"ignore_verdict": true' in out
    assert f"written to {verdict.path_of(folder, ModelIdentity.from_folder(model))}" in out


def test_a_model_whose_texts_do_not_see_each_other(
    apart: Path, texts: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--model", apart, "--texts", texts, *SMALL) == OK
    out = capsys.readouterr().out
    found = verdict.read(folder, ModelIdentity.from_folder(apart))
    assert found is not None
    assert (found.passed, found.selector, found.budget) == (True, "staleness", 0.2)
    assert "verdict: passed. These texts hardly depend on each other" in out
    assert '"blend": {"selector": "staleness", "budget": 0.2}' in out


def test_json_has_stable_names_and_nothing_else_is_printed(
    apart: Path, texts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", apart, "--texts", texts, "--json", "--no-rounding", *SMALL) == OK
    value = json.loads(capfd.readouterr().out)
    names = {field.name for field in fields(Verdict)} | {"independent", "written_to"}
    assert value.keys() == names
    assert value["independent"] is True
    assert value["written_to"] is None
    assert value["model"] == str(apart)
    assert 3 <= value["texts"].pop("texts") <= 6
    assert value["texts"] == {
        "from": [str(texts)], "tokens": 64, "prompts": 2, "texts_per_prompt": 3,
        "positions": 16, "shared_contexts": False, "dtype": "float32",
    }  # fmt: skip
    assert {frozenset(row) for row in value["figures"]} == {
        frozenset(
            ("selector", "budget", "charged", "kl_mean", "kl_p95", "agreement", "kv_error")
        )
    }  # fmt: skip
    assert "rounding" not in {row["selector"] for row in value["figures"]}


def test_one_long_text_is_cut_into_pieces_that_do_not_overlap(model: Path) -> None:
    ids = torch.tensor(tokenize(model, demo_text())[:1000])
    found = cli_blend_texts._pieces(ids, 200, 40)
    assert [len(piece) for piece in found] == [240] * 4
    assert torch.equal(torch.cat(found), ids[:960])
    assert [len(piece) for piece in cli_blend_texts._pieces(ids[:239], 200, 40)] == [239]
    assert cli_blend_texts._pieces(ids[:103], 200, 40) == []


def given(**options: Any) -> cli_blend_texts.Given:
    """What is read when ``options`` are given."""
    defaults = {"texts": None, "requests": None, "preamble": None, "field": "text", "seed": 0}
    return cli_blend_texts.read(argparse.Namespace(**defaults | {"prompts": 8} | options))


def test_texts_are_read_as_documents_are(tmp_path: Path, texts: Path) -> None:
    lines = tmp_path / "a.ndjson"
    lines.write_text('\ufeff{"body": "one"}\n\n{"body": "two", "id": 7}\n{"body": " "}\n')
    before = tmp_path / "before.txt"
    before.write_text("Answer.")
    found = given(texts=[str(lines)], field="body", preamble=str(before))
    assert found == (["one", "two"], [], "Answer.")
    folder = given(texts=[str(texts)]).texts
    assert sorted(folder) == sorted(path.read_text() for path in texts.rglob("[0-9].*"))
    assert given(texts=[str(texts)]).texts == folder
    assert given(texts=[str(texts)], seed=1).texts != folder
    assert given(texts=[str(texts)]).preamble == ""


def test_no_more_is_read_than_fits(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_blend_texts, "MAX_BYTES", 1700)
    whole = {path.read_text() for path in texts.rglob("[0-9].*")}
    found = given(texts=[str(texts)]).texts
    assert sum(map(len, found)) == 1700
    assert all(found)
    assert all(any(one.startswith(text) for one in whole) for text in found)


def test_texts_stand_behind_the_preamble_that_warming_puts_there(
    model: Path, texts: Path, tmp_path: Path
) -> None:
    before = tmp_path / "before.txt"
    before.write_text("Answer from these.")
    tokens = Tokens(str(model))
    found = given(texts=[str(texts)], preamble=str(before))
    args = argparse.Namespace(
        tokens=64, compared=8, prompts=2, texts_per_prompt=3, seed=0, preamble=str(before)
    )
    sample = cli_blend_texts.sample(args, tokens, found)
    assert sample.preamble.tolist() == tokens.preamble("Answer from these.")
    assert len(sample.preamble) > len(tokens.preamble())


@pytest.mark.slow
def test_requests_of_a_model_trained_to_need_other_texts(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained model's task in words: what is asked of one text was said in another."""
    words = pytest.importorskip("benchmarks.quality.words")
    from benchmarks.quality import csmqar

    model = Path(__file__).resolve().parent.parent / "models" / "csmqar-5m"
    if not (model / "tokenizer.json").exists():
        pytest.skip("the model or its tokenizer is not in this checkout")
    spec = csmqar.Spec(family="B", chunks=4)
    batch = csmqar.make_batch(csmqar.held_out_rng(3), 12, spec, 8)
    lines = []
    for ids, cross, places in zip(
        batch.tokens.tolist(), batch.cross.tolist(), [batch.answer_positions] * 12, strict=True
    ):
        length = spec.chunk_tokens
        texts = [
            words.in_words(ids[1 + at : 1 + at + length]) for at in range(0, 4 * length, length)
        ]
        for asked, place in zip(cross, places.tolist(), strict=True):
            if asked:  # of a fact whose subject an earlier text named
                question = words.in_words(ids[place - 2 : place + 1])
                lines.append(json.dumps({"texts": texts, "question": question}))
                break
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(lines))
    asked = (
        "--model",
        model,
        "--requests",
        requests,
        "--compared=1",
        "--prompts=8",
        "--no-rounding",
    )
    code = run(folder, *asked, "--budgets", "0.2", "0.36", "--device=cpu", "--json")
    captured = capsys.readouterr()
    assert code != REFUSED, captured.err
    value = json.loads(captured.out)
    rows = {(row["selector"], row["budget"]): row for row in value["figures"]}
    assert rows["none", 0.0]["agreement"] < 0.8
    assert rows["staleness", 0.36]["agreement"] == 1.0
    assert (code, value["selector"]) == (OK, "staleness")
    assert value["texts"]["positions"] == 8
    found = verdict.read(folder, ModelIdentity.from_folder(model))
    assert found is not None
    assert found.passed


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert run(*arguments) == REFUSED
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, line = captured.err.splitlines()
    assert all("passed over what is no text" in told for told in before)
    return str(line)


def test_mistakes_are_one_line(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", model, "--texts", texts)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((*asked, "--prompts=0"), "--prompts 0 (give 1 or more)"),
        ((*asked, "--texts-per-prompt=1"), "--texts-per-prompt 1"),
        ((*asked, "--tokens=63"), "--tokens 63 (give 64 or more)"),
        ((*asked, "--budgets", "15"), "a budget of 15.0"),
        ((tmp_path / "none", *asked), "holds no store"),
        ((tmp_path, *asked), "holds no store"),
        (("--model", model, "--texts", tmp_path / "none"), "No such file or directory"),
        (("--model", tmp_path / "a" / "b", "--texts", texts), "there is no such folder"),
        (("--model", tmp_path, "--texts", texts), "has no tokenizer"),
        ((*asked, "--device=tpu99"), "cannot load"),
        ((*asked, "--tokens=512", "--texts-per-prompt=20"), "8 texts that are long enough"),
    ]
    for arguments, told in wrong:
        assert told in refused(capsys, *arguments)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no text" in refused(capsys, "--model", model, "--texts", empty)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"no": 1}\n')
    assert "bad.jsonl line 2 has no field 'text'" in refused(capsys, *asked[:2], "--texts", bad)
    bad.write_text('{"texts": ["a"]}\n')
    told = refused(capsys, *asked[:2], "--requests", bad)
    assert "bad.jsonl line 1 is no request" in told
    assert "either --texts or --requests" in refused(capsys, *asked, "--requests", bad)
    assert "either --texts or --requests" in refused(capsys, *asked[:2])
    bad.write_text("\n")
    assert "holds no request" in refused(capsys, *asked[:2], "--requests", bad)
    bad.write_text("{\n")
    assert "bad.jsonl line 1 is no JSON" in refused(capsys, *asked[:2], "--texts", bad)
    assert "model.safetensors" in refused(
        capsys, *asked[:2], "--texts", model / "model.safetensors"
    )
    assert "cannot read" in refused(capsys, *asked, "--preamble", tmp_path / "none")
    empty_file = tmp_path / "empty.txt"
    empty_file.write_text(" \n")
    assert "no text in what --texts" in refused(capsys, *asked[:2], "--texts", empty_file)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[" * 100_000, "line 1 is no JSON"),
        ('{"texts": ["half \\ud800 a pair", "b"], "question": "?"}', "are no Unicode"),
        ('{"texts": ["a", "b"], "question": "\\udfff"}', "are no Unicode"),
        ('{"texts": ["a", "b"], "question": "?"}\n["a"]', "line 2 is a JSON list"),
        ('{"texts": ["a", 1], "question": "?"}', "line 1 is no request"),
    ],
)
def test_requests_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(line)
    assert told in refused(capsys, "--model", "none", "--requests", file)


def test_requests_may_begin_with_a_mark_of_byte_order(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('\ufeff{"texts": ["a", "b"], "question": "?"}\n')
    assert given(requests=str(file)).requests == [(["a", "b"], "?")]


def test_a_folder_that_cannot_be_identified(
    apart: Path, texts: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", apart, "--texts", texts, *SMALL)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(identity, "weights_fingerprint", broken)
        assert "no weights" in refused(capsys, folder, *asked)


def broken(*_: Any, **__: Any) -> str:
    raise IdentityError("no weights")


def test_a_model_of_another_kind_is_refused_before_anything_is_computed(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    other = tmp_path / "gpt"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (other / name).symlink_to(model / name)
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config["sliding_window"] = 8
    (other / "config.json").write_text(json.dumps(config))
    assert "sliding-window" in refused(capsys, "--model", other, "--texts", texts)


def test_help_takes_nothing_heavy() -> None:
    code = (
        "import sys\nfrom prefixstore.cli import main\n"
        "try:\n    main(['blend-check', '--help'])\n"
        "except SystemExit:\n"
        "    print(sorted({'numpy', 'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )  # fmt: skip
    assert "--texts-per-prompt" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
