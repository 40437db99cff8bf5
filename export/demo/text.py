"""Two domains of text that every Python installation has: the standard library's code, and its documentation."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgemix.errors import InputError
from edgemix.files import write_atomically
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.text_sources import TextSource, read_documents

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DOMAINS = ("code", "prose")

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}
_TRAINING_CHARACTERS = 2_000_000
_HELD_OUT_CHARACTERS = 20_000
_MIN_COPY = 120
"""Length of a common substring, in characters, that shows that one module was copied from another."""
_EXCERPT_CHARACTERS = 1_600
"""Characters per document in a held-out part, so that it contains about a dozen documents."""


@dataclass(frozen=True)
class DomainTexts:
    """The documents of a domain by part. No two parts share a file or topic."""

    train: list[str]
    validation: list[str]
    test: list[str]


def make_texts(folder: Path, progress: Progress = NO_PROGRESS) -> dict[str, DomainTexts]:
    """Write the texts to `folder`, a .jsonl file for each domain and part, or read them if all files exist.

    Raises:
        InputError: This Python has no sources of its standard library.
    """
    if not all(_file(folder, domain, part).is_file() for domain in DOMAINS for part in _parts()):
        with progress.stage("collect text"):
            for domain, texts in _collect().items():
                for part in _parts():
                    _write(_file(folder, domain, part), getattr(texts, part))
    return {
        domain: DomainTexts(**{
            part: read_documents(TextSource(_file(folder, domain, part).name), folder) for part in _parts()
        })
        for domain in DOMAINS
    }  # fmt: skip


def _parts() -> list[str]:
    return [field.name for field in fields(DomainTexts)]


def _file(folder: Path, domain: str, part: str) -> Path:
    return folder / f"{domain}-{part}.jsonl"


def _write(path: Path, documents: Iterable[str]) -> None:
    write_atomically(path, b"".join(msgspec.json.encode({"text": text}) + b"\n" for text in documents))


def _collect() -> dict[str, DomainTexts]:
    code = dict(_sources())
    if not code:
        raise InputError("the sources of Python's standard library are not on this machine", "Use a full Python.")
    prose = {f"{name} docstrings": text for name, source in code.items() if (text := _docstrings(source))}
    return {"code": _split_documents(code), "prose": _split_documents(prose | help_topics())}


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED.isdisjoint(name.parts):
            try:
                yield name.as_posix(), path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def _docstrings(source: str) -> str:
    """Return the docstrings of a module that read as prose: long, mostly letters, without examples."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in _statements(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in found if text and _is_prose(text))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield what `ast.walk` yields, in its order, but for expressions: most nodes, none of which has a docstring."""
    nodes = deque([tree])
    while nodes:
        node = nodes.popleft()
        yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, block, ()))


def _is_prose(text: str) -> bool:
    letters = sum(letter.isalpha() or letter.isspace() for letter in text)
    return len(text) >= 200 and ">>>" not in text and letters > 0.9 * len(text)


def help_topics() -> dict[str, str]:
    """Return the language reference as `help()` shows it, by topic; some distributions leave it out."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        return {}
    return dict(topics)


def _split_documents(documents: dict[str, str]) -> DomainTexts:
    """Split documents by the sha256 of their module's or topic's name: 80% for training, 10% each for validation and
    test. A module's code and docstrings are in the same part.
    """
    parts: dict[str, list[str]] = {part: [] for part in _parts()}
    digests = {name: hashlib.sha256(name.removesuffix(" docstrings").encode()).digest() for name in documents}
    for name in sorted(documents, key=digests.__getitem__):
        if documents[name].strip():
            parts[{0: "validation", 1: "test"}.get(digests[name][-1] % 10, "train")].append(documents[name])
    train = list(_take(parts["train"], _TRAINING_CHARACTERS))
    return DomainTexts(train, *(_held_out(parts[part], "\n".join(train)) for part in ("validation", "test")))


def _held_out(documents: Iterable[str], train: str) -> list[str]:
    """Return excerpts of documents, without those that are copied in the training part."""
    excerpts = map(_excerpt, documents)
    return list(_take((text for text in excerpts if not _shares_text(text, train)), _HELD_OUT_CHARACTERS))


def _shares_text(text: str, train: str) -> bool:
    """Return whether the training part contains sentences of a text: modules copy each other's docstrings."""
    starts = range(0, max(1, len(text) - _MIN_COPY + 1), _MIN_COPY // 2)
    return any(text[start : start + _MIN_COPY] in train for start in starts)


def _take(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield documents until they have the given number of characters in total."""
    for text in documents:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _excerpt(text: str) -> str:
    """Return whole lines from the middle of a document: its start has mostly imports or headings."""
    if len(text) <= _EXCERPT_CHARACTERS:
        return text
    start = text.find("\n", (len(text) - _EXCERPT_CHARACTERS) // 2) + 1
    return text[start : text.rfind("\n", start, start + _EXCERPT_CHARACTERS) + 1] or text[:_EXCERPT_CHARACTERS]
