"""The results of an evaluation on texts: likelihoods by member and mixture, and adaptive weights along the texts.

Plain data that the runtime computes, and commands and reports read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowKind = Literal["member", "mixture", "student"]


@dataclass(frozen=True, slots=True)
class Figures:
    """The likelihood of a text and, for a single model, its agreement with the mixture.

    Attributes:
        tokens: Number of scored tokens: all but each document's first.
        bytes: UTF-8 bytes of the scored tokens.
        perplexity: Exponential of the mean negative log-probability per token.
        bits_per_byte: Negative log2-probability divided by the bytes, comparable between tokenizers.
        agreement: Share of tokens at which the model's most probable token is that of the mixture with the bundle's own
            weights; None for mixtures.
        acceptance: Expected share of the model's draft tokens that the mixture would accept; None for mixtures.
    """

    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float
    agreement: float | None = None
    acceptance: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one model or of one mixture of the members.

    Attributes:
        name: A member's name, "student", or a mixture's weights: "uniform", "fitted" or "given" (the bundle's own),
            "fitted to DOMAIN", "adaptive" (the bundle's own at the start of each text).
        weights: Member name -> weight, summing to one; empty for the student.
        files: File name -> figures.
        overall: The figures over the tokens of all files.
        kind: Whether it is a member, a mixture or the student.
        decode_rate: Decoded tokens per second at batch size 1 in the plain loop; None if not measured.
        generation_rate: The same as `generate` decodes by default, with speculation and lazy evaluation; only of the
            mixture with the bundle's default weights.
    """

    name: str
    weights: dict[str, float]
    files: dict[str, Figures]
    overall: Figures
    kind: RowKind = "member"
    decode_rate: float | None = None
    generation_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of `evaluate`: a row for each member, for each mixture of them, and for the student.

    Attributes:
        rows: The rows.
        mixture: Name of the row with the bundle's own weights; with a single member, the member's name.
        default: Name of the row with the weights that generation uses unless a call says otherwise; empty in older
            evaluations.
    """

    rows: tuple[Row, ...]
    mixture: str = ""
    default: str = ""

    def row(self, name: str) -> Row:
        """Return the first row of that name; members come first.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class WeightTrace:
    """A piece of text with the adaptive weights along it.

    Attributes:
        name: The text's name.
        pieces: The text, token by token; a character of several tokens is in the last of them.
        weights: Member name -> its weight when each token was predicted; the first token's is that before any text.
        origins: For a stream of several texts: the index of a token, and the name of the text that begins there.
    """

    name: str
    pieces: tuple[str, ...]
    weights: dict[str, tuple[float, ...]]
    origins: tuple[tuple[int, str], ...] = ()
