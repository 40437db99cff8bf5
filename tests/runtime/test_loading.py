"""What a bundle opens as: a mixture, or its student alone."""

import msgspec
import pytest
from onnx_members import VOCABULARY, random_member, saying, write_bundle

from edgemix.bundle import read_manifest, write_manifest
from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.runtime import Mixture


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
    member = msgspec.structs.replace(member, facts=msgspec.structs.replace(member.facts, layers=3))
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
