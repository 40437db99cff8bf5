"""A recipe's compression: quantization, pruning and the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from edgemix.errors import InputError
from edgemix.formats import Format
from edgemix.recipe.bounds import bound_problems
from edgemix.recipe.problems import Problem, Where

if TYPE_CHECKING:
    from collections.abc import Iterator

Share = Annotated[float, Meta(ge=0, le=1)]
Cut = Annotated[float, Meta(ge=0, le=0.95)]
"""Share of a model's parts to remove."""
Minutes = Annotated[float, Meta(gt=0)]
Steps = Annotated[int, Meta(ge=1, le=1 << 40)]

Algorithm = Literal["auto", "learned-rounding", "distil", "gptq", "rtn", "hqq"]
"""Ways to quantize to int4; `distil` is the old name of `learned-rounding`."""
Divergence = Literal["forward", "reverse", "skewed", "total-variation"]

GROUPS = (16, 32, 64, 128, 256)
"""Block sizes of ONNX Runtime's kernels."""


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are quantized to int4; `rotate` also applies to int8-dynamic.

    Attributes:
        algorithm: `learned-rounding` trains roundings and scales against the model's own fp32 distributions; `gptq`
            compensates each rounding in the weights that are rounded after it. Both use the text under data:
            calibration (or training). `rtn` rounds to nearest; `hqq` fits zero points to the error (Half-Quadratic
            Quantization); `auto` is `learned-rounding` where there is such text, else `rtn`.
        group: Inputs that share a scale.
        steps: Optimizer steps of `learned-rounding`, 2,048 tokens each.
        rotate: Rotate the residual stream and attention's values first, against outlier channels (QuaRot). Embedding
            and head are then stored separately.
        scale: First move scales from weights to the activations that they read (AWQ).
        eight_bits: Share of the weights that gets 8 bits: the most sensitive layers.
    """

    algorithm: Algorithm = "auto"
    group: int = 32
    steps: Steps = 160
    rotate: bool = False
    scale: bool = False
    eight_bits: Share = 0.0

    def __post_init__(self) -> None:
        if self.algorithm == "distil":
            msgspec.structs.force_setattr(self, "algorithm", "learned-rounding")

    @property
    def reads_text(self) -> bool:
        """Whether it needs text."""
        return self.algorithm in ("learned-rounding", "gptq") or self.scale or bool(self.eight_bits)


class Pruning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is removed from a model. Shares are between 0 and 1.

    Attributes:
        layers: Share of the layers to remove.
        ffn: Share of each feed-forward network's channels to remove.
        heads: Share of each layer's key-value groups (with their query heads) to remove.
        sparsity: Share of the linears' weights to set to zero; 0.5 for the pattern 2:4.
        pattern: Where zeros are: anywhere in a row, or two of every four.
        criterion: A weight's importance: its magnitude, or that times its input's norm (`wanda`).
        steps: Number of pruning steps, with a recovery after each.
        recover: Minutes of distillation from the unpruned model, over all steps; 0 leaves it out.
    """

    layers: Cut = 0.0
    ffn: Cut = 0.0
    heads: Cut = 0.0
    sparsity: Cut = 0.0
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    criterion: Literal["wanda", "magnitude"] = "wanda"
    steps: Annotated[int, Meta(ge=1, le=100)] = 1
    recover: Annotated[float, Meta(ge=0)] = 5.0

    @property
    def zeros(self) -> float:
        """The final share of zeros among the linears' weights."""
        return 0.5 if self.pattern == "2:4" else self.sparsity


class Student(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The student that is distilled from the mixture.

        L = (1 - alpha) CE(y, p_s) + alpha T^2 D(p_mix,T, p_s,T)

    Attributes:
        start: The member from which it is cut; by default the one of largest weight.
        config: A folder with its own config.json: the student then starts from random weights.
        prune: What is removed from the start, at once: `steps` and `recover` are ignored, as the student learns from
            the mixture anyway. By default it is cut to about a third of the decoding time.
        format: Its weight format.
        loss: D: KL(p_mix || p_s), KL(p_s || p_mix), KL(p_mix || (1 - skew) p_s + skew p_mix), or half the L1 distance.
        alpha: Weight of the mixture in the loss, against that of the text.
        temperature: T.
        skew: Parameter of the loss `skewed`.
        samples: Share of text sampled from the student, in the second half of training.
        top_k: Tokens kept of each teacher distribution; the rest is one number.
        minutes: Maximum training time; `steps`: maximum optimizer steps. Without both, 30 minutes.
        batch: Windows per step.
        accumulate: Steps whose gradients are added up.
        length: Tokens per window.
        learning_rate: Peak learning rate.
        eight_bit_optimizer: Keep AdamW's moments in 8 bits (bitsandbytes).
    """

    start: str | None = None
    config: str | None = None
    prune: Pruning | None = None
    format: Format = "int4"
    loss: Divergence = "forward"
    alpha: Share = 0.9
    temperature: Annotated[float, Meta(ge=0.05, le=100)] = 1.0
    skew: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    samples: Share = 0.0
    top_k: Annotated[int, Meta(ge=1, le=1 << 16)] = 64
    minutes: Minutes | None = None
    steps: Steps | None = None
    batch: Annotated[int, Meta(ge=1, le=1 << 16)] = 4
    accumulate: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    length: Annotated[int, Meta(ge=2, le=1 << 20)] = 256
    learning_rate: Annotated[float, Meta(gt=0, le=10)] = 1e-3
    eight_bit_optimizer: bool = False


def quantization_problems(quantization: Quantization, where: Where) -> Iterator[Problem]:
    """Yield the mistakes of a recipe's `quantization`, but for numbers out of bounds."""
    if quantization.group not in GROUPS:
        yield Problem((*where, "group"), f"is {quantization.group}; it may be {', '.join(map(str, GROUPS))}")
    if quantization.eight_bits and quantization.algorithm in ("rtn", "hqq"):
        yield Problem(
            (*where, "eight_bits"), f"goes with algorithm learned-rounding or gptq; {quantization.algorithm} has none"
        )


def pruning_problems(pruning: Pruning, where: Where) -> Iterator[Problem]:
    """Yield the mistakes of a recipe's `prune`, but for numbers out of bounds."""
    if pruning.pattern == "2:4" and pruning.sparsity not in (0.0, 0.5):
        yield Problem((*where, "sparsity"), f"is {pruning.sparsity}; two of every four weights is 0.5")
    if not (pruning.layers or pruning.ffn or pruning.heads or pruning.zeros):
        yield Problem(where, "this removes nothing; give a share of layers, ffn, heads or of weights (sparsity)")


def check_pruning(pruning: Pruning) -> None:
    """Check a `Pruning` that was made in Python or from options.

    Raises:
        InputError: With all its mistakes.
    """
    if problems := [str(problem) for problem in (*bound_problems(pruning), *pruning_problems(pruning, ()))]:
        raise InputError("; ".join(problems))


def student_problems(student: Student, members: list[str], where: Where) -> Iterator[Problem]:
    """Yield the mistakes of a recipe's `student`, but for numbers out of bounds."""
    if student.start is not None and student.start not in members:
        yield Problem((*where, "start"), f"no member is called {student.start[:80]!r}; members: {', '.join(members)}")
    if student.start is not None and student.config is not None:
        yield Problem(where, "has both start and config; a student is cut from a member or made from a config")
    if student.config is not None and student.prune is not None:
        yield Problem((*where, "prune"), "a student made from a config has nothing to cut; leave one of them out")
    if student.loss not in get_args(Divergence):
        yield Problem((*where, "loss"), f"is {student.loss!r}; it may be {', '.join(get_args(Divergence))}")
    if student.prune is not None:
        yield from pruning_problems(student.prune, (*where, "prune"))
