"""The documents against the code: option tables, metrics, verbs, golden vectors, links."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import xxhash

from connector.options import EngineOptions, RequestOptions
from prefixstore import Layout, ModelIdentity, MultimodalItem, PutState, cli, config, keys, ledger
from prefixstore import rows as index_rows
from prefixstore.keys import KeyChain
from prefixstore.route.state import COUNTERS
from prefixstore.route.workers import WorkerSpec

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SECURITY = ROOT / "SECURITY.md"
ROADMAP = ROOT / "docs" / "roadmap-rfc10818.md"
DOCUMENTS = [ROOT / "README.md", SECURITY, *sorted((ROOT / "docs").glob("*.md"))]


def section(text: str, title: str) -> str:
    """The text below a heading, up to the next of its kind."""
    _, found, rest = text.partition(f"\n## {title}\n")
    assert found, f"no section {title!r}"
    return rest.partition("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The rows of the first table in a text, without its head; backquotes removed."""
    lines = text[text.index("\n|") + 1 :].splitlines()
    found: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return found[2:]


def plain(value: object) -> str:
    """A default as the tables write it."""
    if isinstance(value, str) and value:
        return value
    return "none" if value is None else json.dumps(value)


def test_the_table_of_engine_options_is_complete() -> None:
    listed = table(section(README, "Options of the engine"))
    assert [row[0] for row in listed] == [field.name for field in fields(EngineOptions)]
    for row, field in zip(listed, fields(EngineOptions), strict=True):
        if field.name == "staging":
            assert (row[1], field.default) == ("what two steps can complete", None)
        elif field.name == "dir":
            assert (row[1], field.default) == ("needed, or url", "")
        elif field.default is not None:
            assert row[1] == plain(field.default).removesuffix(".0")
    told = {row[0]: row[1] for row in listed}
    for name, size in (
        ("memory", config.DEFAULT_MEMORY_BYTES),
        ("disk", config.DEFAULT_DISK_BYTES),
    ):
        assert f"{size >> 30} GiB for a new one" in told[name]


def test_the_table_of_request_options_is_complete() -> None:
    listed = table(section(README, "Options of a request"))
    assert {row[0]: row[1] for row in listed} == {
        field.name: plain(field.default) for field in fields(RequestOptions)
    }


def metric_names() -> set[str]:
    """Names in connector/stats.py, read from its source: importing it takes vLLM."""
    source = (ROOT / "connector" / "stats.py").read_text(encoding="utf-8")
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PLAIN":
            names |= set(ast.literal_eval(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "family":
            names.add(ast.literal_eval(node.args[0]))
    return names | set(
        re.findall(
            r'"(?:prefixstore:)?((?:load|save)_seconds|identity_info|copies_waiting)"', source
        )
    )


def test_the_tables_of_metrics_are_complete() -> None:
    names = metric_names()
    assert len(names) >= 13
    told = [row[0] for row in table(section(README, "Metrics"))]
    assert sorted(told) == sorted(f"prefixstore:{name}" for name in names)
    cells = " ".join(row[0] for row in table(section(OPERATIONS, "Monitoring")))
    assert {n.removesuffix("_total") for n in re.findall(r"prefixstore:(\w+)", cells)} == names


def test_the_counters_of_the_store_are_explained() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "prefixstore").glob("*.py")))
    counted = set(re.findall(r'(?:keeper|self)[.]count\(\s*"(\w+)"', source))
    assert len(counted) > 8
    counted |= {f"corrupt_{tier}" for tier in ledger.TIER_NAMES.values()}
    counted |= {f"put_{state.value}" for state in PutState if state is not PutState.WRITING}
    text = section(OPERATIONS, "Monitoring")
    assert {name for name in counted if f"`{name}`" not in text} == set()


def test_the_routers_metrics_are_explained() -> None:
    text = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
    told = {name for row in table(text[text.index("| metric |") - 1 :])
            for name in re.findall(r"prefixstore_route_(\w+_total)", row[0])}  # fmt: skip
    assert told == set(COUNTERS)


def test_the_table_of_a_workers_entries_is_complete() -> None:
    text = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
    rows = table(text[text.index("| entry |") - 1 :])
    told = [name for row in rows for name in row[0].split(", ")]
    assert told == [field.name for field in fields(WorkerSpec)]


def test_lines_of_the_log_are_ones_the_code_writes() -> None:
    written = []
    for path in [*(ROOT / "prefixstore").rglob("*.py"), *(ROOT / "connector").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                written += re.split(r"%\.?\d*[sdf]", node.value)
    lines = [row[0] for row in table(section(OPERATIONS, "What the log says"))]
    for line in lines:
        for part in filter(None, (part.strip() for part in line.split("..."))):
            assert any(part in text for text in written), f"nothing writes {part!r}"


def verbs() -> dict[str, argparse.ArgumentParser]:
    [action] = [
        a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)
    ]  # argparse has no public way to ask
    return dict(action.choices)


def test_the_table_of_commands_is_complete() -> None:
    listed = table(section(README, "Command line"))
    assert {row[0].split()[1] for row in listed} == set(verbs())
    for row in listed:
        known = verbs()[row[0].split()[1]].format_help()
        for option in re.findall(r"--[a-z-]+", row[1]):
            assert option in known, f"{row[0]} has no {option}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_text_are_ones_that_parse(path: Path) -> None:
    found = re.findall(r"`(prefixstore [a-z]+ [^`]*)`", path.read_text(encoding="utf-8"))
    for command in found:
        cli._parser().parse_args(command.split()[1:])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_the_text_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.findall(
        r"(?:prefixstore|connector|tests|benchmarks|scripts|docs)/[\w/-]*\w(?:\.\w+)?", text
    )
    assert {name for name in named if not (ROOT / name).exists()} == set()
    for target, anchor in re.findall(r"\]\(([\w/.]+)(?:#([\w-]+))?\)", text):
        linked = path.parent / target
        assert linked.exists()
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", t.lower().replace(" ", "-")) for t in titles}


@pytest.mark.parametrize("document", [SECURITY, ROADMAP], ids=lambda path: path.name)
def test_tests_that_a_document_names_are_there(document: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", document.read_text(encoding="utf-8"))
    assert len(named) > 15
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in defined, f"{path} has no {name}"


def test_the_roadmap_has_all_items_and_results_that_are_there() -> None:
    text = ROADMAP.read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(r"^\| (\d+)\. ", text, re.M)] == list(range(1, 30))
    for row in re.findall(r"^\| \d+\. .*$", text, re.M):
        assert "tests/" in row or "Not ours" in row, row
    results = set(re.findall(r"`(2026-[\w-]+\.\w+)`", text))
    assert len(results) > 5
    assert {one for one in results if not (ROOT / "benchmarks" / "results" / one).exists()} == set()


def test_the_packages_of_the_core_are_accounted_for() -> None:
    listed = {
        row[0] for row in table(section(SECURITY.read_text(encoding="utf-8"), "Dependencies"))
    }
    [needed] = re.findall(r"^dependencies = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert listed == {re.split("[^a-z]", one)[0] for one in json.loads(needed)}


def test_the_serve_line_is_what_config_prints(capsys: pytest.CaptureFixture[str]) -> None:
    [told] = re.findall(r"vllm serve MODEL --kv-transfer-config '(.*)'", README)
    value = json.loads(told)
    EngineOptions.parse(value["kv_connector_extra_config"])
    assert cli.main(["config", "/var/cache/kv", "--memory=8GiB", "--disk=200GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == value


def test_the_library_example_runs(tmp_path: Path) -> None:
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    smaller = {
        'ModelIdentity.from_folder("models/my-model", chunk_tokens=64)': "IDENTITY",
        "num_layers=32": "num_layers=2",
        '"/var/cache/kv"': repr(str(tmp_path / "kv")),
        '"8GiB"': '"16MiB"',
        '"200GiB"': f'"32MiB", memory_dir={str(tmp_path)!r}',
    }
    for text, other in smaller.items():
        assert text in example
        example = example.replace(text, other)
    [[identity, _]] = table(section(FORMAT, "Namespace"))
    before = (
        "from prefixstore import ModelIdentity\n"
        f"IDENTITY = ModelIdentity.from_json({identity!r})\n"
        "token_ids, new_payloads = range(200), [bytes(2 * 2 * 8 * 64 * 256)] * 3\n"
    )
    after = "    assert ns.match(chain).num_tokens == 192\n    assert tiers == []\n"
    done = subprocess.run(
        [sys.executable, "-c", before + example + after],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# --- docs/format.md ------------------------------------------------------------------------------


def test_namespace_vector() -> None:
    [[identity, namespace]] = table(section(FORMAT, "Namespace"))
    assert ModelIdentity.from_json(identity).namespace_hex == namespace
    data = b"prefixstore-identity\0" + identity.encode()
    assert hashlib.blake2b(data, digest_size=16).hexdigest() == namespace
    names = [field.name for field in fields(ModelIdentity)]
    assert sorted(json.loads(identity)) == sorted(names)


def test_key_vectors() -> None:
    text = section(FORMAT, "Keys")
    namespace = bytes(range(16))
    assert namespace.hex() in text
    vectors = table(text)
    assert len(vectors) == 3
    for salt, item, root, *told in vectors:
        items = [MultimodalItem(2, 4, bytes(range(8)))] if item else []
        chain = KeyChain(namespace, 4, range(1, 9), salt.encode(), items)
        assert [key.hex() for key in chain.keys] == told
        assert keys.root_key(namespace, salt.encode()).hex() == root
    assert keys.salt_digest(b"tenant-a").hex() in text
    assert chain.preimages[0].hex() in text


def test_slot_vector() -> None:
    text = section(FORMAT, "Slots")
    layout = Layout(num_layers=2, num_planes=2, num_heads=2, chunk_tokens=4, head_bytes=8)
    assert (layout.payload_bytes, layout.slot_bytes, layout.trailer_bytes) == (256, 4096, 96)
    payload = bytes(range(256))
    sums = layout.piece_sums(payload)
    pieces = b"".join(xxhash.xxh3_64_intdigest(payload[at : at + 32]).to_bytes(8, "little")
                      for at in range(0, 256, 32))  # fmt: skip
    [key] = re.findall(r"key `(\w{32})`", text)
    trailer = b"PFXSLOT1" + bytes.fromhex(key) + bytes(8) + pieces
    assert layout.trailer(bytes.fromhex(key), pieces) == trailer
    told = [row[1] for row in table(text[text.index("| what | value |") - 1 :])]
    assert told == [
        f"{sums[0]:016x}",
        f"{sums[1]:016x}",
        xxhash.xxh3_128_hexdigest(payload),
        xxhash.xxh3_128_hexdigest(trailer),
    ]


def test_row_offsets() -> None:
    row = index_rows.Row(
        flags=3, depth=0x11111111, slot=0x22222222, slot_bytes=0x33333333, created_s=0x44444444,
        expires_s=0x55555555, namespace=b"N" * 16, salt=b"S" * 8, trailer_sum=b"T" * 16,
        payload_sum=b"P" * 16, tag=b"tag", preimage=b"preimage",
    )  # fmt: skip
    packed = row.pack()
    listed = table(section(FORMAT, "Index row of a chunk"))
    told = {re.split("[,:;]", cells[2])[0]: cells for cells in listed}
    expected = {
        "row version": b"\x01", "flags": b"\x03", "T": b"\x03\0", "depth": b"\x11" * 4,
        "slot": b"\x22" * 4, "slot_bytes": b"\x33" * 4, "created": b"\x44" * 4,
        "expires": b"\x55" * 4, "namespace": b"N" * 16, "salt digest": b"S" * 8,
        "xxh3_128 of the trailer": b"T" * 16, "xxh3_128 of the payload": b"P" * 16,
    }  # fmt: skip
    assert set(expected) | {"tag", "preimage of the key"} == set(told)
    for name, value in expected.items():
        at = int(told[name][0])
        assert packed[at : at + len(value)] == value, name
    assert packed[80:] == b"tagpreimage"


def test_the_tables_of_both_indexes_are_listed() -> None:
    from prefixstore.formats import INDEX_TABLES

    for title, names in (("durable", INDEX_TABLES), ("live", ledger.TABLES)):
        told = [row[0] for row in table(section(FORMAT, f"Tables of the {title} index")) if row[0]]
        assert sorted(told) == sorted(names)
