"""Sparse weights: what is packed expands to the same bytes, and hostile files are refused before they cost anything."""

from __future__ import annotations

import shutil
import struct
import zlib
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx
import pytest
from helpers.onnx_members import ClosedForm, write_graph
from onnx import TensorProto, helper

from edgemix.bundle.external_data import external_files
from edgemix.bundle.manifest import SparseWeights
from edgemix.bundle.reader import read_manifest
from edgemix.bundle.sparse_storage import (
    HEADER,
    MAGIC,
    MAX_RATIO,
    MAX_SEGMENTS,
    Segment,
    ZeroPoints,
    deflate,
    inflate,
    read_header,
    read_index,
    write_header,
)
from edgemix.bundle.verify import verify_bundle
from edgemix.bundle.writer import write_manifest
from edgemix.errors import BundleError, EdgemixError
from edgemix.export.pruning import packing
from edgemix.export.pruning.packing import pack_weights
from edgemix.files import hash_file
from edgemix.runtime import Mixture
from edgemix.runtime.graphs import sparse_weights
from edgemix.runtime.graphs.decoder import DecoderGraph
from edgemix.runtime.graphs.sparse_weights import expand, expanded_files

if TYPE_CHECKING:
    from pathlib import Path

GENERATOR = np.random.default_rng(0)
ROWS, COLUMNS, BLOCK = 48, 320, 32


def mask(share: float) -> np.ndarray:
    return GENERATOR.random((ROWS, COLUMNS)) >= share


def blocks(bits: int, *, zero_points: bool) -> dict[str, np.ndarray]:
    """The tensors of a MatMulNBits node, half of its weights zero, as its zero points say."""
    shape = ROWS, COLUMNS // BLOCK, BLOCK
    zeros = GENERATOR.integers(0, 1 << bits, shape[:2], np.uint8) if zero_points else np.uint8(1 << (bits - 1))
    codes = GENERATOR.integers(0, 1 << bits, shape, np.uint8)
    codes = np.where(mask(0.5).reshape(shape), codes, np.broadcast_to(np.asarray(zeros).T, shape[1::-1]).T[..., None])
    tensors = {"codes": codes, "scales": GENERATOR.random(shape[:2]).astype(np.float16)}
    if zero_points:
        tensors["zeros"] = zeros
    if bits == 4:
        tensors |= {name: nibbles(tensors[name]) for name in tensors.keys() - {"scales"}}
    return tensors


def nibbles(codes: np.ndarray) -> np.ndarray:
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return codes[..., ::2] | (codes[..., 1::2] << np.uint8(4))


def save(folder: Path, tensors: dict[str, np.ndarray], *nodes: onnx.NodeProto) -> Path:
    """A graph with all of its tensors in external data."""
    initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(list(nodes), "g", [], [], initializer=initializers)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def nbits(bits: int, *inputs: str) -> onnx.NodeProto:
    return helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], domain="com.microsoft", bits=bits, block_size=BLOCK, K=COLUMNS, N=ROWS
    )


CASES = {
    "float32": lambda: ({"w": GENERATOR.normal(size=(ROWS, COLUMNS)).astype(np.float32) * mask(0.5)}, ()),
    "float16": lambda: ({"w": (GENERATOR.normal(size=(ROWS, COLUMNS)) * mask(0.9)).astype(np.float16)}, ()),
    "int8": lambda: ({"w": (GENERATOR.integers(-128, 128, (ROWS, COLUMNS)) * mask(0.5)).astype(np.int8)}, ()),
    "all zero": lambda: ({"w": np.zeros((ROWS, COLUMNS), np.float32), "b": GENERATOR.random(4000)}, ()),
    "8 bits around 128": lambda: (blocks(8, zero_points=False), (nbits(8, "codes", "scales"),)),
    "8 bits with zero points": lambda: (blocks(8, zero_points=True), (nbits(8, "codes", "scales", "zeros"),)),
    "4 bits around 8": lambda: (blocks(4, zero_points=False), (nbits(4, "codes", "scales"),)),
    "4 bits with zero points": lambda: (blocks(4, zero_points=True), (nbits(4, "codes", "scales", "zeros"),)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_packed_expands_to_the_same_bytes(tmp_path, case):
    tensors, nodes = CASES[case]()
    graph = save(tmp_path, tensors, *nodes)
    plain = (tmp_path / "model.onnx.data").read_bytes()
    said = pack_weights(graph)
    assert said == SparseWeights(size=len(plain))
    assert external_files(graph) == {"model.onnx.data.sparse"}
    files = expanded_files(graph)
    assert files["model.onnx.data"].tobytes() == plain
    packed = (tmp_path / "model.onnx.data.sparse").stat().st_size
    assert packed < 0.85 * len(plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data.sparse"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_half_of_the_codes_zero_are_found_by_their_zero_points(tmp_path, bits, zero_points):
    """Random codes: an element that stays costs its bits, one that goes a bit of the mask."""
    graph = save(
        tmp_path,
        blocks(bits, zero_points=zero_points),
        nbits(bits, "codes", "scales", *["zeros"] if zero_points else []),
    )
    pack_weights(graph)
    index = read_index(tmp_path / "model.onnx.data.sparse")
    codes = max(index.segments, key=lambda segment: segment.elements)
    assert (codes.width, codes.zero_points is not None) == (bits, zero_points)
    assert codes.stored / codes.elements * 8 == pytest.approx(1 + bits * 0.5 * (1 - 2**-bits), rel=0.03)


def test_minus_zero_is_kept(tmp_path):
    weights = np.where(mask(0.5), np.float32(-0.0), np.float32(0.0))
    graph = save(tmp_path, {"w": weights})
    assert pack_weights(graph)
    assert expanded_files(graph)["model.onnx.data"].tobytes() == weights.tobytes()


def test_weights_that_do_not_shrink_stay_plain(tmp_path):
    graph = save(tmp_path, {"w": GENERATOR.integers(0, 256, 5000, np.uint8)})
    before = (tmp_path / "model.onnx.data").read_bytes()
    assert pack_weights(graph) is None
    assert (tmp_path / "model.onnx.data").read_bytes() == before
    assert expanded_files(graph) == {}


def test_weights_that_shrink_beyond_belief_stay_plain(tmp_path):
    """No reader would take the file."""
    graph = save(tmp_path, {"w": np.zeros((1000, 100), np.float32)})
    assert pack_weights(graph) is None
    assert (tmp_path / "model.onnx.data").is_file()


def test_a_wrong_expansion_loses_nothing(tmp_path, monkeypatch):
    graph = save(tmp_path, CASES["float32"]()[0])
    monkeypatch.setattr(packing, "expand", lambda path: np.zeros(3, np.uint8))
    with pytest.raises(EdgemixError, match="does not expand"):
        pack_weights(graph)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.fixture
def sparse_bundle(own_bundle):
    """The bundle of two members, the first one's weights sparse; with what it said before."""
    manifest = read_manifest(own_bundle)
    graph = own_bundle / manifest.members[0].graph
    table = GENERATOR.normal(size=(258, 258)) * (GENERATOR.random((258, 258)) < 0.5)
    write_graph(graph, ClosedForm(table.astype(np.float32)))
    with Mixture.assemble(own_bundle, manifest, provider="cpu") as mixture:
        before = mixture.score("1+2=3 and def x").member_log_probabilities
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="model.onnx.data", size_threshold=512)
    first = msgspec.structs.replace(manifest.members[0], sparse=pack_weights(graph))
    folder = manifest.members[0].graph.rpartition("/")[0]
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith(f"{folder}/")}
    files |= {f"{folder}/{path.name}": hash_file(path) for path in graph.parent.iterdir()}
    manifest = msgspec.structs.replace(manifest, members=(first, *manifest.members[1:]), files=files)
    write_manifest(own_bundle, manifest)
    return own_bundle, before


def test_a_sparse_bundle_answers_bit_for_bit_as_before(sparse_bundle):
    bundle, before = sparse_bundle
    manifest = read_manifest(bundle)
    verify_bundle(bundle, manifest)
    assert manifest.members[0].sparse is not None
    assert "members/math/model.onnx.data.sparse" in manifest.files
    with Mixture.load(bundle, provider="cpu") as mixture:
        np.testing.assert_array_equal(mixture.score("1+2=3 and def x").member_log_probabilities, before)


@pytest.mark.parametrize("sparse", [None, SparseWeights(7)])
def test_a_manifest_that_says_otherwise_is_refused(sparse_bundle, sparse):
    bundle, _ = sparse_bundle
    manifest = read_manifest(bundle)
    first = msgspec.structs.replace(manifest.members[0], sparse=sparse)
    manifest = write_manifest(bundle, msgspec.structs.replace(manifest, members=(first, *manifest.members[1:])))
    with pytest.raises(BundleError, match="not stored as"):
        verify_bundle(bundle, manifest)


def test_an_unlisted_sparse_file_is_refused(own_bundle):
    (own_bundle / "members/math/model.onnx.data.sparse").write_bytes(b"x")
    with pytest.raises(BundleError, match="not listed"):
        Mixture.load(own_bundle, provider="cpu")


def test_an_old_onnxruntime_is_named(tmp_path, monkeypatch):
    form = ClosedForm(GENERATOR.random((64, 64)).astype(np.float32) * (GENERATOR.random((64, 64)) < 0.5))
    config = write_graph(tmp_path / "model.onnx", form)
    graph = tmp_path / "model.onnx"
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location="model.onnx.data", size_threshold=512)
    assert pack_weights(graph)
    DecoderGraph.load(graph, config)
    monkeypatch.setattr("edgemix.runtime.graphs.providers.session_options", lambda threads: object())
    with pytest.raises(EdgemixError, match="cannot take weights from memory"):
        DecoderGraph.load(graph, config)


def written(path: Path, size: int, segments: list[Segment], *streams: bytes) -> Path:
    path.write_bytes(b"".join([write_header(size, segments), *streams]))
    return path


SOUND = Segment(0, 64, 8, 0, 0, (64,))


@pytest.mark.parametrize(
    ("segments", "fault"),
    [
        ([msgspec.structs.replace(SOUND, offset=-1)], "lies at"),
        ([msgspec.structs.replace(SOUND, offset=1)], "lies at"),
        ([msgspec.structs.replace(SOUND, length=65)], "lies at"),
        ([msgspec.structs.replace(SOUND, length=0)], "lies at"),
        ([msgspec.structs.replace(SOUND, length=1 << 62)], "lies at"),
        ([SOUND, SOUND], "lies at"),
        ([SOUND] * (MAX_SEGMENTS + 1), "may have 65,536"),
        ([msgspec.structs.replace(SOUND, width=2)], "elements of 2 bits"),
        ([msgspec.structs.replace(SOUND, width=32, length=63)], "elements of 32 bits"),
        ([msgspec.structs.replace(SOUND, width=16)], "do not fit its width"),
        ([msgspec.structs.replace(SOUND, values=(-64,))], "do not fit its width"),
        ([msgspec.structs.replace(SOUND, mask=-1, values=(65,))], "do not fit its width"),
        ([msgspec.structs.replace(SOUND, background=256)], "the background 256"),
        ([msgspec.structs.replace(SOUND, values=(1 << 40,))], "are there"),
        ([msgspec.structs.replace(SOUND, values=(63,))], "64 are there"),
        ([msgspec.structs.replace(SOUND, zero_points=ZeroPoints(0, 8, 8))], "zero points"),
        ([msgspec.structs.replace(SOUND, zero_points=ZeroPoints(1, 8, 8))], "zero points"),
        ([msgspec.structs.replace(SOUND, zero_points=ZeroPoints(0, 0, 8))], "zero points"),
        ([msgspec.structs.replace(SOUND, zero_points=ZeroPoints(0, 8, 1 << 62))], "zero points"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, segments, fault):
    with pytest.raises(BundleError, match=fault):
        read_index(written(tmp_path / "w.sparse", 64, segments, bytes(64)))


def test_a_sound_index_is_not(tmp_path):
    """The cases above differ from this one only in what they are refused for."""
    assert expand(written(tmp_path / "w.sparse", 64, [SOUND], bytes(range(64)))).tobytes() == bytes(range(64))


BOMB = zlib.compressobj(9, zlib.DEFLATED, -15)
BOMB_STREAM = BOMB.compress(bytes(50_000_000)) + BOMB.flush()


@pytest.mark.parametrize(
    ("segment", "streams"),
    [
        (Segment(0, 64, 8, 0, 0, (len(BOMB_STREAM),)), (BOMB_STREAM,)),
        (Segment(0, 64, 8, 0, len(BOMB_STREAM), (1,)), (BOMB_STREAM, b"\0")),
        (Segment(0, 64, 8, 0, 0, (63,)), (bytes(63),)),
        (Segment(0, 64, 8, 0, 0, (20,)), (b"\xff" * 20,)),
        (Segment(0, 60, 4, 0, 15, (60,)), (b"\x0f" * 15, bytes(60))),  # half of the values have no place
        (Segment(0, 63, 8, 0, 8, (64,)), (b"\xff" * 8, bytes(64))),  # the mask has a bit beyond the last element
        (Segment(0, 64, 8, 0, 0, (70,)), (deflate(bytes(64)).ljust(70, b"x"),)),
    ],
)
def test_streams_that_hold_something_else_are_refused(tmp_path, segment, streams, monkeypatch):
    path = written(tmp_path / "w.sparse", 64, [segment], *streams)
    sizes = []
    real = inflate
    monkeypatch.setattr(
        sparse_weights, "inflate", lambda stored, size: sizes.append(len(content := real(stored, size))) or content
    )
    with pytest.raises(BundleError, match="segment 0 is damaged"):
        expand(path)
    assert all(size <= 64 for size in sizes)


def test_a_file_that_would_explode_is_refused_by_its_header(tmp_path):
    path = tmp_path / "w.sparse"
    path.write_bytes(HEADER.pack(MAGIC, 1 << 50, 2) + b"[]")
    with pytest.raises(BundleError, match="no model shrinks so much"):
        read_header(path)
    path.write_bytes(HEADER.pack(MAGIC, (HEADER.size + 2) * MAX_RATIO, 2) + b"[]")
    assert expand(path).size == (HEADER.size + 2) * MAX_RATIO


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"emixsp01",
        struct.pack("<8sQQ", b"emixsp02", 8, 2) + b"[]",
        HEADER.pack(MAGIC, 8, 1 << 60) + b"[]",
        HEADER.pack(MAGIC, 8, 2) + b"[[",
        HEADER.pack(MAGIC, 8, 4) + b"[[1]",
        HEADER.pack(MAGIC, 8, 2000) + b"[" * 2000,
        HEADER.pack(MAGIC, 0, 2) + b"[]",
    ],
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "w.sparse"
    path.write_bytes(content)
    with pytest.raises(BundleError):
        read_index(path)


def external_graph(folder: Path, *, offset: int = 0, length: int = 64, dims: tuple[int, ...] = (4, 4)) -> Path:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "w.data", "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([], "g", [], [], initializer=[tensor])).SerializeToString())
    return path


def test_tensors_stay_within_what_the_file_expands_to(tmp_path):
    graph = external_graph(tmp_path, offset=32)
    written(tmp_path / "w.data.sparse", 64, [SOUND], bytes(64))
    with pytest.raises(BundleError, match=r"32 to 96 of 'w.data', which has 64"):
        expanded_files(graph)


def test_a_file_that_is_longer_than_the_graphs_tensors_is_refused(tmp_path):
    """Its ratio allows it, but no tensor needs it."""
    graph = external_graph(tmp_path)
    written(tmp_path / "w.data.sparse", 1024, [SOUND], bytes(64))
    with pytest.raises(BundleError, match="end at byte 64"):
        expanded_files(graph)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path):
    folder = tmp_path / "graph"
    folder.mkdir()
    written(tmp_path / "elsewhere", 64, [SOUND], bytes(64))
    (folder / "w.data.sparse").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="symbolic link"):
        expanded_files(external_graph(folder))


def test_a_plain_file_goes_before_a_sparse_one(tmp_path):
    graph = external_graph(tmp_path)
    written(tmp_path / "w.data.sparse", 64, [SOUND], bytes(64))
    (tmp_path / "w.data").write_bytes(bytes(64))
    assert external_files(graph) == {"w.data"}
    assert expanded_files(graph) == {}


def test_a_changed_packed_file_fails_its_checksum(sparse_bundle):
    bundle, _ = sparse_bundle
    path = bundle / "members/math/model.onnx.data.sparse"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="has changed"):
        Mixture.load(bundle, provider="cpu")


def test_a_sparse_bundle_can_be_moved(sparse_bundle, tmp_path):
    bundle, before = sparse_bundle
    moved = shutil.copytree(bundle, tmp_path / "moved")
    with Mixture.load(moved, provider="cpu") as mixture:
        np.testing.assert_array_equal(mixture.score("1+2=3 and def x").member_log_probabilities, before)
