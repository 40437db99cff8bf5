"""Many texts at once: each is what it would be alone, whoever comes and goes beside it."""

import threading
import time

import numpy as np
import pytest
from helpers.onnx_members import saying

from edgemix.errors import EdgemixError, InputError
from edgemix.runtime.decoding.batch import PREFILL_CHUNK, BatchSequence, ContinuousBatch

PROMPTS = [
    "a fox",
    "The owl sat on the mat and said nothing at all.",
    "x",
    "hen hen hen",
    "9" * (2 * PREFILL_CHUNK + 7),
    "yz",
]
OPTIONS = [
    {},
    {"temperature": 0.9, "seed": 3, "top_k": 40},
    {"weights": "first"},
    {"weights": "adaptive", "max_new_tokens": 40},
    {"weights": "adaptive", "repetition_penalty": 1.2},
    {"combine": "log-linear", "temperature": 1.0, "seed": 1},
]


def test_texts_are_what_they_are_alone(pair):
    alone = [
        pair.generate(prompt, **{"max_new_tokens": 24, "speculation": "off"} | options)
        for prompt, options in zip(PROMPTS, OPTIONS, strict=True)
    ]
    with pair.serve(most=3) as server:
        tickets = [
            server.submit(prompt, **{"max_new_tokens": 24} | options)
            for prompt, options in zip(PROMPTS, OPTIONS, strict=True)
        ]
        for ticket, expected in zip(tickets, alone, strict=True):
            found = ticket.result()
            assert (found.text, found.token_ids, found.finish_reason) == (
                expected.text,
                expected.token_ids,
                expected.finish_reason,
            )
            np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, atol=1e-4)


def test_threads_may_ask_at_any_time(pair):
    expected = {prompt: pair.generate(prompt, max_new_tokens=12).text for prompt in PROMPTS}
    found = {}
    with pair.serve(most=2) as server:

        def ask(prompt, wait):
            time.sleep(wait)
            found[prompt] = server.submit(prompt, max_new_tokens=12).result().text

        threads = [threading.Thread(target=ask, args=(p, 0.01 * i)) for i, p in enumerate(PROMPTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected


def test_chunks_come_while_the_text_is_written(pair):
    with pair.serve() as server:
        chunks = list(server.submit("a fox", max_new_tokens=20))
    done = chunks[-1].completion
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == done.text


def test_a_text_can_be_cancelled(pair):
    with pair.serve(most=1) as server:
        first = server.submit("a fox", max_new_tokens=3000)
        second = server.submit("hen", max_new_tokens=5)
        next(iter(first))
        first.cancel()
        assert second.result().text == pair.generate("hen", max_new_tokens=5).text
        with pytest.raises(EdgemixError, match="cancelled"):
            first.result()


def test_a_stop_string_ends_a_text_and_makes_room(mixture_of):

    mixture = mixture_of({"a": saying("abcdefgh")})
    with mixture.serve(most=1) as server:
        tickets = [server.submit("a", stop="ef"), server.submit("c")]
        assert [ticket.result().text for ticket in tickets] == ["bcd", "defgh"]


def test_what_makes_no_sense_is_refused_at_once(pair):
    with pair.serve(most=1, waiting=1) as server:
        with pytest.raises(InputError, match="context"):
            server.submit("x" * 5000)
        with pytest.raises(InputError, match="temperature"):
            server.submit("x", temperature=-1)
        tickets = [server.submit("x", max_new_tokens=2000) for _ in range(2)]
        with pytest.raises(EdgemixError, match="again later"):
            server.submit("x")
        tickets[0].cancel()
    with pytest.raises(EdgemixError, match="closed"):
        tickets[1].result()
    with pytest.raises(EdgemixError, match="closed"):
        server.submit("x")


def test_a_graph_that_fails_is_told_to_all(pair, monkeypatch):
    def fail(_):
        raise EdgemixError("no more memory")

    monkeypatch.setattr(ContinuousBatch, "step", fail)
    with pair.serve() as server, pytest.raises(EdgemixError, match="no more memory"):
        server.submit("x").result()


def test_memory_does_not_grow_with_those_who_left(pair):
    with pair.serve(most=2) as server:
        for _ in range(12):
            server.submit("a fox", max_new_tokens=3).result()
        assert all(cache.batch <= 2 for cache in server._batch._caches)


@pytest.mark.parametrize("at", [0, 5])
def test_what_fails_for_one_text_fails_alone(pair, monkeypatch, at):
    """Numbers that are none, say, in the middle of a text or at its first token."""
    expected = pair.generate("hen", max_new_tokens=12).text
    real, count = BatchSequence.mix, [0]

    def mix(row, parts):
        if len(row.request.prompt) == 5:
            count[0] += 1
            parts = np.full_like(parts, np.nan) if count[0] > at else parts
        return real(row, parts)

    monkeypatch.setattr(BatchSequence, "mix", mix)
    with pair.serve() as server:
        good, bad = (server.submit(prompt, max_new_tokens=12) for prompt in ("hen", "a fox"))
        assert good.result().text == expected
        with pytest.raises(EdgemixError, match="not numbers"):
            bad.result()
        assert server.submit("hen", max_new_tokens=12).result().text == expected
