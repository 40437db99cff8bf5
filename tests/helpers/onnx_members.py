"""Tiny ONNX decoders whose logits are known in closed form, and bundles of them.

A member's logits after tokens y_0..y_t are

    logits[v] = table[y_t, v] + pull * (share of v among y_0..y_t) + (tilt * t if v == 0)

so they depend on the last token, on every token before it through the KV cache and, for graphs that take
`position_ids`, on the position. The `shared` graph gets the shares from GroupQueryAttention with zero queries (uniform
attention over one-hot values), the `growing` one from plain operators.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, pre_tokenizers

from edgemix.bundle.graph_io import CacheKind, GraphConfig
from edgemix.bundle.manifest import (
    CHAT_TEMPLATE,
    MANIFEST,
    SCHEMA,
    STUDENT,
    TOKENIZER,
    GraphParity,
    Manifest,
    MemberEntry,
    ModelSource,
    TokenizerEntry,
    Weights,
)
from edgemix.bundle.tokenizer_identity import TokenizerIdentity
from edgemix.bundle.writer import write_manifest
from edgemix.files import FileEntry, hash_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

BOS, EOS = 256, 257
VOCABULARY = 258
"""The byte tokenizer's: one token a byte, then <s> and </s>."""


@dataclass(frozen=True)
class ClosedForm:
    """The numbers behind a graph: `table` float32 [tokens, width], width at least tokens (the rest is padding).

    With `keeps`, the graph can be asked for the last logits only.
    """

    table: np.ndarray
    pull: float = 0.0
    tilt: float = 0.0
    cache: CacheKind = "shared"
    context: int = 4096
    dtype: Literal["float32", "float16"] = "float32"
    keeps: bool = True

    def logits(self, ids: list[int] | np.ndarray) -> np.ndarray:
        """float64 [len(ids), width]."""
        tokens, width = self.table.shape
        seen = np.cumsum(np.eye(tokens, width)[np.asarray(ids)], axis=0)
        logits = self.table[np.asarray(ids)] + self.pull * seen / np.arange(1, len(ids) + 1)[:, None]
        if self.cache == "growing":
            logits[:, 0] += self.tilt * np.arange(len(ids))
        return logits

    def log_probabilities(self, ids: list[int] | np.ndarray) -> np.ndarray:
        """float64 [len(ids), tokens], over the vocabulary without its padding."""
        logits = self.logits(ids)[:, : len(self.table)]
        return (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )

    @property
    def config(self) -> GraphConfig:
        return GraphConfig(
            exporter="mobius" if self.cache == "shared" else "mobius-unfused",
            cache=self.cache,
            layers=1,
            vocabulary=self.table.shape[1],
            context=self.context,
            dtype=self.dtype,
        )


def random_member(seed: int, *, tokens: int = 16, padding: int = 0, **options: Any) -> ClosedForm:
    """A member with random numbers; its padding's logits are large, so that forgetting to cut them off shows."""
    generator = np.random.default_rng(seed)
    table = np.pad(generator.normal(size=(tokens, tokens)) * 2, ((0, 0), (0, padding)), constant_values=9.0)
    return ClosedForm(table.astype(np.float32), **{"pull": 3.0, "tilt": 0.25, **options})


def saying(text: str, *, strength: float = 12.0, **options: Any) -> ClosedForm:
    """A member over the byte tokenizer that says `text` (no byte twice), then </s>, with near certainty."""
    table = np.zeros((VOCABULARY, VOCABULARY), np.float32)
    said = [*text.encode(), EOS]
    assert len(set(said)) == len(said)
    for before, after in itertools.pairwise(said):
        table[before, after] = strength
    return ClosedForm(table, **options)


def mixed(forms: Iterable[ClosedForm], weights: Iterable[float], ids: list[int]) -> np.ndarray:
    """Log-probabilities of every token after the first under the mixture of closed forms: float64 [tokens - 1]."""
    parts = [form.log_probabilities(ids)[range(len(ids) - 1), ids[1:]] for form in forms]
    total = sum(weight * np.exp(part) for weight, part in zip(weights, parts, strict=True))
    return np.asarray(np.log(total))


def write_graph(path: Path, member: ClosedForm) -> GraphConfig:
    """The graph of a closed form."""
    real = TensorProto.FLOAT if member.dtype == "float32" else TensorProto.FLOAT16
    tokens, width = member.table.shape
    size = -(-tokens // 16) * 16  # GroupQueryAttention wants heads of a multiple of 16
    constants = {
        "table": member.table,
        "one_hot": np.eye(tokens, size, dtype=np.float32),
        "pull": np.eye(size, width, dtype=np.float32) * np.float32(member.pull),
        "first": np.eye(1, width, dtype=np.float32)[0] * member.tilt,
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["bigram"]),
        helper.make_node("Gather", ["one_hot", "input_ids"], ["value"]),
    ]
    extra_inputs = []
    if member.cache == "shared":
        nodes += _shares_by_attention(constants)
        output = "all"
    else:
        nodes += _shares_by_hand(constants, real)
        output = "untilted"
        extra_inputs = [helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"])]
    nodes += [
        helper.make_node("MatMul", ["shares", "pull"], ["pulled"]),
        helper.make_node("Add", ["bigram", "pulled"], [output]),
    ]
    if member.cache == "growing":
        constants["last_axis"] = np.array([-1])
        nodes += [
            helper.make_node("Cast", ["position_ids"], ["position"], to=real),
            helper.make_node("Unsqueeze", ["position", "last_axis"], ["position_column"]),
            helper.make_node("Mul", ["position_column", "first"], ["tilt"]),
            helper.make_node("Add", ["untilted", "tilt"], ["all"]),
        ]
    nodes += _last_logits(constants)
    if member.keeps:
        extra_inputs.append(helper.make_tensor_value_info("logits_to_keep", TensorProto.INT64, [1]))
    graph = helper.make_graph(
        nodes,
        "closed_form",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *extra_inputs,
            *(_state(f"past_key_values.0.{kind}", "past", size, real) for kind in ("key", "value")),
        ],
        [
            helper.make_tensor_value_info("logits", real, ["batch", "kept", width]),
            *(_state(f"present.0.{kind}", "total", size, real) for kind in ("key", "value")),
        ],
        [_initializer(name, value, member.dtype) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return member.config


def _last_logits(constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    constants |= {"end": np.array([2**63 - 1]), "axis": np.array([1]), "logits_to_keep": np.array([2**62])}
    return [
        helper.make_node("Neg", ["logits_to_keep"], ["start"]),
        helper.make_node("Slice", ["all", "start", "end", "axis"], ["logits"]),
    ]


def write_stack(path: Path, members: Sequence[ClosedForm]) -> GraphConfig:
    """One graph of several closed forms with shared caches and tables of one shape."""
    config = write_graph(path, members[0])
    model = onnx.load(path)
    graph, width = model.graph, members[0].table.shape[1]
    last = [node for node in graph.node if node.op_type in ("Neg", "Slice")]
    first = next(node for node in graph.node if list(node.output) == ["bigram"])
    for node in [*last, first, *(node for node in graph.node if list(node.output) in (["pulled"], ["all"]))]:
        graph.node.remove(node)
    pull = next(each for each in graph.initializer if each.name == "pull")
    size, count = pull.dims[0], len(members)
    constants = {"nought": np.int64(0), "member_count": np.int64(count), "member_axis": np.array([2])}
    constants |= {"text_axis": np.array([0]), "every": np.array([count]), "last_row": np.array([2**62])}
    constants["one_more"] = np.array([1], np.int32)
    rows = [  # to the attention, each text is as many as there are members
        helper.make_node("Shape", ["input_ids"], ["texts_shape"], end=1),
        helper.make_node("Squeeze", ["texts_shape"], ["texts"]),
        helper.make_node("Mul", ["texts", "member_count"], ["row_count"]),
        helper.make_node("Range", ["nought", "row_count", "one"], ["rows"]),
        helper.make_node("Div", ["rows", "member_count"], ["text_of_row"]),
        helper.make_node("Gather", ["value_of_text", "text_of_row"], ["value"], axis=0),
        helper.make_node("Gather", ["length_of_text", "text_of_row"], ["seqlens_k"], axis=0),
        helper.make_node("Shape", ["input_ids"], ["new_tokens"], start=1, end=2),
        helper.make_node("Cast", ["new_tokens"], ["tokens_of_call"], to=TensorProto.INT32),
        helper.make_node("Add", ["seqlens_k", "one_more"], ["length_of_row"]),
        helper.make_node("Min", ["length_of_row", "tokens_of_call"], ["queries"]),
    ]
    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    attention.input.extend([*[""] * (16 - len(attention.input)), "queries"])
    made = {"value": "value_of_text", "seqlens_k": "length_of_text"}
    for node in graph.node:
        node.output[:] = [made.get(name, name) for name in node.output]
    before = [node for node in graph.node if set(node.output) & {*made.values(), "lengths", "last"}]
    after = [node for node in graph.node if not any(node is each for each in before)]
    del graph.node[:]
    graph.node.extend([*before, *rows, *after])
    for index, member in enumerate(members):
        arrays = {"table": member.table, "pull": np.eye(size, width, dtype=np.float32) * np.float32(member.pull)}
        constants |= {f"{name}.{index}": array for name, array in arrays.items()} | {f"row.{index}": np.array([index])}
        graph.node.extend(
            [
                helper.make_node("Gather", [f"table.{index}", "input_ids"], [f"bigram.{index}"]),
                helper.make_node(
                    "Slice", ["shares", f"row.{index}", "last_row", "text_axis", "every"], [f"shares.{index}"]
                ),
                helper.make_node("MatMul", [f"shares.{index}", f"pull.{index}"], [f"pulled.{index}"]),
                helper.make_node("Add", [f"bigram.{index}", f"pulled.{index}"], [f"all.{index}"]),
                helper.make_node("Unsqueeze", [f"all.{index}", "member_axis"], [f"member.{index}"]),
            ]
        )
    graph.initializer.extend(_initializer(name, np.asarray(value), "float32") for name, value in constants.items())
    graph.node.append(helper.make_node("Concat", [f"member.{index}" for index in range(count)], ["all"], axis=2))
    graph.node.extend(last)
    logits = next(output for output in graph.output if output.name == "logits")
    logits.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "kept", count, width]))
    onnx.save(model, path)
    return msgspec.structs.replace(config, member_count=count)


def _initializer(name: str, value: np.ndarray, dtype: str) -> onnx.TensorProto:
    return numpy_helper.from_array(value.astype(dtype) if value.dtype == np.float32 else value, name)


def _state(name: str, length: str, size: int, real: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, real, ["batch", 1, length, size])


def _shares_by_attention(constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    constants |= {"zero": np.float32(0), "axis_1": np.array([1]), "one": np.int64(1)}
    return [
        helper.make_node("Mul", ["value", "zero"], ["query"]),
        helper.make_node("ReduceSum", ["attention_mask", "axis_1"], ["lengths"], keepdims=0),
        helper.make_node("Sub", ["lengths", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["total"]),
        helper.make_node("Cast", ["total"], ["total_length"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            [
                "query",
                "value",
                "value",
                "past_key_values.0.key",
                "past_key_values.0.value",
                "seqlens_k",
                "total_length",
            ],
            ["shares", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=1,
            kv_num_heads=1,
        ),
    ]


def _shares_by_hand(constants: dict[str, np.ndarray], real: int) -> list[onnx.NodeProto]:
    constants |= {"axis_1": np.array([1]), "axis_2": np.array([2]), "nought": np.int64(0), "one": np.int64(1)}
    return [
        helper.make_node("Unsqueeze", ["value", "axis_1"], ["new_value"]),
        helper.make_node("Concat", ["past_key_values.0.key", "new_value"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "new_value"], ["present.0.value"], axis=2),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "one"], ["total"]),
        helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
        helper.make_node("Gather", ["ids_shape", "one"], ["new"]),
        helper.make_node("Sub", ["total", "new"], ["past"]),
        helper.make_node("Range", ["nought", "total", "one"], ["keys"]),
        helper.make_node("Range", ["past", "total", "one"], ["query_row"]),
        helper.make_node("Unsqueeze", ["query_row", "axis_1"], ["queries"]),
        helper.make_node("LessOrEqual", ["keys", "queries"], ["causal"]),
        helper.make_node("Cast", ["causal"], ["causal_int"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["attention_mask", "axis_1"], ["mask_row"]),
        helper.make_node("Mul", ["mask_row", "causal_int"], ["allowed"]),
        helper.make_node("Cast", ["allowed"], ["weight"], to=real),
        helper.make_node("Squeeze", ["present.0.value", "axis_1"], ["values"]),
        helper.make_node("MatMul", ["weight", "values"], ["counts"]),
        helper.make_node("ReduceSum", ["weight", "axis_2"], ["count"], keepdims=1),
        helper.make_node("Div", ["counts", "count"], ["shares"]),
    ]


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte (ids 0..255), <s> and </s>: every character beyond ASCII is spread over several tokens."""
    characters = _byte_characters()
    core = tokenizers.Tokenizer(models.BPE({character: byte for byte, character in characters.items()}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    return core


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def write_bundle(
    folder: Path,
    members: dict[str, ClosedForm],
    *,
    weights: dict[str, float] | None = None,
    domains: dict[str, dict[str, float]] | None = None,
    bos: int | None = None,
    chat_template: str | None = None,
    student: ClosedForm | None = None,
    stacked: bool = False,
    adaptive: bool = False,
    added: Sequence[str] = (),
) -> Path:
    """A bundle of members over the byte tokenizer, in one graph if they are `stacked`, and perhaps a student.

    The tokenizer has the special tokens `added`, too.
    """
    forms = {f"members/{name}": member for name, member in members.items()}
    if student is not None:
        forms[STUDENT] = student
    entries = [
        MemberEntry(
            name=place.rpartition("/")[2],
            format="fp32",
            graph=f"{place}/model.onnx",
            source=ModelSource(model="closed-form", model_type="closed_form", parameters=1, sha256="0" * 64),
            config=write_graph(folder / place / "model.onnx", form),
            parity=GraphParity(0.0, 0.0, 0.0, 1e-4),
        )
        for place, form in forms.items()
    ]
    if stacked:
        graph = "members/stack/model.onnx"
        config = write_stack(folder / graph, list(members.values()))
        for index, name in enumerate(members):
            shutil.rmtree(folder / "members" / name)
            entries[index] = msgspec.structs.replace(entries[index], graph=graph, config=config)
    tokenizer = _write_tokenizer(folder, added, bos)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, "utf-8")
    manifest = Manifest(
        schema=SCHEMA,
        edgemix="0.1.0",
        target="cpu",
        seed=0,
        members=tuple(entries[: len(members)]),
        student=None if student is None else entries[-1],
        weights=Weights(
            method="fit" if domains else "given",
            default=weights or dict.fromkeys(members, 1 / len(members)),
            domains=domains or {},
            adaptive=adaptive,
        ),
        tokenizer=tokenizer,
        files=_checksums(folder),
    )
    write_manifest(folder, manifest)
    return folder


def _checksums(folder: Path) -> dict[str, FileEntry]:
    """The manifest's `files`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}


def _write_tokenizer(folder: Path, added: Sequence[str], bos: int | None) -> TokenizerEntry:
    """The byte tokenizer, with more special tokens, in a bundle."""
    path = folder / TOKENIZER
    path.parent.mkdir(parents=True, exist_ok=True)
    core = byte_tokenizer()
    core.add_special_tokens([*added])
    core.save(str(path))
    sha256 = TokenizerIdentity.parse(path.read_bytes()).sha256()
    return TokenizerEntry(sha256=sha256, vocabulary=core.get_vocab_size(), eos=(EOS,), bos=bos)
