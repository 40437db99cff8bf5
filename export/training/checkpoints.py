"""Training checkpoints: parameters, optimizer moments and counters in one file, from which a killed run resumes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch

from edgemix.errors import storage_errors
from edgemix.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


@dataclass
class TrainingState:
    """Counters and losses of a training run.

    Attributes:
        steps: Optimizer steps taken.
        seconds: Time spent training, in seconds, over all runs.
        loss: Running mean of the training loss, in nats per token.
        measured: Number of the last validation: 0 before the first step, -1 before any.
        best: Lowest validation loss so far.
        lowest: Lowest validation loss after the first step.
        stale: Validations since `lowest` was reached.
    """

    steps: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    measured: int = -1
    best: float = math.inf
    lowest: float = math.inf
    stale: int = 0


class Checkpoint:
    """A checkpoint in one safetensors file, which is replaced atomically.

    Args:
        path: The file.
        key: Digest of everything that the run depends on; a checkpoint with another key is ignored.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def save(
        self,
        state: TrainingState,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        best: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write parameters, optimizer moments, state, and the best parameters if there are any.

        Raises:
            EdgemixError: The file cannot be written.
        """
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
        tensors |= {f"best/{name}": parameter for name, parameter in (best or {}).items()}
        for name, parameter in parameters.items():
            moments = optimizer.state.get(parameter, {})
            # bitsandbytes counts steps in an integer and shares its value tables between parameters.
            tensors |= {f"moment/{kind}/{name}": torch.as_tensor(each).clone() for kind, each in moments.items()}
        metadata = {"edgemix": json.dumps({"key": self._key, "state": asdict(state)})}
        with storage_errors(f"writing {self._path}"):
            write_atomically(
                self._path, safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()}, metadata)
            )

    def restore(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        best: dict[str, Tensor] | None = None,
    ) -> TrainingState | None:
        """Load a saved checkpoint into `parameters`, `optimizer` and `best`; return None if no valid one exists."""
        if not self._path.is_file():
            return None
        try:
            with safetensors.safe_open(self._path, "pt") as file:
                metadata = json.loads((file.metadata() or {})["edgemix"])
                if metadata["key"] != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            state = TrainingState(**metadata["state"])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError):
            return None
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter/{name}"])
            if best is not None and f"best/{name}" in tensors:
                best[name] = tensors[f"best/{name}"].to(parameter.device)
        for key, tensor in tensors.items():
            part, _, rest = key.partition("/")
            kind, _, name = rest.partition("/")
            if part == "moment":
                optimizer.state[parameters[name]][kind] = _moment(tensor, kind, parameters[name].device)
        return state

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _moment(value: Tensor, kind: str, device: torch.device) -> Tensor | int:
    """Convert a saved optimizer moment back to the type that the optimizer holds."""
    if kind != "step":
        return value.to(device)
    return value if value.is_floating_point() else int(value)
