"""The training loop: AdamW under a budget of steps or time, kept by checkpoints that a killed run goes on from.

Everything random at a step depends on the seed and the step's number alone, so a run of so many steps ends the same
whether it was interrupted or not.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import accelerate
import numpy as np
import torch

from edgemix.errors import EdgemixError, InputError
from edgemix.export.training.checkpoints import Checkpoint, State
from edgemix.progress import NO_PROGRESS, Progress

if torch.distributed.is_available():
    # Its functions have the process group of the moment as their default: imported later, by the first optimiser, they
    # keep the group alive after its end, and its threads abort the process now and then.
    import torch.distributed.nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor

    Loss = Callable[[Tensor], Tensor]

WARM_UP = 0.06
"""Share of the budget in which the learning rate rises."""

_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_SHARE_OF_CHECKPOINTS = 0.02
"""Most of the time that may go into writing checkpoints."""
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Budget:
    """How long to train: so many optimiser steps, so many seconds, or whichever ends first.

    Raises:
        InputError: Neither is given, or one is not above zero.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = [limit for limit in (self.steps, self.seconds) if limit is not None]
        if not given or any(not limit > 0 for limit in given):
            raise InputError("training needs a number of steps or minutes above zero")

    def used(self, steps: int, seconds: float) -> float:
        """Share of the budget that is used up, 1 or more at its end."""
        shares = [steps / self.steps] if self.steps else []
        if self.seconds:
            shares.append(seconds / self.seconds)
        return max(shares)


@dataclass(frozen=True)
class Validation:
    """A loss on text that is held out, measured before the first step and while training goes on. What measured best is
    what training ends with.

    Attributes:
        measure: The loss with the parameters as they are.
        times: How often, over the whole budget, the start not counted.
        patience: Training ends early after so many measurements in a row without a new best one.
    """

    measure: Callable[[], float]
    times: int = 20
    patience: int = 5


def train(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    windows: NDArray[np.int64],
    *,
    budget: Budget,
    batch: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    accumulate: int = 1,
    eight_bit: bool = False,
    validation: Validation | None = None,
    before_step: Callable[[float], None] | None = None,
    after_step: Callable[[int], None] | None = None,
    workers: Accelerator | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    title: str = "train",
    progress: Progress = NO_PROGRESS,
) -> State:
    """Minimise `loss` over `parameters` with AdamW; the learning rate rises, then falls to zero as a half cosine.

    Args:
        loss: Rows of `windows` (token ids [batch, length]) on the parameters' device -> mean loss, a scalar.
        parameters: Name -> what is trained, all on one device.
        windows: int64 [windows, length]; every epoch takes them in another order.
        budget: When to stop. Time includes that of the runs before an interruption.
        batch: Windows whose loss is computed at once.
        learning_rate: At its highest.
        betas: AdamW's; so is `epsilon`.
        epsilon: Small against the gradients.
        accumulate: Batches whose gradients make a step.
        eight_bit: Keep the moments in 8 bits (bitsandbytes).
        validation: Tells which parameters are best, and when there is no more to gain.
        before_step: Told before each step what share of the budget is used.
        after_step: Told with each step, Ctrl-C held back, how many were taken; may change `parameters` that have no
            gradient, which are kept with the others.
        workers: Processes that take a batch each and share their gradients; they must all call this, on equal
            parameters, and see the checkpoint at the same path. The first one writes it.
        seed: Of the order of the windows and of dropout.
        checkpoint: Where to go on from and where to keep the state: every minute or so, when interrupted, at the end.
        title: The stage's name for `progress`.
        progress: Hears of every step's loss.

    Raises:
        EdgemixError: The loss is no longer a number, or a checkpoint cannot be written.
        KeyboardInterrupt: As it came, once the checkpoint is written.
    """
    device = next(iter(parameters.values())).device
    optimizer = _optimizer(parameters, device, learning_rate, betas, epsilon, eight_bit=eight_bit)
    best: dict[str, Tensor] = {}
    state = (checkpoint.restore(parameters, optimizer, best) if checkpoint else None) or State()
    run = _Run(
        loss=loss,
        parameters=parameters,
        windows=windows,
        budget=budget,
        batch=batch,
        learning_rate=learning_rate,
        accumulate=accumulate,
        validation=validation,
        before_step=before_step,
        after_step=after_step,
        workers=workers if workers and workers.num_processes > 1 else None,
        seed=seed,
        optimizer=optimizer,
        device=device,
        state=state,
        best=best,
    )
    if workers and not workers.is_main_process:
        checkpoint = None
    with progress.stage(title, 1.0) as task, torch.random.fork_rng([device] if device.type == "cuda" else []):
        done = 0.0
        saved, pause = time.monotonic(), _SECONDS_BETWEEN_CHECKPOINTS
        try:
            while True:
                run.validate()
                used = run.used()
                task.advance(min(used, 1.0) - done, _note(state))
                done = min(used, 1.0)
                if used >= 1 or (validation and state.stale >= validation.patience):
                    break
                run.step(used)
                if checkpoint and time.monotonic() - saved > pause:
                    started = time.monotonic()
                    checkpoint.save(state, parameters, optimizer, best)
                    saved = time.monotonic()
                    pause = max(_SECONDS_BETWEEN_CHECKPOINTS, (saved - started) / _SHARE_OF_CHECKPOINTS)
        except KeyboardInterrupt:
            if checkpoint:
                with _uninterrupted():
                    checkpoint.save(state, parameters, optimizer, best)
                progress.log(f"{title}: stopped after {state.steps} steps; the same call goes on from there")
            raise
        if checkpoint:
            checkpoint.save(state, parameters, optimizer, best)
    with torch.no_grad():
        for name, parameter in best.items():
            parameters[name].copy_(parameter)
    return state


@dataclass
class _Run:
    """`train` under way: its arguments, and what changes from step to step.

    Attributes:
        workers: None for one process.
        best: The parameters that measured best so far; empty before the first measurement.
    """

    loss: Loss
    parameters: Mapping[str, Tensor]
    windows: NDArray[np.int64]
    budget: Budget
    batch: int
    learning_rate: float
    accumulate: int
    validation: Validation | None
    before_step: Callable[[float], None] | None
    after_step: Callable[[int], None] | None
    workers: Accelerator | None
    seed: int
    optimizer: torch.optim.Optimizer
    device: torch.device
    state: State
    best: dict[str, Tensor]

    def used(self) -> float:
        """Share of the budget that is used up, by the first worker's clock: all must stop at the same step."""
        used = self.budget.used(self.state.steps, self.state.seconds)
        if self.workers is None:
            return used
        return float(accelerate.utils.broadcast(torch.tensor(used, dtype=torch.float64, device=self.device)))

    def step(self, used: float) -> None:
        """One step of the optimiser; parameters, moments and state change together, or not at all."""
        state, started = self.state, time.monotonic()
        if self.before_step:
            self.before_step(used)
        place, places = (self.workers.process_index, self.workers.num_processes) if self.workers else (0, 1)
        order = _order(len(self.windows), state.steps, self.batch * self.accumulate * places, self.seed)
        ids = torch.from_numpy(self.windows[order[place::places]]).to(self.device)
        torch.manual_seed(self.seed + state.steps * places + place)
        value = self._gradients(ids.split(self.batch))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate(used, state.steps)
        with _uninterrupted():
            self.optimizer.step()
            if self.after_step:
                self.after_step(state.steps + 1)
            state.loss = value if state.steps == 0 else 0.9 * state.loss + 0.1 * value
            state.steps += 1
            state.seconds += time.monotonic() - started
        self.optimizer.zero_grad()

    def validate(self) -> None:
        """Measure if that is due, and keep the parameters if they are the best so far."""
        state, started = self.state, time.monotonic()
        if self.validation is None or (due := int(self.used() * self.validation.times + 1e-9)) <= state.measured:
            return
        measured = self.validation.measure()
        with _uninterrupted():
            state.measured = due
            if due:  # first steps may lead away from a good start
                state.stale = 0 if measured < state.lowest else state.stale + 1
                state.lowest = min(state.lowest, measured)
            if measured < state.best:
                state.best = measured
                self.best.update({name: each.detach().clone() for name, each in self.parameters.items()})
            state.seconds += time.monotonic() - started

    def _gradients(self, batches: Sequence[Tensor]) -> float:
        """The mean loss over batches and workers; its gradients, clipped, are in the parameters."""
        total = 0.0
        for batch in batches:
            value = self.loss(batch)
            if not torch.isfinite(value):
                raise EdgemixError(
                    f"the training loss is {value.item()} at step {self.state.steps}", "Try a lower learning rate."
                )
            (value / len(batches) if len(batches) > 1 else value).backward()
            total += float(value.detach()) / len(batches)
        if self.workers:
            for parameter in self.parameters.values():
                parameter.grad = self.workers.reduce(parameter.grad, "mean")
            total = float(self.workers.reduce(torch.tensor(total, device=self.device), "mean"))
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _LARGEST_GRADIENT)
        return total


def rate(used: float, steps: int) -> float:
    """The learning rate's share of its highest value, by the share of the budget used.

    Linear warm-up over `WARM_UP` (from the first step's tenth, as no time is used before it), then a half cosine.
    """
    rise = min(1.0, max(used / WARM_UP, 0.1 * (steps + 1)))
    return rise * 0.5 * (1 + math.cos(math.pi * min(used, 1.0)))


def fingerprint(model: torch.nn.Module) -> str:
    """A digest that tells models apart without reading all of their weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some)
    return digest.hexdigest()


def _optimizer(
    parameters: Mapping[str, Tensor],
    device: torch.device,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    *,
    eight_bit: bool,
) -> torch.optim.Optimizer:
    if eight_bit:
        from bitsandbytes.optim import AdamW8bit

        quantized: torch.optim.Optimizer = AdamW8bit(
            list(parameters.values()), lr=learning_rate, betas=betas, eps=epsilon, weight_decay=0.0
        )
        return quantized
    return torch.optim.AdamW(
        parameters.values(),
        lr=learning_rate,
        betas=betas,
        eps=epsilon,
        weight_decay=0.0,
        fused=device.type == "cpu",  # one pass over memory, a fifth of the time
    )


def _order(windows: int, step: int, batch: int, seed: int) -> NDArray[np.int64]:
    """The indices of a step's windows: epochs follow each other without a gap, each a permutation."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([_epoch(windows, int(place) // windows, seed)[place % windows] for place in places], np.int64)


@lru_cache(maxsize=2)
def _epoch(windows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def _note(state: State) -> str:
    if not state.steps:
        return ""
    best = "" if math.isinf(state.best) else f", best on held-out text {state.best:.3f}"
    return f"step {state.steps}, loss {state.loss:.3f}{best}"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that parameters and moments are never half updated."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets it
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
