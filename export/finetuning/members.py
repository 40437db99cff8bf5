"""Load the members of a recipe, each with an adapter to train; members of one base share its frozen weights."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from edgemix.export.models.loading import load_tokenizer, member_tokenizer
from edgemix.export.models.location import Location, locate
from edgemix.export.models.tokenizers import check_shared
from edgemix.export.training.loop import fingerprint
from edgemix.export.training.lora import FreshAdapter, attach_adapters, eager_attention, frozen_in_bfloat16
from edgemix.export.training.qlora import load_base
from edgemix.export.training.token_loss import has_fast_bfloat16, token_losses
from edgemix.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.export.finetuning.options import TrainingSettings
    from edgemix.export.training.lora import Adapters
    from edgemix.recipe.schema import Recipe


@dataclass(frozen=True)
class TrainableMember:
    """A member with a trainable adapter.

    Attributes:
        name: The member's name.
        base: Base model name to record in the adapter.
        model: The base model, which members may share.
        key: Identity of the base's weights and of the initial adapter.
    """

    name: str
    base: str
    model: PreTrainedModel
    key: Sequence[object]
    _adapters: Adapters
    _index: int
    _token_losses: Callable[[Tensor], Tensor]

    def losses(self, ids: Tensor) -> Tensor:
        """Return the token losses of the base with this member's adapter; see `token_losses`."""
        self._adapters.activate(self._index)
        return self._token_losses(ids)

    def mean_loss(self, ids: Tensor) -> Tensor:
        """Return the mean token loss, a scalar."""
        return self.losses(ids).mean()

    @property
    def device(self) -> torch.device:
        return self._adapters.device

    def write(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder into an empty folder."""
        self._adapters.write(self._index, self.base, folder)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's weights by name."""
        return self._adapters.parameters(self._index)


def shared_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Return the tokenizer that all members share.

    Raises:
        InputError: The members do not share a tokenizer, or it cannot be read.
    """
    load = cache(load_tokenizer)
    tokenizers = {spec.name: member_tokenizer(spec, recipe.folder, load) for spec in recipe.members}
    check_shared(tokenizers)
    return tokenizers[recipe.members[0].name]


@contextmanager
def load_trainable_members(
    recipe: Recipe,
    training: TrainingSettings,
    *,
    four_bit: bool = False,
    vocabulary: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[list[TrainableMember]]:
    """Load all members of a recipe, on the GPU if there is one.

    A member with an adapter continues from it, at that adapter's rank; the others get new adapters with different
    seeds, so that equal members can diverge.

    Args:
        recipe: The members.
        training: Rank, alpha and seed of new adapters, and the length of training windows.
        four_bit: Keep base models in 4 bits, and checkpoint activations.
        vocabulary: Number of logits to use; see `token_losses`.
        progress: Progress callback.

    Raises:
        InputError: A member cannot be read, or has no linear layer.
    """
    groups: dict[Location, list[int]] = {}
    for index, spec in enumerate(recipe.members):
        groups.setdefault(locate(spec.model, recipe.folder), []).append(index)
    with ExitStack() as stack:
        members: dict[int, TrainableMember] = {}
        for location, indices in groups.items():
            initial = [_initial_adapter(recipe, index, training) for index in indices]
            with progress.stage(f"load {location.name}"):
                model = load_base(location, four_bit=four_bit, progress=progress)
            base = [location.name, fingerprint(model)]
            adapters = stack.enter_context(attach_adapters(model, initial, recompute=four_bit))
            stack.enter_context(eager_attention(model, training.length))
            bfloat16 = has_fast_bfloat16(adapters.device)
            losses = token_losses(model, bfloat16=bfloat16, vocabulary=vocabulary)
            stack.enter_context(frozen_in_bfloat16(model, enabled=bfloat16))
            for position, (index, adapter) in enumerate(zip(indices, initial, strict=True)):
                key = [*base, adapter.sha256() if isinstance(adapter, Location) else adapter]
                members[index] = TrainableMember(
                    recipe.members[index].name, location.name, model, key, adapters, position, losses
                )
        yield [members[index] for index in range(len(members))]


def _initial_adapter(recipe: Recipe, index: int, training: TrainingSettings) -> FreshAdapter | Location:
    adapter = recipe.members[index].adapter
    if adapter is not None:
        return locate(adapter, recipe.folder)
    return FreshAdapter(training.rank, training.alpha or 2 * training.rank, training.seed + index)
