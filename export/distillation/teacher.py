"""The teacher: the mixture's next-token distributions on windows of tokens, by their top tokens and the rest's mass.

    P(y | x) = sum_i w_i P_i(y | x)

from a bundle's graphs, or from torch models where there is no bundle. Vocabularies' padding is cut off before the
softmax, as the runtime does.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from edgemix.export.architecture import context_length
from edgemix.export.losses import TopK, top_k_of_probabilities
from edgemix.export.token_loss import bfloat16_pays, plain_head
from edgemix.staging import stage_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from edgemix.export.members import LoadedMember
    from edgemix.runtime import Mixture
    from edgemix.runtime.engine import Blend

_ROWS = 64
"""Tokens that are mixed at once: their distributions stay in a CPU's cache."""
_GPU_ROWS = 1024
_TOKENS = 1024
"""Tokens that a torch member reads at once."""
_BLOCK = 64
_ROOM = 1.25
"""A GPU needs so many times the weights' bytes, for activations and what else is on it."""


class Teacher(Protocol):
    """Whoever the student learns from.

    Attributes:
        key: Digest of all that its distributions depend on.
        vocabulary: The tokenizer's.
        context: Most tokens of a window.
    """

    key: str
    vocabulary: int
    context: int

    def top_k(self, ids: NDArray[np.int64], k: int, temperature: float) -> TopK:
        """What may follow each token but the last of windows [windows, length], row after row, on the CPU."""
        ...


class RuntimeTeacher:
    """A bundle's mixture, as it ships.

    Args:
        mixture: Loaded; it must stay open.
        weights: Member name -> share; members without one are not evaluated.
    """

    def __init__(self, mixture: Mixture, weights: Mapping[str, float]) -> None:
        self._blend: Blend = mixture.blend(weights)
        self.vocabulary, self.context = mixture.vocabulary, mixture.context
        self.key = stage_key(
            members=mixture.manifest.members, weights=[*self._blend.weights.tolist()], provider=mixture.provider
        )

    def top_k(self, ids: NDArray[np.int64], k: int, temperature: float) -> TopK:
        return _top_of_mixture(self._logits(ids), self._blend.weights.tolist(), self.vocabulary, k, temperature)

    def _logits(self, ids: NDArray[np.int64]) -> Iterator[tuple[Tensor, ...]]:
        """Every member's logits [some rows, width] after each token but the last of windows, row after row."""
        members = self._blend.members
        chunk = min(member.chunk for member in members)
        caches = [member.new_cache() for member in members]
        try:
            for window in ids[:, :-1]:
                for cache in caches:
                    cache.rollback([0])
                for at in range(0, len(window), chunk):
                    new = [window[at : at + chunk]]
                    logits = [
                        torch.from_numpy(member.extend_all(cache, new)[0]).split(_ROWS)
                        for member, cache in zip(members, caches, strict=True)
                    ]
                    yield from zip(*logits, strict=True)
        finally:
            for cache in caches:
                cache.free()


class TorchTeacher:
    """Members as torch models: in bfloat16 where the hardware multiplies it, in 4 bits where a GPU lacks the memory.

    Args:
        members: Those that weigh something; their models are copied to the device.
        weights: Member name -> share, normalised here.
        vocabulary: The tokenizer's.
        device: Where they run.
        four_bit: Whether their linears are quantised to NF4 (bitsandbytes); None decides by the device's memory.
    """

    def __init__(
        self,
        members: Sequence[LoadedMember],
        weights: Mapping[str, float],
        vocabulary: int,
        device: torch.device,
        *,
        four_bit: bool | None = None,
    ) -> None:
        heavy = [member for member in members if weights.get(member.name, 0) > 0]
        total = sum(weights[member.name] for member in heavy)
        self._weights = [weights[member.name] / total for member in heavy]
        self.vocabulary = vocabulary
        self.context = min(context_length(member.model.config) for member in heavy)
        self._device = device
        self._dtype = torch.bfloat16 if bfloat16_pays(device) else torch.float32
        self.four_bit = four_bit
        if four_bit is None:
            bytes_needed = self._dtype.itemsize * sum(member.model.num_parameters() for member in heavy)
            self.four_bit = device.type == "cuda" and bytes_needed * _ROOM > torch.cuda.mem_get_info(device)[0]
        self._models = [self._placed(member.model) for member in heavy]
        self.key = stage_key(
            members=[member.source.sha256 for member in heavy],
            weights=self._weights,
            precision=[str(self._dtype), self.four_bit],
        )

    def top_k(self, ids: NDArray[np.int64], k: int, temperature: float) -> TopK:
        with torch.inference_mode():
            top = _top_of_mixture(self._all_logits(ids), self._weights, self.vocabulary, k, temperature)
        return TopK(*(each.clone() for each in top))  # which training may use

    def target_log_probabilities(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Each member's log-probability of every token but the first of its window: float64 [members, tokens]."""
        targets = torch.from_numpy(ids[:, 1:]).flatten().to(self._device)
        scored, at = [], 0
        with torch.inference_mode():
            for logits in self._all_logits(ids):
                wanted = targets[at : at + len(logits[0])]
                cut = (each[:, : self.vocabulary].float() for each in logits)
                scored.append(torch.stack([functional.cross_entropy(each, wanted, reduction="none") for each in cut]))
                at += len(wanted)
        own: NDArray[np.float64] = -torch.cat(scored, 1).cpu().double().numpy()
        return own

    def _placed(self, model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Linear | None]:
        """A copy of the model on the device, and its output layer if it is a plain one."""
        placed = copy.deepcopy(model)
        if self.four_bit:
            quantize_linears(placed, self._dtype)
        placed = placed.to(self._dtype).to(self._device).eval()
        return placed, plain_head(placed)

    def _logits(self, model: PreTrainedModel, head: nn.Linear | None, ids: Tensor) -> Iterator[Tensor]:
        """Logits [some rows, width] after each token of windows [windows, length], row after row."""
        rows = _ROWS if self._device.type == "cpu" else _GPU_ROWS
        if head is None:
            yield from model(input_ids=ids, use_cache=False).logits.flatten(0, 1).split(rows)
            return
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        for some in hidden.split(4 * rows):  # enough for a fast matrix product
            yield from head(some).split(rows)

    def _all_logits(self, ids: NDArray[np.int64]) -> Iterator[tuple[Tensor, ...]]:
        """Every member's logits [some rows, width] after each token but the last of windows, row after row."""
        for some in torch.from_numpy(ids[:, :-1]).to(self._device).split(max(1, _TOKENS // ids.shape[1])):
            yield from zip(*(self._logits(model, head, some) for model, head in self._models), strict=True)


def mix(logits: Sequence[Tensor], weights: Sequence[float], vocabulary: int) -> Tensor:
    """The mixture's probabilities fp32 [rows, vocabulary], from each member's logits [rows, its width]."""
    parts = zip(logits, weights, strict=True)
    first, weight = next(parts)
    mixed = first[:, :vocabulary].float().softmax(-1).mul_(weight)
    for each, weight in parts:
        mixed.add_(each[:, :vocabulary].float().softmax(-1), alpha=weight)
    return mixed


def _top_of_mixture(
    logits: Iterable[tuple[Tensor, ...]], weights: Sequence[float], vocabulary: int, k: int, temperature: float
) -> TopK:
    parts = [top_k_of_probabilities(mix(some, weights, vocabulary), k, temperature) for some in logits]
    return TopK(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))


def quantize_linears(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Put 4-bit linears (NF4, QLoRA: arXiv 2305.14314) in the place of a model's, to be packed when they move to their
    device. The head stays, and so does what is no multiple of a block, for which CPUs have no kernel.
    """
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.Linear) and child is not head and child.in_features % _BLOCK == 0
        if child.out_features % _BLOCK == 0
    ]
    for parent, name, child in linears:
        small = bnb.nn.Linear4bit(
            child.in_features,
            child.out_features,
            bias=child.bias is not None,
            compute_dtype=compute,
            quant_type="nf4",
            device="meta",
        )
        small.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.bias = child.bias
        setattr(parent, name, small)
