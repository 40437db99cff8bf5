"""The initial student: a member cut to a fraction of its decoding time, or random weights from a configuration.

Where members are fine-tunes of one model, the weighted mean of their weights can be closer to their mixture than any of
them (model soups, arXiv 2203.05482); then the student is cut from that mean. The first two and the last two layers are
kept, and others at even steps between them. Then each kept layer's feed-forward network is fitted by least squares to
add what the removed layers after it would have added. Without any training, a third of SmolLM2-135M's layers then
predicts 31% of its next tokens, and 4% without the fit.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig

from edgemix.errors import InputError
from edgemix.export.models.layout import layout
from edgemix.export.models.loading import MemberLoader
from edgemix.export.pruning.importance import Importance, importance
from edgemix.export.pruning.structure import Sizes, Structure
from edgemix.export.pruning.structured import cut, sizes
from edgemix.formats import FORMAT_SPECS, HEAD_FORMAT
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.compression import Student
from edgemix.recipe.validation import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.formats import Format, Target
    from edgemix.recipe.schema import MemberRecipe, Recipe

SHARE = 0.3
"""Default student's decoding time as a fraction of a member's, by `decoding_cost`: at most a third on any machine."""

_LAYER = 1.14e6
"""Cost of a layer beside its weights (norms, attention, kernel launches), as an equivalent number of bytes read."""
_HEAD = 0.55
"""Cost of a byte of the head's large matrix, relative to a byte of a layer's."""
_DAMPING = 1e-2
"""Fraction of the moment's mean diagonal added to its diagonal: calibration text does not span all directions."""
CALIBRATION_TOKENS = 16_384
"""Tokens on which importance is measured and layers are fitted."""


class Shape(NamedTuple):
    """Sizes that determine a decoder's speed: layers, weights of a layer's attention and feed-forward, and the head."""

    layers: int
    attention: float
    ffn: float
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel, sizes: Sizes | None = None) -> Shape:
        """Return a model's shape, or its shape after being cut to `sizes`."""
        parts, now = layout(model), Structure(model).sizes
        sizes, layer = sizes or now, parts.layers[0]
        attention = sum(part.weight.numel() for part in (*layer.attention_readers, layer.output))
        ffn = sum(part.weight.numel() for part in (*layer.mlp_readers, layer.down))
        heads, channels = sizes.key_value_heads / now.key_value_heads, sizes.ffn / now.ffn
        return cls(sizes.layers, attention * heads, ffn * channels, parts.head.weight.numel())


def decoding_cost(shape: Shape, weight_format: Format, target: Target) -> float:
    """Estimate the cost of decoding a token, in bytes read; only ratios are meaningful.

    Fitted to SmolLM2-135M and cuts of it on two cores, within 5% of their times: 30 layers take 7.1 ms in int8 and 4.8
    in int4, 10 layers 2.1, 6 layers 1.5, 14 layers with 640 channels 2.2.

    Args:
        shape: Of the model.
        weight_format: Format of its graph.
        target: Where that runs.
    """
    row = FORMAT_SPECS[weight_format]
    head_row = row if row.floating_point else FORMAT_SPECS[HEAD_FORMAT]
    each, head = (each.gpu_cost if target == "cuda" else each.cpu_cost for each in (row, head_row))
    return shape.layers * ((shape.attention + shape.ffn) * each + _LAYER) + _HEAD * shape.head * head


def default_layers(shape: Shape, member: Format, student: Format, target: Target) -> int:
    """Return how many of a member's layers decode in the fraction `SHARE` of its time; at least two."""
    most = SHARE * decoding_cost(shape, member, target)
    counts = range(2, shape.layers + 1)
    fitting = [layers for layers in counts if decoding_cost(shape._replace(layers=layers), student, target) <= most]
    return max(fitting, default=min(2, shape.layers))


class InitialStudent(NamedTuple):
    """A student before training.

    Attributes:
        model: fp32, on the CPU, in evaluation mode.
        decoding: Decoding time as a fraction of the starting member's, each in its format; None for random weights.
    """

    model: PreTrainedModel
    decoding: float | None


def new_student(
    recipe: Recipe,
    weights: Mapping[str, float],
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    *,
    distance: Callable[[PreTrainedModel], float],
    progress: Progress = NO_PROGRESS,
) -> InitialStudent:
    """Build the initial student that a recipe describes.

    Args:
        recipe: A recipe with a student.
        weights: Weights by member name.
        tokenizer: The members' tokenizer.
        windows: Training text for measuring importance and fitting layers, int64 [windows, length].
        distance: Returns a model's divergence from the mixture.
        progress: Progress callback.

    Raises:
        InputError: A member or the configuration cannot be read, or the model's structure is not supported.
    """
    student = recipe.student
    if student is None:
        raise InputError("the recipe has no student", "Add student: to it.")
    if student.config is not None:
        return InitialStudent(_random_model(recipe, student.config, tokenizer), None)
    spec, model = _starting_model(recipe, weights, distance, progress)
    weight_format = spec.format or recipe.format
    to = _target_sizes(model, student, weight_format, recipe.target)
    calibration = windows[: max(1, CALIBRATION_TOKENS // windows.shape[1])]
    cost = decoding_cost(Shape.of(model, to), student.format, recipe.target)
    share = cost / decoding_cost(Shape.of(model), weight_format, recipe.target)
    return InitialStudent(shrink(model, to, calibration, progress), share)


def expected_shape(
    recipe: Recipe, weights: Mapping[str, float], tokenizer: PreTrainedTokenizerBase, weight_format: Format
) -> Shape:
    """Return the shape that a recipe's student will have.

    Args:
        recipe: A recipe, with a student or the default one.
        weights: Weights by member name.
        tokenizer: The members' tokenizer.
        weight_format: Format of the graph of the member that it is cut from.

    Raises:
        InputError: As `new_student`.
    """
    student = recipe.student or Student()
    if student.config is not None:
        return Shape.of(_random_model(recipe, student.config, tokenizer))
    model = MemberLoader(recipe.folder).load(start_member(recipe, weights)).model
    return Shape.of(model, _target_sizes(model, student, weight_format, recipe.target))


def start_member(recipe: Recipe, weights: Mapping[str, float]) -> MemberRecipe:
    """Return the member that gives the student's shape: the one that the recipe names, or the one of most weight."""
    named = recipe.student.start if recipe.student is not None else None
    if named is not None:
        return next(spec for spec in recipe.members if spec.name == named)
    return max(recipe.members, key=lambda spec: weights.get(spec.name, 0.0))


def _target_sizes(model: PreTrainedModel, student: Student, weight_format: Format, target: Target) -> Sizes:
    """Return the sizes that a model with a graph in a format is cut to."""
    if student.prune is not None:
        return sizes(model, student.prune)
    layers = default_layers(Shape.of(model), weight_format, student.format, target)
    return replace(Structure(model).sizes, layers=layers)


def shrink(model: PreTrainedModel, to: Sizes, windows: Tensor, progress: Progress = NO_PROGRESS) -> PreTrainedModel:
    """Return a new model cut to sizes, with fitted layers; `model` is not changed.

    Raises:
        InputError: The model's structure is not supported, or its class does not support these sizes.
    """
    now = Structure(model).sizes
    kept = evenly_spaced_layers(now.layers, to.layers)
    measured = importance(
        model, windows.tolist(), sizes=Sizes(now.layers, to.ffn, to.key_value_heads), progress=progress
    )
    rank = torch.zeros(now.layers)
    rank[kept] = 1
    student_model = cut(model, to, Importance(measured.channels, measured.heads, rank))
    fit_down_projections(student_model, model, kept, windows, progress)
    return student_model


def evenly_spaced_layers(layers: int, keep: int) -> list[int]:
    """Return the layers to keep, ascending: the first two, the last two, and others at even steps between them."""
    if keep < 5:
        return [round(i * (layers - 1) / max(1, keep - 1)) for i in range(keep)]
    inner = [round(1 + i * (layers - 3) / (keep - 3)) for i in range(keep - 2)]
    return [0, *inner, layers - 1]


def fit_down_projections(
    student: PreTrainedModel,
    model: PreTrainedModel,
    kept: Sequence[int],
    windows: Tensor,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Fit each layer of a student, from the first on, to the input of the model's next kept layer.

    With h the output of the student's layer, f its feed-forward activations and t the target hidden state of the model,
    the update W of the down projection minimizes E |t - h - W f|^2 / |t|^2, with ridge regularization. Layers with a
    norm after the feed-forward network are not changed.

    Args:
        student: Changed in place.
        model: The model that it was cut from.
        kept: Indices of the student's layers in the model, ascending.
        windows: Text, int64 [windows, length].
        progress: Progress callback.
    """
    here, there = layout(student), layout(model)
    ends = [there.layers[index].module for index in kept[1:]] + [there.final_norm.module]
    with progress.stage("fit layers", len(kept)) as task, torch.no_grad():
        targets = _inputs(model, ends, windows)
        for layer, end in zip(here.layers, ends, strict=True):
            if not layer.later_norms:
                activations, outputs = _layer_activations(student, layer.module, layer.down.module, windows)
                goal = targets[end]
                scale = goal.square().mean(1, keepdim=True).rsqrt()  # the next layer normalizes its input
                activations *= scale
                moment = activations.T @ activations
                moment.diagonal().add_(_DAMPING * moment.diagonal().mean())
                addition = torch.linalg.solve(moment, activations.T @ ((goal - outputs) * scale))
                layer.down.set_weight(layer.down.weight + addition.T)
            del targets[end]
            task.advance()


class _StopForward(Exception):  # noqa: N818 - not an error
    """Ends a forward pass early."""


def _inputs(model: PreTrainedModel, modules: Sequence[Any], windows: Tensor) -> dict[Any, Tensor]:
    """Return the inputs of modules: [tokens, hidden] each."""
    inputs: dict[Any, list[Tensor]] = {module: [] for module in modules}

    def record(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        inputs[module].append(hidden.flatten(0, 1).float())

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules]
    try:
        for some in windows.split(4):
            model.base_model(input_ids=some.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: torch.cat(parts) for module, parts in inputs.items()}


def _layer_activations(model: PreTrainedModel, layer: Any, down: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input of a layer's down projection, [tokens, channels], and the layer's output, [tokens, hidden]."""
    activations, outputs = [], []

    def before(_: Any, arguments: tuple[Any, ...]) -> None:
        activations.append(arguments[0].reshape(-1, arguments[0].shape[-1]).float())

    def after(_: Any, __: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1).float())
        raise _StopForward

    hooks = [down.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        for some in windows.split(4):
            try:
                model.base_model(input_ids=some.to(model.device), use_cache=False)
            except _StopForward:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(activations), torch.cat(outputs)


def _starting_model(
    recipe: Recipe, weights: Mapping[str, float], distance: Callable[[PreTrainedModel], float], progress: Progress
) -> tuple[MemberRecipe, PreTrainedModel]:
    """Return the member that gives the student's shape and the model that the student is cut from: the member that the
    recipe names, or the one of the highest weight, or the mean of all of its shape if that is closer to the mixture.
    """
    loader, member = MemberLoader(recipe.folder, progress), start_member(recipe, weights)
    model = loader.load(member).model
    if recipe.student is not None and recipe.student.start is not None:
        return member, model
    others = [spec for spec in recipe.members if spec is not member and weights.get(spec.name, 0) > 0]
    average = average_model(
        model, weights[member.name], ((loader.load(spec).model, weights[spec.name]) for spec in others)
    )
    if average is None:
        return member, model
    with progress.stage("compare the members' mean"):
        return member, min(model, average, key=distance)


def average_model(
    model: PreTrainedModel, weight: float, others: Iterable[tuple[PreTrainedModel, float]]
) -> PreTrainedModel | None:
    """Return a model with the weighted mean of the weights of a model and others of its shape; None without others."""
    student_model = copy.deepcopy(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    total = weight
    with torch.no_grad():
        for parameter in student_model.parameters():
            parameter.mul_(weight)
        for other, share in others:
            if {name: parameter.shape for name, parameter in other.named_parameters()} == shapes:
                for parameter, part in zip(student_model.parameters(), other.parameters(), strict=True):
                    parameter.add_(part, alpha=share)
                total += share
        for parameter in student_model.parameters():
            parameter.div_(total)
    return student_model if total > weight else None


def _random_model(recipe: Recipe, folder: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a model with random weights and the tokenizer's vocabulary, from a configuration."""
    path = local_path(folder, recipe.folder)
    if path is None or not (path / "config.json").is_file():
        raise InputError(f"student.config: there is no config.json in {folder}", "Name the folder that holds it.")
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        config.get_text_config().vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = None
        kind = TasksManager.get_model_class_for_task("text-generation", model_type=config.model_type)
        with torch.random.fork_rng([]):
            torch.manual_seed(recipe.seed)
            student_model: PreTrainedModel = kind.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise InputError(f"student.config: {folder}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    return student_model.eval().requires_grad_(False)
