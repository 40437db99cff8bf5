"""The manifest of a mixture over labels: a folder with each member's graph and tokenizer, or rules.

BUNDLE/
  edgemix.json                           the manifest below
  members/NAME/model.onnx, model.onnx.data, tokenizer.json
  members/NAME/rules.json                of a member that is rules
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal, TypeAlias

import msgspec

from edgemix.bundle.manifest import BundleManifest, ModelSource, SpecialToken, Weights
from edgemix.formats import Format
from edgemix.tasks import LabelCombine


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of the manifest: immutable, and an unknown key is an error."""


class EncoderParity(_Record, frozen=True):
    """The fp32 graph against torch: largest difference of log-probabilities (nats), and its limit.

    Attributes:
        single: Of texts one by one; `padded` of the same texts in a padded batch.
    """

    single: float
    padded: float
    limit: float


class LabelQuantizationParity(_Record, frozen=True):
    """The stored graph against the fp32 graph, on `examples` examples.

    Attributes:
        kl: Mean KL divergence from the fp32 distribution, in nats a prediction; `kl_limit` its limit.
        disagreement: Share of predictions whose most probable label differs; with its limit.
        metric: Name of the task's first metric; `metric_fp32` and `metric_stored` its values on labeled examples, and
            `metric_drop_limit` how much may be lost. None where there are no labeled examples.
    """

    examples: int
    kl: float
    kl_limit: float
    disagreement: float
    disagreement_limit: float
    metric: str | None = None
    metric_fp32: float | None = None
    metric_stored: float | None = None
    metric_drop_limit: float | None = None


class MemberTokenizer(_Record, frozen=True):
    """A member's tokenizer.

    Attributes:
        path: Its tokenizer.json, a path inside the bundle.
        sha256: Of its canonical vocabulary, merges and added tokens.
        vocabulary: Number of ids that the member has rows for.
        max_length: Most tokens of a text, special tokens included.
        special_tokens: Texts of its special tokens by name.
        pad_type_id: Type id of padding.
        padding_side: Where padding goes.
    """

    path: str
    sha256: str
    vocabulary: int
    max_length: int
    special_tokens: dict[SpecialToken, str] = {}
    pad_type_id: int = 0
    padding_side: Literal["left", "right"] = "right"


class EncoderMember(_Record, frozen=True, tag_field="kind", tag="encoder"):
    """A member that is a model: its graph, where it came from, and how close it stayed.

    Attributes:
        labels: For each column of its logits the mixture's name of the label.
        graph: A path inside the bundle.
        inputs: The graph's inputs, of `bundle.graph_io`.
        temperature: What its logits are divided by.
        cost: Relative cost of a call, by which members are asked in turn: its number of weights outside embeddings.
        forced: True if a gate was over its limit and `--force` let it pass.
    """

    name: str
    labels: tuple[str, ...]
    graph: str
    format: Format
    source: ModelSource
    inputs: tuple[str, ...]
    tokenizer: MemberTokenizer
    parity: EncoderParity
    quantization: LabelQuantizationParity | None = None
    temperature: float = 1.0
    cost: float = 1.0
    forced: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of its graph and tokenizer."""
        return (self.graph, self.tokenizer.path)


class RulesMember(_Record, frozen=True, tag_field="kind", tag="rules"):
    """A member that is the written rules of a human expert.

    Attributes:
        labels: For each of the rules' scores the mixture's name of the label.
        rules: A path inside the bundle.
        temperature: What its scores are divided by.
    """

    name: str
    labels: tuple[str, ...]
    rules: str
    entries: int
    temperature: float = 1.0

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of its rules."""
        return (self.rules,)

    @property
    def cost(self) -> float:
        """Rules cost nothing beside a graph."""
        return 0.0


LabelMember: TypeAlias = EncoderMember | RulesMember


class LabelManifest(BundleManifest, frozen=True, kw_only=True):
    """All of `edgemix.json` of a mixture over labels.

    Attributes:
        labels: The mixture's labels in order; of fill-mask none, whose labels are the tokens.
        multi_label: Whether an example may have several labels, or none.
        members: What is mixed, in order.
        weights: The mixture's weights.
        combine: How the members' distributions are mixed by default.
        prior: Share of each label in the validation examples, smoothed; empty without any.
        counts: Member name -> pseudo-count of the Dirichlet prior from which feedback refits the weights.
    """

    members: tuple[LabelMember, ...]
    labels: tuple[str, ...]
    weights: Weights
    multi_label: bool = False
    combine: LabelCombine = "linear"
    prior: tuple[float, ...] = ()
    counts: dict[str, float] = {}  # noqa: RUF012 - msgspec copies it

    @property
    def encoders(self) -> tuple[EncoderMember, ...]:
        """The members that are models."""
        return tuple(member for member in self.members if isinstance(member, EncoderMember))

    @property
    def stored_paths(self) -> tuple[str, ...]:
        return tuple(path for member in self.members for path in member.paths)

    @property
    def graph_paths(self) -> tuple[str, ...]:
        return tuple(member.graph for member in self.encoders)


def member_folder(name: str) -> str:
    """Return the folder of a member in the bundle."""
    return str(PurePosixPath("members") / name)
