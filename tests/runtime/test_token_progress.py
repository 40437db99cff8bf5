"""A prompt's progress: of every member, every token of the prompt, and nothing of what is written behind it."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from helpers.onnx_members import VOCABULARY, random_member

from edgemix.errors import InputError

PROMPT = "a long prompt, as prompts go " * 20


class Listener:
    def __init__(self) -> None:
        self.stages, self.heard, self.steps, self.open = [], 0.0, 0, False

    @contextmanager
    def stage(self, title, total=None):
        self.stages.append((title, total))
        self.open = True
        yield self
        self.open = False

    def advance(self, amount=1.0, note=""):
        assert self.open
        self.heard, self.steps = self.heard + amount, self.steps + 1

    def log(self, line):
        raise AssertionError(line)


@pytest.fixture
def mixture(mixture_of):
    return mixture_of({name: random_member(seed, tokens=VOCABULARY) for name, seed in (("a", 1), ("b", 2))})


@pytest.mark.parametrize("options", [{"speculation": "off"}, {"weights": "adaptive"}])
def test_all_members_reading_is_heard(mixture, options):
    listener, tokens = Listener(), len(mixture.tokenizer.encode(PROMPT))
    said = mixture.generate(PROMPT, max_new_tokens=12, progress=listener, **options)
    assert listener.stages == [("prompt", 2 * tokens)]
    assert listener.heard == 2 * tokens
    assert listener.steps > 2  # chunk by chunk
    assert said.token_ids == mixture.generate(PROMPT, max_new_tokens=12, **options).token_ids


def test_a_batch_is_heard_together(mixture):
    listener, prompts = Listener(), [PROMPT, "short"]
    mixture.generate(prompts, max_new_tokens=3, progress=listener)
    total = 2 * sum(len(mixture.tokenizer.encode(prompt)) for prompt in prompts)
    assert listener.stages == [("prompt", total)]
    assert listener.heard == total


def test_what_was_read_before_is_not_heard_again(mixture):
    list(mixture.stream(PROMPT, max_new_tokens=2))
    listener = Listener()
    mixture.generate(PROMPT, max_new_tokens=2, progress=listener)
    assert listener.heard < listener.stages[0][1] / 4


def test_a_scheduler_reports_no_progress(mixture):
    with mixture.serve() as server, pytest.raises(InputError, match="reports no progress"):
        server.submit("a", progress=Listener())
