import math
from types import SimpleNamespace

import numpy as np
import pytest

from edgemix.bundle import Weights
from edgemix.errors import InputError
from edgemix.runtime.evaluation import evaluate
from edgemix.runtime.results import Score


class TwoCoins:
    """A mixture of two members over the tokens "a" and "b": one gives "a" 3/4, the other 1/4. A token is a byte."""

    members = ("fond", "shy")
    context = 64
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))

    def __init__(self, weights):
        self.manifest = SimpleNamespace(weights=weights)
        self.windows = []

    def score(self, texts, *, window, progress):
        self.windows.append(window)
        return [self._score(text) for text in texts]

    def _score(self, text):
        fond = np.array([0.75 if letter == "a" else 0.25 for letter in text[1:]])
        own = np.log([fond, 1 - fond])
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        return Score(ids, np.full(len(fond), math.nan), own, len(fond))


FITTED = Weights("fit", {"fond": 0.9, "shy": 0.1}, {"as": {"fond": 1.0, "shy": 0.0}})


def test_figures_are_those_worked_out_by_hand():
    table = evaluate(TwoCoins(FITTED), {"as": ["aaaaa"], "bs": ["bbb", "bb", "b", ""]})
    fond, uniform = table.row("fond"), table.row("uniform")
    assert (fond.files["as"].tokens, fond.files["bs"].tokens, fond.overall.tokens) == (4, 3, 7)
    assert fond.files["as"].perplexity == pytest.approx(4 / 3)
    assert fond.files["bs"].bits_per_byte == pytest.approx(2)
    assert fond.overall.bits_per_byte == pytest.approx((4 * math.log2(4 / 3) + 3 * 2) / 7)
    assert uniform.overall.perplexity == pytest.approx(2)
    assert table.row("fitted").files["as"].perplexity == pytest.approx(1 / 0.7)


def test_a_row_for_each_member_and_each_way_to_mix():
    assert [row.name for row in evaluate(TwoCoins(FITTED), {"x": ["ab"]}).rows] == [
        "fond", "shy", "uniform", "fitted", "fitted to as",
    ]  # fmt: skip
    uniform = Weights("uniform", {"fond": 0.5, "shy": 0.5})
    assert [row.name for row in evaluate(TwoCoins(uniform), {"x": ["ab"]}).rows] == ["fond", "shy", "uniform"]
    given = Weights("given", {"fond": 0.2, "shy": 0.8})
    assert evaluate(TwoCoins(given), {"x": ["ab"]}).rows[-1].name == "given"


def test_one_hot_weights_give_that_members_figures():
    table = evaluate(TwoCoins(FITTED), {"x": ["abba"]})
    assert table.row("fitted to as").files == table.row("fond").files


def test_the_window_is_within_the_context():
    mixture = TwoCoins(FITTED)
    evaluate(mixture, {"x": ["ab"]})
    evaluate(mixture, {"x": ["ab"]}, window=16)
    assert mixture.windows == [64, 16]


@pytest.mark.parametrize("files", [{}, {"empty": ["", "a"]}])
def test_nothing_to_score_is_an_error(files):
    with pytest.raises(InputError, match=r"empty|no text"):
        evaluate(TwoCoins(FITTED), files)
