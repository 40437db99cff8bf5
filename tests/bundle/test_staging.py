"""Building a bundle beside its place: killed, resumed, collided with, and swapped in."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from helpers.cut_students import GRAPH, TOKENS, cut_student
from helpers.onnx_members import saying, write_bundle

from edgemix import files as files_module
from edgemix.bundle import writer
from edgemix.bundle.manifest import MANIFEST, Manifest
from edgemix.bundle.reader import read_manifest
from edgemix.bundle.stages import Stages, stage_key
from edgemix.bundle.verify import verify_bundle
from edgemix.bundle.writer import BundleWriter
from edgemix.errors import BundleError, EdgemixError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = stage_key(seed=0)


class StageResult(msgspec.Struct, frozen=True):
    layers: int
    loss: float


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return msgspec.structs.replace(read_manifest(bundle), files={})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "place" / "mixture"


@pytest.fixture(autouse=True)
def _place(output: Path) -> None:
    output.parent.mkdir()


def fill(writer: BundleWriter, bundle: Path) -> None:
    shutil.copytree(bundle, writer.folder, dirs_exist_ok=True)
    (writer.folder / MANIFEST).unlink()


def export(output: Path, bundle: Path, manifest: Manifest) -> Manifest:
    with BundleWriter(output) as writer:
        fill(writer, bundle)
        return writer.finish(manifest)


def around(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir()}


def test_a_finished_bundle_is_whole_and_nothing_else_is_left(bundle: Path, output: Path, manifest: Manifest) -> None:
    with BundleWriter(output) as writer:
        fill(writer, bundle)
        (writer.scratch / "master.onnx").write_bytes(b"x")
        (writer.folder / "members/gone").mkdir()
        (writer.folder / "members/gone/model.onnx").write_bytes(b"from a run before")
        (writer.folder / "members/math/model.onnx.data").write_bytes(b"nobody refers to it")
        writer.stages.mark_done("graph/math", KEY, files=[writer.folder])
        assert not output.exists()
        written = writer.finish(manifest)
    assert around(output) == {"mixture"}
    assert written == read_manifest(output)
    assert written.files == read_manifest(bundle).files
    verify_bundle(output, written)
    assert not (output / "members/gone").exists()


def test_a_student_is_part_of_the_bundle_only_where_the_manifest_has_one(tmp_path: Path, output: Path) -> None:
    source = write_bundle(tmp_path / "source", {"math": saying("1+2=3")}, student=saying("1+3"))
    manifest = msgspec.structs.replace(read_manifest(source), files={})
    written = export(output, source, manifest)
    assert written.files == read_manifest(source).files
    assert "student/model.onnx" in written.files
    export(output, source, msgspec.structs.replace(manifest, student=None))
    assert not (output / "student").exists()
    (source / "student/model.onnx").unlink()
    with pytest.raises(EdgemixError, match=r"student/model\.onnx was never written"):
        export(output, source, manifest)


def test_what_a_student_drafts_with_is_part_of_the_bundle(tmp_path: Path, output: Path) -> None:
    source = write_bundle(tmp_path / "source", {"math": saying("1+2=3")}, student=saying("1+3"))
    manifest = read_manifest(cut_student(source, [*b"13"]))
    written = export(output, source, msgspec.structs.replace(manifest, files={}))
    assert written.files == manifest.files
    assert {GRAPH, TOKENS} < written.files.keys()
    whole = msgspec.structs.replace(manifest.student, draft=None)
    written = export(output, source, msgspec.structs.replace(manifest, files={}, student=whole))
    assert not {GRAPH, TOKENS} & written.files.keys()


def test_an_old_bundle_is_replaced(
    bundle: Path, output: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, exchange in enumerate((writer.exchange_folders, lambda *_: False)):
        monkeypatch.setattr(writer, "exchange_folders", exchange)
        shutil.copytree(bundle, output, dirs_exist_ok=True)
        export(output, bundle, msgspec.structs.replace(manifest, seed=seed + 7))
        assert read_manifest(output).seed == seed + 7
        assert around(output) == {"mixture"}


def test_a_swap_has_no_moment_without_a_bundle(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files_module.exchange_folders(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange folders")
    assert (tmp_path / "one/other").exists()
    assert (tmp_path / "other/one").exists()


def test_a_kill_between_the_two_steps_of_a_move_is_undone(bundle: Path, output: Path) -> None:
    shutil.copytree(bundle, output)
    with BundleWriter(output) as writer:
        writer.stages.mark_done("a", KEY)
    output.rename(output.with_name(".mixture.partial") / "replaced")
    with BundleWriter(output) as writer:
        assert read_manifest(output) == read_manifest(bundle)
        assert writer.stages.done("a", KEY, bool)


def test_readers_find_the_bundle_whenever_a_move_is_killed(bundle: Path, output: Path) -> None:
    """Where folders cannot be exchanged, a kill between the two steps left no bundle until the next export."""
    code = """
import os, signal, sys
from pathlib import Path
import msgspec
from edgemix.bundle import writer
from edgemix.bundle.reader import read_manifest
sys.path.insert(0, sys.argv[1])
from bundle.test_staging import export
writer.exchange_folders = lambda *_: False
rename = Path.rename
def killed(self, target):
    if self.name == "bundle":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
source, output = Path(sys.argv[2]), Path(sys.argv[3])
export(output, source, msgspec.structs.replace(read_manifest(source), files={}, seed=7))
"""
    shutil.copytree(bundle, output)
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(bundle), str(output)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    assert not output.exists()
    assert read_manifest(output) == read_manifest(bundle)
    verify_bundle(output, read_manifest(output))


def test_a_move_that_fails_half_way_is_undone(
    bundle: Path, output: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "bundle":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    shutil.copytree(bundle, output)
    monkeypatch.setattr(writer, "exchange_folders", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(EdgemixError, match="input/output error"):
        export(output, bundle, msgspec.structs.replace(manifest, seed=7))
    assert read_manifest(output) == read_manifest(bundle)


def test_an_empty_folder_is_no_obstacle(bundle: Path, output: Path, manifest: Manifest) -> None:
    output.mkdir()
    export(output, bundle, manifest)
    read_manifest(output)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda output: output.write_text(""), "is a file"),
        (lambda output: (output.mkdir(), (output / "thesis.tex").touch()), "holds other files"),
        (lambda output: output.parent.rmdir(), "there is no folder"),
        (lambda output: (output.parent.rmdir(), output.parent.touch()), "there is no folder"),
    ],
)
def test_other_outputs_are_refused(output: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(output)
    with pytest.raises(InputError, match=message), BundleWriter(output):
        pass
    assert not output.with_name(".mixture.partial").exists()
    with pytest.raises(InputError, match="no place for a bundle"), BundleWriter(Path("/")):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_place_that_cannot_be_written(output: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(EdgemixError, match=os.strerror(number).lower()), BundleWriter(output):
            pass
        patch.undo()
        mkdir = Path.mkdir
        patch.setattr(Path, "mkdir", lambda self, **more: refuse() if self.name == "scratch" else mkdir(self, **more))
        with pytest.raises(EdgemixError, match=os.strerror(number).lower()), BundleWriter(output):
            pass
    assert around(output) == set()
    with BundleWriter(output):  # the lock was given back
        pass


def test_a_full_disk_at_the_end_keeps_the_stages(
    bundle: Path, output: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with BundleWriter(output) as writer:
        fill(writer, bundle)
        writer.stages.mark_done("all", KEY, files=[writer.folder])
        with monkeypatch.context() as patch:
            patch.setattr(files_module.os, "fsync", refuse)
            with pytest.raises(EdgemixError, match="no space left"):
                writer.finish(manifest)
    assert not output.exists()
    with BundleWriter(output) as writer:
        assert writer.stages.done("all", KEY, bool)
        writer.finish(manifest)
    verify_bundle(output, read_manifest(output))


def test_a_graph_that_is_missing_stops_the_end(bundle: Path, output: Path, manifest: Manifest) -> None:
    with BundleWriter(output) as writer:
        fill(writer, bundle)
        (writer.folder / "members/code/model.onnx").unlink()
        with pytest.raises(EdgemixError, match=r"members/code/model\.onnx was never written"):
            writer.finish(manifest)
    assert around(output) == set()


def test_a_stage_is_done_if_and_only_if_nothing_changed(output: Path) -> None:
    result = StageResult(3, 0.1)
    with BundleWriter(output) as writer:
        graph, data = writer.folder / "members/a/model.onnx", writer.folder / "members/a/model.onnx.data"
        stages = writer.stages

        def finish() -> None:
            graph.parent.mkdir(parents=True, exist_ok=True)
            graph.write_bytes(b"graph")
            data.write_bytes(b"data")
            stages.mark_done("graph/a", KEY, result, files=[graph.parent])

        assert stages.done("graph/a", KEY, StageResult) is None
        finish()
        assert stages.done("graph/a", KEY, StageResult) == result
        assert stages.done("graph/b", KEY, StageResult) is None
        assert stages.done("graph/a", stage_key(seed=1), StageResult) is None
        assert not graph.exists()  # what an outdated stage wrote is gone

        finish()
        data.write_bytes(b"more data")
        assert stages.done("graph/a", KEY, StageResult) is None
        finish()
        data.unlink()
        assert stages.done("graph/a", KEY, StageResult) is None
        finish()
        (output.with_name(".mixture.partial") / "stages/graph/a.json").write_bytes(b"{")
        assert stages.done("graph/a", KEY, StageResult) is None
        finish()
        assert stages.done("graph/a", KEY, int) is None
        with pytest.raises(BundleError):
            stages.mark_done("../a", KEY)


def test_keys_tell_inputs_apart() -> None:
    key = stage_key(a=1, b={"x": 1.5, "y": Path("p")})
    assert key == stage_key(b={"y": Path("p"), "x": 1.5}, a=1)
    assert len({key, stage_key(a=2), stage_key(a="2"), stage_key(b=2), stage_key(), stage_key(a=[2])}) == 6


def test_failing_before_any_stage_leaves_nothing(output: Path) -> None:
    with BundleWriter(output) as writer:
        (writer.folder / "half").touch()
    assert around(output) == set()


def test_two_exports_to_one_place(output: Path) -> None:
    with BundleWriter(output) as writer:
        writer.stages.mark_done("a", KEY)
        with pytest.raises(InputError, match="another run"), BundleWriter(output):
            pass
        with BundleWriter(output.with_name("other")):
            pass
        assert writer.stages.done("a", KEY, bool)
    with BundleWriter(output):
        pass


KILLED = """
import sys, time
from pathlib import Path
from edgemix.bundle.writer import BundleWriter
with BundleWriter(Path(sys.argv[1])) as writer:
    (writer.folder / "first").write_bytes(b"whole")
    writer.stages.mark_done("first", "key", files=[writer.folder / "first"])
    (writer.folder / "second").write_bytes(b"hal")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_export_leaves_no_bundle_and_is_resumed(output: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, output], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match="another run"), BundleWriter(output):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not output.exists()
    with BundleWriter(output) as writer:
        assert writer.stages.done("first", "key", bool)
        assert writer.stages.done("second", "key", bool) is None


def test_stages_of_nothing(tmp_path: Path) -> None:
    assert not Stages(tmp_path / "missing").any()
