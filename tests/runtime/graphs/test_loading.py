"""What a bundle opens as: a mixture, or its student alone."""

import json

import msgspec
import pytest
from helpers.cut_students import TOKENS, cut_student
from helpers.onnx_members import EOS, VOCABULARY, random_member, saying, write_bundle

from edgemix.bundle.reader import read_manifest
from edgemix.bundle.writer import write_manifest
from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.files import hash_file
from edgemix.runtime import Mixture
from edgemix.runtime.graphs import providers


def test_a_mixture_tells_what_it_is(pair):
    assert pair.members == ("shared", "growing")
    assert pair.weights == {"shared": 0.7, "growing": 0.3}
    assert pair.vocabulary == VOCABULARY
    assert pair.provider == "cpu"
    assert pair.context == 4096


def test_the_context_is_the_smallest_of_the_members(mixture_of):
    mixture = mixture_of(
        {"a": random_member(0, tokens=VOCABULARY, context=9), "b": random_member(1, tokens=VOCABULARY)}
    )
    assert mixture.context == 9


@pytest.mark.parametrize("verify", [True, False])
def test_a_changed_graph_is_found_by_its_checksum(tmp_path, verify):
    folder = write_bundle(tmp_path / "b", {"a": random_member(0, tokens=VOCABULARY)})
    graph = folder / "members/a/model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1  # within the table
    graph.write_bytes(content)
    if verify:
        with pytest.raises(BundleError, match="sha256"):
            Mixture.load(folder)
    else:
        Mixture.load(folder, verify=False).close()


def test_a_graph_that_does_not_load_is_a_bundle_error(tmp_path):
    folder = write_bundle(tmp_path / "b", {"a": random_member(0, tokens=VOCABULARY)})
    graph = folder / "members/a/model.onnx"
    graph.write_bytes(b"\x00" * graph.stat().st_size)
    with pytest.raises(BundleError):
        Mixture.load(folder, verify=False)


def test_facts_that_do_not_fit_the_graph_are_a_bundle_error(tmp_path):
    folder = write_bundle(tmp_path / "b", {"a": random_member(0, tokens=VOCABULARY)})
    manifest = read_manifest(folder)
    (member,) = manifest.members
    member = msgspec.structs.replace(member, config=msgspec.structs.replace(member.config, layers=3))
    write_manifest(folder, msgspec.structs.replace(manifest, members=(member,)))
    with pytest.raises(BundleError, match=r"past_key_values\.1\.key"):
        Mixture.load(folder)


@pytest.mark.parametrize("options", [{"provider": "tpu"}, {"threads": 0}])
def test_senseless_load_options_are_refused(tmp_path, options):
    folder = write_bundle(tmp_path / "b", {"a": random_member(0, tokens=VOCABULARY)})
    with pytest.raises(InputError):
        Mixture.load(folder, **options)


def test_a_closed_mixture_says_so(mixture_of):
    with mixture_of({"a": random_member(0, tokens=VOCABULARY)}) as mixture:
        mixture.generate("x", max_new_tokens=1)
    with pytest.raises(EdgemixError, match="closed"):
        mixture.generate("x")
    with pytest.raises(EdgemixError, match="closed"):
        mixture.score("xyz")


# The student

SOME = sorted([*b"One ld", EOS])
"""Tokens that it drafts in some tests."""


@pytest.fixture
def folder(tmp_path):
    """A bundle of two members that say one thing and a student that says another."""
    members = {"a": saying("One two!"), "b": saying("One two!", context=512)}
    student = saying("Old", context=64)
    return write_bundle(tmp_path / "b", members, student=student, chat_template="{{ messages[0].content }}")


def test_the_student_is_no_part_of_the_mixture(folder):
    with Mixture.load(folder, provider="cpu", threads=1) as mixture:
        assert mixture.members == ("a", "b")
        assert mixture.context == 512
        assert mixture.generate("O").text == "ne two!"


def test_the_student_alone_is_a_mixture_of_one(folder):
    with Mixture.load(folder, provider="cpu", threads=1, student=True) as student:
        assert (student.members, student.weights) == (("student",), {"student": 1.0})
        assert (student.context, student.vocabulary) == (64, VOCABULARY)
        assert student.generate("O").text == "ld"
        assert [chunk.text for chunk in student.stream("O")] == ["l", "d", ""]
        assert student.chat([{"role": "user", "content": "O"}]).text == "ld"
        assert student.score("Old").perplexity == pytest.approx(1, abs=0.01)
        assert student.next_token_distribution("O").argmax() == ord("l")
        with pytest.raises(InputError, match="Members: student"):
            student.generate("O", weights={"a": 1})


def test_to_open_the_student_the_members_are_not_read(folder):
    graph = folder / "members/a/model.onnx"
    graph.write_bytes(b"\x00" * graph.stat().st_size)
    with Mixture.load(folder, student=True) as student:
        assert student.generate("O").text == "ld"
    with pytest.raises(BundleError, match="sha256"):
        Mixture.load(folder)


@pytest.fixture
def opened(monkeypatch):
    """The graphs that sessions are opened from, within the bundle."""
    graphs, real = [], providers.create_session
    monkeypatch.setattr(
        providers, "create_session", lambda graph, *rest: graphs.append(graph.partition("/b/")[2]) or real(graph, *rest)
    )
    return graphs


def test_to_draft_the_graph_of_some_tokens_is_opened_and_no_other(folder, opened):
    cut_student(folder, SOME)
    with Mixture.load(folder, provider="cpu", threads=1) as both:
        assert sorted(opened) == ["members/a/model.onnx", "members/b/model.onnx", "student/draft.onnx"]
        (drafter,) = both.drafting.graphs
        assert drafter.vocabulary == len(drafter.tokens) == 7
        assert both.drafting.vocabulary == VOCABULARY
        assert both.generate("O").text == "ne two!"
    opened.clear()
    with Mixture.load(folder, provider="cpu", threads=1, student=True) as student:
        assert opened == ["student/model.onnx"]
        assert student.generate("O").text == "ld"


def test_packed_weights_of_the_students_two_graphs_are_not_mixed_up(folder, tmp_path):
    cut_student(folder, SOME)
    for _ in range(2):
        with Mixture.load(folder, "cpu", threads=1, packed=tmp_path / "packed", student=True) as student:
            assert student.generate("O").text == "ld"
        with Mixture.load(folder, "cpu", threads=1, packed=tmp_path / "packed") as both:
            assert both.generate("O").text == "ne two!"


@pytest.mark.parametrize("verify", [True, False])
def test_a_draft_graph_that_is_not_as_wide_as_its_tokens_is_refused(folder, verify):
    manifest = read_manifest(cut_student(folder, SOME))
    (folder / TOKENS).write_text(json.dumps(SOME[1:]))
    files = manifest.files | {TOKENS: hash_file(folder / TOKENS)}
    draft = msgspec.structs.replace(manifest.student.draft, vocabulary=6)
    student = msgspec.structs.replace(manifest.student, draft=draft)
    write_manifest(folder, msgspec.structs.replace(manifest, student=student, files=files))
    with pytest.raises(BundleError, match=r"logits are \['batch', 'kept', 7\], the manifest says vocabulary 6"):
        Mixture.load(folder, "cpu", threads=1, verify=verify)


def test_a_changed_student_is_found_by_its_checksum(folder):
    graph = folder / "student/model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match=r"student/model\.onnx has changed"):
        Mixture.load(folder, student=True)


def test_a_bundle_without_a_student_says_so(tmp_path):
    folder = write_bundle(tmp_path / "b", {"a": saying("One two!")})
    with pytest.raises(InputError, match="has no student") as caught:
        Mixture.load(folder, student=True)
    assert "student: to its recipe" in caught.value.remedy
