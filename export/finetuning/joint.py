"""Fine-tune the members of a recipe: jointly, through the likelihood of their mixture, or each on its own text."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Unpack

import torch

from edgemix.bundle.stages import stage_key
from edgemix.errors import InputError, storage_errors
from edgemix.export.data.text import split
from edgemix.export.finetuning.members import TrainableMember, load_trainable_members, shared_tokenizer
from edgemix.export.finetuning.mixture_likelihood import MixtureLikelihood
from edgemix.export.finetuning.options import HELD_OUT, TrainingOptions, TrainingSettings, held_out_windows
from edgemix.export.finetuning.recipe_output import RECIPE, finetuned_recipe, recipe_text
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models.architecture import context_length
from edgemix.export.models.tokenizers import tokenizer_size
from edgemix.export.training.checkpoints import Checkpoint, TrainingState
from edgemix.export.training.loop import train
from edgemix.export.training.output_folder import atomic_folder, check_output, exclusive
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.text_sources import read_documents

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from edgemix.recipe.schema import Recipe

    DocumentsByDomain = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class MemberReport:
    """The results for one member.

    Attributes:
        name: The member's name.
        adapter: The PEFT folder that was written.
        parameters: Number of weights in the adapter.
        weight: The member's weight in the mixture.
        validation_before: Mean loss of the member alone on the validation text before training, in nats per token; None
            without such text.
        validation_after: Mean loss after training.
    """

    name: str
    adapter: Path
    parameters: int
    weight: float
    validation_before: float | None
    validation_after: float | None


@dataclass(frozen=True)
class MixtureReport:
    """The results of fine-tuning a mixture.

    Attributes:
        recipe: The recipe that was written, which names the new adapters.
        joint: Whether the members were trained by the mixture's likelihood.
        members: Results by member, in the recipe's order.
        steps: Optimizer steps, summed over members trained separately.
        tokens: Tokens read, including repetitions.
        seconds: Training time.
        training_loss: Running mean over the last steps, in nats per token: of the mixture, or the mean over members.
        validation_before: Mean loss of the mixture, with its initial weights, on the validation text of all domains
            before training, in nats per token; None without such text.
        validation_after: Mean loss after training.
    """

    recipe: Path
    joint: bool
    members: tuple[MemberReport, ...]
    steps: int
    tokens: int
    seconds: float
    training_loss: float
    validation_before: float | None
    validation_after: float | None


def finetune_mixture(
    recipe: Recipe,
    output: Path,
    texts: DocumentsByDomain | None = None,
    *,
    separate: bool = False,
    fit_weights: bool | None = None,
    four_bit: bool = False,
    progress: Progress = NO_PROGRESS,
    **options: Unpack[TrainingOptions],
) -> MixtureReport:
    """Train an adapter for each member of a recipe, and write them with a recipe that names them.

    An interrupted run leaves checkpoints beside `output`; the same call resumes it. With a number of steps, the result
    is the same as without the interruption.

    Args:
        recipe: The mixture. Losses are measured on its validation text, or on the fraction `HELD_OUT` of each training
            text if it has none. A member with an adapter continues from it.
        output: The folder to write: the adapters, by member name, and recipe.yaml; must not exist yet.
        texts: Training text by domain; None takes the recipe's.
        separate: Train each member alone: on the domain of its name, if there is one, else on all text.
        fit_weights: Re-estimate the mixture's weights with every step; None does so if the recipe fits weights.
        four_bit: Keep the models in 4 bits while adapters are trained (QLoRA).
        progress: Progress callback.
        options: See `TrainingSettings`; steps and minutes are per member with `separate`.

    Raises:
        InputError: The output exists already, a member cannot be read or has zero weight, the members do not share a
            tokenizer, or there is too little text.
        EdgemixError: The loss is not finite, or the disk is full.
    """
    check_output(output)
    training = TrainingSettings(**options)
    fit_weights = not separate and (recipe.fits_weights if fit_weights is None else fit_weights)
    weights = _initial_weights(recipe)
    if not separate:
        _refuse_zero_weights(recipe, weights)
    documents = _documents(recipe, texts, training.seed)
    with progress.stage("compare tokenizers"), library_warnings(progress):
        tokenizer = shared_tokenizer(recipe)
    vocabulary = tokenizer_size(tokenizer)
    with (
        exclusive(output),
        library_warnings(progress),
        load_trainable_members(
            recipe, training, four_bit=four_bit, vocabulary=vocabulary, progress=progress
        ) as members,
    ):
        length = min(training.length, *(context_length(member.model.config) for member in members))
        with progress.stage("tokenize"):
            held_out = held_out_windows(documents.held_out, tokenizer, length)
            sources = [documents.for_member(member.name) for member in members] if separate else [documents.all]
            own = [training.windows(source, tokenizer, length) for source in sources]
        run = _MixtureFinetuning(output, training, members, weights.to(members[0].device), progress)
        outcome = run.finetune(own, held_out, separate=separate, fit_weights=fit_weights)
        fitted = outcome.weights if fit_weights and not recipe.fits_weights else None
        _write(output, members, recipe_text(finetuned_recipe(recipe, output, fitted)))
        run.remove_checkpoints()
    return _report(output, members, outcome, joint=not separate, step_tokens=training.batch * own[0].shape[1])


def _refuse_zero_weights(recipe: Recipe, weights: Tensor) -> None:
    """Raise InputError if a member has no weight: it would have no gradient."""
    zero = [spec.name for spec, weight in zip(recipe.members, weights.tolist(), strict=True) if not weight]
    if zero:
        raise InputError(
            f"the weight of {', '.join(zero)} is zero, so the mixture's likelihood teaches it nothing",
            "Give it a weight, leave it out of the recipe, or tune each member alone (--separate).",
        )


def _write(output: Path, members: Sequence[TrainableMember], recipe: str) -> None:
    """Write the adapters and the recipe's text, all or nothing."""
    with atomic_folder(output) as folder:
        for member in members:
            (folder / member.name).mkdir()
            member.write(folder / member.name)
        (folder / RECIPE).write_text(recipe, "utf-8")


def _report(
    output: Path, members: Sequence[TrainableMember], outcome: _Outcome, *, joint: bool, step_tokens: int
) -> MixtureReport:
    states, before, after = outcome.states, outcome.before, outcome.after
    steps = sum(state.steps for state in states)
    return MixtureReport(
        recipe=output / RECIPE,
        joint=joint,
        members=_member_reports(output, members, outcome),
        steps=steps,
        tokens=steps * step_tokens,
        seconds=sum(state.seconds for state in states),
        training_loss=math.fsum(state.loss for state in states) / len(states),
        validation_before=before.mixture if before else None,
        validation_after=after.mixture if after else None,
    )


def _member_reports(output: Path, members: Sequence[TrainableMember], outcome: _Outcome) -> tuple[MemberReport, ...]:
    weights, before, after = outcome.weights, outcome.before, outcome.after
    return tuple(
        MemberReport(
            name=member.name,
            adapter=output / member.name,
            parameters=sum(each.numel() for each in member.parameters.values()),
            weight=weights[member.name],
            validation_before=before.members[index] if before else None,
            validation_after=after.members[index] if after else None,
        )
        for index, member in enumerate(members)
    )


@dataclass(frozen=True)
class _Documents:
    """Documents by domain."""

    training: DocumentsByDomain
    held_out: DocumentsByDomain

    @property
    def all(self) -> list[str]:
        return [document for documents in self.training.values() for document in documents]

    def for_member(self, member: str) -> Sequence[str]:
        """Return the training text of a member that is trained separately."""
        return self.training.get(member) or self.all


def _documents(recipe: Recipe, texts: DocumentsByDomain | None, seed: int) -> _Documents:
    """Read the training text and the held-out text: the recipe's validation text, or a part of the training text."""
    data = recipe.data
    if texts is None:
        texts = {domain: read_documents(source, recipe.folder) for domain, source in data.training.items()}
    if not texts:
        raise InputError(
            "the recipe names no text to learn from", "Name some under data: training:, or give text files."
        )
    if data.validation:
        return _Documents(
            texts, {domain: read_documents(source, recipe.folder) for domain, source in data.validation.items()}
        )
    parts = {domain: split(documents, HELD_OUT, seed=seed) for domain, documents in texts.items()}
    return _Documents(
        {domain: rest for domain, (rest, _) in parts.items()}, {domain: kept for domain, (_, kept) in parts.items()}
    )


def _initial_weights(recipe: Recipe) -> Tensor:
    """Return the initial weights: fp32 [members] with sum one, uniform if the recipe fits weights."""
    given = recipe.weights if isinstance(recipe.weights, dict) else {}
    weights = torch.tensor([given.get(spec.name, 0.0 if given else 1.0) for spec in recipe.members])
    return weights / weights.sum()


class _MeanLosses(NamedTuple):
    """Mean losses on text, in nats per token: of the mixture, and of each member alone."""

    mixture: float
    members: list[float]


class _Outcome(NamedTuple):
    """The results of training: states of the runs, the members' weights, and losses before and after."""

    states: Sequence[TrainingState]
    weights: dict[str, float]
    before: _MeanLosses | None
    after: _MeanLosses | None


class _MixtureFinetuning:
    """The training runs of a mixture's members, and their checkpoints."""

    def __init__(
        self,
        output: Path,
        training: TrainingSettings,
        members: list[TrainableMember],
        weights: Tensor,
        progress: Progress,
    ) -> None:
        self._training, self._members, self._progress, self._title = training, members, progress, output.name
        self.weights = weights
        self._likelihood = MixtureLikelihood([member.losses for member in members], weights)
        self._checkpoints = output.with_name(f".{output.name}.checkpoints")
        with storage_errors(f"writing beside {output}"):
            self._checkpoints.mkdir(exist_ok=True)

    def finetune(
        self,
        texts: Sequence[NDArray[np.int64]],
        held_out: Sequence[NDArray[np.int64]],
        *,
        separate: bool,
        fit_weights: bool,
    ) -> _Outcome:
        """Train the members, each on its own text or all on the first one, and measure them on the held-out text."""
        before = self.measure(held_out)
        states = self.train_separately(texts) if separate else [self.train_jointly(texts[0], fit_weights=fit_weights)]
        after = self.measure(held_out)
        weights = dict(zip((member.name for member in self._members), self.weights.tolist(), strict=True))
        return _Outcome(states, weights, before, after)

    def train_jointly(self, text: NDArray[np.int64], *, fit_weights: bool) -> TrainingState:
        """Train all members with the mixture's loss."""
        parameters = {name: each for member in self._members for name, each in _named(member).items()}
        return self._train(
            self._likelihood,
            # The weights are checkpointed with the adapters; without a gradient, the optimizer does not change them.
            parameters | {"mixture weights": self.weights},
            text,
            micro_batch=self._micro_batch(),
            name="mixture",
            key=[[member.key for member in self._members], self.weights.tolist(), fit_weights],
            after_step=self._likelihood.update_weights if fit_weights else None,
        )

    def train_separately(self, texts: Sequence[NDArray[np.int64]]) -> list[TrainingState]:
        """Train each member with its own loss, one after the other. Checkpoints keep finished members."""
        return [
            self._train(
                member.mean_loss,
                _named(member),
                text,
                micro_batch=self._training.batch,
                name=member.name,
                key=member.key,
            )
            for member, text in zip(self._members, texts, strict=True)
        ]

    def measure(self, texts: Sequence[NDArray[np.int64]]) -> _MeanLosses | None:
        """Return the current losses on texts, each int64 [windows, length]; None without texts."""
        found = []
        with torch.no_grad():
            for text in texts:
                for start in range(0, len(text), self._training.batch):
                    ids = torch.from_numpy(text[start : start + self._training.batch]).to(self.weights.device)
                    found.append(self._likelihood.log_probabilities(ids))
        if not found:
            return None
        log_probabilities = torch.cat(found, 1)
        mixture = (self.weights.log()[:, None] + log_probabilities).logsumexp(0)
        return _MeanLosses(-float(mixture.mean()), (-log_probabilities.mean(1)).tolist())

    def remove_checkpoints(self) -> None:
        with storage_errors(f"removing {self._checkpoints}"):
            shutil.rmtree(self._checkpoints)

    def _train(
        self,
        loss: Callable[[Tensor], Tensor],
        parameters: Mapping[str, Tensor],
        text: NDArray[np.int64],
        *,
        micro_batch: int,
        name: str,
        key: Sequence[object],
        after_step: Callable[[int], None] | None = None,
    ) -> TrainingState:
        training = self._training
        digest = hashlib.sha256(text.tobytes()).hexdigest()
        models = {id(member.model): member.model for member in self._members}.values()
        for model in models:
            model.train()
        state = train(
            loss,
            parameters,
            text,
            budget=training.budget,
            batch=micro_batch,
            accumulate=training.batch // micro_batch,
            learning_rate=training.learning_rate,
            after_step=after_step,
            seed=training.seed,
            checkpoint=Checkpoint(self._checkpoints / name, stage_key(what=key, text=digest, training=training)),
            title=f"{name}: fine-tune",
            progress=self._progress,
        )
        for model in models:
            model.eval()
        return state

    def _micro_batch(self) -> int:
        """Return the micro-batch size of joint training. The activations of all members are in memory until the loss is
        known, and should take no more memory than a whole batch of one member: the largest such divisor of the batch.
        """
        batch, most = self._training.batch, max(1, self._training.batch // len(self._members))
        return max(size for size in range(1, most + 1) if batch % size == 0)


def _named(member: TrainableMember) -> dict[str, Tensor]:
    """Return a member's parameters by names that are unique among members."""
    return {f"{member.name}/{name}": each for name, each in member.parameters.items()}
