r"""One model in several formats: perplexity, size, and tokens per second of decoding and prefill.

    python tools/measure/formats.py MODEL TEXT... -o FOLDER [--adapter A] [--calibration FILE...]
                                    [--formats fp32 int8 int4 int4-rtn int4-learned-rounding-group=128 int4-rotate ...]

A format is its name in a recipe. After dashes may follow an algorithm and other settings of a recipe's `quantization`,
those that are true or false as their names, others as name=value. Each becomes a bundle in FOLDER, exported as `edgemix
export` does it, but for a gate that is over its limit: it is noted, not obeyed. Bundles that lie there already are
measured again, not built; give each model and each calibration text a FOLDER of its own.

Perplexity is of windows of 512 tokens that share nothing, with every token after a window's first scored (`edgemix
evaluate` scores that one, too, as the last one's continuation, and comes out a little lower). WikiText's <unk> reads
unk. Speed is of the runtime's graphs at batch 1, greedy, a 141-token prompt and 128 new tokens; the formats take turns
in one process, the first turn is a warm-up, and what counts is the median. Ratios are to int4, within each turn. Prints
a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec
import numpy as np

from edgemix.bundle.manifest import MANIFEST
from edgemix.bundle.reader import read_manifest
from edgemix.cli.command import quiet_libraries
from edgemix.cli.console import Console, megabytes
from edgemix.cli.texts import read_files, unescape_newlines
from edgemix.errors import EdgemixError, InputError
from edgemix.formats import FORMAT_SPECS, FORMATS, MIXED_BITS
from edgemix.progress import PrefixedProgress
from edgemix.recipe.compression import Algorithm, Quantization
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource, holds_objects

if TYPE_CHECKING:
    from edgemix.bundle.manifest import Manifest
    from edgemix.progress import Progress
    from edgemix.runtime import Mixture
    from edgemix.runtime.graphs.decoder import DecoderGraph

NAME = "model"
"""What the bundles call their only member."""
WINDOW = 512
PROMPT, STEPS = 141, 128
PAUSE = 0.2
"""Seconds before a format's turn: the other sessions' threads spin on for a while."""


@dataclass
class Measured:
    """What is known of one format; rates are tokens per second, one a turn."""

    manifest: Manifest
    perplexity: dict[str, float] = field(default_factory=dict)
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of the graph and its data."""
        folder = self.manifest.members[0].graph.rpartition("/")[0] + "/"
        return sum(entry.size for name, entry in self.manifest.files.items() if name.startswith(folder))


def member(variant: str, model: str, adapter: str | None) -> MemberRecipe:
    """The recipe's member for a format as the command line names it.

    Raises:
        ValueError: It names none.
    """
    name = max((each for each in FORMATS if f"{variant}-".startswith(f"{each}-")), key=len, default=None)
    if name is None:
        raise ValueError(f"{variant}: no such format; there are {', '.join(FORMATS)}")
    settings = dict(_setting(part, variant) for part in filter(None, _parts(variant.removeprefix(name))))
    if settings and not FORMAT_SPECS[name].rotatable:
        raise ValueError(f"{variant}: {name} is made in one way only")
    return MemberRecipe(NAME, model, adapter, format=name, quantization=Quantization(**settings) if settings else None)


def _parts(settings: str) -> list[str]:
    """Split settings at dashes, but not within an algorithm's name."""
    return re.split(r"-(?!rounding)", settings)


def _setting(part: str, variant: str) -> tuple[str, Any]:
    """A field of `Quantization`, and its value."""
    types = {each.name: each.type for each in msgspec.structs.fields(Quantization)}
    if part in get_args(Algorithm):
        return "algorithm", part
    name, equals, value = part.partition("=")
    if name in types and (equals or types[name] is bool):
        try:
            return name, msgspec.convert(value if equals else True, types[name], strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"{variant}: {name}: {error}") from None
    raise ValueError(f"{variant}: {part}: no such algorithm ({', '.join(get_args(Algorithm))}), nor a setting")


def build(recipe: Recipe, bundle: Path, console: Console) -> Manifest:
    """Export a bundle, unless it is there."""
    if (bundle / MANIFEST).is_file():
        return read_manifest(bundle)
    from edgemix.export.pipeline import export_bundle

    return export_bundle(recipe, bundle, force=True, progress=console.progress)


def perplexity(mixture: Mixture, text: str, most: int, progress: Progress) -> float:
    """Perplexity of the first windows of a text, each read alone.

    Raises:
        InputError: It is less than one window.
    """
    from edgemix.runtime.evaluation.scoring import score_tokens

    tokenizer = mixture.tokenizer
    start = [] if tokenizer.entry.bos is None else [tokenizer.entry.bos]
    room = WINDOW - len(start)
    ids = tokenizer.encode(text.replace(" <unk> ", " unk "), bos=False)
    windows = [[*start, *ids[at : at + room]] for at in range(0, len(ids) - room + 1, room)][:most]
    if not windows:
        raise InputError(f"a text has less than {WINDOW} tokens", "Give more of it.")
    scores = []
    with progress.stage("perplexity", len(windows) * (WINDOW - 1)) as task:
        for window in windows:
            ensemble = mixture.ensemble()
            scored, _ = score_tokens(
                ensemble.graphs,
                np.ones(1),
                np.array(window, np.int64),
                combine="linear",
                vocabulary=mixture.vocabulary,
                window=WINDOW,
                advance=task.advance,
            )
            scores.append(scored)
    return math.exp(-float(np.concatenate(scores).mean()))


def timed(model: DecoderGraph, prompt: list[int]) -> tuple[float, float]:
    """Tokens per second of reading the prompt, and of decoding greedily after it."""
    cache = model.new_cache()
    try:
        begun = time.perf_counter()
        logits = model.extend(cache, [prompt])
        read = time.perf_counter()
        for _ in range(STEPS):
            logits = model.extend(cache, [[int(logits[0].argmax())]])
        done = time.perf_counter()
    finally:
        cache.free()
    return len(prompt) / (read - begun), STEPS / (done - read)


def measure(found: dict[str, Measured], texts: dict[str, str], arguments: argparse.Namespace, console: Console) -> None:
    """Fill in perplexity, format by format, then speed, with all formats open at once."""
    from edgemix.runtime import Mixture

    with ExitStack() as stack:
        models = {}
        for variant, figures in found.items():
            bundle = arguments.output / variant
            mixture = stack.enter_context(Mixture.load(bundle, provider="cpu", threads=arguments.threads))
            models[variant] = mixture.ensemble().graphs[0]
            progress = PrefixedProgress(console.progress, variant)
            for name, text in texts.items():
                figures.perplexity[name] = perplexity(mixture, text, arguments.windows, progress)
        prompt = mixture.tokenizer.encode(next(iter(texts.values())))[:PROMPT]
        with console.progress.stage("speed", (arguments.rounds + 1) * len(models)) as task:
            for turn in range(arguments.rounds + 1):
                for variant, model in models.items():
                    time.sleep(PAUSE)
                    prefill, decode = timed(model, prompt)
                    if turn > 0:
                        found[variant].prefill.append(prefill)
                        found[variant].decode.append(decode)
                    task.advance()


def summary(found: dict[str, Measured], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the JSON line holds: medians over the turns, and of each turn's ratio to int4."""
    source = next(iter(found.values())).manifest.members[0].source
    base = next((variant for variant in found if variant.split("-")[0] == MIXED_BITS), None)
    formats = {}
    for variant, figures in found.items():
        row: dict[str, Any] = {
            "perplexity": {name: round(value, 3) for name, value in figures.perplexity.items()},
            "megabytes": round(figures.size / 1e6, 1),
            "decode": round(statistics.median(figures.decode), 1),
            "prefill": round(statistics.median(figures.prefill), 1),
        }
        for rate in ("decode", "prefill") if base else ():
            pairs = zip(getattr(figures, rate), getattr(found[base], rate), strict=True)
            row[f"{rate}_ratio"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 3)
        formats[variant] = {**row, "forced": figures.manifest.members[0].forced}
    return {
        "model": source.model,
        "adapter": source.adapter,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "windows": arguments.windows,
        "ratios_to": base,
        "formats": formats,
    }


def show(figures: dict[str, Any], sizes: dict[str, int], console: Console) -> None:
    """The table for people."""
    texts = next(iter(figures["formats"].values()))["perplexity"]
    base = figures["ratios_to"]
    ratios = (f"Decode\n/ {base}", f"Prefill\n/ {base}") if base else ()
    title = " + ".join(filter(None, (figures["model"], figures["adapter"])))
    console.table(
        f"{title}: perplexity; size; tokens/s",
        ("Format", *texts, "MB", "Decode", "Prefill", *ratios),
        [_cells(variant, row, sizes[variant]) for variant, row in figures["formats"].items()],
    )
    if over := [variant for variant, row in figures["formats"].items() if row["forced"]]:
        console.note(f"Over the parity gate's limits: {', '.join(over)}")


def _cells(variant: str, row: dict[str, Any], size: int) -> list[str]:
    rates = [f"{row[rate]:,.0f}" for rate in ("decode", "prefill")]
    ratios = [f"{row[ratio]:.2f}" for ratio in ("decode_ratio", "prefill_ratio") if ratio in row]
    return [variant, *(f"{value:,.2f}" for value in row["perplexity"].values()), megabytes(size), *rates, *ratios]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a hub id or a .gguf file, as in a recipe")
    parser.add_argument("texts", type=Path, nargs="+", help="what perplexity is measured on; nothing is fitted to it")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--adapter", help="a LoRA adapter to merge into the model")
    parser.add_argument("--calibration", type=Path, nargs="+", default=[], help="text that formats may look at")
    parser.add_argument("--template", help="how a line of a .jsonl file becomes text")
    parser.add_argument("--formats", nargs="+", default=["fp32", "int8", "int8-dynamic", "int4"])
    parser.add_argument("--windows", type=_count, default=40, help="read of each text at most")
    parser.add_argument("--rounds", type=_count, default=9)
    parser.add_argument("--threads", type=_count, default=2)
    arguments = parser.parse_args()
    if both := {path.resolve() for path in arguments.texts} & {path.resolve() for path in arguments.calibration}:
        parser.error(f"{both.pop()} is to measure on: it must not be calibration text, too")
    try:
        members = {variant: member(variant, arguments.model, arguments.adapter) for variant in arguments.formats}
    except ValueError as error:
        parser.error(str(error))

    quiet_libraries()
    console = Console()
    try:
        template = unescape_newlines(arguments.template)
        texts = {name: "\n".join(each) for name, each in read_files(tuple(arguments.texts), template).items()}
        calibration = {
            str(index): TextSource(str(path.resolve()), template if holds_objects(path.name) else None)
            for index, path in enumerate(arguments.calibration)
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        found = {}
        for variant, spec in members.items():
            recipe = Recipe(members=(spec,), data=Data(calibration=calibration))
            found[variant] = Measured(build(recipe, arguments.output / variant, console))
        measure(found, texts, arguments, console)
    except EdgemixError as error:
        sys.exit(str(error))
    figures = summary(found, arguments)
    show(figures, {variant: each.size for variant, each in found.items()}, console)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
