"""The text that is continued while it is measured. It says nothing twice, so that drafts from the text are not better
than they would be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.tokenizer import Tokenizer

_TEXT = '''\
The harbour lies on the north side of the island, where the cliffs give way to a shallow bay. Fishing boats leave
before dawn and come back in the afternoon with mackerel, herring and now and then a few lobsters. In winter the ferry
runs only twice a week, and when a storm is expected it does not run at all. Most of the houses were built between
1820 and 1870, when copper was still mined in the hills behind the village.
---
def moving_average(values, width):
    """Means of each stretch of `width` values."""
    if width < 1:
        raise ValueError("the width must be at least 1")
    total = sum(values[:width])
    means = [total / width]
    for index in range(width, len(values)):
        total += values[index] - values[index - width]
        means.append(total / width)
    return means
---
Question: A baker sells 48 loaves in the morning and half as many in the afternoon. Each loaf costs 3 euros. How much
does she earn in five days?
Answer: In the afternoon she sells 48 / 2 = 24 loaves, so in a day she sells 48 + 24 = 72. At 3 euros a loaf that
makes 72 * 3 = 216 euros a day, and in five days 216 * 5 = 1080 euros.
---
A heat pump moves warmth from a cold place to a warm one, as a refrigerator does. It needs electricity for its
compressor, yet it delivers several times that energy as heat, because most of it is taken from the air or the ground
outside. How well it works depends on the difference between the two temperatures: the smaller that is, the less the
compressor has to do. Underfloor heating therefore suits it better than old radiators.
---
Dear Ms Okafor,

thank you for your letter of 3 March. We are glad to hear that the new windows have arrived without damage. Our
fitters can begin on Tuesday of next week, at about eight in the morning, and will need two days for the ground floor.
Please move furniture away from the walls, and tell us whether there is a place to park a van. The invoice will follow
by post.
---
Early maps of the coast show a river mouth far to the west of where it is today. Sand that the current carries along
the shore built a spit across it, grain by grain, and pushed the outlet eastwards by some forty metres a year. A canal
was dug in 1893 to hold it in its place. Behind the spit a lagoon formed, which is now a reserve for wading birds;
more than two hundred species have been counted there since records began.
'''
PASSAGES = tuple(f"{passage}\n" for passage in _TEXT.split("---\n"))


class Prompts:
    """Prompts of any length, in token ids, that begin at several places of a text.

    Args:
        tokenizer: Encodes them.
        text: What to take them from; the passages above by default.

    Attributes:
        count: Different beginnings.
    """

    def __init__(self, tokenizer: Tokenizer, text: str | None = None) -> None:
        pieces = PASSAGES if text is None else [text]
        encoded = [tokenizer.encode(piece, bos=False) for piece in pieces if piece]
        if not encoded:
            raise InputError("there is no text to continue", "Give a file with some.")
        self._bos = [] if tokenizer.entry.bos is None else [tokenizer.entry.bos]
        self._ids: NDArray[np.int64] = np.concatenate([np.asarray(ids, np.int64) for ids in encoded])
        if text is None:
            self._starts = np.cumsum([0, *(len(ids) for ids in encoded[:-1])]).tolist()
        else:
            self._starts = np.linspace(0, len(self._ids), len(PASSAGES), endpoint=False).astype(int).tolist()
        self.count = len(self._starts)

    def take(self, tokens: int, number: int = 0) -> list[int]:
        """A prompt of so many tokens, at least one, from the beginning of that number; where the text ends it begins
        again.
        """
        start = self._starts[number % self.count]
        wanted = np.arange(start, start + tokens - len(self._bos))
        return [*self._bos, *self._ids.take(wanted, mode="wrap").tolist()][:tokens]

    def batch(self, tokens: int, size: int) -> Sequence[list[int]]:
        """Prompts for so many texts at once."""
        return [self.take(tokens, number) for number in range(size)]
