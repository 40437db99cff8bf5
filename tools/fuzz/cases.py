"""Cases: each a sealed mutation of a tiny bundle, or of a file that is read beside one, made from a seed."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from graphs import graph
from templates import SOUND, template
from tokenizer_parts import tokenizer
from values import integer, mutated_bytes, mutated_json, value

from edgemix.bundle.manifest import CHAT_TEMPLATE, MANIFEST, NGRAMS, TOKENIZER, checksum_of
from edgemix.bundle.tokenizer_identity import TokenizerIdentity

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.cut_students import TOKENS, cut_student
from helpers.onnx_members import EOS, VOCABULARY, ClosedForm, write_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

GRAPH, GROWING, STUDENT_GRAPH = "members/one/model.onnx", "members/two/model.onnx", "student/model.onnx"
SPARSE = "members/one/model.onnx.data.sparse"
SESSION, RECIPE, LINES = "session.safetensors", "recipe.yaml", "texts.jsonl"
PARTS = {
    "tokenizer": 26,
    "template": 24,
    "graph": 22,
    "manifest": 10,
    "session": 6,
    "recipe": 4,
    "ngrams": 2,
    "draft tokens": 2,
    "sparse": 4,
}
"""What is mutated -> in how many of a hundred cases."""
_RECIPE = b"""members:
  one: {model: models/one, adapter: adapters/a, quantization: int4}
  two: {model: models/two}
weights: fit
data: {validation: [a.txt, {file: b.txt}], training: {file: c.txt}}
student: {layers: 2}
"""


class Bases:
    """The sound bundles that cases are made from, in a folder.

    Args:
        folder: They are made there, if they are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.plain, self.sparse, self.session = folder / "plain", folder / "sparse", folder / SESSION
        if not (folder / "finished").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._make()
            (folder / "finished").touch()

    def _make(self) -> None:
        from edgemix import Mixture
        from edgemix.export.drafting.ngrams import count_ngrams

        rng = np.random.default_rng(0)
        table = rng.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
        table[:, 127:] -= 9
        one, two = ClosedForm(table, context=512, pull=1.0), ClosedForm(table.T.copy(), cache="growing", context=512)
        write_bundle(self.plain, {"one": one, "two": two}, student=one, chat_template=SOUND)
        cut_student(self.plain, [*range(97, 123), EOS])
        (self.plain / NGRAMS).write_bytes(count_ngrams([[*b"hello world"] * 9], 100).to_bytes())
        _seal(self.plain, {NGRAMS: None}, ngrams=(self.plain / NGRAMS).stat().st_size // 13)
        write_bundle(
            self.sparse, {"one": ClosedForm(np.where(table > 0.5, table, 0), context=512)}, chat_template=SOUND
        )
        _store_sparse(self.sparse)
        with Mixture.load(self.plain, provider="cpu", threads=1) as mixture:
            session = mixture.session()
            session.send("hello", max_new_tokens=2)
            session.save(self.session)


def _store_sparse(bundle: Path) -> None:
    import onnx

    from edgemix.export.pruning.packing import pack_weights

    graph = bundle / GRAPH
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    stored = pack_weights(graph)
    assert stored is not None
    _seal(bundle, {GRAPH: None, SPARSE: None}, sparse=stored.size)


def _seal(bundle: Path, files: dict[str, Any], document: bytes | None = None, **changes: Any) -> None:
    """Write a manifest that agrees with the bundle's files, as an attacker would.

    Args:
        bundle: The bundle.
        files: The files that were changed.
        document: The manifest to seal; the bundle's own by default.
        changes: Keys of the manifest to set; `sparse` is that of the first member.
    """
    manifest = json.loads((bundle / MANIFEST).read_bytes() if document is None else document)
    for name in files:
        content = (bundle / name).read_bytes()
        with suppress(TypeError, KeyError, AttributeError):
            manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if TOKENIZER in files:
        with suppress(Exception, RecursionError):
            manifest["tokenizer"]["sha256"] = TokenizerIdentity.parse((bundle / TOKENIZER).read_bytes()).sha256()
    if "sparse" in changes:
        manifest["members"][0]["sparse"] = {"size": changes.pop("sparse")}
    manifest.update(changes)
    with suppress(Exception, RecursionError):
        manifest["checksum"] = checksum_of(msgspec.json.decode(json.dumps(manifest)))
    (bundle / MANIFEST).write_text(json.dumps(manifest))


class Case:
    """One case, written to a folder.

    Attributes:
        part: What was mutated.
        bundle: The bundle to open.
        session, recipe: Files to read, where the case has them.
    """

    def __init__(self, rng: Random, bases: Bases, folder: Path) -> None:
        self.part = rng.choices([*PARTS], [*PARTS.values()])[0]
        self.session: Path | None = None
        self.recipe: Path | None = None
        self.bundle = folder / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bases.sparse if self.part == "sparse" else bases.plain, self.bundle, copy_function=_link)
        if self.part == "manifest":
            self._change_manifest(rng)
        elif self.part == "session":
            self.session = folder / SESSION
            self.session.write_bytes(_session(rng, bases.session.read_bytes()))
        elif self.part == "recipe":
            self.recipe = folder / RECIPE
            self.recipe.write_bytes(_recipe(rng))
        else:
            place, change = _CHANGES[self.part]
            name = place if isinstance(place, str) else place(rng)
            path = self.bundle / name
            content = change(rng, path.read_bytes())
            path.unlink()
            path.write_bytes(content)
            changes = {}
            if self.part == "ngrams" and len(content) % 13 == 0:
                changes = {"ngrams": len(content) // 13}
            self._manifest_alone()
            _seal(self.bundle, {name: None}, **changes)

    def _manifest_alone(self) -> bytes:
        """Give the bundle a manifest file of its own."""
        data = (self.bundle / MANIFEST).read_bytes()
        (self.bundle / MANIFEST).unlink()
        (self.bundle / MANIFEST).write_bytes(data)
        return data

    def _change_manifest(self, rng: Random) -> None:
        data = self._manifest_alone()
        changed = mutated_bytes(rng, data) if rng.randrange(6) == 0 else mutated_json(rng, data)
        (self.bundle / MANIFEST).write_bytes(changed)
        with suppress(ValueError, RecursionError, TypeError, AttributeError):  # what is no manifest cannot be sealed
            _seal(self.bundle, {}, changed)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def _session(rng: Random, data: bytes) -> bytes:
    """Return a session file with damage; its own checksums are right where they can be."""
    if rng.randrange(3) == 0:
        return mutated_bytes(rng, data)
    length = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    action = rng.randrange(5)
    if action == 0:
        encoded = mutated_json(rng, data[8 : 8 + length])
    else:
        if action < 4:
            content = mutated_json(rng, header["__metadata__"]["edgemix"].encode()).decode()
            header["__metadata__"] = {
                "edgemix": content,
                "sha256": hashlib.sha256(content.encode("utf-8", "replace")).hexdigest(),
            }
        else:
            name = rng.choice(sorted(header.keys() - {"__metadata__"}))
            header[name][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
                ("F32", "F64", [integer(rng)], [0, 8], value(rng))
            )
        encoded = json.dumps(header).encode()
    if rng.randrange(12) == 0:
        tensors = bytes(byte ^ 0x7F for byte in tensors)
    size = integer(rng) % (1 << 64) if rng.randrange(12) == 0 else len(encoded)
    return size.to_bytes(8, "little") + encoded + tensors


def _recipe(rng: Random) -> bytes:
    if rng.randrange(2):
        return mutated_bytes(rng, _RECIPE)
    bombs = (
        "a: &a [x, x]\nb: [*a, *a]",
        "- " * 5_000,
        "[" * 5_000,
        "? " * 3_000,
        "!!python/object/apply:os.system [ls]",
        "a: 1e999",
        "members: {one: {model: '\\ud800'}}",
        "members: {one: {model: 12345678901234567890123456789}}",
        "\ufeff" * 9,
        "members: " + "{a: " * 99,
        "a: " + "9" * 5_000,
        "weights: {one: .nan}",
        "a: !!binary x",
        "2024-99-99: 1",
        "{" * 99,
    )
    return rng.choice(bombs).encode("utf-8", "surrogatepass") + rng.choice((b"", b"\n" + _RECIPE))


def _sparse(rng: Random, data: bytes) -> bytes:
    magic, size, length = struct.unpack("<8sQQ", data[:24])
    action = rng.randrange(4)
    if action == 0:
        return mutated_bytes(rng, data)
    if action == 1:
        numbers = [size, length]
        numbers[rng.randrange(2)] = integer(rng) % (1 << 64)
        return struct.pack("<8sQQ", magic, *numbers) + data[24:]
    index = mutated_json(rng, data[24 : 24 + length])
    return struct.pack("<8sQQ", magic, size, len(index)) + index + data[24 + length :]


def _ngrams(rng: Random, data: bytes) -> bytes:
    if rng.randrange(2):
        return mutated_bytes(rng, data)
    rows = rng.choice((1, 2, 100))
    return bytes(rng.randrange(256) for _ in range(8 * rows)) + bytes(5 * rows) + data[: 13 * rng.randrange(2)]


def _graph_file(rng: Random) -> str:
    return rng.choice((GRAPH, GRAPH, GROWING, STUDENT_GRAPH))


_CHANGES: dict[str, tuple[str | Callable[[Random], str], Callable[[Random, bytes], bytes]]] = {
    "tokenizer": (TOKENIZER, tokenizer),
    "template": (CHAT_TEMPLATE, template),
    "graph": (_graph_file, graph),
    "ngrams": (NGRAMS, _ngrams),
    "draft tokens": (TOKENS, mutated_json),
    "sparse": (SPARSE, _sparse),
}
"""A part of the bundle -> its file, or a choice of one, and how that is changed."""
