import random

import pytest

from edgemix.errors import InputError
from edgemix.export.demo import text as demo_text
from edgemix.export.demo.text import DOMAINS, make_texts

WORDS = ("tell", "the", "reader", "at", "length", "what", "this", "is", "for", "and", "how", "it", "came", "to", "be")


def prose(seed):
    """A long sentence, another for each seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=60))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of sixty modules, each with a docstring of prose."""
    root = tmp_path / "library"
    (root / "test").mkdir(parents=True)
    for i in range(60):
        body = "\n".join(f"value_{i}_{line} = {line}" for line in range(100))
        (root / f"module{i}.py").write_text(f'"""Module {i}. {prose(i)}"""\n{body}\n')
    (root / "test" / "test_module.py").write_text("never = 'read'\n")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(demo_text.sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr(demo_text, "help_topics", dict)
    return root


def test_modules_and_their_docstrings_fall_on_the_same_side(library, tmp_path):
    texts = make_texts(tmp_path)
    for part in ("train", "validation", "test"):
        code, prose = (getattr(texts[domain], part) for domain in DOMAINS)
        modules = {text.split("value_")[1].split("_")[0] for text in code}
        assert modules == {text.split("Module ")[1].split(".")[0] for text in prose}
        assert modules
    everything = str(texts)
    assert "never" not in everything
    assert all(text.startswith("Module") and "value_" not in text for text in texts["prose"].train)


BLOCKS = """
class One:
    try:
        def two(): {0}
    except OSError:
        def three(): {1}
    else:
        def four(): {2}
    finally:
        async def five(): {3}
if one:
    with two:
        for three in four:
            def six(): {4}
else:
    while five:
        class Seven: {5}
match six:
    case 1:
        def eight(): {6}
nine = [lambda ten: ten, {7}]
"""


def test_docstrings_are_read_from_every_kind_of_block(library, tmp_path):
    (library / "blocks.py").write_text(BLOCKS.format(*(f'"Block {i}. {prose(i)}"' for i in range(8))))
    texts = make_texts(tmp_path)["prose"]
    [found] = [text for text in texts.train + texts.validation + texts.test if "Block" in text]
    assert [text[len("Block ")] for text in found.split("\n\n")] == list("0235614")  # level by level


def test_held_out_excerpts_are_whole_lines_of_bounded_size(library, tmp_path):
    texts = make_texts(tmp_path)
    for text in texts["code"].validation + texts["code"].test:
        assert len(text) <= demo_text._EXCERPT_CHARACTERS
        assert text.startswith("value_")
        assert text.endswith("\n")


def test_the_files_are_kept(library, tmp_path):
    first = make_texts(tmp_path)
    for path in library.glob("*.py"):
        path.unlink()
    assert make_texts(tmp_path) == first


def test_copied_text_is_not_held_out(library, tmp_path):
    for path in library.glob("module*.py"):
        path.write_text((library / "module0.py").read_text())
    with pytest.raises(InputError, match="has no text"):
        make_texts(tmp_path)


def test_partly_copied_text_is_not_held_out(library, tmp_path):
    """Docstrings that sibling modules copy from each other stood in training and in validation text."""
    shared = prose(-1)
    for path in library.glob("module*.py"):
        head, _, rest = path.read_text().partition(". ")
        path.write_text(f"{head}. {shared} {rest}")
    with pytest.raises(InputError, match="has no text"):
        make_texts(tmp_path)


def test_a_python_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_text.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="sources"):
        make_texts(tmp_path)


@pytest.mark.parametrize("text", [prose(0)[:150], prose(0) + ">>> f(1)", "|a|b| 1 2 3 4 | +--+--+ " * 30])
def test_what_is_no_prose(text):
    assert not demo_text._is_prose(text)
