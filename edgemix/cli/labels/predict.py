"""`edgemix predict`: the labels of texts."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from edgemix.cli.command import command
from edgemix.cli.options import bundle_argument, runtime_options
from edgemix.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemix.cli.console import Console
    from edgemix.runtime.classification.classifier import Classifier, Prediction
    from edgemix.runtime.classification.fill_mask_mixture import MaskPrediction
    from edgemix.runtime.classification.token_classifier import TokenPrediction

_LONGEST_CELL = 60
_MOST_WORDS = 10


class _Input(NamedTuple):
    text: str | list[str]
    pair: str | None = None


@command(
    "predict",
    example='edgemix predict mixture "What a film!" "A mess."\n'
    "edgemix predict mixture --file reviews.jsonl --json\n"
    'echo "What a film!" | edgemix predict mixture',
    extra="cpu",
    on_interrupt="No answers were written.",
)
@bundle_argument
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Read texts from a file: of .jsonl the text fields, of others the lines. May be repeated.",
)
@click.option("--pair", metavar="TEXT", help="The second text of a pair, for one TEXT.")
@click.option("--weights", metavar="NAME", help="The bundle's weights for a domain, or MEMBER=SHARE,... of your own.")
@click.option(
    "--combine",
    type=click.Choice(["linear", "log-linear", "bayes"]),
    show_default="as the bundle says",
    help="How the members' distributions are mixed.",
)
@click.option("--decision", is_flag=True, help="Labels only: ask members only as far as they can change them.")
@click.option("--members", is_flag=True, help="Show what each member says.")
@click.option("--explain", is_flag=True, help="Show which words mattered, and which rules fired.")
@runtime_options
def predict(
    console: Console,
    *,
    bundle: Path,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    pair: str | None,
    weights: str | None,
    combine: Any,
    decision: bool,
    members: bool,
    explain: bool,
    **loading: Any,
) -> None:
    """Predict labels, entities or masked words with BUNDLE.

    Texts come from the command line, from files, or from stdin, a text a line.
    """
    inputs = _inputs(texts, files, pair)

    import edgemix
    from edgemix.bundle.reader import read_any_manifest
    from edgemix.errors import BundleError
    from edgemix.runtime.classification.classifier import Classifier

    task = read_any_manifest(bundle).task
    if TASKS[task].shared != "labels":
        raise BundleError(f"{bundle}: is a bundle of {task}, and has no labels", "Use edgemix generate.")
    only = {"--pair": pair is not None, "--decision": decision, "--members": members, "--explain": explain}
    if task != Classifier.task and (given := [option for option, used in only.items() if used]):
        raise click.UsageError(f"{', '.join(given)}: only for {Classifier.task}; this is a bundle of {task}.")
    options: dict[str, Any] = {"weights": _weights(weights), "combine": combine}
    with edgemix.load(bundle, **loading) as mixture:
        if explain:
            _explain(console, mixture, inputs, **options)
            return
        if isinstance(mixture, Classifier):
            options["decision"] = decision
            if any(each.pair is not None for each in inputs):
                options["pairs"] = [each.pair or "" for each in inputs]
        found = mixture.predict_batch([each.text for each in inputs], progress=console.progress, **options)
    if console.as_json:
        answers = [_document(*each) for each in zip(inputs, found, strict=True)]
        console.document({"bundle": bundle, "predictions": answers})
    elif isinstance(mixture, Classifier):
        _show(console, mixture, inputs, found, members=members)
    else:
        rows = [(_shortened(_text(given)), _summary(each)) for given, each in zip(inputs, found, strict=True)]
        console.table("Predictions", ("Text", "Answer"), rows, left=2)


def _summary(found: TokenPrediction | list[MaskPrediction]) -> str:
    """Return the entities of a text, or the words in its masks' places."""
    if isinstance(found, list):
        return " | ".join(", ".join(f"{word} {share:.2f}" for word, share in place.words) for place in found)
    return ", ".join(f"{each.text} [{each.label} {each.score:.2f}]" for each in found.entities) or "(none)"


def _text(given: _Input) -> str:
    return given.text if isinstance(given.text, str) else " ".join(given.text)


def _document(given: _Input, found: Any) -> dict[str, Any]:
    answer = {"masks": [asdict(place) for place in found]} if isinstance(found, list) else asdict(found)
    return {"text": given.text, **({} if given.pair is None else {"pair": given.pair}), **answer}


def _inputs(texts: Sequence[str], files: Sequence[Path], pair: str | None) -> list[_Input]:
    if pair is not None and (len(texts) != 1 or files):
        raise click.UsageError("--pair goes with one TEXT.")
    found = [_Input(_checked(text), pair and _checked(pair)) for text in texts]
    for file in files:
        found += _lines(file)
    if not found and not files:
        if sys.stdin.isatty():
            raise click.UsageError("No text: give one as an argument, with --file, or on stdin.")
        from edgemix.recipe.text_sources import decode

        found = [_Input(line) for line in decode(sys.stdin.buffer.read(), "stdin").splitlines() if line.strip()]
    if not found:
        from edgemix.errors import InputError

        raise InputError("there is no text to label", "Give one as an argument, with --file, or on stdin.")
    return found


def _lines(file: Path) -> list[_Input]:
    from edgemix.recipe.labeled import LabeledSource, read_examples
    from edgemix.recipe.text_sources import holds_objects, read_plain

    if not holds_objects(file.name):
        return [_Input(line) for line in read_plain(file).splitlines() if line.strip()]
    examples = read_examples(LabeledSource(str(file)), Path(), "text-classification", labeled=False)
    return [_Input(each.text if isinstance(each.text, str) else list(each.text), each.pair) for each in examples]


def _checked(text: str) -> str:
    from edgemix.errors import InputError

    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("a text is not UTF-8", "Check the terminal's encoding, or give texts in a file.") from None
    return text


def _weights(given: str | None) -> dict[str, float] | str | None:
    """Return weights of a command line: a domain's name, or MEMBER=SHARE,..."""
    if given is None or "=" not in given:
        return given
    from edgemix.errors import InputError

    found = {}
    for part in given.split(","):
        name, _, share = part.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            raise InputError(f"--weights: {part.strip()!r} is no MEMBER=SHARE", "For example: a=0.7,b=0.3") from None
    return found


def _show(
    console: Console, classifier: Classifier, inputs: Sequence[_Input], found: Sequence[Prediction], *, members: bool
) -> None:
    rows = []
    for given, each in zip(inputs, found, strict=True):
        names = ", ".join(each.labels) or "(none)"
        probability = f"{each.probabilities[each.labels[0]]:.3f}" if each.labels and each.probabilities else ""
        own = [_opinion(each, name) for name in classifier.members] if members else []
        rows.append((_shortened(_text(given)), names, probability, *own))
    header = ("Text", "Labels", "Probability", *(classifier.members if members else ()))
    console.table("Predictions", header, rows, left=2)


def _explain(console: Console, classifier: Classifier, inputs: Sequence[_Input], **options: Any) -> None:
    """Print why each text has its label."""
    documents = []
    for given in inputs:
        text = _text(given)
        found = classifier.explain(text, **options)
        documents.append({"text": text, **asdict(found)})
        if console.as_json:
            continue
        label = found.prediction.label or "(none)"
        strongest = sorted(found.words, key=lambda word: -abs(word.effect))[:_MOST_WORDS]
        rows = [(_shortened(each.text), f"{each.effect:+.3f}") for each in strongest]
        console.table(f"{_shortened(text)}: {label}", ("Without it", "Probability lost"), rows)
        fired = [
            (name, rule.rule, rule.label, f"{rule.strength:+.2f}", f"{rule.start}-{rule.end}")
            for name, rules in found.rules.items()
            for rule in rules
        ]
        if fired:
            console.table("Rules that fired", ("Member", "Rule", "Label", "Strength", "Characters"), fired, left=3)
    if console.as_json:
        console.document({"explanations": documents})


def _opinion(found: Prediction, name: str) -> str:
    opinion = found.members.get(name)
    if opinion is None:
        return "abstains" if name in found.members else ""
    label = max(opinion.probabilities, key=opinion.probabilities.__getitem__)
    return f"{label} {opinion.probabilities[label]:.2f}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_CELL else f"{line[: _LONGEST_CELL - 3]}..."
