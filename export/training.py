"""The training loop: AdamW under a budget of steps or time, kept by checkpoints that a killed run goes on from.

Everything random at a step depends on the seed and the step's number alone, so a checkpoint holds the parameters, the
optimiser's moments and three numbers; a run of so many steps ends the same whether it was interrupted or not.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from edgemix.bundle import write_atomically
from edgemix.errors import EdgemixError, InputError, storage_errors
from edgemix.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    Loss = Callable[[Tensor], Tensor]

WARM_UP = 0.06
"""Share of the budget in which the learning rate rises."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
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


@dataclass
class State:
    """Where training stands.

    Attributes:
        steps: Optimiser steps taken.
        seconds: Time that they took, over all runs.
        loss: Running mean of the training loss, nats a token.
    """

    steps: int = 0
    seconds: float = 0.0
    loss: float = math.nan


class Checkpoint:
    """Training under way, in one safetensors file that is replaced atomically.

    Args:
        path: The file.
        key: Digest of everything that the run depends on; a checkpoint with another key is not taken up.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def save(self, state: State, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Write parameters, optimiser moments and state.

        Raises:
            EdgemixError: The disk refuses.
        """
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            moments = optimizer.state.get(parameter, {})
            tensors |= {f"{kind}/{name}": moments[kind] for kind in moments}
        metadata = {"edgemix": json.dumps({"key": self._key, "state": asdict(state)})}
        with storage_errors(f"writing {self._path}"):
            write_atomically(
                self._path, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata)
            )

    def restore(self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> State | None:
        """Load what `save` wrote into parameters and optimiser; None if there is nothing that fits."""
        if not self._path.is_file():
            return None
        try:
            with safetensors.safe_open(self._path, "pt") as file:
                written = json.loads((file.metadata() or {})["edgemix"])
                if written["key"] != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            state = State(**written["state"])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter/{name}"])
            if f"exp_avg/{name}" in tensors:
                optimizer.state[parameter] = {
                    kind: tensors[f"{kind}/{name}"].to("cpu" if kind == "step" else parameter.device)
                    for kind in _MOMENTS
                }
        return state

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


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
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    title: str = "train",
    progress: Progress = SILENT,
) -> State:
    """Minimise `loss` over `parameters` with AdamW; the learning rate rises, then falls to zero as a half cosine.

    Args:
        loss: Token ids [batch, length] on the parameters' device -> mean loss, a scalar.
        parameters: Name -> what is trained, all on one device.
        windows: int64 [windows, length]; every epoch takes them in another order.
        budget: When to stop. Time includes that of the runs before an interruption.
        batch: Windows a step.
        learning_rate: At its highest.
        betas: AdamW's; so is `epsilon`.
        epsilon: Small against the gradients.
        seed: Of the order of the windows and of dropout.
        checkpoint: Where to go on from and where to keep the state: every minute, when interrupted and at the end.
        title: The stage's name for `progress`.
        progress: Hears of every step's loss.

    Raises:
        EdgemixError: The loss is no longer a number, or a checkpoint cannot be written.
        KeyboardInterrupt: As it came, once the checkpoint is written.
    """
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=betas, eps=epsilon, weight_decay=0.0)
    device = next(iter(parameters.values())).device
    state = (checkpoint.restore(parameters, optimizer) if checkpoint else None) or State()
    with progress.stage(title, 1.0) as task, torch.random.fork_rng([device] if device.type == "cuda" else []):
        task.advance(budget.used(state.steps, state.seconds), _note(state))
        saved = time.monotonic()
        try:
            while (used := budget.used(state.steps, state.seconds)) < 1:
                started = time.monotonic()
                ids = torch.from_numpy(windows[_order(len(windows), state.steps, batch, seed)]).to(device)
                torch.manual_seed(seed + state.steps)
                value = _gradients(loss, ids, parameters, state.steps)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate(used, state.steps)
                with _uninterrupted():
                    optimizer.step()
                    state.loss = value if state.steps == 0 else 0.9 * state.loss + 0.1 * value
                    state.steps += 1
                    state.seconds += time.monotonic() - started
                optimizer.zero_grad()
                task.advance(min(budget.used(state.steps, state.seconds), 1.0) - used, _note(state))
                if checkpoint and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                    checkpoint.save(state, parameters, optimizer)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if checkpoint:
                with _uninterrupted():
                    checkpoint.save(state, parameters, optimizer)
                progress.say(f"{title}: stopped after {state.steps} steps; the same call goes on from there")
            raise
        if checkpoint:
            checkpoint.save(state, parameters, optimizer)
    return state


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


def _gradients(loss: Loss, ids: Tensor, parameters: Mapping[str, Tensor], steps: int) -> float:
    value = loss(ids)
    if not torch.isfinite(value):
        raise EdgemixError(f"the training loss is {value.item()} at step {steps}", "Try a lower learning rate.")
    value.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), _LARGEST_GRADIENT)
    return float(value.detach())


def _order(windows: int, step: int, batch: int, seed: int) -> NDArray[np.int64]:
    """The indices of a step's windows: epochs follow each other without a gap, each a permutation."""
    places = np.arange(step * batch, (step + 1) * batch)
    return np.array([_epoch(windows, int(place) // windows, seed)[place % windows] for place in places], np.int64)


@lru_cache(maxsize=2)
def _epoch(windows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


def _note(state: State) -> str:
    return f"step {state.steps}, loss {state.loss:.3f}" if state.steps else ""


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
