"""From a mixture to its student: text, the teacher's word on it, a model to begin with, training, a folder.

Everything that takes long lies in one folder and is taken up by the next call: the teacher's distributions shard by
shard, the student before it learned, the state of training, and the student itself.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import accelerate
import msgspec
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from edgemix.bundle.stages import stage_key
from edgemix.errors import InputError, RecipeError, storage_errors
from edgemix.export.demo.tiny import save_member
from edgemix.export.distillation.head_loss import distillation_loss
from edgemix.export.distillation.loss import Lesson, learning_speed, mean_loss
from edgemix.export.distillation.student import SETTLE_TOKENS, new_student
from edgemix.export.distillation.teacher import open_teacher
from edgemix.export.distillation.teacher_cache import TeacherCache
from edgemix.export.distillation.texts import read_texts
from edgemix.export.models.architecture import context_length
from edgemix.export.models.loading import load_tokenizer
from edgemix.export.models.location import locate
from edgemix.export.pruning.sparsity import preserve_zeros, sparsify
from edgemix.export.training.checkpoints import Checkpoint
from edgemix.export.training.loop import TrainingBudget, Validation, train
from edgemix.export.training.lora import eager_attention
from edgemix.export.training.losses import Objective
from edgemix.export.training.output_folder import check_output, exclusive, seal, sealed
from edgemix.export.training.token_loss import has_fast_bfloat16
from edgemix.files import write_atomically
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.compression import Student
from edgemix.recipe.load import check

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from edgemix.export.distillation.teacher import Teacher
    from edgemix.export.distillation.texts import Texts
    from edgemix.export.training.checkpoints import TrainingState
    from edgemix.recipe.schema import Recipe

MINUTES = 30.0
"""How long distillation takes where the recipe says nothing."""
READINGS = 2
"""How often the student reads what the teacher has said, where minutes are limited: they are shared between the two by
how fast each is. Up to four readings are almost as good as new text (Muennighoff et al., arXiv 2305.16264); a student
of SmolLM2-135M that reads 150,000 tokens twice agrees with the mixture on 57.9% of held-out text, and on 58.8% when it
reads twice as many once."""
TEACHER_SHARES = (0.1, 0.75)
"""Least and most of the minutes that the teacher has."""

_MOST_TOKENS = 20_000_000
_MODEL, _REPORT = "model", "report.json"


class DistilReport(msgspec.Struct, frozen=True):
    """What a distillation did.

    Attributes:
        parameters: Weights of the student; `layers` its layers.
        decoding: Its decoding time as a share of its start's in the recipe's formats, by what has to be read; None for
            a student that began with random weights.
        weights: Member name -> share in the mixture that it learned from.
        teacher_tokens: Tokens that the teacher has spoken on, in `teacher_seconds`.
        steps: Optimiser steps; `tokens` what they read, repetitions counted; `seconds` the time they took.
        training_loss: Running mean over the last steps.
        held_out_before: The loss on held-out text before the first step; None where there is too little text.
        held_out: The same with the weights that were kept, the best.
    """

    parameters: int
    layers: int
    decoding: float | None
    weights: dict[str, float]
    teacher_tokens: int
    teacher_seconds: float
    steps: int
    tokens: int
    seconds: float
    training_loss: float
    held_out_before: float | None
    held_out: float | None


def distil(
    recipe: Recipe, output: Path, *, bundle: Path | None = None, progress: Progress = NO_PROGRESS
) -> DistilReport:
    """Distil a recipe's mixture into its student, and write that as a Hugging Face folder with the tokenizer.

    A run that is interrupted leaves its work beside `output`; the same call takes it up. With a number of steps the
    result is then the same as without the interruption. Under `accelerate launch` every process calls this.

    Args:
        recipe: With a student (without: the default one) and training text.
        output: The folder; must not be there yet.
        bundle: Whose mixture teaches, with its weights; None loads the recipe's members, and fits weights if need be.
        progress: Hears of every stage.

    Raises:
        RecipeError: The recipe has mistakes.
        InputError: The output is there already, something cannot be read, or there is too little text.
        EdgemixError: The loss is no longer a number, or the disk is full.
    """
    recipe = msgspec.structs.replace(recipe, student=recipe.student or Student())
    if problems := check(recipe):
        raise RecipeError("\n".join(["the recipe has mistakes:", *problems]))
    check_output(output)
    begun = torch.distributed.is_available() and torch.distributed.is_initialized()
    accelerator = accelerate.Accelerator()
    first = accelerator.is_main_process
    progress = progress if first else NO_PROGRESS
    folder = output.with_name(f".{output.name}.distilling")
    try:
        with (
            exclusive(output) if first else nullcontext(),
            open_teacher(recipe, bundle, accelerator.device, progress) as found,
        ):
            teacher, weights = found
            report = _Distillation(recipe, weights, teacher, folder, accelerator=accelerator, progress=progress).run()
            if first:
                with storage_errors(f"writing {output}"):
                    (folder / _MODEL).rename(output)
                    shutil.rmtree(folder)
            accelerator.wait_for_everyone()
    finally:
        if not begun and accelerator.num_processes > 1:
            accelerator.end_training()
    return report


def make_student(
    recipe: Recipe, weights: Mapping[str, float], teacher: Teacher, folder: Path, progress: Progress = NO_PROGRESS
) -> Path:
    """As `distil`, for an export under way.

    Args:
        recipe: With a student.
        weights: Member name -> share.
        teacher: The mixture of these.
        folder: Where the work lies between calls; the same call takes it up, or finds it done.
        progress: Hears of every stage.

    Returns:
        The student's Hugging Face folder, in `folder`.

    Raises:
        InputError, EdgemixError: As `distil`.
    """
    with storage_errors(f"making {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    _Distillation(recipe, weights, teacher, folder, progress=progress).run()
    return folder / _MODEL


def default_device() -> torch.device:
    """Where a single process trains."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Done(msgspec.Struct, frozen=True):
    """A finished distillation: digest of all that it depends on, and what it did."""

    key: str
    report: DistilReport


class _Distillation:
    """One distillation under way.

    Args:
        recipe: With a student.
        weights: Member name -> share.
        teacher: The mixture of these.
        folder: Where all work lies.
        accelerator: The processes that share it; None for this one alone.
        progress: Hears of every stage.
    """

    def __init__(
        self,
        recipe: Recipe,
        weights: Mapping[str, float],
        teacher: Teacher,
        folder: Path,
        *,
        accelerator: accelerate.Accelerator | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> None:
        if recipe.student is None:
            raise InputError("the recipe has no student", "Add student: to it.")
        self._recipe, self._student = recipe, recipe.student
        self._weights, self._teacher = weights, teacher
        self._folder, self._accelerator, self._progress = folder, accelerator, progress
        self._first = accelerator is None or accelerator.is_main_process
        self._device = accelerator.device if accelerator else default_device()
        self._minutes = (
            MINUTES if self._student.minutes is None and self._student.steps is None else self._student.minutes
        )
        self._length = min(self._student.length, teacher.context)
        places = accelerator.num_processes if accelerator else 1
        self._step_tokens = self._student.batch * self._student.accumulate * places * self._length
        self._tokenizer = load_tokenizer(locate(recipe.members[0].model, recipe.folder))
        self._objective = Objective(
            self._student.loss, self._student.alpha, self._student.temperature, self._student.skew
        )

    def run(self) -> DistilReport:
        with self._progress.stage("tokenise"):
            most = min(_MOST_TOKENS, (self._student.steps or _MOST_TOKENS) * self._step_tokens)
            texts = read_texts(self._recipe, self._tokenizer, self._length, most)
        key = self._key(texts)
        if (done := self._done(key)) is not None:
            return done
        watched = self._ask_of_held_out(texts)
        model, decoding = self._begin(key, texts, watched)
        cache = self._cache("training", texts.training).fill(
            seconds=self._teacher_seconds(model, watched, key), accelerator=self._accelerator, progress=self._progress
        )
        spent = cache.spent + watched.spent
        before, state = self._train(model, cache, watched, key, spent, watch=bool(len(texts.held_out)))
        report = DistilReport(
            parameters=model.num_parameters(),
            layers=model.config.get_text_config().num_hidden_layers,
            decoding=decoding,
            weights=dict(self._weights),
            teacher_tokens=(len(cache.windows) + len(watched.windows)) * self._length,
            teacher_seconds=spent,
            steps=state.steps,
            tokens=state.steps * self._step_tokens,
            seconds=state.seconds,
            training_loss=state.loss,
            held_out_before=before if len(texts.held_out) else None,
            held_out=state.best if len(texts.held_out) else None,
        )
        if self._first:
            self._finish(model, _Done(key, report))
        return report

    def _key(self, texts: Texts) -> str:
        """Digest of all that the student depends on."""
        return stage_key(
            student=self._student,
            members=self._recipe.members,
            formats=[self._recipe.format, self._recipe.target],
            weights=self._weights,
            teacher=self._teacher.key,
            text=[hashlib.sha256(part.tobytes()).hexdigest() for part in (texts.training, texts.held_out)],
            seed=self._recipe.seed,
            step=self._step_tokens,
        )

    def _done(self, key: str) -> DistilReport | None:
        try:
            done = msgspec.json.decode((self._folder / _REPORT).read_bytes(), type=_Done)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return done.report if done.key == key and (self._folder / _MODEL).is_dir() else None

    def _cache(self, name: str, windows: NDArray[np.int64]) -> TeacherCache:
        student, folder = self._student, self._folder / "teacher" / name
        return TeacherCache(folder, windows, self._teacher, k=student.top_k, temperature=student.temperature)

    def _ask_of_held_out(self, texts: Texts) -> TeacherCache:
        """The teacher's word on text to be watched on."""
        # Too little text to hold some out: what is learned from is watched.
        watched = self._cache("held-out", texts.held_out if len(texts.held_out) else texts.training[:8])
        return watched.fill(accelerator=self._accelerator, title="teacher, held-out text", progress=self._progress)

    def _teacher_seconds(self, model: PreTrainedModel, watched: TeacherCache, key: str) -> float | None:
        """How long the teacher may speak on text to learn from: None where minutes are not limited.

        With t of T seconds for the teacher, v tokens a second, the student, of u tokens a second, reads each of them
        u (T - t) / (v t) times. What was found once stays, so that a run that goes on reads the same text.
        """
        if self._minutes is None:
            return None
        path, whole = self._folder / f"shares-{key[:16]}.json", 60 * self._minutes - watched.spent
        try:
            share = msgspec.json.decode(path.read_bytes(), type=float)
        except (FileNotFoundError, msgspec.DecodeError):
            speed = len(watched.windows) * self._length / max(watched.spent, 1e-6)
            batch = min(len(watched.windows), self._student.batch)
            places = self._accelerator.num_processes if self._accelerator else 1
            learning = places * learning_speed(model, self._lesson(model, watched), batch, self._length)
            least, most = TEACHER_SHARES
            share = min(max(learning / (learning + READINGS * speed), least), most)
            if self._accelerator:  # by the first one's clock
                found = torch.tensor(share, dtype=torch.float64, device=self._device)
                share = float(accelerate.utils.broadcast(found))
            if self._first:
                with storage_errors(f"writing {path}"):
                    write_atomically(path, msgspec.json.encode(share))
        return share * whole

    def _begin(self, key: str, texts: Texts, watched: TeacherCache) -> tuple[PreTrainedModel, float | None]:
        """The student before it learned, on the device, and its decoding time as a share of its start's."""
        folder = self._folder / f"start-{key[:16]}"
        if self._first and not sealed(folder):
            plain = Objective("forward", temperature=self._student.temperature)

            def distance(model: PreTrainedModel) -> float:
                bfloat16 = has_fast_bfloat16(model.device)
                loss = distillation_loss(model, plain, self._teacher.vocabulary, bfloat16=bfloat16)
                return mean_loss(model, loss, watched)

            beginning = new_student(
                self._recipe,
                self._weights,
                self._tokenizer,
                torch.from_numpy(texts.training),
                distance=distance,
                progress=self._progress,
            )
            self._set_zeros(beginning.model, texts)
            beginning.model.config.edgemix_decoding = beginning.decoding
            with storage_errors(f"writing {folder}"):
                shutil.rmtree(folder, ignore_errors=True)
                save_member(beginning.model, self._tokenizer, folder)
                seal(folder)
        if self._accelerator:
            self._accelerator.wait_for_everyone()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        decoding = vars(model.config).pop("edgemix_decoding", None)
        if context_length(model.config) < self._length:
            raise InputError(
                f"windows of {self._length} tokens are more than the student's context, {context_length(model.config)}",
                "Set student: length: to that, or less.",
            )
        return model.to(self._device).eval(), decoding

    def _set_zeros(self, model: PreTrainedModel, texts: Texts) -> None:
        """Where the recipe wants zeros in the student's weights, all at once: what comes is recovery enough."""
        prune = self._student.prune
        if prune is not None and prune.zeros:
            calibration = texts.training[: max(1, SETTLE_TOKENS // self._length)].tolist()
            options: dict[str, Any] = {"pattern": prune.pattern, "criterion": prune.criterion}
            sparsify(model, prune.zeros, windows=calibration, progress=self._progress, **options)

    def _lesson(self, model: PreTrainedModel, cache: TeacherCache) -> Lesson:
        student = self._student
        return Lesson(
            model,
            cache,
            self._objective,
            self._teacher.vocabulary,
            teacher=self._teacher if student.samples else None,
            samples=student.samples,
            k=student.top_k,
            bfloat16=has_fast_bfloat16(model.device),
        )

    def _train(
        self, model: PreTrainedModel, cache: TeacherCache, watched: TeacherCache, key: str, spent: float, *, watch: bool
    ) -> tuple[float, TrainingState]:
        """Let the model learn, in evaluation mode (dropout would blur what the teacher says)."""
        student, lesson, seconds = self._student, self._lesson(model, cache), None
        if self._minutes is not None:
            seconds = 60 * max(self._minutes - spent / 60, self._minutes * (1 - TEACHER_SHARES[1]) / 2)
        model.requires_grad_()
        pruned = student.prune is not None and student.prune.zeros
        with eager_attention(model, self._length), preserve_zeros(model) if pruned else nullcontext():
            before = lesson.measure(watched)
            state = train(
                lesson,
                dict(model.named_parameters()),
                np.arange(len(cache.windows))[:, None],
                budget=TrainingBudget(student.steps, seconds),
                batch=student.batch,
                learning_rate=student.learning_rate,
                accumulate=student.accumulate,
                eight_bit=student.eight_bit_optimizer,
                validation=Validation(lambda: lesson.measure(watched)) if watch else None,
                before_step=lesson.before_step,
                accelerator=self._accelerator,
                seed=self._recipe.seed,
                checkpoint=Checkpoint(self._folder / "training", key),
                title="distil",
                progress=self._progress,
            )
        return before, state

    def _finish(self, model: PreTrainedModel, done: _Done) -> None:
        """Write the student, then that it is done, and drop what only an unfinished run needs."""
        with storage_errors(f"writing {self._folder}"):
            shutil.rmtree(self._folder / _MODEL, ignore_errors=True)
            save_member(model.to("cpu").requires_grad_(requires_grad=False), self._tokenizer, self._folder / _MODEL)
            write_atomically(self._folder / _REPORT, msgspec.json.encode(done))
            (self._folder / "training").unlink(missing_ok=True)
            for start in self._folder.glob("start-*"):
                shutil.rmtree(start)
