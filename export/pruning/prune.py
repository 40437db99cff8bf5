"""Pruning from end to end: in several cuts, each followed by recovery training. A stopped run resumes."""

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
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models.loading import load_member
from edgemix.export.pruning.cuts import Cuts, PruningState
from edgemix.export.pruning.importance import importance
from edgemix.export.pruning.recovery import recover
from edgemix.export.pruning.report import PruningReport, compare, layer_reports, sum_reports
from edgemix.export.pruning.sparsity import sparsify
from edgemix.export.pruning.structure import Sizes, Structure
from edgemix.export.pruning.structured import cut, layers_to_keep, sizes
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
"""Windows on which importance is measured: ten tokens for each of 1,536 channels."""

_WINDOWS = 4_096
_HELD_OUT_WINDOWS = 16
_HELD_OUT = 0.05
"""Fraction of the text that neither importance nor recovery uses."""


@dataclass(frozen=True)
class PruningTexts:
    """Pruning's text: windows for importance and recovery, int64 [windows, length], and held-out windows."""

    training: NDArray[np.int64]
    held_out: list[list[int]]


@dataclass(frozen=True)
class Pruned:
    """A pruned model, on the CPU, with its report."""

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
    """Prune a model from a folder, a .gguf file or the hub, and write it as a Hugging Face folder.

    An interrupted run leaves its work beside `output`; the same call resumes it.

    Args:
        model: The folder or file, relative to the working folder, or the hub id.
        output: The folder to write; must not exist yet.
        domains: Documents by domain.
        pruning: What to remove.
        adapter: A LoRA adapter that is merged into the model first.
        recovery_steps: See `prune_model`.
        seed: Seed of the choice and the order of text.
        progress: Progress callback.

    Raises:
        InputError: The output exists already, or the model cannot be read; also as `prune_model`.
    """
    check_output(output)
    scratch = output.with_name(f".{output.name}.pruning")
    with exclusive(output):
        with library_warnings(progress):
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
        member: The loaded member.
        pruning: What to remove.
        recipe: The recipe, for its texts and its seed.
        output: Folder for the pruned model, without the tokenizer; replaced if it exists.
        scratch: Folder for this run only; removed when the call succeeds.
        progress: Progress callback.

    Returns:
        The divergence of the pruned model from the original.

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
    """Return a recipe's documents for pruning by domain: calibration and training text."""
    domains: dict[str, list[str]] = {}
    for part in (recipe.data.calibration, recipe.data.training):
        for domain, source in part.items():
            domains.setdefault(domain, []).extend(read_documents(source, recipe.folder))
    return domains


def prune_texts(
    domains: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, name: str = "", seed: int = 0
) -> PruningTexts:
    """Cut documents into windows, holding some out; see `calibration_windows` for the share of each domain.

    Args:
        domains: Documents by domain.
        tokenizer: The model's tokenizer.
        name: The member's name: a domain of that name gets as much weight as all others together.
        seed: Seed of the choice and the order.

    Raises:
        InputError: There is no text, or too little.
    """
    if not domains:
        raise InputError("pruning needs text to measure importance", "Give some that is like what the model reads.")
    parts = {domain: split(documents, _HELD_OUT, seed=seed) for domain, documents in domains.items()}
    training, held_out = ({domain: part[i] for domain, part in parts.items() if part[i]} for i in (0, 1))
    windows = calibration_windows(training, tokenizer, LENGTH, _WINDOWS, name=name, seed=seed)
    if held_out:
        held_out_windows = calibration_windows(held_out, tokenizer, LENGTH, _HELD_OUT_WINDOWS, name=name, seed=seed)
    else:  # too little text to hold out documents: hold out windows
        count = max(1, round(_HELD_OUT * len(windows)))
        held_out_windows, windows = windows[:count], windows[count:] or windows
    return PruningTexts(np.array(windows, np.int64), held_out_windows)


def prune_model(
    model: PreTrainedModel,
    pruning: Pruning,
    texts: PruningTexts,
    *,
    scratch: Path | None = None,
    recovery_steps: int | None = None,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> Pruned:
    """Prune a model in `pruning.steps` cuts with recovery after each.

    An interrupted run leaves its last cut and a checkpoint of the recovery in `scratch`; the same call resumes it, with
    the same result if the recovery has a number of steps.

    Args:
        model: A causal language model in fp32 and evaluation mode; unchanged when the call ends.
        pruning: What to remove.
        texts: Text from `prune_texts`.
        scratch: Folder for this run only; not removed.
        recovery_steps: Optimizer steps of recovery after each cut, instead of `pruning.recover` minutes in total.
        seed: Seed of the order of the text.
        progress: Progress callback.

    Raises:
        InputError: `pruning` is invalid, or the model's structure is not supported or does not allow the sizes.
        EdgemixError: The recovery's loss is not finite, or a file cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; the checkpoint has been written.
    """
    check_pruning(pruning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original_device = model.device
    key = stage_key(
        model=fingerprint(model),
        pruning=pruning,
        text=hashlib.sha256(texts.training.tobytes()).hexdigest(),
        steps=recovery_steps,
        seed=seed,
    )
    try:
        cuts = Cuts(scratch, key) if scratch else None
        run = _PruningRun(model.to(device), pruning, texts, cuts, recovery_steps, seed, progress)
        state = run.finish()
        with progress.stage("compare"):
            figures = compare(model, state.model, texts.held_out)
        parts = layer_reports(model, state.model, state.kept)
        report = PruningReport(
            before=_sizes(model),
            after=_sizes(state.model),
            parts=parts,
            total=sum_reports(parts),
            figures=figures,
            recovery_steps=state.recovery_steps,
            recovery_seconds=state.recovery_seconds,
        )
        return Pruned(state.model.to("cpu"), report)
    finally:
        model.to(original_device)


@dataclass(frozen=True)
class _PruningRun:
    """The arguments of `prune_model`, and its steps."""

    teacher: PreTrainedModel
    pruning: Pruning
    texts: PruningTexts
    cuts: Cuts | None
    steps: int | None
    seed: int
    progress: Progress

    def finish(self) -> PruningState:
        """Run all cuts and recoveries, resuming from the state on disk if there is one."""
        state = self.cuts.last(self.teacher, self.pruning.steps) if self.cuts else None
        state = state or self._cut(PruningState(self.teacher, 0, list(range(_layers(self.teacher)))))
        while True:
            self._recover(state)
            if state.step == self.pruning.steps:
                return state
            state = self._cut(state)

    def _cut(self, state: PruningState) -> PruningState:
        """Make the next cut, and save it."""
        pruning, progress, step = self.pruning, self.progress, state.step + 1
        calibration = self.texts.training[:CALIBRATION_WINDOWS].tolist()
        model, kept = state.model, state.kept
        if pruning.layers or pruning.ffn or pruning.heads:
            target, now = sizes(self.teacher, pruning, step / pruning.steps), Structure(model).sizes
            if target != now:
                measured = importance(model, calibration, sizes=target, progress=progress)
                with progress.stage(f"cut {step} of {pruning.steps}"):
                    kept = [kept[index] for index in layers_to_keep(now, target, measured)]
                    model = cut(model, target, measured)
        if pruning.zeros:
            model = copy.deepcopy(model) if model is self.teacher else model
            # Cubic schedule: many zeros at first, fewer later (Zhu and Gupta, arXiv 1710.01878).
            sparsity = pruning.zeros * (1 - (1 - step / pruning.steps) ** 3)
            options: dict[str, Any] = {"pattern": pruning.pattern, "criterion": pruning.criterion}
            sparsify(model, sparsity, windows=calibration, progress=progress, **options)
        model = copy.deepcopy(model) if model is self.teacher else model
        state = PruningState(model, step, kept, state.recovery_steps, state.recovery_seconds)
        if self.cuts:
            self.cuts.save(state)
        return state

    def _recover(self, state: PruningState) -> None:
        budget = self._budget()
        if budget is None:
            return
        training = recover(
            state.model,
            self.teacher,
            self.texts.training,
            budget=budget,
            seed=self.seed + state.step,
            checkpoint=self.cuts.checkpoint(state.step) if self.cuts else None,
            title=f"recover {state.step} of {self.pruning.steps}",
            progress=self.progress,
        )
        state.recovery_steps += training.steps
        state.recovery_seconds += training.seconds

    def _budget(self) -> TrainingBudget | None:
        """Return the budget of one recovery; None without recovery."""
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
