r"""The mixture against the naive loop, against one member alone, and against other runtimes, on the same prompts.

    python tools/benchmark.py BUNDLE PROMPTS.jsonl [-o FIGURES.json] [--plot PICTURE.png] [--weights adaptive]
                              [--one-graph BUNDLE] [--peer llama-cpp=MODEL.gguf] [--peer transformers=FOLDER] ...

Sides: the naive loop (every member for every token, one after the other); each technique of edgemix switched on alone
(members asked only where it matters; drafts from the text, from n-grams, from the student), and all together; one
member alone, token by token; the bare ONNX Runtime loop on that member's graph; and the peers that are named, which run
one model: transformers (on torch), llama-cpp, onnxruntime-genai, openvino-genai, ctranslate2. What follows a space in a
peer's name only tells two models of one runtime apart. They take turns prompt by prompt, greedy, batch 1; the first
round is a warm-up. Figures are medians over prompts and rounds, ratios medians of the ratios within a turn; "All is"
says how many times as fast as a side all techniques together are.

Every technique must say what the naive loop says; how many texts differ is in the table. With --one-graph the same
members, exported as one graph, are compared, too, and must say what their own plain loop says.
PROMPTS has a JSON object a line, with "prompt" and perhaps "domain".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from load_times import loading
from peers import PEERS, bare_loop

from edgemix.bundle.paths import resolve
from edgemix.cli.command import quiet_libraries
from edgemix.cli.console import Console
from edgemix.cli.options import WeightsType
from edgemix.errors import EdgemixError, InputError
from edgemix.recipe.text_sources import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from edgemix.runtime import Mixture
    from edgemix.runtime.mixing.ensemble import Ensemble

NAIVE, ALONE, ALL, STACKED = "naive loop", "one member", "all together", "one graph"
TECHNIQUES: dict[str, dict[str, bool]] = {
    "lazy": {"lazy": True},
    "lookup": {"lookup": True},
    "n-grams": {"ngrams": True},
    "student": {"student": True},
    ALL: {"lazy": True, "lookup": True, "ngrams": True, "student": True},
}


@dataclass
class Side:
    """One way to generate.

    Attributes:
        run: Prompt ids, tokens to generate -> the tokens, step by step.
        like: The side whose texts it must say.
    """

    run: Callable[[list[int], int], Iterable[list[int]]]
    like: str | None = None


@dataclass
class Turns:
    """What a side did: by prompt, a figure a round."""

    prefill: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, list[int]] = field(default_factory=dict)


def sides(
    bundle: Path,
    mixture: Mixture,
    ensemble: Ensemble,
    peers: Mapping[str, str],
    *,
    stacked: Ensemble | None,
    threads: int,
) -> dict[str, Side]:
    """All that is compared, by name."""
    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.decoding.speculative import SpeculativeDecoding
    from edgemix.runtime.decoding.static_batch import StaticBatch
    from edgemix.runtime.mixing.ensemble import Ensemble

    common: dict[str, Any] = {"context": mixture.context, "eos": ()}
    drafters = {"student": mixture.drafting, "ngrams": mixture.ngrams}

    def plainly(ensemble: Ensemble) -> Side:
        def run(ids: list[int], count: int) -> Iterable[list[int]]:
            return _ids(StaticBatch(ensemble, [ids], Sampling(), seeds=[0], max_new_tokens=count, **common))

        return Side(run)

    def fast(techniques: dict[str, bool], ensemble: Ensemble = ensemble, like: str = NAIVE) -> Side:
        own = {name: drafter if techniques.get(name) else None for name, drafter in drafters.items()}
        options: dict[str, Any] = {"lazy": False, "lookup": False, **techniques, **own}

        def run(ids: list[int], count: int) -> Iterable[list[int]]:
            return _ids(
                SpeculativeDecoding(ensemble, ids, Sampling(), seed=0, max_new_tokens=count, **common, **options)
            )

        return Side(run, like)

    best = int(ensemble.weights.argmax())
    one_hot = np.eye(len(ensemble.weights))[best]
    alone = Ensemble.of(ensemble.graphs, one_hot, "linear", mixture.vocabulary)
    found = {NAIVE: plainly(ensemble)}
    for name, techniques in TECHNIQUES.items():
        if name == ALL or all(drafters.get(technique, True) is not None for technique in techniques):
            found[name] = fast(techniques)
    if stacked is not None:
        found[STACKED] = plainly(stacked)
        for name in ("lookup", ALL):
            found[f"{STACKED}, {name}"] = fast(TECHNIQUES[name], stacked, STACKED)
    found[ALONE] = plainly(alone)
    graph = resolve(bundle, mixture.manifest.members[best].graph)
    found["bare ONNX Runtime"] = Side(bare_loop(graph, mixture.vocabulary, threads))
    return found | {name: Side(PEERS[name.partition(" ")[0]](where, threads)) for name, where in peers.items()}


def _ids(decoding: Any) -> Iterable[list[int]]:
    with closing(decoding):
        while tokens := decoding.step():
            yield [token.id for token in tokens]


def take_turns(
    compared: Mapping[str, Side], prompts: list[list[int]], *, new: int, rounds: int, console: Console
) -> dict[str, Turns]:
    """Let every side generate from every prompt, in turns."""
    found = {name: Turns() for name in compared}
    with console.progress.stage("turns", (rounds + 1) * len(prompts) * len(compared)) as task:
        for turn in range(rounds + 1):
            for number, prompt in enumerate(prompts):
                for name, side in compared.items():
                    begun = time.perf_counter()
                    steps = iter(side.run(prompt, new))
                    text = list(next(steps))
                    first, told = time.perf_counter(), len(text)
                    for step in steps:
                        text += step
                    seconds = time.perf_counter() - first
                    found[name].text[number] = text
                    if turn:
                        found[name].prefill[number].append(len(prompt) / (first - begun))
                        found[name].decode[number].append((len(text) - told) / seconds)
                    task.advance(note=name)
    return found


def throughput(
    mixture: Mixture, ensemble: Ensemble, prompts: list[list[int]], *, size: int, new: int
) -> dict[str, Any]:
    """Tokens a second of all texts together, prompts and all: one text alone by the plain loop, a batch, and three
    times as many texts that join and leave a batch of that size, a quarter to seven quarters as long. Medians of turns.
    """
    from edgemix.runtime.decoding.batch import ContinuousBatch, GenerationRequest
    from edgemix.runtime.decoding.sampling import Sampling
    from edgemix.runtime.decoding.static_batch import StaticBatch
    from edgemix.runtime.mixing.ensemble import Ensemble

    some = [prompts[i % len(prompts)] for i in range(3 * size)]

    def batch(ids: list[list[int]]) -> tuple[float, float]:
        options: dict[str, Any] = {"seeds": [0] * len(ids), "context": mixture.context, "eos": ()}
        begun = time.perf_counter()
        with closing(StaticBatch(ensemble, ids, Sampling(), max_new_tokens=new, **options)) as decoding:
            decoding.step()
            first = time.perf_counter()
            while decoding.step():
                pass
        ended = time.perf_counter()
        return len(ids) * new / (ended - begun), len(ids) * (new - 1) / (ended - first)

    def continuous() -> float:
        lengths = np.linspace(new / 4, 7 * new / 4, len(some)).astype(int)
        np.random.default_rng(0).shuffle(lengths)
        everyone = Ensemble(
            ensemble.graphs, np.full(len(ensemble.weights), 1 / len(ensemble.weights)), "linear", ensemble.vocabulary
        )
        begun, told = time.perf_counter(), 0
        with closing(ContinuousBatch(everyone, size)) as served:
            for ids, length in zip(some, lengths, strict=True):
                served.add(
                    GenerationRequest.of(
                        ensemble,
                        np.arange(len(ensemble.weights)),
                        ids,
                        Sampling(),
                        seed=0,
                        max_new_tokens=int(length),
                        context=mixture.context,
                        eos=(),
                    )
                )
            while len(served):
                told += len(served.step())
        return told / (time.perf_counter() - begun)

    batch(some[:1])
    turns = [(batch(some[:1]), batch(some[:size]), continuous()) for _ in range(3)]
    return {
        "batch": size,
        "alone": statistics.median(alone for (alone, _), *_ in turns),
        "together": statistics.median(together for _, (together, _), _ in turns),
        "continuous": statistics.median(coming for *_, coming in turns),
        "decode_times_alone": statistics.median(together / alone for (_, alone), (_, together), _ in turns),
        "continuous_share": statistics.median(coming / together for _, (together, _), coming in turns),
    }


def summary(found: Mapping[str, Turns], compared: Mapping[str, Side], domains: list[str]) -> dict[str, Any]:
    """Medians, spreads and ratios of each side."""
    rows: dict[str, Any] = {}
    for name, turns in found.items():
        decode = [rate for rates in turns.decode.values() for rate in rates]
        prefill = [rate for rates in turns.prefill.values() for rate in rates]
        row = {
            "decode": statistics.median(decode),
            "decode_quartiles": np.percentile(decode, [25, 75]).tolist(),
            "prefill": statistics.median(prefill),
            "times_naive": _ratio(turns, found[NAIVE]),
            "times_one_member": _ratio(turns, found[ALONE]),
            "all_times_this": _ratio(found[ALL], turns),
            "by_domain": {
                domain: statistics.median(
                    rate for number, rates in turns.decode.items() if domains[number] == domain for rate in rates
                )
                for domain in dict.fromkeys(domains)
            },
        }
        if like := compared[name].like:
            row["differ"] = sum(text != found[like].text[number] for number, text in turns.text.items())
        rows[name] = row
    return rows


def _ratio(turns: Turns, base: Turns) -> float:
    pairs = (zip(rates, base.decode[number], strict=True) for number, rates in turns.decode.items())
    return statistics.median(ours / theirs for pair in pairs for ours, theirs in pair)


def show(figures: dict[str, Any], console: Console) -> None:
    """The table for people."""
    rows = figures["sides"]
    domains = next(iter(rows.values()))["by_domain"]
    ratios = ("x naive", "x member", "All is")
    columns = ("", "Decode", *(domains if len(domains) > 1 else ()), *ratios, "Prefill", "Texts differ")
    console.table(
        f"Tokens/s: {figures['prompts']} prompts, {figures['new_tokens']} new tokens, {figures['threads']} threads",
        columns,
        [
            (
                name,
                f"{row['decode']:.1f}",
                *(f"{rate:.1f}" for rate in row["by_domain"].values() if len(domains) > 1),
                f"{row['times_naive']:.2f}",
                f"{row['times_one_member']:.2f}",
                f"{row['all_times_this']:.2f}x",
                f"{row['prefill']:,.0f}",
                str(row.get("differ", "")),
            )
            for name, row in rows.items()
        ],
    )
    load = figures["loading"]
    for way, name in (("", "all members, warm"), ("packed_", "the same from packed weights")):
        seconds, resident = load[f"{way}seconds"], load[f"{way}resident"]
        size = f"{resident / 1e6:,.0f} MB resident, {resident / load['files']:.2f} times their files"
        console.note(f"{seconds:.2f} s to load {name}; {size}")
    if figures["throughput"]:
        many = figures["throughput"]
        console.table(
            f"All texts together, prompts and all, in batches of {many['batch']}",
            ("", "Tokens/s"),
            [(name, f"{many[name]:.1f}") for name in ("alone", "together", "continuous")],
        )


def plot(figures: dict[str, Any], path: Path) -> None:
    """A picture of the decoding rates: bars with the quartiles, the naive loop's rate as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = figures["sides"]
    names = list(rows)[::-1]
    rates = [rows[name]["decode"] for name in names]
    low, high = zip(*(rows[name]["decode_quartiles"] for name in names), strict=True)
    colours = ["#1f6f8b" if "differ" in rows[name] else "#c8793d" if name == NAIVE else "#9aa5ab" for name in names]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(names) + 1.4), layout="constrained")
    spread = [np.subtract(rates, low).clip(0), np.subtract(high, rates).clip(0)]
    axes.barh(names, rates, color=colours, xerr=spread, error_kw={"ecolor": "#444", "lw": 1, "capsize": 2})
    axes.axvline(rows[NAIVE]["decode"], color="#c8793d", lw=1, ls="--")
    for name, rate, end in zip(names, rates, high, strict=True):
        axes.annotate(
            f" {rate:.0f}  ({rows[name]['times_naive']:.2f}x)",
            (max(rate, end), name),
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_xlabel("tokens/s, greedy, batch 1 (median, quartiles)")
    axes.set_title(f"{figures['bundle']}: {figures['members']} member(s), {figures['threads']} threads", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.18)
    figure.savefig(path, dpi=144)


def read_prompts(path: Path, most: int) -> list[tuple[str, str]]:
    """Prompts with their domains; of more than `most`, every so manieth.

    Raises:
        InputError: The file is not what it should be.
    """
    try:
        rows = [json.loads(line) for line in decode(path.read_bytes(), str(path)).splitlines() if line.strip()]
        found = [(str(row["prompt"]), str(row.get("domain", ""))) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is not a file of {{"prompt": ...}} lines: {error}') from None
    return found[:: max(1, len(found) // most)][:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="write the figures here, too")
    parser.add_argument("--plot", type=Path, help="a picture, .png or .svg")
    parser.add_argument("--weights", type=lambda text: WeightsType().convert(text, None, None), default="adaptive")
    parser.add_argument("--peer", action="append", default=[], help=f"NAME=MODEL; names: {', '.join(PEERS)}")
    parser.add_argument("--one-graph", type=Path, metavar="BUNDLE", help="the same members with stack: true")
    parser.add_argument("--most", type=int, default=30, help="prompts at most")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batch", type=int, help="measure throughput, too, in batches of so many texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    peers = dict(each.partition("=")[::2] for each in arguments.peer)
    if unknown := {name for name in peers if name.partition(" ")[0] not in PEERS}:
        parser.error(f"unknown peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")

    quiet_libraries()
    console = Console()
    try:
        from edgemix.runtime import Mixture

        if arguments.plot and find_spec("matplotlib") is None:
            raise InputError("--plot needs matplotlib", "pip install 'edgemix[bench]'")
        prompts = read_prompts(arguments.prompts, arguments.most)
        options: dict[str, Any] = {"provider": "cpu", "threads": arguments.threads, "plan": False}
        one_graph = Mixture.load(arguments.one_graph, **options) if arguments.one_graph else nullcontext()
        with Mixture.load(arguments.bundle, **options) as mixture, one_graph as stacked:
            ensemble = mixture.ensemble(arguments.weights)
            other = stacked and stacked.ensemble(arguments.weights)
            compared = sides(arguments.bundle, mixture, ensemble, peers, stacked=other, threads=arguments.threads)
            encoded = [mixture.tokenizer.encode(prompt) for prompt, _ in prompts]
            found = take_turns(compared, encoded, new=arguments.new, rounds=arguments.rounds, console=console)
            figures = {
                "bundle": arguments.bundle.name,
                "members": len(mixture.members),
                "formats": sorted({entry.format for entry in mixture.manifest.members}),
                "weights": arguments.weights,
                "threads": arguments.threads,
                "prompts": len(prompts),
                "new_tokens": arguments.new,
                "rounds": arguments.rounds,
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
                "loading": loading(arguments.bundle, arguments.threads),
                "throughput": arguments.batch
                and throughput(mixture, ensemble, encoded, size=arguments.batch, new=arguments.new),
                "sides": summary(found, compared, [domain for _, domain in prompts]),
            }
        if arguments.output:
            arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except EdgemixError as error:
        sys.exit(str(error))
    show(figures, console)
    print(json.dumps(figures))
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
