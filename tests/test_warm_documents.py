"""Documents: what is read from where, and one clear error for what is not."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from prefixstore import warm_documents
from prefixstore.config import TAG_BYTES_MAX
from prefixstore.errors import ConfigError
from prefixstore.warm_documents import Document, read_documents


def read(*sources: object, field: str = "text") -> dict[str, str]:
    found = list(read_documents([str(s) for s in sources], field))
    assert len({document.name for document in found}) == len(found)
    return {document.name: document.text for document in found}


def test_files_folders_json_lines_and_stdin(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("no document")
    (folder / "c.md").write_text("of c")
    (folder / "b" / "a.txt").write_text("\ufeffof a, é", encoding="utf-8")
    lines = [{"id": 7, "text": "seven"}, {"name": "n", "text": "named"}, {"text": "neither"}]
    (folder / "d.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    single = tmp_path / "one.txt"
    single.write_text("one")
    sources = [str(single), str(folder), "-"]
    found = [(d.name, d.text) for d in read_documents(sources, stdin=lambda: b"piped")]
    assert found == [
        (str(single), "one"),
        (str(folder / "c.md"), "of c"),
        ("7", "seven"),
        ("n", "named"),
        (f"{folder / 'd.jsonl'}:5", "neither"),
        (str(folder / "b" / "a.txt"), "of a, é"),
        ("stdin", "piped"),
    ]


def test_another_field_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "x", "body": "words", "text": 3}\n')
    assert read(path, field="body") == {"x": "words"}


def test_what_is_no_text_is_passed_over_in_folders_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "b.bin").write_bytes(b"ab\0cd")
    (tmp_path / "c.txt").write_text("text")
    assert list(read(tmp_path)) == [str(tmp_path / "c.txt")]
    assert "passed over what is no text, or too long: a.png, b.bin" in caplog.text
    with pytest.raises(ConfigError, match=r"a\.png is not UTF-8"):
        read(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"b\.bin holds NUL bytes"):
        read(tmp_path / "b.bin")


def test_a_text_that_would_take_all_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_documents, "TEXT_BYTES_MAX", 5)
    (tmp_path / "a.txt").write_text("12345")
    (tmp_path / "b.txt").write_text("123456")
    assert list(read(tmp_path)) == [str(tmp_path / "a.txt")]
    with pytest.raises(ConfigError, match=r"b\.txt is a text of 6 B \(split it"):
        read(tmp_path / "b.txt")
    with pytest.raises(ConfigError, match=r"b\.txt is a text of 6 B"):
        warm_documents.read_text(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 is no JSON"),
        ('{"text": "a"}\n\n["a"]\n', "line 3 is a JSON list"),
        ('{"body": "a", "id": 1}\n', r"line 1 has no field 'text' \(its fields: body, id"),
        ("[" * 100_000, "line 1 is no JSON"),
        ('{"text": 5}\n', "line 1: field 'text' is a int"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        ('{"text": "half \\ud800 a pair"}\n', "line 1 has characters that are no Unicode"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.txt: No such file"):
        read(tmp_path / "gone.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no text files"):
        read(tmp_path / "empty")
    with pytest.raises(ConfigError, match="standard input is given twice"):
        read("-", "-")


def test_tags_are_the_end_of_long_names() -> None:
    assert Document("short").tag == "short"
    tag = Document("é" * 50 + "/end.txt").tag
    assert tag.endswith("é/end.txt")
    assert TAG_BYTES_MAX - 2 < len(tag.encode()) <= TAG_BYTES_MAX


def test_reading_stops_at_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("é" * 50, encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n' * 30)
    found = list(read_documents([str(tmp_path)], limit_bytes=1000))
    # An eighth of it of each; a character is never cut.
    assert [len(document.text) for document in found] == [50] * 10
    assert "are enough" in caplog.text
    found = list(read_documents([str(tmp_path)], limit_bytes=8 * 33))
    assert [len(document.text) for document in found] == [16] * 8
    lines = str(tmp_path / "lines.jsonl")
    assert len(list(read_documents([lines], limit_bytes=8 * 31))) == 2
    assert len(list(read_documents([lines, lines], limit_bytes=8 * 31))) == 4
    drawn = [
        [d.name for d in read_documents([str(tmp_path)], limit_bytes=1000, order=Random(seed))]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_is_no_text_does_not_count(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"a{number}.png").write_bytes(b"\0" * 100)
    (tmp_path / "b.txt").write_text("text")
    assert [d.text for d in read_documents([str(tmp_path)], limit_bytes=200)] == ["text"]
