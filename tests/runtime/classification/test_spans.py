import numpy as np
import pytest

from edgemix.errors import InputError
from edgemix.runtime.classification.tokens.bio import LabelScheme
from edgemix.runtime.classification.tokens.spans import Entity, aggregate, consistent_entities, merge_windows
from edgemix.runtime.classification.tokens.words import given_words, on_words, text_words

SCHEME = LabelScheme(("O", "B-PER", "I-PER"))


def log(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows, np.float32))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n", []),
        ("Ada  met\tBob.", ["Ada", "met", "Bob", "."]),
        ("U.N.'s (x_1)!", ["U", ".", "N", ".", "'", "s", "(", "x", "_", "1", ")", "!"]),
        ("東京 to Köln, हिन्दी cafe\u0301", ["東", "京", "to", "Köln", ",", "हिन्दी", "cafe\u0301"]),
        ("a\U0001f600b", ["a", "\U0001f600", "b"]),
    ],
)
def test_words_of_a_text(text, words):
    """A mark such as a vowel sign of Hindi is no letter to Python, and yet part of a word."""
    assert [text[start:end] for start, end in text_words(text)] == words


def test_places_of_given_words():
    words = ["New", "", "York!"]
    assert [" ".join(words)[start:end] for start, end in given_words(words)] == words
    assert given_words([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("pooling", "first_word"),
    [("first", [0.5, 0.3, 0.2]), ("average", [0.3, 0.55, 0.15]), ("max", [0.1, 0.8, 0.1])],
)
def test_tokens_are_pooled_by_the_word_in_which_they_begin(pooling, first_word):
    # "Ada" is two tokens, the second begins with the space before "met" and belongs to it, "x" has none.
    text = "Ada met x"
    tokens = log([0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1])
    offsets = np.array([[0, 1], [1, 3], [3, 7]])
    rows, read = on_words(tokens, offsets, text_words(text), SCHEME, pooling)
    assert np.allclose(np.exp(rows), [first_word, [0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    assert read.tolist() == [True, True, False]


def test_a_token_over_several_words_begins_an_entity_once():
    rows, read = on_words(log([0.1, 0.6, 0.3]), np.array([[0, 4]]), text_words("U.N."), SCHEME)
    assert np.allclose(np.exp(rows), [[0.1, 0.6, 0.3], *[[0.1, 0.0, 0.9]] * 3])
    assert read.all()
    [entity] = consistent_entities("U.N.", rows, text_words("U.N."), SCHEME)
    assert (entity.label, entity.text) == ("PER", "U.N.")


def test_members_of_different_tokenizers_mix_exactly_on_words():
    text = "Ada met"
    words = text_words(text)
    letters, _ = on_words(
        log(*[[0.2, 0.7, 0.1]] * 3, *[[0.9, 0.05, 0.05]] * 3),
        np.array([[i, i + 1] for i in (0, 1, 2, 4, 5, 6)]),
        words,
        SCHEME,
    )
    whole, _ = on_words(log([0.6, 0.2, 0.2], [0.5, 0.25, 0.25]), words, words, SCHEME)
    mixture = np.log(0.5 * np.exp(letters) + 0.5 * np.exp(whole))
    assert np.allclose(np.exp(mixture), [[0.4, 0.45, 0.15], [0.7, 0.15, 0.15]])
    assert consistent_entities(text, mixture, words, SCHEME) == (Entity("PER", 0, 3, "Ada", pytest.approx(0.45)),)


@pytest.mark.parametrize("offsets", [np.zeros((0, 2), np.int64), np.zeros((1, 2), np.int64)])
def test_a_text_without_tokens_is_not_read(offsets):
    rows, read = on_words(log(*[[0.2, 0.7, 0.1]] * len(offsets)).reshape(-1, 3), offsets, text_words("a b"), SCHEME)
    assert not read.any()
    assert np.allclose(np.exp(rows), 1 / 3)
    assert aggregate("a b", rows[:0], offsets[:0], SCHEME) == ()


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="none, simple, first, average, max"):
        aggregate("a", log([1, 0, 0]), text_words("a"), SCHEME, aggregation="last")
    with pytest.raises(InputError, match="first, average, max"):
        on_words(log([1, 0, 0]), text_words("a"), text_words("a"), SCHEME, "last")


class Window:
    """A window of a text with [CLS] and [SEP]; every token is its own number."""

    def __init__(self, first, end):
        self.first = first
        self.ids = np.array([-1, *range(first, end), -1])
        self.special = self.ids < 0
        self.offsets = np.stack([self.ids, self.ids + 1], axis=1)
        self.tokens = [str(id_) for id_ in self.ids]


@pytest.mark.parametrize(
    ("windows", "sources"),
    [
        ([(0, 3)], "000"),
        ([(0, 6), (4, 9)], "000001111"),
        ([(0, 4), (2, 6), (4, 7)], "0001122"),
        ([(0, 2), (2, 4)], "0011"),
    ],
)
def test_a_token_counts_in_the_window_where_it_is_farther_from_an_edge(windows, sources):
    windows = [Window(*each) for each in windows]
    merged = merge_windows(windows, [np.full((len(w.ids), 1), i, np.float32) for i, w in enumerate(windows)])
    assert merged.ids.tolist() == list(range(len(sources)))
    assert merged.offsets[:, 0].tolist() == merged.ids.tolist()
    assert merged.tokens == tuple(map(str, merged.ids))
    assert "".join(str(int(value)) for value in merged.log_probabilities[:, 0]) == sources


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("pooling", ["first", "average", "max"])
def test_words_have_what_a_loop_over_tokens_gives(seed, pooling):
    random = np.random.default_rng(seed)
    text = "".join(random.choice(list("ab .  "), 40))
    cuts = np.sort(random.choice(np.arange(1, 40), 15, replace=False))
    offsets = np.stack([np.concatenate([[0], cuts]), np.append(cuts, 40)], axis=1)[random.random(16) < 0.8]
    tokens = np.log(random.dirichlet(np.ones(3), len(offsets)).astype(np.float32))
    words = text_words(text)
    rows, read = on_words(tokens, offsets, words, SCHEME, pooling)
    for row, known, (start, end) in zip(np.exp(rows), read, words, strict=True):
        before = max((e for s, e in words if e <= start), default=0)
        own = [np.exp(t) for t, (s, e) in zip(tokens, offsets, strict=True) if before <= s < end and e > start]
        over = [np.exp(t) for t, (s, e) in zip(tokens, offsets, strict=True) if s < start < e]
        if own:
            chosen = {"first": own[0], "average": np.mean(own, axis=0), "max": max(own, key=max)}[pooling]
        elif over:
            chosen = [over[0][0], 0.0, over[0][1] + over[0][2]]
        else:
            chosen = [1 / 3] * 3
        assert known == bool(own or over)
        assert np.allclose(row, chosen, atol=1e-6)
