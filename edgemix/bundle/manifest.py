"""The manifest of a bundle, a folder with the tokenizer's files and each member's graph.

BUNDLE/
  edgemix.json                           the manifest below
  tokenizer/tokenizer.json               and chat_template.jinja where the tokenizer has one
  members/NAME/model.onnx, model.onnx.data
  student/model.onnx, model.onnx.data    where the bundle has a student
  student/draft.onnx, draft_tokens.json  where it drafts with fewer rows of its head
  ngrams.bin                             frequent n-grams, where the recipe had training text
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from edgemix.bundle.graph_io import GraphConfig
from edgemix.files import FileEntry
from edgemix.formats import Format, Target
from edgemix.tasks import DEFAULT_TASK, GraphKind, TaskName

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = 5
"""2 added students, pruned and sparse members, and the mixture's parity; 3 weights that are adaptive by default; 4 the
texts of special tokens; 5 mixtures over labels.
Bundles of older schemas are read as they are."""
SpecialToken = Literal["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"]
MANIFEST = "edgemix.json"
NGRAMS = "ngrams.bin"
TOKENIZER = "tokenizer/tokenizer.json"
CHAT_TEMPLATE = "tokenizer/chat_template.jinja"
MEMBER_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9_-])?")
"""A member's name is also its folder's, on every system."""
STUDENT = "student"
"""The student's name, and its folder."""
RESERVED_NAMES = frozenset({STUDENT, "mixture", "uniform", "fitted", "given", "adaptive"})
"""Names that tables use for mixtures and the student."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every part of the manifest: immutable, and an unknown key is an error.

    A field that was renamed keeps its old key in the JSON (`name=`), so that bundles of every schema stay readable.
    """


class ModelSource(_Record, frozen=True):
    """Where a member comes from.

    Attributes:
        model: The recipe's `model` (a folder's or file's name without its parents, or a hub id).
        adapter: The adapter folder's name, if one was merged.
        model_type: Hugging Face's `model_type`.
        parameters: Number of weights.
        license: As the model's card or GGUF metadata states it, if it does.
        sha256: Of the weights as they were read.
    """

    model: str
    model_type: str
    parameters: int
    sha256: str
    adapter: str | None = None
    license: str | None = msgspec.field(default=None, name="licence")


class GraphParity(_Record, frozen=True):
    """The fp32 graph against torch: largest difference of log-probabilities (nats) by case, and its limit.

    At positions where the torch model itself is unstable, the difference counts in units of what rounding alone makes.
    """

    prefill: float
    decode: float
    padded_batch: float
    limit: float


class QuantizationParity(_Record, frozen=True):
    """The stored graph against the fp32 graph, on `tokens` tokens of text.

    Attributes:
        kl: Mean KL divergence from the fp32 distribution, in nats a token; `kl_limit` its limit.
        top1_disagreement: Share of positions whose most probable token differs; `top1_disagreement_limit` its limit.
        perplexity_ratio: Perplexity of the stored graph over that of the fp32 graph; with its limit.
        decode_kl: As `kl`, and with its limit, where the stored graph reads a token a call, after a past.
    """

    tokens: int
    kl: float
    kl_limit: float
    top1_disagreement: float = msgspec.field(name="flips")
    top1_disagreement_limit: float = msgspec.field(name="flips_limit")
    perplexity_ratio: float
    perplexity_ratio_limit: float
    decode_kl: float | None = None


class MixtureParity(_Record, frozen=True):
    """The mixture of the stored graphs against the mixture of the fp32 graphs, on `tokens` tokens of the gates' text.

    It has no limits: KL divergence is jointly convex, so the mixture's is at most the weighted mean of its members',
    and those have passed theirs.

    Attributes:
        weights: Both mixtures', member name -> share; the bundle's own when it was made.
        kl, top1_disagreement, perplexity_ratio: As in `QuantizationParity`.
    """

    weights: dict[str, float]
    tokens: int
    kl: float
    top1_disagreement: float = msgspec.field(name="flips")
    perplexity_ratio: float


class BudgetPoint(_Record, frozen=True):
    """The costs of a choice of formats.

    Attributes:
        bytes: Of the bundle's folder.
        seconds: Of decoding a token with its members; None where time was not limited.
        loss: Estimated KL divergence of the mixture from fp32, in nats a token: the weighted mean of the members'.
    """

    bytes: int
    seconds: float | None
    loss: float


class BudgetFigures(_Record, frozen=True):
    """The budget that the members' formats were chosen by.

    Attributes:
        bytes, seconds: The limits; None where there was none.
        chosen: As estimated before anything was trained.
        losses: Member name -> its own part of the estimate, before it is weighted; of those that were chosen for.
        curve: The best choices, from the smallest (or fastest) to the largest.
        measured: Seconds a token of the mixture as it ships, on the machine that made it.
    """

    bytes: int | None
    seconds: float | None
    chosen: BudgetPoint
    losses: dict[str, float]
    curve: tuple[BudgetPoint, ...]
    measured: float | None = None


class PruningFigures(_Record, frozen=True):
    """A pruned model against the model that it was cut from, on `tokens` tokens of text that neither was fitted to.

    Attributes:
        parameters_before: Number of weights before, `parameters_after` after structured cuts.
        sparsity: Share of zeros among the weights of the layers' linears.
        kl: Mean KL divergence from the unpruned model's distribution, in nats a token; `kl_limit` its limit.
        perplexity_ratio: Perplexity of the pruned model over that of the unpruned one; with its limit.
    """

    parameters_before: int
    parameters_after: int
    sparsity: float
    tokens: int
    kl: float
    kl_limit: float
    perplexity_ratio: float
    perplexity_ratio_limit: float


class SparseWeights(_Record, frozen=True):
    """Weights stored without their zeros, in a .sparse file beside the graph that the runtime expands when it loads.

    Attributes:
        size: Bytes of the external data file that it stands for.
    """

    size: int


class DraftGraph(_Record, frozen=True):
    """The student's graph with fewer rows of its head, to draft with. Its other weights are those of the whole graph.

    Attributes:
        graph: A path inside the bundle, in the student's folder.
        tokens: Another one: JSON, the ids of the tokens that the rows are of, ascending.
        vocabulary: Number of rows, the width of its logits.
    """

    graph: str
    tokens: str
    vocabulary: int


class MemberEntry(_Record, frozen=True):
    """One member, or the student: its graph (a path inside the bundle), where it came from, and how close it stayed.

    A graph of several members is the entry of each of them; they follow each other in the order of its logits.

    Attributes:
        fallbacks: Exporter paths tried before `config.exporter`, each with why it was refused.
        quantization: None for fp32.
        forced: True if a gate was over its limit and `--force` let it pass.
        pruning: None for a model that was not pruned.
        sparse: Set where the weights are stored without their zeros.
        eight_bits: Share of the layers' weights that int4 has in 8 bits.
        draft: Of the student: what it drafts with, where that is not its whole graph.
    """

    name: str
    format: Format
    graph: str
    source: ModelSource
    config: GraphConfig = msgspec.field(name="facts")
    parity: GraphParity
    quantization: QuantizationParity | None = None
    fallbacks: tuple[str, ...] = ()
    forced: bool = False
    kind: GraphKind = "decoder"
    pruning: PruningFigures | None = None
    sparse: SparseWeights | None = None
    eight_bits: float = 0.0
    draft: DraftGraph | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of its graph and of its draft graph."""
        return (self.graph,) if self.draft is None else (self.graph, self.draft.graph)


class TokenizerEntry(_Record, frozen=True):
    """The tokenizer that all members share.

    Attributes:
        sha256: Of its canonical vocabulary, merges and added tokens (not of a file's bytes).
        vocabulary: Number of token ids; members' logits beyond it are padding and never mixed. Members may have fewer
            rows: see `Manifest.vocabulary`.
        bos: Beginning-of-text token id, if the model family starts texts with one; `adds_bos` whether encoding puts it.
        eos: Ids that end a generation.
        special_tokens: The texts of the tokens that chat templates know by name; none in bundles before schema 4.
    """

    sha256: str
    vocabulary: int
    eos: tuple[int, ...]
    bos: int | None = None
    special_tokens: dict[SpecialToken, str] = {}


class Weights(_Record, frozen=True):
    """The mixture's weights, each mapping member name -> share, summing to one.

    Attributes:
        method: How `default` was found.
        default: The bundle's fixed weights, and where adaptive weights begin.
        domains: For `fit`: the best weights for each validation file's domain alone.
        adaptive: Weights follow the text unless a call gives others. Bundles before schema 3 have fixed weights.
    """

    method: Literal["uniform", "given", "fit"]
    default: dict[str, float]
    domains: dict[str, dict[str, float]] = {}
    adaptive: bool = False


class BundleManifest(_Record, frozen=True, kw_only=True):
    """What the manifests of all tasks have.

    Attributes:
        files: Every other file's path in the bundle -> its size and checksum.
        checksum: Sha256 of the manifest itself, see `checksum_of`.
        task: What the members predict; manifests without it are of the default task.
    """

    schema: int
    edgemix: str
    target: Target
    seed: int
    files: dict[str, FileEntry]
    versions: dict[str, str] = {}
    checksum: str = ""
    task: TaskName = DEFAULT_TASK

    @property
    def stored_paths(self) -> tuple[str, ...]:
        """Every file that the bundle must list, but for the graphs' external data and other files of a tokenizer."""
        raise NotImplementedError

    @property
    def graph_paths(self) -> tuple[str, ...]:
        """Paths of all graphs."""
        raise NotImplementedError

    def sealed(self) -> Self:
        """The same manifest with its checksum."""
        document = msgspec.json.decode(msgspec.json.encode(self))
        return msgspec.structs.replace(self, checksum=checksum_of(document))


class Manifest(BundleManifest, frozen=True, kw_only=True):
    """All of `edgemix.json` of a mixture of language models.

    Attributes:
        members: What is mixed, in order.
        student: The small model that was distilled from the mixture; it is no member, and has no weight.
        quantization: What quantization costs the mixture; None where it has one member, or all are fp32.
        budget: What decided on the members' formats; None where the recipe did.
        ngrams: How many n-grams of the training text it has to draft from; 0 where there is no such file.
    """

    members: tuple[MemberEntry, ...]
    weights: Weights
    tokenizer: TokenizerEntry
    student: MemberEntry | None = None
    quantization: MixtureParity | None = None
    budget: BudgetFigures | None = None
    ngrams: int = 0

    @property
    def graphs(self) -> tuple[MemberEntry, ...]:
        """Every graph that the bundle holds: the members', then the student's."""
        return self.members if self.student is None else (*self.members, self.student)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that are mixed: the tokenizer's, as far as every member has rows for them.

        A member cannot read a token that it has no row for, so no text may hold one, and its probability is zero.
        """
        return min(self.tokenizer.vocabulary, *(member.config.vocabulary for member in self.members))

    @property
    def stored_paths(self) -> tuple[str, ...]:
        drafts = (entry.draft.tokens for entry in self.graphs if entry.draft is not None)
        return (TOKENIZER, *self.graph_paths, *drafts, *((NGRAMS,) if self.ngrams else ()))

    @property
    def graph_paths(self) -> tuple[str, ...]:
        return tuple(path for entry in self.graphs for path in entry.paths)

    def alone(self, entry: MemberEntry) -> Manifest:
        """The bundle as if one of its graphs were all of it: a mixture of one."""
        weights = Weights("given", {entry.name: 1.0})
        return msgspec.structs.replace(
            self, members=(entry,), weights=weights, student=None, quantization=None, budget=None
        )


def checksum_of(document: Mapping[str, Any]) -> str:
    """Sha256 of a manifest as it was decoded from JSON, all of it but its checksum.

    Of the document and not of a `Manifest`, so that fields which later versions add leave older bundles' checksums
    alone. The order of keys does not count, but in schema 1, which was hashed as it was written.
    """
    order: Literal["sorted"] | None = None if document.get("schema") == 1 else "sorted"
    return hashlib.sha256(msgspec.json.encode({**document, "checksum": ""}, order=order)).hexdigest()
