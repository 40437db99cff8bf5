"""Training under way, on disk: parameters, the optimiser's moments and a few numbers, which a killed run takes up."""

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
class State:
    """Where training stands.

    Attributes:
        steps: Optimiser steps taken.
        seconds: Time that they took, over all runs.
        loss: Running mean of the training loss, nats a token.
        measured: How often the validation loss was due, the start not counted; `best` is the lowest so far, `lowest`
            that without the start, `stale` counts those since.
    """

    steps: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    measured: int = -1
    best: float = math.inf
    lowest: float = math.inf
    stale: int = 0


class Checkpoint:
    """Training under way, in one safetensors file that is replaced atomically.

    Args:
        path: The file.
        key: Digest of everything that the run depends on; a checkpoint with another key is not taken up.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def save(
        self,
        state: State,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        best: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write parameters, optimiser moments, the best parameters where there are some, and state.

        Raises:
            EdgemixError: The disk refuses.
        """
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
        tensors |= {f"best/{name}": parameter for name, parameter in (best or {}).items()}
        for name, parameter in parameters.items():
            moments = optimizer.state.get(parameter, {})
            # bitsandbytes counts steps in an integer, and shares its tables of values between parameters.
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
    ) -> State | None:
        """Load what `save` wrote into parameters, optimiser and `best`; None if there is nothing that fits."""
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
            if best is not None and f"best/{name}" in tensors:
                best[name] = tensors[f"best/{name}"].to(parameter.device)
        for place, each in tensors.items():
            part, _, rest = place.partition("/")
            kind, _, name = rest.partition("/")
            if part == "moment":
                optimizer.state[parameters[name]][kind] = _moment(each, kind, parameters[name].device)
        return state

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _moment(value: Tensor, kind: str, device: torch.device) -> Tensor | int:
    """An optimiser's moment as it was before `Checkpoint.save`."""
    if kind != "step":
        return value.to(device)
    return value if value.is_floating_point() else int(value)
