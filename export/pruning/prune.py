"""Pruning from end to end: in small cuts, each followed by recovery, taken up again where a run was stopped."""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgemix.bundle.stages import stage_key
from edgemix.errors import InputError, storage_errors
from edgemix.export.data.text import calibration_windows, split
from edgemix.export.models.loading import load_member
from edgemix.export.pruning.cuts import Cuts, Stand
from edgemix.export.pruning.importance import importance
from edgemix.export.pruning.recovery import recover
from edgemix.export.pruning.report import PruningReport, compare, parts_of, total_of
from edgemix.export.pruning.sparsity import sparsify
from edgemix.export.pruning.structure import Sizes, Structure
from edgemix.export.pruning.structured import cut, kept_layers, sizes
from edgemix.export.training.loop import TrainingBudget, fingerprint
from edgemix.export.training.output_folder import atomic_folder, check_output, exclusive
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.compression import check_pruning
from edgemix.recipe.schema import MemberRecipe
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.bundle.manifest import PruningFigures
    from edgemix.export.models.loading import LoadedMember
    from edgemix.recipe.compression import Pruning
    from edgemix.recipe.schema import Recipe

LENGTH = 256
"""Tokens of a window."""
CALIBRATION_WINDOWS = 64
"""Those that importance is measured on: ten tokens for each of 1,536 channels."""

_WINDOWS = 4_096
_HELD_OUT_WINDOWS = 16
_HELD_OUT = 0.05
"""Share of the text that neither importance nor recovery sees."""


@dataclass(frozen=True)
class Texts:
    """What pruning reads: windows int64 [windows, length] that it fits the model to, and others that judge it."""

    training: NDArray[np.int64]
    held_out: list[list[int]]


@dataclass(frozen=True)
class Pruned:
    """What is left of a model, on the CPU, and what was done."""

    model: PreTrainedModel
    report: PruningReport


def prune(
    model: str,
    output: Path,
    domains: Mapping[str, Sequence[str]],
    pruning: Pruning,
    *,
    adapter: str | None = None,
    recovery_steps: int | None = None,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> PruningReport:
    """Prune a model that lies in a folder, a .gguf file or on the hub, and write what is left as a Hugging Face folder.

    An interrupted run leaves its work beside `output`; the same call takes it up.

    Args:
        model: The folder or file, relative to the working folder, or the hub id.
        output: The folder to write; must not be there yet.
        domains: Text by domain.
        pruning: What is cut away.
        adapter: A LoRA adapter that is merged into the model first.
        recovery_steps: See `prune_model`, as for what else it raises.
        seed: Of the choice and the order of text.
        progress: Hears of every stage.

    Raises:
        InputError: The output is there already, or the model cannot be read.
    """
    check_output(output)
    scratch = output.with_name(f".{output.name}.pruning")
    with exclusive(output):
        member = load_member(MemberRecipe(output.name, model, adapter=adapter), Path(), progress)
        texts = prune_texts(domains, member.tokenizer, seed=seed)
        pruned = prune_model(
            member.model,
            pruning,
            texts,
            scratch=scratch,
            recovery_steps=recovery_steps,
            seed=seed,
            progress=progress,
        )
        with atomic_folder(output) as folder:
            pruned.model.save_pretrained(folder)
            member.tokenizer.save_pretrained(folder)
            if member.source.license:
                (folder / "README.md").write_text(f"---\nlicense: {member.source.license}\n---\n", "utf-8")
        shutil.rmtree(scratch, ignore_errors=True)
    return pruned.report


def prune_member(
    member: LoadedMember,
    pruning: Pruning,
    recipe: Recipe,
    output: Path,
    *,
    scratch: Path,
    progress: Progress = NO_PROGRESS,
) -> PruningFigures:
    """Prune a recipe's member for export.

    Args:
        member: As it was read.
        pruning: What is cut away.
        recipe: For its texts and its seed.
        output: Where what is left is written to, without the tokenizer; replaced if it is there.
        scratch: For this run alone; gone when the call ends well.
        progress: Hears of every stage.

    Returns:
        How far the model has moved.

    Raises:
        InputError, EdgemixError, KeyboardInterrupt: See `prune_model`.
    """
    texts = prune_texts(pruning_domains(recipe), member.tokenizer, name=member.name, seed=recipe.seed)
    pruned = prune_model(member.model, pruning, texts, scratch=scratch, seed=recipe.seed, progress=progress)
    with storage_errors(f"writing {output}"):
        shutil.rmtree(output, ignore_errors=True)
        pruned.model.save_pretrained(output)
        shutil.rmtree(scratch, ignore_errors=True)
    return pruned.report.figures


def pruning_domains(recipe: Recipe) -> dict[str, list[str]]:
    """The text that a recipe has for pruning, by domain: calibration and training."""
    domains: dict[str, list[str]] = {}
    for part in (recipe.data.calibration, recipe.data.training):
        for domain, source in part.items():
            domains.setdefault(domain, []).extend(read_documents(source, recipe.folder))
    return domains


def prune_texts(
    domains: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, name: str = "", seed: int = 0
) -> Texts:
    """Windows of documents, with some kept out for judging; see `calibration_windows` for the shares of domains.

    Args:
        domains: Documents by domain.
        tokenizer: The model's.
        name: The member's: a domain that is called so counts as much as all others.
        seed: Of the choice and the order.

    Raises:
        InputError: There is no text, or not enough of it.
    """
    if not domains:
        raise InputError("pruning needs text to see what can be missed", "Give some that is like what the model reads.")
    parts = {domain: split(documents, _HELD_OUT, seed=seed) for domain, documents in domains.items()}
    training, held_out = ({domain: part[i] for domain, part in parts.items() if part[i]} for i in (0, 1))
    fitted = calibration_windows(training, tokenizer, LENGTH, _WINDOWS, name=name, seed=seed)
    if held_out:
        judged = calibration_windows(held_out, tokenizer, LENGTH, _HELD_OUT_WINDOWS, name=name, seed=seed)
    else:  # a short text: hold back windows of it
        count = max(1, round(_HELD_OUT * len(fitted)))
        judged, fitted = fitted[:count], fitted[count:] or fitted
    return Texts(np.array(fitted, np.int64), judged)


def prune_model(
    model: PreTrainedModel,
    pruning: Pruning,
    texts: Texts,
    *,
    scratch: Path | None = None,
    recovery_steps: int | None = None,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> Pruned:
    """Prune a model in `pruning.steps` cuts with recovery after each.

    A run that is interrupted leaves its last cut and the recovery under way in `scratch`; the same call takes them up,
    and ends the same if the recovery has a number of steps.

    Args:
        model: A causal language model in fp32 and evaluation mode; unchanged when the call ends.
        pruning: What is cut away.
        texts: From `prune_texts`.
        scratch: A folder for this run alone; it is left with what the last step needed.
        recovery_steps: Optimiser steps of recovery after each cut, in the place of `pruning.recover` minutes over all.
        seed: Of the order of the text.
        progress: Hears of every stage.

    Raises:
        InputError: `pruning` has mistakes, or the model's structure is not known or does not allow the sizes.
        EdgemixError: The recovery's loss is no longer a number, or the disk refuses.
        KeyboardInterrupt: As it came, once the checkpoint is written.
    """
    check_pruning(pruning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    home = model.device
    key = stage_key(
        model=fingerprint(model),
        pruning=pruning,
        text=hashlib.sha256(texts.training.tobytes()).hexdigest(),
        steps=recovery_steps,
        seed=seed,
    )
    try:
        cuts = Cuts(scratch, key) if scratch else None
        run = _Run(model.to(device), pruning, texts, cuts, recovery_steps, seed, progress)
        stand = run.finish()
        with progress.stage("compare"):
            figures = compare(model, stand.model, texts.held_out)
        parts = parts_of(model, stand.model, stand.kept)
        report = PruningReport(
            before=_sizes(model),
            after=_sizes(stand.model),
            parts=parts,
            total=total_of(parts),
            figures=figures,
            recovery_steps=stand.recovery_steps,
            recovery_seconds=stand.recovery_seconds,
        )
        return Pruned(stand.model.to("cpu"), report)
    finally:
        model.to(home)


@dataclass(frozen=True)
class _Run:
    """A pruning under way: the arguments of `prune_model`."""

    teacher: PreTrainedModel
    pruning: Pruning
    texts: Texts
    cuts: Cuts | None
    steps: int | None
    seed: int
    progress: Progress

    def finish(self) -> Stand:
        """Go on from what is on disk, if anything is, to the end."""
        stand = self.cuts.last(self.teacher, self.pruning.steps) if self.cuts else None
        stand = stand or self._cut(Stand(self.teacher, 0, list(range(_layers(self.teacher)))))
        while True:
            self._recover(stand)
            if stand.step == self.pruning.steps:
                return stand
            stand = self._cut(stand)

    def _cut(self, stand: Stand) -> Stand:
        """The next cut, kept on disk."""
        pruning, progress, step = self.pruning, self.progress, stand.step + 1
        calibration = self.texts.training[:CALIBRATION_WINDOWS].tolist()
        model, kept = stand.model, stand.kept
        if pruning.layers or pruning.ffn or pruning.heads:
            wanted, now = sizes(self.teacher, pruning, step / pruning.steps), Structure(model).sizes
            if wanted != now:
                measured = importance(model, calibration, sizes=wanted, progress=progress)
                with progress.stage(f"cut {step} of {pruning.steps}"):
                    kept = [kept[index] for index in kept_layers(now, wanted, measured)]
                    model = cut(model, wanted, measured)
        if pruning.zeros:
            model = copy.deepcopy(model) if model is self.teacher else model
            # Many at first, fewer later (Zhu and Gupta, arXiv 1710.01878).
            share = pruning.zeros * (1 - (1 - step / pruning.steps) ** 3)
            options: dict[str, Any] = {"pattern": pruning.pattern, "criterion": pruning.criterion}
            sparsify(model, share, windows=calibration, progress=progress, **options)
        model = copy.deepcopy(model) if model is self.teacher else model
        stand = Stand(model, step, kept, stand.recovery_steps, stand.recovery_seconds)
        if self.cuts:
            self.cuts.keep(stand)
        return stand

    def _recover(self, stand: Stand) -> None:
        budget = self._budget()
        if budget is None:
            return
        state = recover(
            stand.model,
            self.teacher,
            self.texts.training,
            budget=budget,
            seed=self.seed + stand.step,
            checkpoint=self.cuts.checkpoint(stand.step) if self.cuts else None,
            title=f"recover {stand.step} of {self.pruning.steps}",
            progress=self.progress,
        )
        stand.recovery_steps += state.steps
        stand.recovery_seconds += state.seconds

    def _budget(self) -> TrainingBudget | None:
        """Of one recovery."""
        if self.steps is not None:
            return TrainingBudget(self.steps) if self.steps else None
        return TrainingBudget(seconds=60 * self.pruning.recover / self.pruning.steps) if self.pruning.recover else None


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _sizes(model: PreTrainedModel) -> Sizes | None:
    try:
        return Structure(model).sizes
    except InputError:
        return None
