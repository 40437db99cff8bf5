"""Distill a mixture into its student: read text, cache the teacher's distributions, build a student, train it.

All expensive results are kept in one folder, from which the next call resumes: the teacher's distributions by shard,
the initial student, the training checkpoint, and the student itself.
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
from edgemix.export.distillation.head_loss import objective_loss
from edgemix.export.distillation.loss import DistillationLoss, mean_loss, training_speed
from edgemix.export.distillation.report import DistillationReport
from edgemix.export.distillation.student import CALIBRATION_TOKENS, new_student
from edgemix.export.distillation.teacher import open_teacher
from edgemix.export.distillation.teacher_cache import TeacherCache
from edgemix.export.distillation.texts import read_texts
from edgemix.export.library_warnings import library_warnings
from edgemix.export.models.architecture import context_length
from edgemix.export.models.loading import member_tokenizer
from edgemix.export.models.save import save_member
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
    from edgemix.export.distillation.texts import DistillationTexts
    from edgemix.export.training.checkpoints import TrainingState
    from edgemix.recipe.schema import Recipe

MINUTES = 30.0
"""Default duration of distillation."""
EPOCHS = 2
"""Epochs that the student trains for when minutes are limited; the minutes are divided between teacher and student by
their speeds. Up to four epochs are almost as good as new text (Muennighoff et al., arXiv 2305.16264): a student of
SmolLM2-135M agrees with the mixture on 57.9% of held-out text after two epochs of 150,000 tokens, and on 58.8% after
one epoch of twice as many."""
TEACHER_SHARES = (0.1, 0.75)
"""Lowest and highest fraction of the minutes that the teacher gets."""

_MOST_TOKENS = 20_000_000
_MODEL, _REPORT = "model", "report.json"


def distill(
    recipe: Recipe, output: Path, *, bundle: Path | None = None, progress: Progress = NO_PROGRESS
) -> DistillationReport:
    """Distill a recipe's mixture into its student, and write it as a Hugging Face folder with the tokenizer.

    An interrupted run leaves its work beside `output`; the same call resumes it. With a number of steps, the result is
    the same as without the interruption. Under `accelerate launch`, every process calls this function.

    Args:
        recipe: The recipe, with training text; without a student it gets the default one.
        output: The folder to write; must not exist yet.
        bundle: Bundle whose mixture and weights to distill; None loads the recipe's members and fits weights if needed.
        progress: Progress callback.

    Raises:
        RecipeError: The recipe has mistakes.
        InputError: The output exists already, a file cannot be read, or there is too little text.
        EdgemixError: The loss is not finite, or the disk is full.
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
            library_warnings(progress),
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
    """Distill the student during an export; see `distill`.

    Args:
        recipe: A recipe with a student.
        weights: Weights by member name.
        teacher: The mixture with these weights.
        folder: Keeps intermediate results; the same call resumes, or returns the finished student.
        progress: Progress callback.

    Returns:
        The student's Hugging Face folder, within `folder`.

    Raises:
        InputError, EdgemixError: As `distill`.
    """
    with storage_errors(f"making {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    _Distillation(recipe, weights, teacher, folder, progress=progress).run()
    return folder / _MODEL


def default_device() -> torch.device:
    """Return the training device of a single process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Record(msgspec.Struct, frozen=True):
    """Record of a finished distillation: digest of everything that it depends on, and its report."""

    key: str
    report: DistillationReport


class _Distillation:
    """The stages of one distillation.

    Args:
        recipe: A recipe with a student.
        weights: Weights by member name.
        teacher: The mixture with these weights.
        folder: Keeps intermediate results.
        accelerator: The processes that take part; None for a single process.
        progress: Progress callback.
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
        world_size = accelerator.num_processes if accelerator else 1
        self._step_tokens = self._student.batch * self._student.accumulate * world_size * self._length
        self._tokenizer = member_tokenizer(recipe.members[0], recipe.folder)
        self._objective = Objective(
            self._student.loss, self._student.alpha, self._student.temperature, self._student.skew
        )

    def run(self) -> DistillationReport:
        with self._progress.stage("tokenize"):
            max_tokens = min(_MOST_TOKENS, (self._student.steps or _MOST_TOKENS) * self._step_tokens)
            texts = read_texts(self._recipe, self._tokenizer, self._length, max_tokens)
        key = self._key(texts)
        if (record := self._finished_report(key)) is not None:
            return record
        eval_cache = self._fill_eval_cache(texts)
        model, decoding = self._initial_student(key, texts, eval_cache)
        cache = self._cache("training", texts.training).fill(
            seconds=self._teacher_seconds(model, eval_cache, key),
            accelerator=self._accelerator,
            progress=self._progress,
        )
        seconds_spent = cache.seconds_spent + eval_cache.seconds_spent
        before, state = self._train(model, cache, eval_cache, key, seconds_spent, watch=bool(len(texts.held_out)))
        report = DistillationReport(
            parameters=model.num_parameters(),
            layers=model.config.get_text_config().num_hidden_layers,
            decoding=decoding,
            weights=dict(self._weights),
            teacher_tokens=(len(cache.windows) + len(eval_cache.windows)) * self._length,
            teacher_seconds=seconds_spent,
            steps=state.steps,
            tokens=state.steps * self._step_tokens,
            seconds=state.seconds,
            training_loss=state.loss,
            held_out_before=before if len(texts.held_out) else None,
            held_out=state.best if len(texts.held_out) else None,
        )
        if self._first:
            self._finish(model, _Record(key, report))
        return report

    def _key(self, texts: DistillationTexts) -> str:
        """Return a digest of everything that the student depends on."""
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

    def _finished_report(self, key: str) -> DistillationReport | None:
        try:
            record = msgspec.json.decode((self._folder / _REPORT).read_bytes(), type=_Record)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return record.report if record.key == key and (self._folder / _MODEL).is_dir() else None

    def _cache(self, name: str, windows: NDArray[np.int64]) -> TeacherCache:
        student, folder = self._student, self._folder / "teacher" / name
        return TeacherCache(folder, windows, self._teacher, k=student.top_k, temperature=student.temperature)

    def _fill_eval_cache(self, texts: DistillationTexts) -> TeacherCache:
        """Cache the teacher's distributions on held-out text, or on some training text if there is none."""
        eval_cache = self._cache("held-out", texts.held_out if len(texts.held_out) else texts.training[:8])
        return eval_cache.fill(accelerator=self._accelerator, title="teacher, held-out text", progress=self._progress)

    def _teacher_seconds(self, model: PreTrainedModel, eval_cache: TeacherCache, key: str) -> float | None:
        """Return the teacher's time on training text in seconds; None without a time limit.

        With t of T seconds for the teacher, at v tokens per second, the student, at u tokens per second, trains for
        u (T - t) / (v t) epochs. The fraction is kept on disk, so that a resumed run reads the same text.
        """
        if self._minutes is None:
            return None
        path, whole = self._folder / f"shares-{key[:16]}.json", 60 * self._minutes - eval_cache.seconds_spent
        try:
            share = msgspec.json.decode(path.read_bytes(), type=float)
        except (FileNotFoundError, msgspec.DecodeError):
            teacher_speed = len(eval_cache.windows) * self._length / max(eval_cache.seconds_spent, 1e-6)
            batch = min(len(eval_cache.windows), self._student.batch)
            world_size = self._accelerator.num_processes if self._accelerator else 1
            student_speed = world_size * training_speed(model, self._loss(model, eval_cache), batch, self._length)
            lowest, highest = TEACHER_SHARES
            share = min(max(student_speed / (student_speed + EPOCHS * teacher_speed), lowest), highest)
            if self._accelerator:  # by the main process's clock
                found = torch.tensor(share, dtype=torch.float64, device=self._device)
                share = float(accelerate.utils.broadcast(found))
            if self._first:
                with storage_errors(f"writing {path}"):
                    write_atomically(path, msgspec.json.encode(share))
        return share * whole

    def _initial_student(
        self, key: str, texts: DistillationTexts, eval_cache: TeacherCache
    ) -> tuple[PreTrainedModel, float | None]:
        """Return the initial student on the device, and its decoding time as a fraction of the starting member's."""
        folder = self._folder / f"start-{key[:16]}"
        if self._first and not sealed(folder):
            plain = Objective("forward", temperature=self._student.temperature)

            def distance(model: PreTrainedModel) -> float:
                bfloat16 = has_fast_bfloat16(model.device)
                loss = objective_loss(model, plain, self._teacher.vocabulary, bfloat16=bfloat16)
                return mean_loss(model, loss, eval_cache)

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

    def _set_zeros(self, model: PreTrainedModel, texts: DistillationTexts) -> None:
        """Prune the student's weights in one cut if the recipe does; training is the recovery."""
        prune = self._student.prune
        if prune is not None and prune.zeros:
            calibration = texts.training[: max(1, CALIBRATION_TOKENS // self._length)].tolist()
            options: dict[str, Any] = {"pattern": prune.pattern, "criterion": prune.criterion}
            sparsify(model, prune.zeros, windows=calibration, progress=self._progress, **options)

    def _loss(self, model: PreTrainedModel, cache: TeacherCache) -> DistillationLoss:
        student = self._student
        return DistillationLoss(
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
        self,
        model: PreTrainedModel,
        cache: TeacherCache,
        eval_cache: TeacherCache,
        key: str,
        seconds_spent: float,
        *,
        watch: bool,
    ) -> tuple[float, TrainingState]:
        """Train the model, in evaluation mode: dropout would add noise. Return the initial loss and the final state."""
        student, loss, seconds = self._student, self._loss(model, cache), None
        if self._minutes is not None:
            seconds = 60 * max(self._minutes - seconds_spent / 60, self._minutes * (1 - TEACHER_SHARES[1]) / 2)
        model.requires_grad_()
        pruned = student.prune is not None and student.prune.zeros
        with eager_attention(model, self._length), preserve_zeros(model) if pruned else nullcontext():
            before = loss.measure(eval_cache)
            state = train(
                loss,
                dict(model.named_parameters()),
                np.arange(len(cache.windows))[:, None],
                budget=TrainingBudget(student.steps, seconds),
                batch=student.batch,
                learning_rate=student.learning_rate,
                accumulate=student.accumulate,
                eight_bit=student.eight_bit_optimizer,
                validation=Validation(lambda: loss.measure(eval_cache)) if watch else None,
                before_step=loss.before_step,
                accelerator=self._accelerator,
                seed=self._recipe.seed,
                checkpoint=Checkpoint(self._folder / "training", key),
                title="distill",
                progress=self._progress,
            )
        return before, state

    def _finish(self, model: PreTrainedModel, record: _Record) -> None:
        """Write the student and its record, and delete what only an unfinished run needs."""
        with storage_errors(f"writing {self._folder}"):
            shutil.rmtree(self._folder / _MODEL, ignore_errors=True)
            save_member(model.to("cpu").requires_grad_(requires_grad=False), self._tokenizer, self._folder / _MODEL)
            write_atomically(self._folder / _REPORT, msgspec.json.encode(record))
            (self._folder / "training").unlink(missing_ok=True)
            for start in self._folder.glob("start-*"):
                shutil.rmtree(start)
