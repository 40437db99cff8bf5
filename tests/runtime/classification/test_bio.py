import itertools
import time

import numpy as np
import pytest

from edgemix.runtime.classification.tokens.bio import LabelScheme, viterbi

PER = LabelScheme(("O", "B-PER", "I-PER"))
TWO = LabelScheme(("I-LOC", "O", "B-PER", "I-PER", "B-LOC", "MISC"))


def consistent(labels, scheme):
    names = [scheme.names[label] for label in labels]
    for before, name in zip(["O", *names], names, strict=False):
        if name.startswith("I-") and f"B-{name[2:]}" in scheme.names and before not in (name, f"B-{name[2:]}"):
            return False
    return True


def log(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float32))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0.5, 0.1, 0.4], [0.1, 0.1, 0.8]], "B I"),  # .1 * .8 > .5 * .1
        ([[0.8, 0.05, 0.15], [0.3, 0.3, 0.4]], "O O"),  # .8 * .3 is more than .05 * .4, and as much as O B
        ([[0.1, 0.2, 0.7]], "B"),
        ([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], None),  # no consistent sequence is possible
        ([], ""),
    ],
)
def test_sequences_that_a_hand_can_count(rows, expected):
    labels = viterbi(log(*rows).reshape(-1, 3), PER)
    assert consistent(labels, PER)
    if expected is not None:
        assert " ".join("OBI"[label] for label in labels) == expected


def test_without_a_b_label_i_begins_entities():
    """Members that are trained on the IOB1 scheme would never find an entity."""
    assert viterbi(log([0.2, 0.8], [0.9, 0.1]), LabelScheme(("O", "I-PER"))).tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_the_most_probable_of_all_consistent_sequences_is_found_in_batches(seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 6, 5)
    scores = log(*random.dirichlet(np.full(6, 0.3), int(lengths.sum()))).reshape(-1, 6)
    found = np.split(viterbi(scores, TWO, lengths), np.cumsum(lengths)[:-1])
    for own, labels in zip(np.split(scores, np.cumsum(lengths)[:-1]), found, strict=True):
        rows = np.arange(len(own))
        candidates = (c for c in itertools.product(range(6), repeat=len(own)) if consistent(c, TWO))
        best = max(own[rows, list(c)].sum() if c else 0.0 for c in candidates)
        assert consistent(labels, TWO)
        assert own[rows, labels].sum() == pytest.approx(best, rel=1e-5)


def test_a_text_of_a_million_words_is_decoded_in_parts():
    scores = np.log(np.random.default_rng(0).dirichlet(np.full(6, 0.3), 1_000).astype(np.float32) + 1e-9)
    started = time.process_time()
    labels = viterbi(np.tile(scores, (1_000, 1)), TWO)
    assert time.process_time() - started < 20
    assert consistent(labels[:5_000], TWO)
