"""The student before it learns: cut from a member to a share of its decoding time, or random from a configuration.

Where members are fine-tunes of one model, the weighted mean of their weights can be closer to their mixture than any of
them (model soups, arXiv 2203.05482); then the student is cut from that. Of layers, the first and the last two stay and
the others at even steps. Then each that stays is settled: its feed-forward network now adds, by least squares, what the
layers that went would have added after it. Of SmolLM2-135M's next tokens a third of its layers then finds 31% without
any training, where it finds 4% when they are only put together.
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
"""Of a member's decoding time: the default student's, by the cost below. It is to be a third at most on any machine."""

_BYTES: Mapping[Format, float] = {
    "fp32": 4.0, "fp16": 4.0, "int8": 1.06, "int8-dynamic": 1.03, "int4": 0.56, "nf4": 4.0,
}  # fmt: skip
"""Bytes that a weight of a layer costs while one token is decoded on a CPU, which computes with fp16 in fp32, and takes
as long as that to unpack nf4. On a GPU, fp16 and nf4 are what they are in memory.
"""
_GPU_BYTES: Mapping[Format, float] = {"fp16": 2.0, "nf4": 0.53}
_LAYER = 1.14e6
"""What a layer costs beside its weights (norms, attention, the start of each kernel), in bytes that could be read."""
_HEAD = 0.55
"""A byte of a matrix as large as the head costs so much of one of a layer's."""
_DAMPING = 1e-2
"""Share of the moment's mean diagonal that is added to it: calibration text does not span all directions."""
SETTLE_TOKENS = 16_384
"""Tokens on which a student is settled."""


class Shape(NamedTuple):
    """What decides on a decoder's speed: layers, weights of a layer's attention and feed-forward, and of the head."""

    layers: int
    attention: float
    ffn: float
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel, sizes: Sizes | None = None) -> Shape:
        """A model's, or what it would be if the model were cut to sizes."""
        parts, now = layout(model), Structure(model).sizes
        sizes, layer = sizes or now, parts.layers[0]
        attention = sum(part.weight.numel() for part in (*layer.attention_readers, layer.output))
        ffn = sum(part.weight.numel() for part in (*layer.mlp_readers, layer.down))
        heads, channels = sizes.key_value_heads / now.key_value_heads, sizes.ffn / now.ffn
        return cls(sizes.layers, attention * heads, ffn * channels, parts.head.weight.numel())


def decoding_cost(shape: Shape, form: Format, target: Target) -> float:
    """What decoding a token costs, in bytes read; only ratios of it mean something.

    Fitted to SmolLM2-135M and cuts of it on two cores, whose times it is within 5% of: 30 layers in int8 7.1 ms and in
    int4 4.8, 10 layers 2.1, 6 layers 1.5, 14 layers with 640 channels 2.2.

    Args:
        shape: Of the model.
        form: Of its graph.
        target: Where that runs.
    """
    # Quantised formats hold the head in 8 bits.
    each, head = (_bytes_of(kind, target) for kind in (form, form if form in ("fp32", "fp16") else "int8"))
    return shape.layers * ((shape.attention + shape.ffn) * each + _LAYER) + _HEAD * shape.head * head


def _bytes_of(form: Format, target: Target) -> float:
    return _GPU_BYTES.get(form, _BYTES[form]) if target == "cuda" else _BYTES[form]


def default_layers(shape: Shape, member: Format, student: Format, target: Target) -> int:
    """How many of a member's layers decode in `SHARE` of its time; two at least."""
    most = SHARE * decoding_cost(shape, member, target)
    counts = range(2, shape.layers + 1)
    fitting = [layers for layers in counts if decoding_cost(shape._replace(layers=layers), student, target) <= most]
    return max(fitting, default=min(2, shape.layers))


class Beginning(NamedTuple):
    """A student before it learns.

    Attributes:
        model: fp32, on the CPU, in evaluation mode.
        decoding: Its decoding time as a share of its start's, each in its format; None without a start.
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
) -> Beginning:
    """The student that a recipe describes, before it learns.

    Args:
        recipe: With a student.
        weights: Member name -> share.
        tokenizer: The members'.
        windows: int64 [windows, length] of training text, for cutting.
        distance: How far a model is from the mixture.
        progress: Hears of the stages.

    Raises:
        InputError: A member or the configuration cannot be read, or the model's structure is not known.
    """
    student = recipe.student
    if student is None:
        raise InputError("the recipe has no student", "Add student: to it.")
    if student.config is not None:
        return Beginning(_random(recipe, student.config, tokenizer), None)
    spec, model = _start(recipe, weights, distance, progress)
    form = spec.format or recipe.format
    to = _sizes_to_be(model, student, form, recipe.target)
    calibration = windows[: max(1, SETTLE_TOKENS // windows.shape[1])]
    cost = decoding_cost(Shape.of(model, to), student.format, recipe.target)
    share = cost / decoding_cost(Shape.of(model), form, recipe.target)
    return Beginning(smaller(model, to, calibration, progress), share)


def expected_shape(
    recipe: Recipe, weights: Mapping[str, float], tokenizer: PreTrainedTokenizerBase, form: Format
) -> Shape:
    """The shape that a recipe's student will have.

    Args:
        recipe: With a student.
        weights: Member name -> share.
        tokenizer: The members'.
        form: Of the graph of the member that it is cut from.

    Raises:
        InputError: As `new_student`.
    """
    student = recipe.student or Student()
    if student.config is not None:
        return Shape.of(_random(recipe, student.config, tokenizer))
    model = MemberLoader(recipe.folder).load(start_member(recipe, weights)).model
    return Shape.of(model, _sizes_to_be(model, student, form, recipe.target))


def start_member(recipe: Recipe, weights: Mapping[str, float]) -> MemberRecipe:
    """The member that a student is cut from, or one of its shape: what the recipe names, or the heaviest."""
    named = recipe.student.start if recipe.student is not None else None
    if named is not None:
        return next(spec for spec in recipe.members if spec.name == named)
    return max(recipe.members, key=lambda spec: weights.get(spec.name, 0.0))


def _sizes_to_be(model: PreTrainedModel, student: Student, form: Format, target: Target) -> Sizes:
    """What a model with a graph of format `form` is cut to."""
    if student.prune is not None:
        return sizes(model, student.prune)
    layers = default_layers(Shape.of(model), form, student.format, target)
    return replace(Structure(model).sizes, layers=layers)


def smaller(model: PreTrainedModel, to: Sizes, windows: Tensor, progress: Progress = NO_PROGRESS) -> PreTrainedModel:
    """A new model cut to sizes and settled; `model` stays as it is.

    Raises:
        InputError: The model's structure is not known, or its class cannot do these sizes.
    """
    now = Structure(model).sizes
    kept = spread(now.layers, to.layers)
    measured = importance(
        model, windows.tolist(), sizes=Sizes(now.layers, to.ffn, to.key_value_heads), progress=progress
    )
    rank = torch.zeros(now.layers)
    rank[kept] = 1
    made = cut(model, to, Importance(measured.channels, measured.heads, rank))
    settle(made, model, kept, windows, progress)
    return made


def spread(layers: int, keep: int) -> list[int]:
    """The layers that stay, ascending: the first two, the last two, and others at even steps between them."""
    if keep < 5:
        return [round(i * (layers - 1) / max(1, keep - 1)) for i in range(keep)]
    inner = [round(1 + i * (layers - 3) / (keep - 3)) for i in range(keep - 2)]
    return [0, *inner, layers - 1]


def settle(
    student: PreTrainedModel,
    model: PreTrainedModel,
    kept: Sequence[int],
    windows: Tensor,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Let each layer of a student, from the first on, end where the model's next layer that stayed begins.

    For the layer's residual stream h and its feed-forward activations f, with t what the model has there, the down
    projection gets the addition that minimises E |t - h - W f|^2 / |t|^2, with a ridge. Layers whose feed-forward
    output passes a norm on its way are left as they are.

    Args:
        student: Changed in place.
        model: What it was cut from.
        kept: The model's layers that the student has, ascending.
        windows: int64 [windows, length].
        progress: Hears of every layer.
    """
    here, there = layout(student), layout(model)
    ends = [there.layers[index].module for index in kept[1:]] + [there.final_norm.module]
    with progress.stage("settle", len(kept)) as task, torch.no_grad():
        wanted = _inputs(model, ends, windows)
        for layer, end in zip(here.layers, ends, strict=True):
            if not layer.later_norms:
                activations, reached = _reached(student, layer.module, layer.down.module, windows)
                goal = wanted[end]
                scale = goal.square().mean(1, keepdim=True).rsqrt()  # what is read next is normalised
                activations *= scale
                moment = activations.T @ activations
                moment.diagonal().add_(_DAMPING * moment.diagonal().mean())
                addition = torch.linalg.solve(moment, activations.T @ ((goal - reached) * scale))
                layer.down.set_weight(layer.down.weight + addition.T)
            del wanted[end]
            task.advance()


class _Enough(Exception):  # noqa: N818 - nothing is wrong
    """What a pass was for has been seen."""


def _inputs(model: PreTrainedModel, modules: Sequence[Any], windows: Tensor) -> dict[Any, Tensor]:
    """What modules read: [tokens, hidden] each."""
    seen: dict[Any, list[Tensor]] = {module: [] for module in modules}

    def watch(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read = arguments[0] if arguments else keywords["hidden_states"]
        seen[module].append(read.flatten(0, 1).float())

    hooks = [module.register_forward_pre_hook(watch, with_kwargs=True) for module in modules]
    try:
        for some in windows.split(4):
            model.base_model(input_ids=some.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: torch.cat(parts) for module, parts in seen.items()}


def _reached(model: PreTrainedModel, layer: Any, down: Any, windows: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer's down projection reads, [tokens, channels], and what the layer ends with, [tokens, hidden]."""
    activations, reached = [], []

    def before(_: Any, arguments: tuple[Any, ...]) -> None:
        activations.append(arguments[0].reshape(-1, arguments[0].shape[-1]).float())

    def after(_: Any, __: Any, output: Any) -> None:
        reached.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1).float())
        raise _Enough

    hooks = [down.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    try:
        for some in windows.split(4):
            try:
                model.base_model(input_ids=some.to(model.device), use_cache=False)
            except _Enough:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(activations), torch.cat(reached)


def _start(
    recipe: Recipe, weights: Mapping[str, float], distance: Callable[[PreTrainedModel], float], progress: Progress
) -> tuple[MemberRecipe, PreTrainedModel]:
    """What the student is cut from, with the member that it is of a kind with: the one that the recipe names; or the
    heaviest, or the mean of all that have its shape where that is closer to the mixture.
    """
    loader, best = MemberLoader(recipe.folder, progress), start_member(recipe, weights)
    model = loader.load(best).model
    if recipe.student is not None and recipe.student.start is not None:
        return best, model
    others = [spec for spec in recipe.members if spec is not best and weights.get(spec.name, 0) > 0]
    average = mean(model, weights[best.name], ((loader.load(spec).model, weights[spec.name]) for spec in others))
    if average is None:
        return best, model
    with progress.stage("compare the members' mean"):
        return best, min(model, average, key=distance)


def mean(
    model: PreTrainedModel, weight: float, others: Iterable[tuple[PreTrainedModel, float]]
) -> PreTrainedModel | None:
    """A model with the weighted mean of a model's weights and those of others of its shape; None without such."""
    made = copy.deepcopy(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    total = weight
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(weight)
        for other, share in others:
            if {name: parameter.shape for name, parameter in other.named_parameters()} == shapes:
                for parameter, part in zip(made.parameters(), other.parameters(), strict=True):
                    parameter.add_(part, alpha=share)
                total += share
        for parameter in made.parameters():
            parameter.div_(total)
    return made if total > weight else None


def _random(recipe: Recipe, folder: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights and the tokenizer's vocabulary, from a configuration of the user's."""
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
            made: PreTrainedModel = kind.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise InputError(f"student.config: {folder}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    return made.eval().requires_grad_(False)
