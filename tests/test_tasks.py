"""Tasks: their rows are complete, and a bundle of any of them opens as what runs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, get_args

import msgspec
import pytest
from helpers.onnx_members import VOCABULARY, random_member, write_bundle

import edgemix
from edgemix.bundle.graph_io import GRAPH_TENSORS
from edgemix.bundle.manifest import MANIFEST
from edgemix.bundle.manifest_validation import validation_errors
from edgemix.bundle.reader import read_manifest
from edgemix.errors import BundleError
from edgemix.tasks import DEFAULT_TASK, TASKS, GraphKind, TaskName

if TYPE_CHECKING:
    from pathlib import Path


def test_every_task_and_every_kind_of_graph_has_a_row() -> None:
    assert set(TASKS) == set(get_args(TaskName))
    assert set(GRAPH_TENSORS) == set(get_args(GraphKind))
    for row in TASKS.values():
        module, _, name = row.runtime_class.rpartition(".")
        assert callable(getattr(import_module(module), name).load)


def test_load_opens_a_bundle_as_the_class_of_its_task(tmp_path: Path) -> None:
    write_bundle(
        tmp_path / "bundle", {"a": random_member(1, tokens=VOCABULARY), "b": random_member(2, tokens=VOCABULARY)}
    )
    with edgemix.load(str(tmp_path / "bundle"), provider="cpu", threads=1) as mixture:
        assert type(mixture) is edgemix.Mixture
        assert mixture.members == ("a", "b")


def test_load_of_no_bundle_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        edgemix.load(tmp_path)


def test_a_manifest_without_a_task_is_of_text_generation(tmp_path: Path) -> None:
    """Bundles before tasks have no such key."""
    write_bundle(tmp_path / "bundle", {"a": random_member(1, tokens=VOCABULARY)})
    document = msgspec.json.decode((tmp_path / "bundle" / MANIFEST).read_bytes())
    assert document.pop("task") == DEFAULT_TASK == "text-generation"
    assert msgspec.convert(document, type(read_manifest(tmp_path / "bundle"))).task == DEFAULT_TASK


def test_graphs_without_layers_are_refused_where_their_kind_has_a_state(tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", {"a": random_member(1, tokens=VOCABULARY)})
    manifest = read_manifest(tmp_path / "bundle")
    (member,) = manifest.members
    broken = msgspec.structs.replace(member, config=msgspec.structs.replace(member.config, layers=0))
    (error,) = validation_errors(msgspec.structs.replace(manifest, members=(broken,)))
    assert "layers is 0, and may be 1 to" in error
