r"""The mixture against the naive loop, against one member alone, and against other runtimes, on the same prompts.

    python tools/benchmark BUNDLE PROMPTS.jsonl [-o FIGURES.json] [--plot PICTURE.png] [--weights adaptive]
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
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from figures import plot, show, summary
from load_times import loading
from peers import PEERS
from sides import sides
from turns import take_turns, throughput

from edgemix.cli.command import quiet_libraries
from edgemix.cli.console import Console
from edgemix.cli.options import WeightsType
from edgemix.errors import EdgemixError, InputError
from edgemix.recipe.text_sources import decode


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
    parser.add_argument("--batch", type=int, help="measure throughput, too, in batches of this many texts")
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
