"""Text files as documents, and what is said of files that hold none."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from edgemix.errors import InputError
from edgemix.recipe import text_sources
from edgemix.recipe.text_sources import TextSource, parse_template, read_documents


def read(folder: Path, content: bytes | str, name: str = "t.txt", template: str | None = None) -> list[str]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_documents(TextSource(name, template), folder)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert read(tmp_path, "one\r\n\ntwo é\u2028") == ["one\r\n\ntwo é\u2028"]
    assert read(tmp_path, "\ufeffmark") == ["mark"]
    (tmp_path / "absolute.py").write_text("x = 1\n")
    assert read_documents(TextSource(str(tmp_path / "absolute.py")), Path("elsewhere")) == ["x = 1\n"]


def test_every_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    lines = '{"text": "a\\u2028b"}\n\n  \n{"text": " "}\r\n{"text": "c", "n": 1}'
    assert read(tmp_path, lines, "t.jsonl") == ["a\u2028b", "c"]
    lines = '{"q": "1+1?", "a": 2}\n{"q": "{a}", "a": 0.5}'
    assert read(tmp_path, lines, "t.jsonl", "Q: {q}\n{{A}}: {a}\n") == ["Q: 1+1?\n{A}: 2\n", "Q: {a}\n{A}: 0.5\n"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.JSONL", '{"text": "a"}\n{"text": "b"}\n'),
        ("t.ndjson", '{"text": "a"}\n{"text": "b"}\n'),
        ("t.json", '[{"text": "a"},\n {"text": "b", "n": [1]}]'),
        ("t.json", '{"text": "a"}\n{"text": "b"}\n'),
    ],
)
def test_json_is_read_under_all_its_names(tmp_path: Path, name: str, content: str) -> None:
    """Braces and keys of such files were read as prose, and scored."""
    assert read(tmp_path, content, name) == ["a", "b"]
    assert read(tmp_path, content, name, "<{text}>") == ["<a>", "<b>"]


def test_text_that_begins_like_json_is_text(tmp_path: Path) -> None:
    for text in ('{"a": 1}', '{\n  "a": 1\n}\n', '{"a": 1} is an object\n{"b": 2} is one, too'):
        assert read(tmp_path, text) == [text]


@pytest.mark.parametrize(
    ("name", "content", "template", "message"),
    [
        ("t.txt", "", None, "t.txt: has no text"),
        ("t.txt", " \n\t", None, "t.txt: has no text"),
        ("t.txt", b"ab\xffc", None, "not UTF-8: byte 0xff at offset 2"),
        ("t.txt", b"\xef\xbb\xbfab\xe2\x82", None, "not UTF-8: byte 0xe2 at offset 5"),
        ("t.txt", "text", "{text}", "only for .jsonl"),
        ("t.jsonl", "\n\n", None, "has no text"),
        ("t.jsonl", '{"text": "a"}\n\n{"text": ', None, "t.jsonl:3: is not a JSON object"),
        ("t.jsonl", '["a"]', None, "t.jsonl:1: is not a JSON object"),
        ("t.jsonl", '{"text":' + "[" * 100_000, None, "t.jsonl:1: is not a JSON object"),
        ("t.jsonl", '{"body": "a"}', None, "t.jsonl:1: the field 'text' is missing\nIts fields: body"),
        ("t.jsonl", '{"text": null}', None, "t.jsonl:1: the field 'text' is no text or number"),
        ("t.jsonl", '{"text": "a"}', "{title}", "the field 'title' is missing"),
        (
            "t.jsonl",
            '{"text": "a"}\n{"text": "\\ud800"}',
            None,
            "t.jsonl:2: is not a JSON object: it has half of a surr",
        ),
        ("t.jsonl", '{"text": "a", "n": NaN}', None, "t.jsonl:1: is not a JSON object: NaN is no JSON"),
        ("t.jsonl", '{"text": -Infinity}', None, "t.jsonl:1: is not a JSON object: -Infinity is no JSON"),
        (
            "t.jsonl",
            '{"text": ' + "9" * 5000 + "}",
            None,
            "t.jsonl:1: is not a JSON object: Integer value",
        ),
        ("t.json", '[{"text": "a"}, 1]', None, "t.json: is not a list of JSON objects"),
        ("t.json", '[{"text": "a"}, {"body": "b"}]', None, "t.json: object 2: the field 'text' is missing"),
        ("t.json", "prose", None, "t.json:1: is not a JSON object"),
        ("t.txt", '{"text": "a"}\n\n{"text": "b"}\n', None, "its lines are JSON objects\nName it .jsonl"),
        ("t.txt.gz", b"\x1f\x8b\x08\x00text", None, "is compressed with gzip"),
        ("t.parquet", b"PAR1\x15\x04textPAR1", None, "is a Parquet file"),
        ("t.bz2", bz2.compress(b"text"), None, "is compressed with bzip2"),
        ("t.json", '{\n"text": "a"\n}\n{\n"text": "b"\n}', None, "is not one JSON object, nor one in each line"),
        ("t.jsonl", '{"text": "a: NaN"', None, "Input data was truncated"),
        ("t.jsonl", '{"text": "\\ud83d\\ude00"', None, "Input data was truncated"),
        ("t.txt", "text".encode("utf-16"), None, "is UTF-16"),
        ("t.txt", b"ELF\x00\x01", None, "a NUL byte at offset 3"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes | str, template: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read(tmp_path, content, name, template)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "template", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>99999999999}", "{}", "{0}", "{a", "}", "plain", "", "{a:{b}}"]
)
def test_templates_only_fill_in_fields(template: str) -> None:
    with pytest.raises(InputError, match="template"):
        parse_template(template)


def test_missing_files_folders_and_strange_names(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for name, message in [
        ("missing.txt", "no such file"),
        ("file/below.txt", "no such file"),
        ("~nobody-by-this-name/t.txt", "no such file"),
        ("nul\0.txt", "null"),
        (".", "is a folder"),
        ("/dev/null", "not a regular file"),
    ]:
        with pytest.raises(InputError, match=message):
            read_documents(TextSource(name), tmp_path)


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "MAX_BYTES", 4)
    assert read(tmp_path, "1234") == ["1234"]
    with pytest.raises(InputError, match="has 5 bytes; at most 4"):
        read(tmp_path, "12345")


@pytest.mark.parametrize("text", ["BZhang says hello", "PAR1 is a word", "BZh9 is not a stream", "ARROW1 points"])
def test_text_that_begins_like_a_known_file_is_text(tmp_path: Path, text: str) -> None:
    """Files were refused for their first letters."""
    assert read(tmp_path, text) == [text]


def test_an_object_over_several_lines_is_a_document(tmp_path: Path) -> None:
    assert read(tmp_path, '{\n  "text": "a"\n}\n', "t.json") == ["a"]
