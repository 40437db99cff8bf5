"""Statistics of the inputs of a model's linears on calibration text, layer by layer.

The statistics of one layer are in memory at a time, and each layer reads the outputs of the quantized layers before it,
as in GPTQ (Frantar et al., arXiv 2210.17323): it then compensates for their errors.

Not every output matters equally. With g the gradient of the model's own loss (labels drawn from its distributions) at a
linear's outputs, weighting each token by |g|^2 turns the squared error of outputs into the loss's second order, up to
the direction of g (as in GuidedQuant, Kim et al., arXiv 2505.07004). Measured on the wiki expert of SmolLM2-135M, every
fourth window of WikiText-2's test, GPTQ to 4 bits in blocks of 32: 14.70 without weights, 14.49 to 14.63 with (fp32
13.95, rounded 16.61).

`activations` observes the finished ONNX graph instead. There are two systems because each sees what the other cannot:
GPTQ needs a layer's inputs after the layers before it were quantized, and gradients, which only the torch model has;
8-bit activations and the 8-bit cache need the values of the graph's own tensors, which exist only there.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from edgemix.errors import InputError
from edgemix.export.models.layout import DecoderLayer, Layout, Part, layout
from edgemix.export.training.token_loss import has_fast_bfloat16
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

WINDOWS, LENGTH = 32, 512
"""Default calibration text: 16,384 tokens, ten for each input of a matrix with 1,536."""

BATCH_TOKENS = 2048
"""Tokens that a layer reads at once."""


@dataclass
class Statistics:
    """Statistics of one linear's inputs x [K].

    Attributes:
        hessian: fp32 [K, K], 2 / n sum x x^T, each token with its weight: the second derivative of the mean squared
            output error by a weight row.
        mean_absolute: fp32 [K], the mean |x|.
        tokens: n.
    """

    hessian: Tensor
    mean_absolute: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, columns: int, device: torch.device) -> Statistics:
        """Return the statistics of no inputs."""
        return cls(torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device))

    def add(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs [..., K]; `weights` are those of all tokens, of which the next ones are used."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        weighted = rows if weights is None else rows * weights[self.tokens : self.tokens + len(rows), None]
        kept = self.tokens / (self.tokens + len(rows))
        self.tokens += len(rows)
        self.hessian.addmm_(weighted.T, rows, beta=kept, alpha=2 / self.tokens)
        self.mean_absolute.mul_(kept).add_(rows.abs().sum(0), alpha=1 / self.tokens)

    def divide(self, scale: Tensor) -> None:
        """Turn into the statistics of inputs divided by a scale [K]."""
        self.hessian.div_(scale).div_(scale[:, None])
        self.mean_absolute.div_(scale)


class Gradients(NamedTuple):
    """Gradients of the model's loss at one linear's outputs y [tokens, N].

    Attributes:
        tokens: fp32 [tokens], the squared norm of d loss / d y of each, in the order of `calibrate`.
        rows: fp32 [N], the mean square over tokens of each output's.
    """

    tokens: Tensor
    rows: Tensor


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer and its inputs; its weights may be replaced until the next layer is requested.

    Attributes:
        layer: The layer.
        linears: Name within the model -> linear.
        statistics: Name -> what it read. Without gradients, linears that read the same tensor share one object.
        run: Computes what the layer makes of calibration windows, with the weights as they are at that time: hidden
            states [batch, length, hidden], one after the other.
    """

    layer: DecoderLayer
    linears: dict[str, Part]
    statistics: dict[str, Statistics]
    run: Callable[[], Iterator[Tensor]]


def calibrate(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    parts: Layout | None = None,
    gradients: Mapping[str, Gradients] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[CalibratedLayer]:
    """Iterate over a decoder's layers with the statistics of each.

        for calibrated in calibrate(model, windows):
            for name, part in calibrated.linears.items():
                part.set_weight(quantized(part.weight, calibrated.statistics[name].hessian))

    Args:
        model: In evaluation mode; runs where its weights lie.
        windows: Token ids, of calibration text.
        parts: The model's layout, if it is known already.
        gradients: From `output_gradients` on the same windows: weights of tokens.
        progress: Progress callback.

    Raises:
        InputError: There are no windows, or the model's structure is not known.
    """
    parts = layout(model) if parts is None else parts
    states, options = _first_states(model, parts, windows)
    with progress.stage("calibrate", len(parts.layers)) as task:
        for index, layer in enumerate(parts.layers):

            def run(index: int = index, layer: DecoderLayer = layer) -> Iterator[Tensor]:
                for state in states:
                    yield _run(layer, state, options[state.shape[:2]][index])

            yield CalibratedLayer(layer, layer.linears(), _observe(layer, run, gradients), run)
            for position, state in enumerate(run()):
                states[position] = state
            task.advance(note=layer.name)


def output_gradients(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    parts: Layout | None = None,
    seed: int = 0,
    progress: Progress = NO_PROGRESS,
) -> dict[str, Gradients]:
    """Compute the gradients of the loss at each linear's outputs, by the linear's name.

    The loss is the summed negative log-probability of tokens that the model itself would say next: the mean square of
    its gradient is the Fisher information, which is the second derivative of KL(model || changed model).

    Args:
        model: In evaluation mode.
        windows: Token ids, of calibration text.
        parts: The model's layout, if it is known already.
        seed: Of the tokens drawn.
        progress: Progress callback.
    """
    parts = layout(model) if parts is None else parts
    linears = parts.linears()
    norms: dict[str, list[Tensor]] = {name: [] for name in linears}
    squares = {name: torch.zeros(len(part.weight), device=part.weight.device) for name, part in linears.items()}
    generator = torch.Generator(model.device).manual_seed(seed)

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: object, outputs: tuple[Tensor, ...]) -> None:
            square = outputs[0].flatten(0, -2).float().square()
            norms[name].append(square.sum(1))
            squares[name] += square.sum(0)

        return look

    def begin(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output.detach().requires_grad_()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack, progress.stage("gradients", len(windows)) as task:
        for parameter in trained:
            stack.callback(parameter.requires_grad_(False).requires_grad_)
        stack.callback(parts.embedding.register_forward_hook(begin).remove)
        for name, part in linears.items():
            stack.callback(part.module.register_full_backward_hook(hook(name)).remove)
        stack.enter_context(torch.enable_grad())
        for ids in (window[None] for batch in _batches(windows, model.device) for window in batch):
            with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bfloat16(model.device)):
                logits = model(input_ids=ids, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            functional.cross_entropy(logits, drawn, reduction="sum").backward()
            task.advance()
    tokens = sum(len(window) for window in windows)
    return {name: Gradients(torch.cat(norms[name]), squares[name] / tokens) for name in linears}


def _observe(
    layer: DecoderLayer, run: Callable[[], Iterator[Tensor]], gradients: Mapping[str, Gradients] | None
) -> dict[str, Statistics]:
    """Compute the statistics of a layer's linears; without weights, once for those that read the same tensor."""
    linears = layer.linears()
    groups = layer.groups() if gradients is None else [(name,) for name in linears]
    found: dict[str, Statistics] = {}
    with ExitStack() as hooks:
        for group in groups:
            part, weights = linears[group[0]], None
            statistics = Statistics.of(part.weight.shape[1], part.weight.device)
            found.update(dict.fromkeys(group, statistics))
            if gradients is not None:
                weights = gradients[group[0]].tokens
                weights = weights / weights.mean() if bool(weights.any()) else torch.ones_like(weights)

            def look(
                _: nn.Module,
                inputs: tuple[Tensor, ...],
                statistics: Statistics = statistics,
                weights: Tensor | None = weights,
            ) -> None:
                statistics.add(inputs[0], weights)

            hooks.callback(part.module.register_forward_pre_hook(look).remove)
        for _ in run():
            pass
    return {name: found[name] for name in linears}


class _Arguments(NamedTuple):
    """Arguments of a layer's call beside its hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _Reached(Exception):  # noqa: N818 - it ends a run early, nothing failed
    """The first layer was reached; the rest of the model need not run."""


def _first_states(
    model: PreTrainedModel, parts: Layout, windows: Sequence[Sequence[int]]
) -> tuple[list[Tensor], dict[torch.Size, list[_Arguments]]]:
    """What the first layer reads, for each batch; and for each shape of batch the other arguments of each layer.

    Masks and positions are the same for all batches of one shape, because windows have no padding, but may differ
    from layer to layer (sliding windows).
    """
    states: list[Tensor] = []
    options: dict[torch.Size, list[_Arguments]] = {}
    with ExitStack() as hooks:
        seen: list[_Arguments] = []

        def look(module: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
            named = dict(keywords)
            state, *rest = inputs or (named.pop("hidden_states"),)
            if module is parts.layers[0].module:
                states.append(state)
                if state.shape[:2] in options:
                    raise _Reached
            seen.append(_Arguments(tuple(rest), named))

        for layer in parts.layers:
            hooks.callback(layer.module.register_forward_pre_hook(look, with_kwargs=True).remove)
        for batch in _batches(windows, model.device):
            with torch.no_grad():
                try:
                    model.base_model(input_ids=batch, use_cache=False)
                except _Reached:
                    continue
            options[batch.shape], seen = seen, []
    return states, options


def _run(layer: DecoderLayer, state: Tensor, arguments: _Arguments) -> Tensor:
    with torch.no_grad(), torch.autocast(state.device.type, torch.bfloat16, enabled=has_fast_bfloat16(state.device)):
        made = layer.module(state, *arguments.positional, **arguments.named)
    return (made if isinstance(made, torch.Tensor) else made[0]).to(state.dtype)


def _batches(windows: Sequence[Sequence[int]], device: torch.device) -> Iterator[Tensor]:
    """Yield int64 [batch, length] of chunks of one length each."""
    if not windows:
        raise InputError("there is no calibration text", "Give the recipe's data.calibration more text.")
    waiting = sorted(windows, key=len, reverse=True)
    while waiting:
        length = len(waiting[0])
        count = min(max(1, BATCH_TOKENS // length), sum(len(window) == length for window in waiting))
        yield torch.tensor([list(window) for window in waiting[:count]], device=device)
        waiting = waiting[count:]
