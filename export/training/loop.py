"""The training loop: AdamW within a budget of steps or time, with checkpoints from which a killed run resumes.

Everything random in a step depends only on the seed and the step's number, so a run with a step budget gives the same
result whether it was interrupted or not.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Required, TypedDict, Unpack

import accelerate
import numpy as np
import torch

from edgemix.errors import EdgemixError, InputError
from edgemix.export.training.checkpoints import Checkpoint, TrainingState
from edgemix.progress import NO_PROGRESS, Progress

if torch.distributed.is_available():
    # Its functions take the current process group as a default argument. Imported later, by the first optimizer, they
    # would keep the group alive after its end, and its threads sometimes abort the process.
    import torch.distributed.nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor

    Loss = Callable[[Tensor], Tensor]

WARMUP_FRACTION = 0.06
"""Fraction of the budget over which the learning rate rises."""

_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_MAX_CHECKPOINT_TIME = 0.02
"""Largest fraction of the time spent writing checkpoints."""
_MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingBudget:
    """How long to train: optimizer steps, seconds, or whichever limit is reached first.

    Raises:
        InputError: No limit is given, or a limit is not above zero.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.steps, self.seconds) if limit is not None]
        if not given or any(not limit > 0 for limit in given):
            raise InputError("training needs a number of steps or minutes above zero")

    def used(self, steps: int, seconds: float) -> float:
        """Return the fraction of the budget that is used; 1 or more when it is exhausted."""
        fractions = [steps / self.steps] if self.steps else []
        if self.seconds:
            fractions.append(seconds / self.seconds)
        return max(fractions)


@dataclass(frozen=True)
class Validation:
    """A loss on held-out text, measured before the first step and during training. Training ends with the parameters
    that had the lowest one.

    Attributes:
        measure: Returns the loss with the current parameters.
        times: Number of measurements over the whole budget, not counting the one before the first step.
        patience: Number of measurements in a row without a new lowest loss after which training stops early.
    """

    measure: Callable[[], float]
    times: int = 20
    patience: int = 5


class StepOptions(TypedDict, total=False):
    """The fields of `StepSettings`, as keyword arguments."""

    batch: Required[int]
    learning_rate: Required[float]
    betas: tuple[float, float]
    epsilon: float
    accumulate: int
    eight_bit: bool
    seed: int


@dataclass(frozen=True)
class StepSettings:
    """How an optimizer step is taken, with AdamW.

    Attributes:
        batch: Windows per forward pass.
        learning_rate: Peak learning rate.
        betas: AdamW's coefficients of the running averages.
        epsilon: AdamW's term added to the denominator.
        accumulate: Batches whose gradients are accumulated for one step.
        eight_bit: Keep the moments in 8 bits (bitsandbytes).
        seed: Seed of the windows' order and of dropout.
    """

    batch: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    accumulate: int = 1
    eight_bit: bool = False
    seed: int = 0

    def optimizer(self, parameters: Mapping[str, Tensor], device: torch.device) -> torch.optim.Optimizer:
        """Return AdamW over parameters that are all on one device."""
        if self.eight_bit:
            from bitsandbytes.optim import AdamW8bit

            quantized: torch.optim.Optimizer = AdamW8bit(
                list(parameters.values()), lr=self.learning_rate, betas=self.betas, eps=self.epsilon, weight_decay=0.0
            )
            return quantized
        return torch.optim.AdamW(
            parameters.values(),
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.epsilon,
            weight_decay=0.0,
            fused=device.type == "cpu",  # one pass over memory: a fifth of the time
        )


def train(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    windows: NDArray[np.int64],
    *,
    budget: TrainingBudget,
    validation: Validation | None = None,
    before_step: Callable[[float], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    accelerator: Accelerator | None = None,
    checkpoint: Checkpoint | None = None,
    title: str = "train",
    progress: Progress = NO_PROGRESS,
    **options: Unpack[StepOptions],
) -> TrainingState:
    """Minimize `loss` over `parameters` with AdamW. The learning rate rises linearly, then falls as a half cosine to 0.

    Args:
        loss: Maps rows of `windows`, int64 [batch, length] on the parameters' device, to their mean loss, a scalar.
        parameters: Trained tensors by name, all on one device.
        windows: int64 [windows, length], shuffled anew each epoch.
        budget: When to stop. Time includes runs before an interruption.
        validation: Selects the best parameters and stops training early.
        before_step: Called before each step with the fraction of the budget that is used.
        after_step: Called with the number of steps taken, while Ctrl-C is deferred. It may change `parameters` that
            have no gradient; they are checkpointed with the others.
        accelerator: Processes that take a batch each and average their gradients. All must call this function with
            equal parameters and see the checkpoint at the same path; the main process writes it.
        checkpoint: Resumed from if it exists; written about every minute, when interrupted, and at the end.
        title: Title of the progress stage.
        progress: Progress callback.
        options: See `StepSettings`.

    Raises:
        EdgemixError: The loss is not finite, or a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; the checkpoint has been written.
    """
    several = accelerator if accelerator and accelerator.num_processes > 1 else None
    settings = StepSettings(**options)
    run = _TrainingLoop(loss, parameters, windows, budget, settings, validation, before_step, after_step, several)
    if checkpoint:
        run.resume(checkpoint)
    if accelerator and not accelerator.is_main_process:
        checkpoint = None
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        run.run(checkpoint, title, progress)
    run.restore_best()
    return run.state


@dataclass
class _TrainingLoop:
    """The arguments of `train`, and the state that changes from step to step.

    Attributes:
        accelerator: None for a single process.
        best: Parameters with the lowest validation loss so far; empty before the first validation.
    """

    loss: Loss
    parameters: Mapping[str, Tensor]
    windows: NDArray[np.int64]
    budget: TrainingBudget
    settings: StepSettings
    validation: Validation | None
    before_step: Callable[[float], None] | None
    after_step: Callable[[int], None] | None
    accelerator: Accelerator | None
    device: torch.device = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    state: TrainingState = field(default_factory=TrainingState, init=False)
    best: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = self.settings.optimizer(self.parameters, self.device)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, if there is one of this run."""
        self.state = checkpoint.restore(self.parameters, self.optimizer, self.best) or self.state

    def restore_best(self) -> None:
        """Give the parameters their values at the lowest validation loss, if it was measured."""
        with torch.no_grad():
            for name, parameter in self.best.items():
                self.parameters[name].copy_(parameter)

    def run(self, checkpoint: Checkpoint | None, title: str, progress: Progress) -> None:
        """Train until the budget is used or validation stops improving, and write checkpoints.

        Raises:
            EdgemixError, KeyboardInterrupt: See `train`.
        """
        state, patience = self.state, self.validation.patience if self.validation else math.inf
        done, saved, pause = 0.0, time.monotonic(), _SECONDS_BETWEEN_CHECKPOINTS
        with progress.stage(title, 1.0) as task:
            try:
                while True:
                    self.validate()
                    used = self.used()
                    task.advance(min(used, 1.0) - done, _note(state))
                    done = min(used, 1.0)
                    if used >= 1 or state.stale >= patience:
                        break
                    self.step(used)
                    if checkpoint and time.monotonic() - saved > pause:
                        started = time.monotonic()
                        checkpoint.save(state, self.parameters, self.optimizer, self.best)
                        saved = time.monotonic()
                        pause = max(_SECONDS_BETWEEN_CHECKPOINTS, (saved - started) / _MAX_CHECKPOINT_TIME)
            except KeyboardInterrupt:
                if checkpoint:
                    with _defer_interrupts():
                        checkpoint.save(state, self.parameters, self.optimizer, self.best)
                    progress.log(f"{title}: stopped after {state.steps} steps; the same call resumes from there")
                raise
            if checkpoint:
                checkpoint.save(state, self.parameters, self.optimizer, self.best)

    def used(self) -> float:
        """Return the fraction of the budget used, by the main process's clock: all must stop at the same step."""
        used = self.budget.used(self.state.steps, self.state.seconds)
        if self.accelerator is None:
            return used
        return float(accelerate.utils.broadcast(torch.tensor(used, dtype=torch.float64, device=self.device)))

    def step(self, used: float) -> None:
        """Take one optimizer step. Parameters, moments and state change together or not at all."""
        state, settings, started = self.state, self.settings, time.monotonic()
        if self.before_step:
            self.before_step(used)
        rank, world_size = (
            (self.accelerator.process_index, self.accelerator.num_processes) if self.accelerator else (0, 1)
        )
        indices = _batch_indices(
            len(self.windows), state.steps, settings.batch * settings.accumulate * world_size, settings.seed
        )
        ids = torch.from_numpy(self.windows[indices[rank::world_size]]).to(self.device)
        torch.manual_seed(settings.seed + state.steps * world_size + rank)
        value = self._gradients(ids.split(settings.batch))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(used, state.steps)
        with _defer_interrupts():
            self.optimizer.step()
            if self.after_step:
                self.after_step(state.steps + 1)
            state.loss = value if state.steps == 0 else 0.9 * state.loss + 0.1 * value
            state.steps += 1
            state.seconds += time.monotonic() - started
        self.optimizer.zero_grad()

    def validate(self) -> None:
        """Measure the validation loss if it is due, and keep the parameters if it is the lowest so far."""
        state, started = self.state, time.monotonic()
        if self.validation is None or (due := int(self.used() * self.validation.times + 1e-9)) <= state.measured:
            return
        measured = self.validation.measure()
        with _defer_interrupts():
            state.measured = due
            if due:  # first steps may lead away from a good start
                state.stale = 0 if measured < state.lowest else state.stale + 1
                state.lowest = min(state.lowest, measured)
            if measured < state.best:
                state.best = measured
                self.best.update({name: each.detach().clone() for name, each in self.parameters.items()})
            state.seconds += time.monotonic() - started

    def _gradients(self, batches: Sequence[Tensor]) -> float:
        """Return the mean loss over batches and processes; its clipped gradients are in the parameters."""
        total = 0.0
        for batch in batches:
            value = self.loss(batch)
            if not torch.isfinite(value):
                raise EdgemixError(
                    f"the training loss is {value.item()} at step {self.state.steps}", "Try a lower learning rate."
                )
            (value / len(batches) if len(batches) > 1 else value).backward()
            total += float(value.detach()) / len(batches)
        if self.accelerator:
            for parameter in self.parameters.values():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.device), "mean"))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _MAX_GRADIENT_NORM)
        return total


def learning_rate_factor(used: float, steps: int) -> float:
    """Return the learning rate as a fraction of its peak, given the fraction of the budget used.

    Linear warm-up over `WARMUP_FRACTION` (0.1 at the first step, before which no time is used), then a half cosine.
    """
    warmup = min(1.0, max(used / WARMUP_FRACTION, 0.1 * (steps + 1)))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(used, 1.0)))


def fingerprint(model: torch.nn.Module) -> str:
    """Return a digest that distinguishes models without reading all of their weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some)
    return digest.hexdigest()


def _batch_indices(windows: int, step: int, batch: int, seed: int) -> NDArray[np.int64]:
    """Return the window indices of a step: int64 [batch]. Epochs are permutations that follow without a gap."""
    positions = np.arange(step * batch, (step + 1) * batch)
    return np.array([_epoch_permutation(windows, int(at) // windows, seed)[at % windows] for at in positions], np.int64)


@lru_cache(maxsize=2)
def _epoch_permutation(windows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def _note(state: TrainingState) -> str:
    if not state.steps:
        return ""
    best = "" if math.isinf(state.best) else f", best on held-out text {state.best:.3f}"
    return f"step {state.steps}, loss {state.loss:.3f}{best}"


@contextmanager
def _defer_interrupts() -> Iterator[None]:
    """Defer Ctrl-C until the block is done, so that parameters and moments are never half updated."""
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread only
        yield
        return
    held: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt
