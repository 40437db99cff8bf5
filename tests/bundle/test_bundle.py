"""Reading, verifying and writing bundles: what is sound passes, and every damage is named."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import onnx
import pytest
from helpers.cut_students import GRAPH as DRAFT_GRAPH
from helpers.cut_students import TOKENS, cut_student
from helpers.onnx_members import saying, write_bundle

from edgemix import files as files_module
from edgemix.bundle import reader as bundle_module
from edgemix.bundle import verify as verify_module
from edgemix.bundle.manifest import MANIFEST, NGRAMS, SCHEMA, STUDENT, TOKENIZER, FileEntry, checksum_of
from edgemix.bundle.paths import resolve
from edgemix.bundle.reader import draft_tokens, ngram_table, read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.bundle.writer import check_writable, write_manifest
from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.export.drafting.ngrams import count_ngrams
from edgemix.files import hash_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = "members/math/model.onnx"
DATA = "members/math/model.onnx.data"
PARITY = {"weights": {"math": 1.0}, "tokens": 9, "kl": 0.1, "flips": 0.0, "perplexity_ratio": 1.0}


@pytest.fixture
def with_data(own_bundle: Path) -> Path:
    """A bundle whose first graph keeps its weights beside it."""
    model = onnx.load(own_bundle / GRAPH)
    onnx.save(model, own_bundle / GRAPH, save_as_external_data=True, location=Path(DATA).name, size_threshold=0)
    change(own_bundle, lambda it: it["files"].update({name: entry(own_bundle / name) for name in (GRAPH, DATA)}))
    return own_bundle


def entry(path: Path) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(hash_file(path))
    return built


def change(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((bundle / MANIFEST).read_text())
    edit(content)
    with contextlib.suppress(ValueError):  # what is no manifest cannot be sealed
        content["checksum"] = checksum_of(content)
    (bundle / MANIFEST).write_text(json.dumps(content))


def verify(bundle: Path, *, checksums: bool = True) -> None:
    verify_bundle(bundle, read_manifest(bundle), checksums=checksums)


def expect_damage_is_found(bundle: Path, name: str) -> None:
    """Check that a change of a file, and its loss, are found; put the file back."""
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1] + b" ")
    with pytest.raises(BundleError, match=f"{name} has changed"):
        verify(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        read_manifest(bundle)
    (bundle / name).write_bytes(content)


def test_what_is_written_is_read_back(with_data: Path) -> None:
    manifest = read_manifest(with_data)
    verify_bundle(with_data, manifest)
    before = (with_data / MANIFEST).stat().st_mode
    write_manifest(with_data, manifest)
    assert read_manifest(with_data) == manifest
    assert (with_data / MANIFEST).stat().st_mode == before
    assert hash_file(with_data / GRAPH).sha256 == hashlib.sha256((with_data / GRAPH).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (shutil.rmtree, "no such bundle"),
        (lambda bundle: (shutil.rmtree(bundle), bundle.write_text("")), "not a folder"),
        (lambda bundle: (bundle / MANIFEST).unlink(), "it has no edgemix.json"),
        (lambda bundle: ((bundle / MANIFEST).unlink(), os.mkfifo(bundle / MANIFEST)), "it has no edgemix.json"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b" " * (16 << 20) + b"{}"), "no manifest"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b""), "truncated"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b'{"schema": 1, "\xff": 2}'), "damaged"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b'{"schema": 1,}'), r"damaged: .*byte \d+"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b'{"schema": 1, "files": ' + b"[" * 10**6), "damaged"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b'{"schema": ' + b"9" * 10**4 + b"}"), "damaged"),
        (lambda bundle: (bundle / MANIFEST).write_bytes(b"[]"), "damaged"),
        (lambda bundle: os.truncate(bundle / MANIFEST, 700), "damaged"),
        (lambda bundle: (bundle / GRAPH).unlink(), "model.onnx is missing"),
        (lambda bundle: os.truncate(bundle / GRAPH, 100), "model.onnx has 100 bytes, and should have"),
        (lambda bundle: (bundle / GRAPH).open("ab").write(b"more"), "and should have"),
        (lambda bundle: ((bundle / GRAPH).unlink(), (bundle / GRAPH).mkdir()), "not a regular file"),
        (lambda bundle: ((bundle / GRAPH).unlink(), (bundle / GRAPH).symlink_to("/etc/passwd")), "leaves the folder"),
    ],
)
def test_damaged_bundles_are_refused(own_bundle: Path, prepare: Callable[[Path], object], reason: str) -> None:
    prepare(own_bundle)
    with pytest.raises(BundleError, match=reason):
        read_manifest(own_bundle)


def test_a_flipped_byte_of_the_manifest_is_found(own_bundle: Path) -> None:
    path = own_bundle / MANIFEST
    manifest, data = read_manifest(own_bundle), path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with contextlib.suppress(BundleError):
            assert read_manifest(own_bundle) == manifest  # white space, or an escape of the same letter


@pytest.mark.parametrize("whole", [True, False])
def test_another_tokenizer_is_found_behind_right_checksums(own_bundle: Path, whole: bool) -> None:
    path = own_bundle / TOKENIZER
    parsed = json.loads(path.read_text())
    vocabulary = parsed["model"]["vocab"]
    first, second, *_ = vocabulary
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(parsed) if whole else "[]")
    change(own_bundle, lambda it: it["files"].update({TOKENIZER: entry(path)}))
    with pytest.raises(
        BundleError, match=r"not the tokenizer that the members were exported with|not a tokenizer\.json"
    ):
        verify(own_bundle)


def test_a_newer_schema_is_told_before_its_unknown_fields(own_bundle: Path) -> None:
    change(own_bundle, lambda it: it.update(schema=SCHEMA + 1, novelty=True))
    with pytest.raises(BundleError, match=rf"newer edgemix \(schema {SCHEMA + 1}.*\n.*pip install --upgrade"):
        read_manifest(own_bundle)
    change(own_bundle, lambda it: it.update(schema=SCHEMA))
    with pytest.raises(BundleError, match="novelty"):
        read_manifest(own_bundle)


def test_a_bundle_of_schema_2_has_fixed_weights(own_bundle: Path) -> None:
    def age(it: dict[str, Any]) -> None:
        it["schema"] = 2
        del it["weights"]["adaptive"]

    change(own_bundle, age)
    assert not read_manifest(own_bundle).weights.adaptive


def test_a_bundle_of_schema_1_is_read_and_written_in_the_newest(own_bundle: Path) -> None:
    """New optional fields changed the checksum that was worked out for older bundles, and those were refused."""

    def age(it: dict[str, Any]) -> None:
        it["schema"] = 1
        del it["student"], it["quantization"]
        for member in it["members"]:
            del member["pruning"], member["sparse"]

    change(own_bundle, age)
    manifest = read_manifest(own_bundle)
    assert manifest.student is manifest.quantization is manifest.members[0].pruning is None
    assert write_manifest(own_bundle, manifest).schema == SCHEMA
    assert read_manifest(own_bundle).members == manifest.members


@pytest.fixture
def with_student(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "mixture", {"math": saying("1+2=3")}, student=saying("1+3"))


def test_the_students_files_are_checked_like_the_members(with_student: Path) -> None:
    manifest = read_manifest(with_student)
    verify_bundle(with_student, manifest)
    assert [entry.name for entry in manifest.graphs] == ["math", STUDENT]
    graph = with_student / f"{STUDENT}/model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BundleError, match=r"student/model\.onnx has changed"):
        verify(with_student)
    graph.unlink()
    with pytest.raises(BundleError, match=r"student/model\.onnx is missing"):
        read_manifest(with_student)


def test_one_graph_can_be_verified_alone(with_student: Path) -> None:
    """The student is for small machines: they shall not have to read every member to open it."""
    manifest = read_manifest(with_student)
    graph = with_student / "members/math/model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    verify_bundle(with_student, manifest, only=manifest.student)
    with pytest.raises(BundleError, match="math/model"):
        verify_bundle(with_student, manifest, only=manifest.members[0])
    (with_student / TOKENIZER).write_bytes(b" " * (with_student / TOKENIZER).stat().st_size)
    with pytest.raises(BundleError, match="tokenizer"):
        verify_bundle(with_student, manifest, only=manifest.student)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda it: it["student"].update(name="pupil"), "student: is called 'pupil'"),
        (lambda it: it["student"].update(graph="members/math/model.onnx"), "not in the folder student"),
        (lambda it: it["student"].update(graph="student/../../x.onnx"), "not listed"),
        (lambda it: it["student"]["facts"].update(vocabulary=10**12), "student: vocabulary is"),
        (lambda it: it["student"]["facts"].update(vocabulary=7), "logits are 7 wide"),
        (lambda it: it["student"].update(name="math"), "student: is called 'math'"),
        (lambda it: (it["members"][0].update(name=STUDENT), weigh(it, {STUDENT: 1.0})), "is the student's name"),
        (lambda it: weigh(it, {"math": 0.5, STUDENT: 0.5}), "not over the members: 'student'"),
        (lambda it: it["files"].pop("student/model.onnx"), "not listed"),
    ],
)
def test_hostile_students_are_refused(
    with_student: Path, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change(with_student, edit)
    with pytest.raises(BundleError, match=reason):
        read_manifest(with_student)


@pytest.fixture
def drafting(with_student: Path) -> Path:
    return cut_student(with_student, [*b"+123", 257])


def test_what_the_student_drafts_with_is_checked_like_the_rest(drafting: Path) -> None:
    manifest = read_manifest(drafting)
    assert manifest.student is not None
    assert manifest.student.paths == ("student/model.onnx", DRAFT_GRAPH)
    for only in (None, manifest.student):
        verify_bundle(drafting, manifest, only=only)
    assert draft_tokens(drafting, manifest, manifest.student.draft) == [*b"+123", 257]
    for name in (DRAFT_GRAPH, TOKENS):
        expect_damage_is_found(drafting, name)


def test_two_graphs_of_a_folder_are_told_apart(drafting: Path) -> None:
    """Weights packed for the student's graph were opened as those of the graph that it drafts with."""
    manifest = read_manifest(drafting)
    assert bundle_module.graph_digest(manifest, "student/model.onnx") != bundle_module.graph_digest(
        manifest, DRAFT_GRAPH
    )


@pytest.fixture
def counted(own_bundle: Path) -> Path:
    """A bundle with n-grams: of "+1" and "1+", and of the last of its tokens."""
    table = count_ngrams([[43, 49, 43, 49, 43, 49, 43, 49], [257] * 9], 100)
    (own_bundle / NGRAMS).write_bytes(table.to_bytes())
    change(
        own_bundle, lambda it: (it.update(ngrams=len(table)), it["files"].update({NGRAMS: entry(own_bundle / NGRAMS)}))
    )
    return own_bundle


def test_ngrams_are_checked_like_the_rest(counted: Path) -> None:
    verify(counted)
    table = ngram_table(counted, read_manifest(counted))
    assert table is not None
    assert table.guess([1, 43]) == (49, pytest.approx(4 / 5, abs=1 / 255))
    expect_damage_is_found(counted, NGRAMS)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda it: it.update(ngrams=-1), "ngrams: there are -1"),
        (lambda it: it.update(ngrams=10**15), "bytes, and should have 1,000,000,000,000,000 n-grams"),
        (lambda it: it.update(ngrams=1), "bytes, and should have 1 n-grams"),
        (lambda it: it["files"].pop(NGRAMS), "not listed"),
        (lambda it: it["tokenizer"].update(vocabulary=257, eos=[2]), "a token beyond the 257 of the tokenizer"),
    ],
)
def test_hostile_ngrams_are_refused(counted: Path, edit: Callable[[dict[str, Any]], object], reason: str) -> None:
    change(counted, edit)
    with pytest.raises(BundleError, match=reason):
        verify(counted)


def test_an_empty_file_of_ngrams_is_refused(counted: Path) -> None:
    (counted / NGRAMS).write_bytes(b"")
    change(counted, lambda it: it["files"].update({NGRAMS: entry(counted / NGRAMS)}))
    with pytest.raises(BundleError, match="has 0 bytes"):
        verify(counted, checksums=False)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        ({"graph": "student/model.onnx"}, "'student/model.onnx', its whole graph"),
        ({"graph": "members/math/model.onnx"}, "no .onnx file in the folder student"),
        ({"graph": TOKENS}, "no .onnx file in the folder student"),
        ({"graph": "student/../members/math/model.onnx"}, "not listed"),
        ({"tokens": "tokenizer/tokenizer.json"}, "no .json file in the folder student"),
        ({"tokens": DRAFT_GRAPH}, "no .json file in the folder student"),
        ({"tokens": "student/others.json"}, "not listed"),
        ({"vocabulary": 0}, "drafts 0 tokens"),
        ({"vocabulary": 259}, "drafts 259 tokens of the tokenizer's 258"),
        ({"vocabulary": 10**15}, "tokens of the tokenizer's 258"),
        ({"vocabulary": "5"}, "damaged"),
    ],
)
def test_hostile_drafts_are_refused(drafting: Path, edit: dict[str, Any], reason: str) -> None:
    change(drafting, lambda it: it["student"]["draft"].update(edit))
    with pytest.raises(BundleError, match=reason):
        read_manifest(drafting)


def test_a_member_does_not_draft(drafting: Path) -> None:
    change(drafting, lambda it: it["members"][0].update(draft=it["student"]["draft"]))
    with pytest.raises(BundleError, match="'math' drafts, as only the student may"):
        read_manifest(drafting)


@pytest.mark.parametrize(
    "tokens",
    [
        "[1, 2, 3, 4]",
        "[1, 2, 3, 4, 5, 6]",
        "[1, 2, 3, 5, 4]",
        "[1, 2, 3, 4, 4]",
        "[-1, 2, 3, 4, 5]",
        "[1, 2, 3, 4, 258]",
        "[1, 2, 3, 4, 5.5]",
        "[1, 2, 3, 4, true]",
        '{"tokens": [1]}',
        "[1, 2, 3, 4, 5" + " " * 200 + "]",
        "[" * 5_000,
        "",
    ],
)
def test_tokens_to_draft_that_are_none_are_refused(drafting: Path, tokens: str) -> None:
    (drafting / TOKENS).write_text(tokens)
    change(drafting, lambda it: it["files"].update({TOKENS: entry(drafting / TOKENS)}))
    with pytest.raises(BundleError, match=r"draft_tokens\.json (is damaged|should hold 5 different ids)"):
        verify(drafting)


def test_a_draft_graph_takes_weights_from_listed_files_only(drafting: Path) -> None:
    model = onnx.load(drafting / DRAFT_GRAPH)
    onnx.save(model, drafting / DRAFT_GRAPH, save_as_external_data=True, location="more.bin", size_threshold=0)
    change(drafting, lambda it: it["files"].update({DRAFT_GRAPH: entry(drafting / DRAFT_GRAPH)}))
    with pytest.raises(BundleError, match=r"draft\.onnx takes weights from 'more\.bin', which is not listed"):
        verify(drafting)


def weigh(it: dict[str, Any], weights: dict[str, float]) -> None:
    it["weights"]["default"] = weights


def member(it: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = it["members"][0]
    return found


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda it: it.update(schema=0), "schema"),
        (lambda it: it.update(members=[]), "there are 0, and may be 1 to 1,024"),
        (lambda it: it.update(members=it["members"] * 600), "there are 1,200"),
        (lambda it: it.update(members=[*it["members"], member(it)]), "do not follow each other"),
        (lambda it: it["members"].append(member(it)), "more than once"),
        (lambda it: member(it).update(name="CODE"), "more than once"),
        (lambda it: member(it).update(name="../x"), "no name for a member"),
        (lambda it: member(it).update(name=""), "no name for a member"),
        (lambda it: member(it).update(format="int3"), "format"),
        (lambda it: member(it).update(graph="model.onnx"), "not listed"),
        (lambda it: member(it).update(graph="../model.onnx"), "not listed"),
        (lambda it: member(it).update(graph=TOKENIZER), "no .onnx file"),
        (lambda it: member(it)["facts"].update(layers=0), "layers is 0"),
        (lambda it: member(it)["facts"].update(layers=10**9), "layers is"),
        (lambda it: member(it)["facts"].update(vocabulary=10**12), "vocabulary is"),
        (lambda it: member(it)["facts"].update(context=-1), "context is"),
        (lambda it: member(it)["facts"].update(context=2**62), "context is"),
        (lambda it: member(it)["facts"].update(context=2**70), "context"),
        (lambda it: it["weights"].update(default={"math": 1.0}), "not over the members: 'code'"),
        (lambda it: it["weights"].update(default={"math": 0.5, "code": 0.5, "x": 0}), "not over the members: 'x'"),
        (lambda it: it["weights"].update(default={"math": 1.5, "code": -0.5}), "not between 0 and 1"),
        (lambda it: it["weights"].update(default={"math": 0.5, "code": 0.4}), "sum to 1"),
        (lambda it: it["weights"].update(default={"math": 0.5, "code": None}), "damaged"),
        (lambda it: it["weights"]["domains"].update(x={"math": 0.0, "code": 0.0}), r"domains\['x'\] does not sum"),
        (lambda it: it.update(quantization=PARITY), r"quantization\.weights is not over the members: 'code'"),
        (lambda it: it["tokenizer"].update(vocabulary=0), "vocabulary is 0"),
        (lambda it: it["tokenizer"].update(vocabulary=10**9), "may be 1 to"),
        (lambda it: it["tokenizer"].update(eos=[10**6]), "special token"),
        (lambda it: it["tokenizer"].update(bos=-1), "special token"),
        (lambda it: it["files"].pop(GRAPH), "not listed"),
        (lambda it: it["files"].pop(TOKENIZER), "not listed"),
        (lambda it: it["files"].update({MANIFEST: it["files"][GRAPH]}), "cannot list itself"),
        (lambda it: it["files"].update({"/etc/passwd": it["files"][GRAPH]}), "is absolute"),
        (lambda it: it["files"].update({"a/../../b": it["files"][GRAPH]}), r"contains \.\."),
        (lambda it: it["files"].update({"a\\b": it["files"][GRAPH]}), "not allowed"),
        (lambda it: it["files"].update({"c:b": it["files"][GRAPH]}), "not allowed"),
        (lambda it: it["files"].update({"a\0b": it["files"][GRAPH]}), "not allowed"),
        (lambda it: it["files"].update({"\ud800": it["files"][GRAPH]}), "damaged|not allowed"),
        (lambda it: it["files"].update({"x" * 2000: it["files"][GRAPH]}), "too long"),
        (lambda it: it["files"].update({"": it["files"][GRAPH]}), "is empty"),
        (lambda it: it["files"][GRAPH].update(size=-1), "negative size"),
        (lambda it: it["files"][GRAPH].update(size=2**62), "and should have"),
        (lambda it: it["files"][GRAPH].update(sha256="0" * 63), "sha256 that is none"),
    ],
)
def test_hostile_manifests_are_refused(own_bundle: Path, edit: Callable[[dict[str, Any]], object], reason: str) -> None:
    change(own_bundle, edit)
    with pytest.raises(BundleError, match=reason):
        read_manifest(own_bundle)


def test_a_graph_that_members_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of many members that share a graph kept the check of that graph busy once for each."""
    members = {f"m{number}": saying("1+2=3") for number in range(3)}
    folder = write_bundle(tmp_path / "stack", members, stacked=True)
    read: list[Path] = []
    whole = verify_module.verify_graph
    monkeypatch.setattr(verify_module, "verify_graph", lambda graph: read.append(graph) or whole(graph))
    verify_bundle(folder, read_manifest(folder))
    assert len(read) == 1


def test_one_flipped_byte_in_any_file_is_found(with_data: Path) -> None:
    for name in read_manifest(with_data).files:
        content = (with_data / name).read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1
            (with_data / name).write_bytes(flipped)
            with pytest.raises(BundleError, match=f"{name} has changed"):
                verify(with_data)
        (with_data / name).write_bytes(content)
    verify(with_data)


def test_external_data_must_be_listed_and_whole_even_without_checksums(with_data: Path) -> None:
    verify(with_data, checksums=False)
    content = (with_data / DATA).read_bytes()
    change(with_data, lambda it: it["files"].pop(DATA))
    with pytest.raises(BundleError, match=r"model\.onnx\.data is not listed"):
        verify(with_data, checksums=False)
    (with_data / DATA).write_bytes(content[:-1])
    change(with_data, lambda it: it["files"].update({DATA: entry(with_data / DATA)}))
    with pytest.raises(BundleError, match="a tensor at bytes"):
        verify(with_data)
    (with_data / DATA).rename(with_data / "weights")
    (with_data / DATA).symlink_to(with_data / "weights")
    change(with_data, lambda it: it["files"].pop(DATA))
    with pytest.raises(BundleError, match="not listed"):
        verify(with_data, checksums=False)


def test_unlisted_files_that_could_be_loaded_are_refused_and_others_ignored(own_bundle: Path) -> None:
    for name in (".DS_Store", "README.md", "members/math/Thumbs.db"):
        (own_bundle / name).write_text("x")
    verify(own_bundle)
    for name in ("extra.onnx", "members/math/more.data", "tokenizer/added.json", "tokenizer/chat.jinja"):
        (own_bundle / name).write_text("x")
        with pytest.raises(BundleError, match=f"{name} is not listed"):
            verify(own_bundle, checksums=False)
        (own_bundle / name).unlink()


def test_verifying_tells_its_progress(own_bundle: Path) -> None:
    class Listener:
        total: float | None = 0.0
        seen = 0.0

        def stage(self, title: str, total: float | None = None) -> Listener:
            self.total = total
            return self

        def __enter__(self) -> Listener:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def advance(self, amount: float = 1.0, note: str = "") -> None:
            self.seen += amount

        def log(self, line: str) -> None:
            pass

    listener = Listener()
    manifest = read_manifest(own_bundle)
    verify_bundle(own_bundle, manifest, progress=listener)
    assert listener.seen == listener.total == sum(file.size for file in manifest.files.values())


def test_resolve_keeps_to_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle/inner").mkdir(parents=True)
    (tmp_path / "bundle/out").symlink_to(tmp_path)
    (tmp_path / "bundle/in").symlink_to("inner")
    bundle = tmp_path / "bundle"
    assert resolve(bundle, "inner/file") == bundle / "inner/file"
    assert resolve(bundle, "in/file") == bundle / "in/file"
    for path in ("..", "out/file", "out", "/etc", "inner//x", "./x", "", "a" * 300, "a\nb"):
        with pytest.raises(BundleError):
            resolve(bundle, path)


def test_an_unsound_manifest_is_not_written(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    weights = msgspec.structs.replace(manifest.weights, default={"math": float("nan"), "code": 1.0})
    parity = msgspec.structs.replace(manifest.members[0].parity, decode=float("inf"))
    members = (msgspec.structs.replace(manifest.members[0], parity=parity), manifest.members[1])
    for fault, changed in {
        "weights.default": msgspec.structs.replace(manifest, weights=weights),
        r"members\[0\].parity.decode is not a finite number": msgspec.structs.replace(manifest, members=members),
        "negative size": msgspec.structs.replace(manifest, files={**manifest.files, "x": FileEntry(-1, "0" * 64)}),
    }.items():
        with pytest.raises(EdgemixError, match=fault):
            write_manifest(own_bundle, changed)
    assert read_manifest(own_bundle) == manifest


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, EdgemixError("no space left on device", "Free some space there, or choose another disk.")),
        (errno.EROFS, InputError("read-only file system", "Change the permissions, or choose another folder.")),
        (errno.EIO, EdgemixError("input/output error")),
    ],
)
def test_a_disk_that_refuses_leaves_the_old_manifest(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, expected: EdgemixError
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    before = (own_bundle / MANIFEST).read_bytes()
    manifest = read_manifest(own_bundle)
    monkeypatch.setattr(files_module.os if call == "fsync" else Path, call, refuse)
    with pytest.raises(EdgemixError, match=expected.message) as error:
        write_manifest(own_bundle, manifest)
    assert type(error.value) is type(expected)
    assert error.value.remedy == expected.remedy
    assert (own_bundle / MANIFEST).read_bytes() == before
    assert [path.name for path in own_bundle.iterdir() if "tmp" in path.name] == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_bundle_that_cannot_be_written_is_found_before_any_work(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = sorted(own_bundle.iterdir())
    check_writable(own_bundle)
    assert sorted(own_bundle.iterdir()) == before

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(InputError, match=r"writing .*edgemix\.json"):
        check_writable(own_bundle)


def test_writing_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(EdgemixError, match="no such file"):
        write_atomically(tmp_path / "missing/file", b"")
