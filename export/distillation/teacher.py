"""The teacher: the mixture's next-token distributions on windows of tokens, as top tokens and the tail's probability.

    P(y | x) = sum_i w_i P_i(y | x)

computed by a bundle's graphs, or by torch models if there is no bundle, or if they are faster and equivalent. Padding
of the vocabulary is removed before the softmax, as the runtime does.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional

from edgemix.bundle.stages import stage_key
from edgemix.bundle.tokenizer_identity import TokenizerIdentity
from edgemix.errors import InputError
from edgemix.export.data.text import windows
from edgemix.export.models.architecture import context_length
from edgemix.export.models.loading import MemberLoader, member_tokenizer
from edgemix.export.models.tokenizers import check_shared, tokenizer_json, tokenizer_size
from edgemix.export.stages.weights import fit
from edgemix.export.training.loop import fingerprint
from edgemix.export.training.losses import TopK, top_k_of_probabilities
from edgemix.export.training.token_loss import has_fast_bfloat16, linear_head
from edgemix.formats import FORMAT_SPECS
from edgemix.progress import NO_PROGRESS, Progress
from edgemix.recipe.text_sources import read_documents
from edgemix.runtime import Mixture
from edgemix.runtime.mixing.arithmetic import normalize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgemix.export.models.loading import LoadedMember
    from edgemix.recipe.schema import Recipe
    from edgemix.runtime.mixing.ensemble import Ensemble

_ROWS = 64
"""Tokens whose distributions are mixed at once: they stay in a CPU's cache."""
_GPU_ROWS = 1024
_TOKENS = 4096
"""Tokens per forward pass of a torch member: 1,024 take a sixth more time."""
_BLOCK = 64
_ROOM = 1.25
"""GPU memory needed, as a multiple of the weights' bytes: activations, and whatever else is on the GPU."""


class Teacher(Protocol):
    """Computes the distributions that the student is trained on.

    Attributes:
        key: Digest of everything that the distributions depend on.
        vocabulary: Size of the tokenizer's vocabulary.
        context: Largest number of tokens in a window.
    """

    key: str
    vocabulary: int
    context: int

    def top_k(self, ids: NDArray[np.int64], k: int, temperature: float) -> TopK:
        """Return the distributions after each token but the last of windows [windows, length], by rows, on the CPU."""
        ...


class RuntimeTeacher:
    """A bundle's mixture.

    Args:
        mixture: The loaded mixture, which must stay open.
        weights: Weights by member name; members without a weight are not evaluated.
    """

    def __init__(self, mixture: Mixture, weights: Mapping[str, float]) -> None:
        self._ensemble: Ensemble = mixture.ensemble(weights)
        self.vocabulary, self.context = mixture.vocabulary, mixture.context
        self.key = stage_key(
            members=mixture.manifest.members, weights=[*self._ensemble.weights.tolist()], provider=mixture.provider
        )

    def top_k(self, ids: NDArray[np.int64], k: int, temperature: float) -> TopK:
        return _top_of_mixture(self._logits(ids), self._ensemble.weights.tolist(), self.vocabulary, k, temperature)

    def _logits(self, ids: NDArray[np.int64]) -> Iterator[tuple[Tensor, ...]]:
        """Yield every member's logits [some rows, width] after each token but the last of windows, row after row."""
        members = self._ensemble.graphs
        chunk = min(member.chunk for member in members)
        caches = [member.new_cache() for member in members]
        try:
            for window in ids[:, :-1]:
                for cache in caches:
                    cache.rollback([0])
                for at in range(0, len(window), chunk):
                    new = [window[at : at + chunk]]
                    logits = [
                        torch.from_numpy(part).split(_ROWS)
                        for member, cache in zip(members, caches, strict=True)
                        for part in member.parts(member.extend_all(cache, new)[0])
                    ]
                    yield from zip(*logits, strict=True)
        finally:
            for cache in caches:
                cache.free()


class TorchTeacher:
    """Members as torch models: in bfloat16 if the hardware multiplies it, in 4 bits if a GPU lacks the memory.

    Args:
        members: Consumed one after the other; their models are copied to the device.
        vocabulary: Size of the tokenizer's vocabulary.
        device: Device of the models.
        four_bit: Whether to quantize linears to NF4 (bitsandbytes); None decides by the device's free memory.
    """

    def __init__(
        self, members: Iterable[LoadedMember], vocabulary: int, device: torch.device, *, four_bit: bool | None = None
    ) -> None:
        self.vocabulary = vocabulary
        self.context = 0
        self._device = device
        self._dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
        self._models: dict[str, _DeviceMember] = {}
        for member in members:
            self._models[member.name] = self._place(member, four_bit)
            self.vocabulary = min(self.vocabulary, member.model.config.get_text_config().vocab_size)
            context = context_length(member.model.config)
            self.context = min(self.context, context) if self.context else context
        self.set_weights(dict.fromkeys(self._models, 1.0))

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weights, which are normalized; members without a weight are not evaluated. Uniform by default."""
        total = sum(weights.values())
        self._active = [member for name, member in self._models.items() if weights.get(name, 0) > 0]
        self._weights = [weights[name] / total for name in self._models if weights.get(name, 0) > 0]
        self.key = stage_key(members=[member.key for member in self._active], weights=self._weights)

    def top_k(self, ids: NDArray[np.int64], k: int, temperature: float) -> TopK:
        with torch.inference_mode():
            top = _top_of_mixture(self._all_logits(ids, self._active), self._weights, self.vocabulary, k, temperature)
        return TopK(*(each.clone() for each in top))  # training cannot use inference tensors

    def target_log_probabilities(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each member's log-probability of every token except the first of each window: float64
        [members, tokens]. All members are evaluated, whatever their weights.
        """
        targets = torch.from_numpy(ids[:, 1:]).flatten().to(self._device)
        scored, at = [], 0
        with torch.inference_mode():
            for logits in self._all_logits(ids, self._models.values()):
                wanted = targets[at : at + len(logits[0])]
                cut = (each[:, : self.vocabulary].float() for each in logits)
                scored.append(torch.stack([functional.cross_entropy(each, wanted, reduction="none") for each in cut]))
                at += len(wanted)
        own: NDArray[np.float64] = -torch.cat(scored, 1).cpu().double().numpy()
        return own

    def _place(self, member: LoadedMember, four_bit: bool | None) -> _DeviceMember:
        model = copy.deepcopy(member.model)
        if four_bit is None:
            needed = _ROOM * self._dtype.itemsize * model.num_parameters()
            four_bit = self._device.type == "cuda" and needed > torch.cuda.mem_get_info(self._device)[0]
        if four_bit:
            quantize_linears(model, self._dtype)
        model = model.to(self._dtype).to(self._device).eval()
        weights = [member.source.sha256, fingerprint(member.model)]  # the model may have been pruned after loading
        key = stage_key(member=weights, precision=[str(self._dtype), four_bit])
        return _DeviceMember(model, linear_head(model), key)

    def _logits(self, member: _DeviceMember, ids: Tensor) -> Iterator[Tensor]:
        """Yield logits [rows, width] after each token of windows [windows, length], in chunks of rows."""
        rows = _ROWS if self._device.type == "cpu" else _GPU_ROWS
        if member.head is None:
            yield from member.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).split(rows)
            return
        hidden = member.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        for some in hidden.split(4 * rows):  # enough for a fast matrix product
            yield from member.head(some).split(rows)

    def _all_logits(self, ids: NDArray[np.int64], members: Iterable[_DeviceMember]) -> Iterator[tuple[Tensor, ...]]:
        """Yield members' logits [rows, width] after each token except the last of windows, in chunks of rows."""
        members = list(members)
        for some in torch.from_numpy(ids[:, :-1]).to(self._device).split(max(1, _TOKENS // ids.shape[1])):
            yield from zip(*(self._logits(member, some) for member in members), strict=True)


def teacher_in_export(
    mixture: Mixture, weights: Mapping[str, float], load: Callable[[str], LoadedMember], device: torch.device
) -> Teacher:
    """Return a teacher for the mixture of a bundle during its export: its torch models if the hardware multiplies
    bfloat16 and the graphs are equivalent (on two cores with AMX, three of SmolLM2-135M evaluate 910 tokens per second,
    their int8 graphs 250), else its graphs.

    Args:
        mixture: The bundle's mixture.
        weights: Weights by member name.
        load: Returns a member's torch model by name.
        device: Device of torch models.
    """
    active = [entry for entry in mixture.manifest.members if weights.get(entry.name, 0) > 0]
    if not has_fast_bfloat16(device) or not all(FORMAT_SPECS[entry.format].faithful for entry in active):
        return RuntimeTeacher(mixture, weights)
    teacher = TorchTeacher((load(entry.name) for entry in active), mixture.vocabulary, device)
    teacher.set_weights(weights)
    return teacher


class _DeviceMember(NamedTuple):
    """A member on the teacher's device: its model, its head if it is a linear layer, and a digest of it."""

    model: PreTrainedModel
    head: nn.Linear | None
    key: str


@contextmanager
def open_teacher(
    recipe: Recipe, bundle: Path | None, device: torch.device, progress: Progress = NO_PROGRESS
) -> Iterator[tuple[Teacher, dict[str, float]]]:
    """Open the teacher of a recipe's student, and return it with the weights of its members.

    Args:
        recipe: Its members are loaded, and its weights are used or fitted, if there is no bundle.
        bundle: Bundle whose mixture and weights to use.
        device: Device of torch models.
        progress: Progress callback.

    Raises:
        BundleError: The bundle cannot be opened.
        InputError: A member cannot be read, the members (or they and the bundle) do not share one tokenizer, or a text
            cannot be read.
    """
    if bundle is not None:
        with Mixture.load(bundle) as mixture:
            _check_tokenizer(recipe, bundle, mixture)
            yield RuntimeTeacher(mixture, mixture.weights), dict(mixture.weights)
        return
    tokenizers = {spec.name: member_tokenizer(spec, recipe.folder) for spec in recipe.members}
    check_shared(tokenizers)
    tokenizer, names = next(iter(tokenizers.values())), list(tokenizers)
    loader = MemberLoader(recipe.folder, progress)
    teacher = TorchTeacher(map(loader.load, recipe.members), tokenizer_size(tokenizer), device)
    given = recipe.weights if isinstance(recipe.weights, dict) else dict.fromkeys(names, 1.0)
    weights = dict(zip(names, normalize(given, names).tolist(), strict=True))
    if recipe.fits_weights:
        with progress.stage("fit weights"):
            found = fit(np.concatenate([*_validation(recipe, tokenizer, teacher)], axis=1))
        weights = dict(zip(names, found.weights.tolist(), strict=True))
    teacher.set_weights(weights)
    yield teacher, weights


def _check_tokenizer(recipe: Recipe, bundle: Path, mixture: Mixture) -> None:
    """Check that a bundle has the tokenizer of the recipe's members, whose token ids the student uses."""
    first = recipe.members[0]
    identity = TokenizerIdentity.parse(tokenizer_json(member_tokenizer(first, recipe.folder)))
    if identity.sha256() != mixture.manifest.tokenizer.sha256:
        raise InputError(
            f"{bundle} has another tokenizer than {first.name}, the recipe's first member",
            "Let a bundle of this recipe teach, or leave --bundle out.",
        )


def _validation(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, teacher: TorchTeacher
) -> Iterator[NDArray[np.float64]]:
    """Yield each member's log-probabilities of a recipe's validation text by domain: float64 [members, tokens]."""
    data = recipe.data
    for source in data.validation.values():
        documents = read_documents(source, recipe.folder)
        length = min(data.window, teacher.context)
        ids = np.array(windows(documents, tokenizer, length, max_tokens=data.max_tokens), np.int64)
        yield teacher.target_log_probabilities(ids)


def mix(logits: Sequence[Tensor], weights: Sequence[float], vocabulary: int) -> Tensor:
    """Return the mixture's probabilities, fp32 [rows, vocabulary], from each member's logits [rows, width]."""
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
    """Replace a model's linears by 4-bit ones (NF4, QLoRA: arXiv 2305.14314), which are packed when they are moved to
    their device. The head is kept, and so are linears whose sizes are no multiple of a block: CPUs have no kernel.
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
