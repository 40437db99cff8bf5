"""What is found of a bundle on texts: how probable they are by each member and mixture, and who speaks where in them.

Plain data: the runtime makes it, commands and reports read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RowKind = Literal["member", "mixture", "student"]


@dataclass(frozen=True, slots=True)
class Figures:
    """How probable some text is, and for a single model how close to the mixture.

    Attributes:
        tokens: Number of scored tokens: all but each document's first.
        bytes: Their UTF-8 bytes.
        perplexity: Exp of the mean negative log-probability of a token.
        bits_per_byte: Negative log2-probability of the tokens by their bytes: comparable between tokenizers.
        agreement: Share of tokens at which the model's most probable token is that of the mixture with the bundle's own
            weights; None for mixtures.
        acceptance: Expected share of the model's drafts that the mixture would accept, see `comparison`.
    """

    tokens: int
    bytes: int
    perplexity: float
    bits_per_byte: float
    agreement: float | None = None
    acceptance: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One model, or one way to weigh the members.

    Attributes:
        name: A member's name, "uniform", "fitted" or "given" (the bundle's own weights), "fitted to DOMAIN", "adaptive"
            (weights that follow each text, from these before it), "student".
        weights: Member name -> share, summing to one; empty for the student.
        files: File name -> figures.
        overall: Over the tokens of all files.
        kind: What the name is a name of.
        decode_rate: Tokens a second of decoding at batch 1, where it was measured.
    """

    name: str
    weights: dict[str, float]
    files: dict[str, Figures]
    overall: Figures
    kind: RowKind = "member"
    decode_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The table that `evaluate` makes: a row for each member, one for each mixture of them, one for the student.

    Attributes:
        rows: The table.
        mixture: The name of the row with the bundle's own weights; of the member where there is only one.
    """

    rows: tuple[Row, ...]
    mixture: str = ""

    def row(self, name: str) -> Row:
        """The first row of that name; members come first.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of text, and what adaptive weights were along it.

    Attributes:
        name: Of the text that it is from.
        pieces: The text, token by token; a character of several tokens stands at the last of them.
        weights: Member name -> its weight when each token was predicted; the first token has those before any text.
        origins: Of a stream of several texts: the place of a token, and the name of the text that begins there.
    """

    name: str
    pieces: tuple[str, ...]
    weights: dict[str, tuple[float, ...]]
    origins: tuple[tuple[int, str], ...] = ()
