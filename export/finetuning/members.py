"""The members of a recipe in memory, each with an adapter to train; those of one base share its frozen weights."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from edgemix.export.models.loading import load_tokenizer
from edgemix.export.models.location import Location, locate
from edgemix.export.models.tokenizers import check_shared
from edgemix.export.training.loop import fingerprint
from edgemix.export.training.lora import FreshAdapter, attach_adapters, eager_attention
from edgemix.export.training.qlora import load_base
from edgemix.export.training.token_loss import has_fast_bfloat16, token_losses
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.export.finetuning.options import Training
    from edgemix.export.training.lora import Adapters
    from edgemix.recipe.schema import Recipe


@dataclass(frozen=True)
class TunedMember:
    """A member whose adapter can be trained.

    Attributes:
        name: The member's.
        base: What its adapter calls the base model.
        model: The base model, which other members may share.
        key: What makes its training repeatable: the base's weights, the adapter that it begins with.
    """

    name: str
    base: str
    model: PreTrainedModel
    key: Sequence[object]
    _adapters: Adapters
    _index: int
    _read: Callable[[Tensor], Tensor]

    def losses(self, ids: Tensor) -> Tensor:
        """Token losses of the base with this member's adapter; see `token_losses`."""
        self._adapters.activate(self._index)
        return self._read(ids)

    def mean_loss(self, ids: Tensor) -> Tensor:
        """Their mean."""
        return self.losses(ids).mean()

    @property
    def device(self) -> torch.device:
        return self._adapters.device

    def write(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, into an empty one."""
        self._adapters.write(self._index, self.base, folder)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's weights by name."""
        return self._adapters.parameters(self._index)


def shared_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The one tokenizer of all members.

    Raises:
        InputError: They do not share one, or it cannot be read.
    """
    read = cache(load_tokenizer)
    found = {spec.name: read(locate(spec.model, recipe.folder)) for spec in recipe.members}
    check_shared(found)
    return found[recipe.members[0].name]


@contextmanager
def open_members(
    recipe: Recipe,
    training: Training,
    *,
    four_bit: bool = False,
    vocabulary: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[list[TunedMember]]:
    """All members of a recipe, on the GPU if there is one.

    A member that has an adapter goes on from it, at that adapter's rank; the others get a fresh one, each from a seed
    of its own, so that equal members can part.

    Args:
        recipe: The members.
        training: Of fresh adapters; its `length` is what attention is prepared for.
        four_bit: Keep base models in 4 bits, and no more activations than must be.
        vocabulary: How many logits count; see `token_losses`.
        progress: Hears of every model.

    Raises:
        InputError: A member cannot be read, or has no linear layer.
    """
    groups: dict[Location, list[int]] = {}
    for index, spec in enumerate(recipe.members):
        groups.setdefault(locate(spec.model, recipe.folder), []).append(index)
    with ExitStack() as stack:
        opened: dict[int, TunedMember] = {}
        for location, indices in groups.items():
            begins = [_beginning(recipe, index, training) for index in indices]
            with progress.stage(f"load {location.name}"):
                model = load_base(location, four_bit=four_bit, progress=progress)
            base = [location.name, fingerprint(model)]
            adapters = stack.enter_context(attach_adapters(model, begins, recompute=four_bit))
            stack.enter_context(eager_attention(model, training.length))
            read = token_losses(model, bfloat16=has_fast_bfloat16(adapters.device), vocabulary=vocabulary)
            for place, (index, begin) in enumerate(zip(indices, begins, strict=True)):
                key = [*base, begin.sha256() if isinstance(begin, Location) else begin]
                opened[index] = TunedMember(
                    recipe.members[index].name, location.name, model, key, adapters, place, read
                )
        yield [opened[index] for index in range(len(opened))]


def _beginning(recipe: Recipe, index: int, training: Training) -> FreshAdapter | Location:
    adapter = recipe.members[index].adapter
    if adapter is not None:
        return locate(adapter, recipe.folder)
    return FreshAdapter(training.rank, training.alpha or 2 * training.rank, training.seed + index)
