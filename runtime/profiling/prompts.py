"""The prompts of a profile. Their text does not repeat itself, which would make drafts from the text too good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemix.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemix.runtime.text.tokenizer import Tokenizer

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
---
class Inventory:
    """What a shop has in stock, by article."""

    def __init__(self):
        self._stock = {}

    def receive(self, article, pieces):
        if pieces <= 0:
            raise ValueError(f"{pieces} pieces of {article} are no delivery")
        self._stock[article] = self._stock.get(article, 0) + pieces

    def sell(self, article, wanted):
        available = self._stock.get(article, 0)
        if wanted > available:
            raise LookupError(f"only {available} of {article} are left")
        self._stock[article] = available - wanted
        return wanted
---
Question: Two trains leave the same station in opposite directions, one at 80 kilometres an hour, the other at 110. How
far apart are they after an hour and a half?
Answer: Together they put 80 + 110 = 190 kilometres between them every hour. In 1.5 hours that is 190 * 1.5 = 285, so
the distance is 285 kilometres.
---
Bread that rises slowly tastes of more than flour. Over a night in the cold, yeast works at a tenth of its usual pace
while bacteria turn a little of the starch into acids, and enzymes have time to free sugars that later brown the crust.
Bakers call this retarding. The dough is shaped in the evening, covered, and set on a low shelf; next morning it goes
straight into a very hot oven with a cup of water thrown onto the floor of it, whose steam keeps the skin soft until the
loaf has spread as far as it will.
---
The committee met on Thursday to discuss the bridge. Mr Lindqvist reported that its piers were sound but that eleven of
the forty hangers showed rust beneath the paint, three of them badly. Replacing all of them would close one lane from
April until late June; replacing the worst three would take a fortnight, and the rest could wait two winters. After some
debate it was agreed, by seven votes against four, to do the whole work at once and to ask the county for a share of the
cost. The treasurer abstained.
---
Owls hear with ears set at different heights, so a sound from below reaches one a moment before its fellow. From that
delay, and from which is louder, the bird knows direction both sideways and up or down, to within two degrees. Its face
is a dish of stiff feathers which gathers noise as a cupped hand does. In snow a great grey owl will plunge through
thirty centimetres of crust after a vole that it has never seen.
'''
PASSAGES = tuple(f"{passage}\n" for passage in _TEXT.split("---\n"))


class Prompts:
    """Prompts of any length, in token ids, that begin at several places of a text.

    Args:
        tokenizer: Encodes them.
        text: Text to take them from; the passages above by default.

    Attributes:
        count: Number of distinct beginnings.
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
        """Return a prompt of `tokens` tokens, at least one, from the given beginning; the text wraps around."""
        start = self._starts[number % self.count]
        wanted = np.arange(start, start + tokens - len(self._bos))
        return [*self._bos, *self._ids.take(wanted, mode="wrap").tolist()][:tokens]

    def batch(self, tokens: int, size: int) -> Sequence[list[int]]:
        """Return `size` prompts of `tokens` tokens."""
        return [self.take(tokens, number) for number in range(size)]
