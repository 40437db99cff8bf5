r"""What weights that follow the text are worth: on texts of one domain each, and on a stream that moves between them.

    python tools/measure/adaptive.py BUNDLE TEXT TEXT... [--template T] [--passage 300] [--max-tokens 15000]

The stream is one document: passages of the texts in turn. Prints bits per byte of every member, of
fixed weights and of adaptive ones with several periods (tokens between two changes), by how much each loses against
the best member of that text, and one JSON line. Every text is read once, whatever is compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgemix.cli.console import Console
from edgemix.cli.texts import read_files, unescape_newlines
from edgemix.errors import EdgemixError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgemix.runtime import Mixture

    Variant = Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Members' log-probabilities of a document's tokens -> the mixture's."""

STREAM = "stream"
PERIODS = (1, 4, 16, 32, 64)
WINDOW = 512


def alternate(mixture: Mixture, texts: Mapping[str, Sequence[str]], passage: int, most: int) -> str:
    """Return passages of the texts in turn: up to `most` tokens of each, and equally many."""
    tokens = [mixture.tokenizer.encode("\n\n".join(documents))[:most] for documents in texts.values()]
    starts = range(0, min(map(len, tokens)), passage)
    return "\n\n".join(mixture.tokenizer.decode(ids[at : at + passage]) for at in starts for ids in tokens)


def variants(mixture: Mixture) -> dict[str, Variant]:
    """Return the compared mixtures, by name."""
    from edgemix.runtime.mixing.adaptive import AdaptivePrior, adaptive_targets
    from edgemix.runtime.mixing.arithmetic import linear_targets

    fitted = mixture.manifest.weights
    members = mixture.members
    experts = AdaptivePrior.of(members, fitted.default, fitted.domains)

    def fixed(shares: Mapping[str, float]) -> Variant:
        return lambda own: linear_targets(own, np.array([shares.get(member, 0.0) for member in members]))

    found: dict[str, Variant] = {name: fixed({name: 1.0}) for name in members}
    found["uniform"] = fixed(dict.fromkeys(members, 1 / len(members)))
    found["fixed"] = fixed(fitted.default)
    for period in PERIODS:
        found[f"adaptive, {period}"] = lambda own, period=period: adaptive_targets(own, experts, period=period)[0]
    return found


def measure(
    mixture: Mixture, texts: Mapping[str, Sequence[str]], window: int, console: Console
) -> dict[str, dict[str, float]]:
    """Return bits per byte by mixture, then by text."""
    compared = variants(mixture)
    rows: dict[str, dict[str, float]] = {name: {} for name in compared}
    for text, documents in texts.items():
        scores = mixture.score(documents, window=window, progress=console.progress)
        scored = sum(score.scored_bytes for score in scores)
        for name, mix in compared.items():
            nats = -sum(float(mix(score.member_log_probabilities).sum()) for score in scores)
            rows[name][text] = nats / math.log(2) / scored
    return rows


def show(rows: Mapping[str, Mapping[str, float]], members: Sequence[str], console: Console) -> None:
    """The table for people."""
    texts = list(next(iter(rows.values())))
    best = {text: min(rows[member][text] for member in members) for text in texts}
    console.table(
        "Bits per byte, against the best member of the text",
        ("", *texts),
        [
            (name, *(f"{row[text]:.4f} ({row[text] / best[text] - 1:+.1%})" for text in texts))
            for name, row in rows.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--template", help="how a line of a .jsonl text becomes text")
    parser.add_argument("--passage", type=int, default=300, help="tokens of the stream that are of one text")
    parser.add_argument("--max-tokens", type=int, default=15_000, help="read of each text")
    arguments = parser.parse_args()

    console = Console()
    try:
        from edgemix.runtime import Mixture
        from edgemix.runtime.evaluation.evaluate import scored_documents

        template = unescape_newlines(arguments.template)
        files = read_files(tuple(arguments.texts), template)
        if len(files) < 2 or STREAM in files or arguments.passage < 2 or arguments.max_tokens < 2:
            raise InputError(f"give two texts or more, none called {STREAM}, and at least two tokens of each")
        with Mixture.load(arguments.bundle, provider="cpu") as mixture:
            most = arguments.max_tokens
            taken = {name: scored_documents(mixture, name, documents, most) for name, documents in files.items()}
            taken[STREAM] = [alternate(mixture, files, arguments.passage, most)]
            rows = measure(mixture, taken, min(WINDOW, mixture.context), console)
            show(rows, mixture.members, console)
    except EdgemixError as error:
        sys.exit(str(error))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
