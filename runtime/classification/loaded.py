"""The loaded members of a bundle over labels: the base of `Classifier`, `TokenClassifier` and `FillMask`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from edgemix.bundle.label_bundle.manifest import LabelManifest
from edgemix.bundle.label_bundle.verify import verify_label_bundle
from edgemix.bundle.reader import read_any_manifest
from edgemix.bundle.writer import write_manifest
from edgemix.errors import BundleError, EdgemixError, InputError
from edgemix.runtime.classification.combining import check_combine, combine, yes_and_no
from edgemix.runtime.classification.members import open_member
from edgemix.runtime.graphs.providers import choose
from edgemix.runtime.mixing.arithmetic import log_softmax, normalize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.classification.encoding import Text
    from edgemix.runtime.classification.members import LabelModel, Scores
    from edgemix.runtime.graphs.providers import Provider
    from edgemix.tasks import LabelCombine, LabelTaskName

LabelWeights = Mapping[str, float] | str | None
"""The weights of one call: member name -> number (normalized; a missing name weighs nothing), the name of one of the
bundle's domains, or None for the bundle's own."""


class LabelMixture:
    """A loaded mixture over labels.

    Attributes:
        manifest: The bundle's manifest.
        members: The members' names, in order.
        labels: The mixture's labels, in order.
        weights: Member name -> share: the bundle's own weights.
        provider: Where the graphs run, by its name in `PROVIDERS`.
        known: bool [members, labels], which labels each member knows.
    """

    task: ClassVar[LabelTaskName]

    def __init__(self, manifest: LabelManifest, models: Sequence[LabelModel], provider: Provider) -> None:
        self.manifest = manifest
        self.members = tuple(member.name for member in manifest.members)
        self.labels = manifest.labels
        self.weights: Mapping[str, float] = dict(manifest.weights.default)
        self.provider = provider.name
        self._models = tuple(models)
        places = {label: place for place, label in enumerate(manifest.labels)}
        self._columns = [np.array([places[label] for label in model.labels], np.int64) for model in models]
        self.known = np.zeros((len(self._models), len(self.labels)), np.bool_)
        for known, columns in zip(self.known, self._columns, strict=True):
            known[columns] = True
        self._log_prior = np.log(np.array(manifest.prior)) if manifest.prior else None

    @classmethod
    def load(cls, path: str | Path, provider: str = "auto", threads: int | None = None, verify: bool = True) -> Self:
        """Open a bundle.

        Args:
            path: The bundle's folder.
            provider: "cpu", "cuda", "cuda-graphs", or "auto": CUDA where it works, else the CPU.
            threads: Threads within an operator; as many as there are physical cores by default.
            verify: Compare the checksums of all files. Without it only structure, paths and sizes are checked.

        Raises:
            BundleError: The bundle is missing, damaged, unsafe, of another task, or its graphs do not load.
            EdgemixError: The provider asked for does not work here.
        """
        bundle = Path(path)
        manifest = read_any_manifest(bundle)
        if not isinstance(manifest, LabelManifest) or manifest.task != cls.task:
            raise BundleError(
                f"{bundle}: is a bundle of {manifest.task}, and {cls.__name__} runs {cls.task}",
                "Open it with edgemix.load, which knows every task.",
            )
        verify_label_bundle(bundle, manifest, checksums=verify)
        return cls.assemble(bundle, manifest, provider, threads)

    @classmethod
    def assemble(
        cls, bundle: Path, manifest: LabelManifest, provider: str = "auto", threads: int | None = None
    ) -> Self:
        """Open the files of a bundle that is being made, by its manifest.

        Raises:
            BundleError: A file is damaged, or a graph does not load.
            EdgemixError: The provider asked for does not work here.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        chosen = choose(provider)
        return cls(manifest, [open_member(bundle, entry, chosen, threads) for entry in manifest.members], chosen)

    def save(self, bundle: str | Path) -> None:
        """Write the weights to the bundle that this was loaded from, in one step: a reader sees the old or the new.

        Raises:
            EdgemixError: It cannot be written, or has changed since.
        """
        folder = Path(bundle)
        found = read_any_manifest(folder)
        if found.files != self.manifest.files:
            raise EdgemixError(f"{folder} is not the bundle that this mixture was loaded from", "Load it again.")
        self.manifest = write_manifest(folder, self.manifest)

    def close(self) -> None:
        """Free the graphs; the mixture cannot be used afterwards."""
        models, self._models = self._models, ()
        for model in models:
            model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def models(self) -> tuple[LabelModel, ...]:
        """The members.

        Raises:
            EdgemixError: The mixture is closed.
        """
        if not self._models:
            raise EdgemixError("this mixture is closed", "Load the bundle again.")
        return self._models

    def shares(self, weights: LabelWeights = None) -> NDArray[np.float64]:
        """Return weights as float64 [members] on the simplex.

        Raises:
            InputError: They name no domain or no member of this bundle, or are no weights.
        """
        own = self.manifest.weights
        if isinstance(weights, str):
            if weights not in own.domains:
                known = ", ".join(own.domains) or "none"
                raise InputError(f"there are no weights {weights!r}", f"The bundle's domains: {known}.")
            weights = own.domains[weights]
        return normalize(own.default if weights is None else weights, self.members)

    def combine_option(self, how: LabelCombine | None) -> LabelCombine:
        """Return how members are mixed: as a call says, or the bundle.

        Raises:
            InputError: There is no such way.
        """
        if how is not None:
            check_combine(how)
        return how or self.manifest.combine

    def spread(self, member: int, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return a member's log-probabilities of the mixture's labels, from its own logits.

        Args:
            member: Its index.
            logits: float32 [..., its labels].

        Returns:
            float64 [..., labels], -inf at those that it does not know; [..., labels, 2] (no and yes) of bundles whose
            examples may have several labels, where both are log 1/2 at those.
        """
        scaled = logits / np.float32(self.models[member].temperature)
        columns, shape = self._columns[member], (*logits.shape[:-1], len(self.labels))
        if self.manifest.multi_label:
            found = np.full((*shape, 2), -np.log(2))
            found[..., columns, :] = yes_and_no(scaled)
            return found
        found = np.full(shape, -np.inf)
        found[..., columns] = log_softmax(scaled)
        return found

    def score_texts(self, texts: Sequence[Text], pairs: Sequence[Text] | None = None) -> tuple[list[Scores], list[int]]:
        """Return all members' scores of texts, and how many predictions each text has: one, or one a word or mask.

        Args:
            texts: The texts.
            pairs: The second text of each pair.
        """
        return [model.score(texts, pairs) for model in self.models], [1] * len(texts)

    def spread_all(self, scores: Sequence[Scores]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return all members' log-probabilities [members, predictions, labels (, 2)], and where they have an opinion
        [members, predictions]; see `spread`.
        """
        logs = np.stack([self.spread(member, logits) for member, (logits, _) in enumerate(scores)])
        return logs, np.stack([present for _, present in scores])

    def mixed(self, scores: Sequence[Scores], weights: NDArray[np.float64], how: LabelCombine) -> NDArray[np.float64]:
        """Return the mixture's log-probabilities of all members' scores; see `mix`."""
        logs, present = self.spread_all(scores)
        return self.mix(logs, weights, how, present)

    def mix(
        self,
        log_probabilities: NDArray[np.float64],
        weights: NDArray[np.float64],
        how: LabelCombine,
        present: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """Return the mixture's log-probabilities of the members' [members, texts, labels (, 2)].

        Args:
            log_probabilities: From `spread`, of each member.
            weights: float64 [members].
            how: How they are mixed.
            present: Where each member has an opinion [members, texts].
        """
        if not self.manifest.multi_label:
            return combine(
                log_probabilities, weights, how, known=self.known, present=present, log_prior=self._log_prior
            )
        # Each label is a question of its own, on which a member that does not know it abstains.
        asked = present[..., None] & self.known[:, None, :]
        both = None if self._log_prior is None else np.exp(self._log_prior)
        if both is None:
            return combine(log_probabilities, weights, how, present=asked)
        mixed = [
            combine(
                log_probabilities[..., label, :],
                weights,
                how,
                present=asked[..., label],
                log_prior=np.log(np.array([1 - share, share])),
            )
            for label, share in enumerate(np.clip(both, 1e-6, 1 - 1e-6))
        ]
        return np.stack(mixed, axis=-2)
