"""Check everything that edgemix does on a CUDA GPU, on a machine that has one.

    python tools/check_gpu.py [--folder FOLDER]

Makes two tiny members, exports them for cuda in every format that runs there, and holds the CUDA provider, plainly and
with CUDA graphs, against the CPU provider on the same graphs: log-probabilities of a text, greedy tokens, a ragged
batch against single prompts, caches that grow. Prints a JSON line a format and provider; exits 1 if a check fails. Its
figures are of tiny models: they say that CUDA computes the same, not how fast it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edgemix.errors import EdgemixError
from edgemix.export.demo.text import make_texts
from edgemix.export.demo.tiny import train_member, train_tokenizer
from edgemix.export.pipeline import export_bundle
from edgemix.formats import FORMAT_SPECS
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.recipe.text_sources import TextSource
from edgemix.runtime import Mixture

FORMATS = tuple(row.name for row in FORMAT_SPECS.values() if "cuda" in row.targets and not row.reference)
MEMBERS = ("code", "prose")
PROMPTS = ["def read(path):\n", "The module provides", "import os\n\nclass A", "x"]
LONG = 300
"""New tokens of the longest generation: more than a fresh cache holds."""
TOLERANCE = 0.05
"""Largest difference of log-probabilities, in nats, that float16 on two devices may show."""


def make_members(folder: Path) -> str:
    """Train the members, unless an earlier run did; returns text to score."""
    (folder / "text").mkdir(exist_ok=True)
    texts = make_texts(folder / "text")
    tokenizer = train_tokenizer([text for name in MEMBERS for text in texts[name].train[:200]])
    for name in MEMBERS:
        if not (folder / name).is_dir():
            train_member(folder / name, texts[name].train, tokenizer, steps=40)
    (folder / "validation.txt").write_text("\n".join(texts["code"].validation)[:20_000], encoding="utf-8")
    return "\n".join(texts["prose"].test)[:4_000]


def check(bundle: Path, text: str, provider: str) -> dict[str, float | bool]:
    """Compare a provider with the CPU's on one bundle."""
    found: dict[str, float | bool] = {}
    with Mixture.load(bundle, provider="cpu") as cpu, Mixture.load(bundle, provider=provider) as cuda:
        ours, theirs = cuda.score(text), cpu.score(text)
        found["score_difference"] = float(np.abs(ours.member_log_probabilities - theirs.member_log_probabilities).max())
        distribution = cuda.next_token_distribution(PROMPTS[0])
        found["sums_to_one"] = bool(abs(distribution.sum() - 1) < 1e-6)
        single = [cuda.generate(prompt, max_new_tokens=24) for prompt in PROMPTS]
        batch = cuda.generate(PROMPTS, max_new_tokens=24)
        found["batch_equals_single"] = [c.token_ids for c in batch] == [c.token_ids for c in single]
        reference = cpu.generate(PROMPTS, max_new_tokens=24)
        pairs = [
            (a, b)
            for x, y in zip(single, reference, strict=True)
            for a, b in zip(x.token_ids, y.token_ids, strict=False)
        ]
        found["greedy_agreement"] = sum(a == b for a, b in pairs) / len(pairs)
        long = cuda.generate(PROMPTS[0], max_new_tokens=LONG)
        begun = time.perf_counter()
        again = cuda.generate(PROMPTS[0], max_new_tokens=LONG)
        found["long_seconds"] = time.perf_counter() - begun
        found["long_is_repeatable"] = long.token_ids == again.token_ids
    found["passed"] = bool(
        found["score_difference"] <= TOLERANCE
        and found["sums_to_one"]
        and found["batch_equals_single"]
        and found["long_is_repeatable"]
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--provider", default="cuda", help="cpu holds the CPU against itself, to try the script out")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="edgemix-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    text = make_members(folder)
    passed = True
    for weight_format in FORMATS:
        recipe = Recipe(
            members=tuple(MemberRecipe(name, name) for name in MEMBERS),
            format=weight_format,
            target="cuda",
            data=Data(validation={"code": TextSource("validation.txt")}),
            folder=folder,
        )
        bundle = folder / f"bundle-{weight_format}"
        providers = (arguments.provider, "cuda-graphs") if arguments.provider == "cuda" else (arguments.provider,)
        for number, provider in enumerate(providers):
            try:
                if not number:
                    export_bundle(recipe, bundle, force=True)
                figures = check(bundle, text, provider)
            except EdgemixError as error:
                figures = {"passed": False, "error": str(error)}
            passed &= bool(figures["passed"])
            print(json.dumps({"format": weight_format, "provider": provider, **figures}), flush=True)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
