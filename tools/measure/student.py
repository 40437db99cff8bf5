r"""How close the student comes to the mixture, how fast it is, and whether a mixture is worth having as a teacher.

    python tools/measure/student.py RECIPE TEXT... --base MODEL -o FOLDER [--template T] [--minutes 45]
                                    [--max-tokens 15000]

Builds two bundles with equal students, trained for equal minutes on the recipe's training text: one of the recipe's
mixture, one of the single base model that its members were made from. Then measures both students on the texts, which
nothing may have been trained on: greedy agreement with the mixture, expected acceptance of their drafts by it, bits per
byte, and the student's decoding time as a share of a member's. Bundles that lie in FOLDER already are measured again,
not built. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgemix.bundle.manifest import MANIFEST
from edgemix.cli.console import Console
from edgemix.cli.texts import read_files, unescape_newlines
from edgemix.errors import EdgemixError
from edgemix.recipe.compression import Student
from edgemix.recipe.load import load_recipe
from edgemix.recipe.schema import MemberRecipe, Recipe

if TYPE_CHECKING:
    from edgemix.results.evaluation import Evaluation, Row


def recipes(recipe: Recipe, base: str, minutes: float | None) -> dict[str, Recipe]:
    """The recipe, and the same with the base as its only member."""
    student = recipe.student or Student()
    if minutes is not None:
        student = msgspec.structs.replace(student, minutes=minutes, steps=None)
    ours = msgspec.structs.replace(recipe, student=student)
    alone = msgspec.structs.replace(student, start=None)
    single = (MemberRecipe("base", base),)
    return {
        "mixture": ours,
        "base": msgspec.structs.replace(ours, members=single, weights="uniform", student=alone),
    }


def build(recipe: Recipe, bundle: Path, console: Console) -> None:
    """Export a bundle with its student, unless it is there."""
    if not (bundle / MANIFEST).is_file():
        from edgemix.export.pipeline import export_bundle

        export_bundle(recipe, bundle, progress=console.progress)


def measure(folder: Path, texts: dict[str, list[str]], most: int | None, console: Console) -> dict[str, Evaluation]:
    """The mixture with its own student, then with the base's, on the same texts."""
    from edgemix.runtime import Mixture
    from edgemix.runtime.evaluation.evaluate import evaluate

    found = {}
    with Mixture.load(folder / "mixture", provider="cpu", plan=False) as mixture:
        for name in ("mixture", "base"):
            with Mixture.load(folder / name, provider="cpu", student=True) as student:
                found[name] = evaluate(
                    mixture, texts, student=student, max_tokens=most, speed=True, progress=console.progress
                )
    return found


def summary(found: dict[str, Evaluation]) -> dict[str, object]:
    """What the JSON line holds; rates are tokens per second, `decoding_share` is of the slowest member's time."""
    members = [row for row in found["mixture"].rows if row.kind == "member"]
    rate = min(row.decode_rate or 0.0 for row in members)
    lines: dict[str, object] = {}
    for name, evaluation in found.items():
        row = evaluation.row("student")
        figures = {file: _plain(each) for file, each in row.files.items()} | {"all": _plain(row.overall)}
        share = rate / row.decode_rate if row.decode_rate else None
        lines[f"student of the {name}"] = {"figures": figures, "decode_rate": row.decode_rate, "decoding_share": share}
    own = found["mixture"].row(found["mixture"].mixture)
    lines["mixture"] = {"figures": {"all": _plain(own.overall)}, "decode_rate": own.decode_rate}
    lines["members"] = {
        row.name: {"figures": {"all": _plain(row.overall)}, "decode_rate": row.decode_rate} for row in members
    }
    return lines


def _plain(figures: object) -> dict[str, float]:
    kept = ("tokens", "bits_per_byte", "agreement", "acceptance")
    return {name: round(value, 4) for name, value in asdict(figures).items() if name in kept and value is not None}  # type: ignore[call-overload]


def show(found: dict[str, Evaluation], console: Console) -> None:
    """The table for people."""
    first = found["mixture"]
    rows = [(row.name, row) for row in first.rows if row.kind == "member" or row.name == first.mixture]
    rows += [(f"student of the {name}", each.row("student")) for name, each in found.items()]
    columns = ("", *first.rows[0].files, "all", "agreement", "acceptance", "tokens/s")
    console.table(
        "Bits per byte; closeness to the mixture; decoding", columns, [_cells(name, row) for name, row in rows]
    )


def _cells(name: str, row: Row) -> list[str]:
    bits = [f"{each.bits_per_byte:.4f}" for each in (*row.files.values(), row.overall)]
    close = ["" if each is None else f"{each:.1%}" for each in (row.overall.agreement, row.overall.acceptance)]
    return [name, *bits, *close, f"{row.decode_rate:.0f}" if row.decode_rate else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--base", required=True, help="the model that the members were made from, as in a recipe")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--template", help="how a line of a .jsonl text becomes text")
    parser.add_argument("--minutes", type=float, help="of each distillation; the recipe's by default")
    parser.add_argument("--max-tokens", type=int, default=15_000, help="read of each text")
    arguments = parser.parse_args()

    console = Console()
    try:
        template = unescape_newlines(arguments.template)
        texts = read_files(tuple(arguments.texts), template)
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name, recipe in recipes(load_recipe(arguments.recipe), arguments.base, arguments.minutes).items():
            build(recipe, arguments.output / name, console)
        found = measure(arguments.output, texts, arguments.max_tokens, console)
    except EdgemixError as error:
        sys.exit(str(error))
    show(found, console)
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
