"""Move scales between an activation's producer and the weights that read it; the model computes the same.

An activation x is divided by a scale s for each channel where it is made (a norm's gain, the rows of a linear), and the
columns of its readers are multiplied by it (AWQ, Lin et al., arXiv 2306.00978):  s_j = mean|x_j|^alpha  gives the
columns that are multiplied with much a finer grid, with the alpha that leaves the least error in the outputs.

`smoothing` does the like on the ONNX graph, for another purpose: it scales activations so that they round better to 8
bits, for the products that the graph really has. This one scales weights for 4-bit rounding, on the torch model, before
the rounding is learned or compensated for there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from edgemix.export.quantization.algorithms.rtn import rtn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from edgemix.export.models.layout import DecoderLayer, Norm, Part
    from edgemix.export.quantization.statistics.calibration import CalibratedLayer, Statistics

Place = Literal["attention", "output", "mlp", "down"]

_ALPHAS = tuple(0.1 * step for step in range(1, 10))
_TINY = 1e-5


@dataclass(frozen=True, eq=False)
class Fold:
    """An activation whose scale can be moved.

    Attributes:
        place: The readers: query, key and value; output; gate and up; down.
        readers: Name within the model -> whole linears that read it.
        repeats: (heads, times, channels): the activation [heads * times * channels] is made from [heads, channels]
            values, each read `times` times over, by the query heads of one key-value head.
        divide: Divides what makes the activation by a scale [heads * channels].
    """

    place: Place
    readers: dict[str, Part]
    repeats: tuple[int, int, int]
    divide: Callable[[Tensor], None]

    def shared(self, values: Tensor) -> Tensor:
        """Return the largest of values [K] among channels that share a scale, [heads * channels]."""
        return values.unflatten(0, self.repeats).amax(1).flatten()

    def spread(self, scale: Tensor) -> Tensor:
        """Expand a scale [heads * channels] to the activation's channels [K]."""
        heads, times, channels = self.repeats
        return scale.view(heads, 1, channels).expand(heads, times, channels).reshape(-1)

    def apply(self, scale: Tensor) -> Tensor:
        """Move a scale [heads * channels] from the activation into its readers; returns it for each channel [K]."""
        scale = scale.clamp(min=_TINY)
        spread = self.spread(scale)
        self.divide(scale)
        for part in self.readers.values():
            part.set_weight(part.weight * spread)
        return spread


def folds(layer: DecoderLayer) -> Iterator[Fold]:
    """Return the activations of a layer whose scales can be moved.

    What a feed-forward network without a gate makes is not among them: its activation function lies in between.
    """
    linears = layer.linears()

    def readers(*parts: Part) -> dict[str, Part]:
        modules = {part.module for part in parts}
        return {name: whole for name, whole in linears.items() if whole.module in modules}

    hidden = len(layer.attention_norm.gain)
    yield Fold(
        "attention", readers(*layer.attention_readers), (1, 1, hidden), lambda s: _divide_norm(layer.attention_norm, s)
    )
    yield Fold(
        "output",
        readers(layer.output),
        (layer.key_value_heads, layer.heads // layer.key_value_heads, layer.head_dim),
        lambda s: _divide_rows(layer.value, s),
    )
    yield Fold("mlp", readers(*layer.mlp_readers), (1, 1, hidden), lambda s: _divide_norm(layer.mlp_norm, s))
    if layer.gate is not None:
        channels = len(layer.up.weight)
        yield Fold("down", readers(layer.down), (1, 1, channels), lambda s: _divide_rows(layer.up, s))


def scale_weights(calibrated: CalibratedLayer, *, bits: int, block: int) -> dict[str, float]:
    """Apply AWQ to one layer, in place; its weights and statistics become those of the scaled inputs.

    Args:
        calibrated: From `calibration.calibrate`.
        bits: As the weights will have them.
        block: Likewise.

    Returns:
        Place -> the alpha taken; 0 where no scale was better than none.
    """

    def rounded(weight: Tensor) -> Tensor:
        values = rtn(weight.contiguous().cpu().numpy(), bits=bits, block=block, symmetric=False).dequantized()
        return torch.from_numpy(values).to(weight)

    taken: dict[str, float] = {}
    for fold in folds(calibrated.layer):
        statistics = {name: calibrated.statistics[name] for name in fold.readers}
        first = next(iter(statistics.values()))
        sizes = fold.shared(first.mean_absolute).clamp(min=_TINY)

        def error(scale: Tensor, fold: Fold = fold, statistics: dict[str, Statistics] = statistics) -> float:
            total = 0.0
            for name, part in fold.readers.items():
                weight, hessian = part.weight, statistics[name].hessian
                lost = weight - rounded(weight * scale) / scale
                total += float(((lost @ hessian) * lost).sum())
            return total

        best, least = (0.0, torch.ones_like(sizes)), error(torch.ones_like(first.mean_absolute))
        for alpha in _ALPHAS:
            scale = sizes**alpha
            scale = scale / (scale.amax() * scale.amin()).sqrt()
            if (found := error(fold.spread(scale))) < least:
                best, least = (alpha, scale), found
        taken[fold.place], scale = best
        if taken[fold.place]:
            spread = fold.apply(scale)
            for each in {id(each): each for each in statistics.values()}.values():  # some are shared
                each.divide(spread)
    return taken


def _divide_norm(norm: Norm, scale: Tensor) -> None:
    norm.set_gain(norm.gain / scale)
    if norm.bias is not None:
        norm.bias.div_(scale)


def _divide_rows(part: Part, scale: Tensor) -> None:
    part.set_weight(part.weight / scale[:, None])
    if part.bias is not None:
        part.set_bias(part.bias / scale)
