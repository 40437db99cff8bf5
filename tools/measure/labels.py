"""Texts per second of bundles over labels, of their members, and of a torch model, in turns.

    python tools/measure/labels.py BUNDLE... --texts FILE [--torch FOLDER] [--most 512] [--rounds 5] [--threads N]

Each bundle's mixture predicts the texts of FILE (.jsonl) with all members, with `decision=True`, and with each member
alone; the torch model of FOLDER, a transformers folder with its head, predicts them in fp32, sorted by length and in
batches of 32, as a careful user of torch would. All take turns in one process; the first turn is a warm-up, and what
counts is the median. Ratios are to the torch model, or to the first row without one, within each turn. Prints a table
and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edgemix.cli.command import quiet_libraries
from edgemix.cli.console import Console
from edgemix.errors import EdgemixError
from edgemix.recipe.labeled import LabeledSource, read_examples
from edgemix.runtime.classification.classifier import Classifier

if TYPE_CHECKING:
    from collections.abc import Callable

    Side = Callable[[], object]

BATCH = 32


def sides(name: str, classifier: Classifier, texts: list[str]) -> dict[str, Side]:
    """Return what is timed of a bundle, by name."""
    found: dict[str, Side] = {}
    if len(classifier.members) > 1:
        found[f"{name}: mixture"] = lambda: classifier.predict_batch(texts)
        found[f"{name}: decision"] = lambda: classifier.predict_batch(texts, decision=True)
    for member in classifier.members:
        found[f"{name}: {member}"] = lambda member=member: classifier.predict_batch(texts, weights={member: 1.0})
    return found


def torch_side(folder: Path, texts: list[str], threads: int | None) -> Side:
    """Return a run of a torch model over the texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if threads is not None:
        torch.set_num_threads(threads)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ordered = sorted(texts, key=len)

    def run() -> None:
        with torch.inference_mode():
            for start in range(0, len(ordered), BATCH):
                batch = tokenizer(ordered[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
                model(**batch).logits.argmax(-1)

    return run


def measure(runs: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each side by turn, without the first."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    quiet_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--torch", type=Path)
    parser.add_argument("--most", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    console = Console(as_json=False)
    try:
        examples = read_examples(LabeledSource(str(arguments.texts)), Path(), "text-classification", labeled=False)
        texts = [each.text for each in examples if isinstance(each.text, str)][: arguments.most]
        runs: dict[str, Side] = {}
        if arguments.torch is not None:
            runs["torch"] = torch_side(arguments.torch, texts, arguments.threads)
        for bundle in arguments.bundles:
            classifier = Classifier.load(bundle, "cpu", arguments.threads)
            runs |= sides(bundle.name, classifier, texts)
    except EdgemixError as error:
        sys.exit(str(error))
    seconds = measure(runs, arguments.rounds)
    first = next(iter(seconds.values()))
    rates = {name: len(texts) / statistics.median(found) for name, found in seconds.items()}
    ratios = {
        name: statistics.median(base / own for base, own in zip(first, found, strict=True))
        for name, found in seconds.items()
    }
    base = next(iter(seconds))
    rows = [(name, f"{rate:,.0f}", f"{ratios[name]:.2f}") for name, rate in rates.items()]
    console.table(f"{len(texts)} texts, medians of {arguments.rounds}", ("", "Texts/s", f"Relative to {base}"), rows)
    sys.stdout.write(json.dumps({"texts": len(texts), "rates": rates, "ratios": ratios}) + "\n")


if __name__ == "__main__":
    main()
