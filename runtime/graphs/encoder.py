"""A loaded graph of an encoder with its head: token ids in, logits out, no state between calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgemix.bundle import graph_io
from edgemix.errors import BundleError, EdgemixError
from edgemix.runtime.cancellation import check
from edgemix.runtime.graphs.providers import exclusive, onnxruntime_errors, open_session, plain

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgemix.runtime.graphs.providers import Provider

_FLOATS = ("tensor(float)", "tensor(float16)")


class EncoderGraph:
    """A loaded encoder graph; several threads may use it at once.

    Attributes:
        name: For messages.
        labels: Width of the logits.
        by_token: Whether there are logits for each token.
    """

    def __init__(self, session: Any, provider: Provider, name: str) -> None:
        """Wrap a session.

        Raises:
            BundleError: Its inputs or outputs are none of an encoder's.
        """
        self.name, self._session, self._provider = name, session, provider
        tensors = graph_io.GRAPH_TENSORS["encoder"]
        inputs = {tensor.name: tensor for tensor in session.get_inputs()}
        outputs = {tensor.name: tensor for tensor in session.get_outputs()}
        wrong = inputs.keys() - tensors.inputs - tensors.optional_inputs
        if wrong or not tensors.inputs <= inputs.keys() or outputs.keys() != tensors.outputs:
            raise BundleError(
                f"{name}: its graph is no encoder's: it reads {', '.join(inputs)} and returns {', '.join(outputs)}",
                "Export the bundle again.",
            )
        logits = outputs[graph_io.LOGITS]
        fixed = isinstance(logits.shape[-1], int) and logits.shape[-1] > 0
        if logits.type not in _FLOATS or len(logits.shape) not in (2, 3) or not fixed:
            raise BundleError(f"{name}: its logits are {logits.type} {logits.shape}", "Export the bundle again.")
        if any(tensor.type != "tensor(int64)" or len(tensor.shape) != 2 for tensor in inputs.values()):
            raise BundleError(f"{name}: its inputs are not all int64 [batch, sequence]", "Export the bundle again.")
        self.labels: int = logits.shape[-1]
        self.by_token = len(logits.shape) == 3
        self._typed = graph_io.TOKEN_TYPE_IDS in inputs

    @classmethod
    def load(
        cls,
        path: Path,
        provider: Provider,
        *,
        threads: int | None = None,
        name: str = "",
    ) -> EncoderGraph:
        """Open a graph; see `providers.open_session`.

        Raises:
            BundleError: It does not load, or is no encoder's.
        """
        return cls(open_session(path, provider, threads=threads), provider, name or path.parent.name)

    def run(
        self, ids: NDArray[np.int64], attention_mask: NDArray[np.int64], type_ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return logits float32 [texts, labels], or [texts, tokens, labels] where there are some for each token.

        Args:
            ids: int64 [texts, tokens].
            attention_mask: int64 [texts, tokens], 0 at padding.
            type_ids: int64 [texts, tokens]; not read by models that have none.

        Raises:
            EdgemixError: The graph fails, or returns something else or NaN.
        """
        check()
        feeds = {graph_io.INPUT_IDS: ids, graph_io.ATTENTION_MASK: attention_mask}
        if self._typed:
            feeds[graph_io.TOKEN_TYPE_IDS] = type_ids
        try:
            with exclusive(self._provider):
                (logits,) = self._session.run([graph_io.LOGITS], feeds)
        except onnxruntime_errors() as error:
            raise EdgemixError(f"{self.name}: its graph fails: {plain(error)}") from error
        expected = (*ids.shape, self.labels) if self.by_token else (len(ids), self.labels)
        if logits.shape != expected:
            raise EdgemixError(f"{self.name}: its logits are {logits.shape}, and should be {expected}")
        found = np.asarray(logits, np.float32)
        own = found[attention_mask > 0] if self.by_token else found
        if np.isnan(own).any():
            raise EdgemixError(f"{self.name}: its logits are not numbers", "Export it in another format.")
        return found
