"""What fails for one text ends that text, with the reason, and no other."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from edgemix.errors import EdgemixError
from edgemix.runtime import Mixture
from edgemix.runtime.graphs.providers import PROVIDERS
from edgemix.runtime.sequences.prefix_cache import PrefixCache

PROMPTS = ["a fox", "hen hen", "The owl sat on the mat.", "x", "9" * 150]
OPTIONS = [{}, {"temperature": 0.9, "seed": 3}, {"weights": "first"}, {"weights": "adaptive"}]


class Panic(BaseException):
    """A library in Rust raises no Exception where it panics."""


class Faults:
    """Makes calls of graphs fail: before they ran, or after, when the cache was written.

    Args:
        fails: Called with the graph's name and the number of tokens; an error to raise, or None.
    """

    def __init__(self, fails):
        self._fails, self.raised = fails, 0

    @contextmanager
    def watch(self, name, tokens):
        error, late = self._fails(name, tokens), self.raised % 2
        if error is not None:
            self.raised += 1
            if not late:
                raise error
        yield
        if error is not None:
            raise error


def failing(mixture, fails, **options):
    """The same mixture, whose graphs fail as they are told."""
    faults = Faults(fails)
    graphs = [graph.watched(faults.watch) for graph in mixture.graphs()]
    return Mixture(mixture.manifest, graphs, mixture.tokenizer, PROVIDERS["cpu"], **options), faults


def test_one_failed_step_ends_no_text(pair):
    """ONNX Runtime fails once, in a step of several texts: all go on as if it had not."""
    expected = {prompt: pair.generate(prompt, max_new_tokens=20, speculation="off").token_ids for prompt in PROMPTS}
    for at in (0, 1, 6, 9):
        steps = iter(range(10_000))

        def fails(_, tokens, steps=steps, at=at):
            # No prompt has 2 to 4 tokens: those are steps of that many texts.
            return RuntimeError("bad step") if 2 <= tokens <= 4 and next(steps) == at else None

        mixture, faults = failing(pair, fails)
        with mixture.serve(most=4) as server:
            handles = {prompt: server.submit(prompt, max_new_tokens=20) for prompt in PROMPTS}
            assert {prompt: handle.result().token_ids for prompt, handle in handles.items()} == expected
        assert faults.raised == 1


@pytest.mark.parametrize("error", [RuntimeError("bad"), MemoryError("full"), Panic("index")], ids=repr)
def test_a_graph_that_fails_for_good_ends_the_texts_that_need_it(pair, error):
    """They hear why, and the server serves the next client."""
    calls, repaired = iter(range(10_000)), threading.Event()

    def fails(name, _):
        return error if name == "growing" and not repaired.is_set() and next(calls) > 12 else None

    mixture, _ = failing(pair, fails)
    with mixture.serve(most=4) as server:
        for handle in [server.submit(prompt, max_new_tokens=100) for prompt in ("a fox", "hen")]:
            with pytest.raises(EdgemixError, match=str(error)) as found:
                handle.result()
            assert found.value.__cause__.__traceback__ is None  # its frames kept the caches of failed texts
        repaired.set()
        expected = pair.generate("x", max_new_tokens=5).text
        assert server.submit("x", max_new_tokens=5).result().text == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_clients_are_told_when_the_thread_exits(pair):
    """A SystemExit ends the scheduler; clients waited for ever, and new ones were taken."""
    mixture, _ = failing(pair, lambda *_: SystemExit())
    with mixture.serve() as server:
        handle = server.submit("a fox", max_new_tokens=5)
        with pytest.raises(EdgemixError, match="closed"):
            asyncio.run(asyncio.wait_for(handle.aresult(), 10))
        with pytest.raises(EdgemixError, match="closed"):
            server.submit("hen")


def test_random_failures_end_single_texts_only(pair):
    """Sixty-four clients, while calls fail at random: each gets the right text, or the reason."""
    jobs = [(prompt, options) for prompt in PROMPTS for options in OPTIONS]
    expected = [
        pair.generate(prompt, max_new_tokens=16, speculation="off", **options).token_ids for prompt, options in jobs
    ]
    chance, lock = random.Random(5), threading.Lock()

    def fails(_, tokens):
        with lock:
            drawn = chance.random()
        kinds = (RuntimeError("step"), MemoryError("memory"), Panic("panic"))
        return kinds[int(drawn * 1000) % 3] if drawn < (0.05 if tokens > 1 else 0.2) else None

    mixture, faults = failing(pair, fails, prefix_bytes=1 << 20)
    right, reasons = [], []
    with mixture.serve(most=8) as server:

        def client(number):
            for turn in range(3):
                index = (number + 7 * turn) % len(jobs)
                prompt, options = jobs[index]
                try:
                    found = server.submit(prompt, max_new_tokens=16, **options).result()
                except EdgemixError as error:
                    reasons.append(str(error))
                else:
                    assert found.token_ids == expected[index]
                    right.append(index)

        with ThreadPoolExecutor(64) as pool:
            for future in [pool.submit(client, number) for number in range(64)]:
                future.result(timeout=60)
    assert faults.raised > 50
    assert len(right) > 20
    assert len(reasons) > 5
    assert len(right) + len(reasons) == 3 * 64
    assert all(any(reason in said for reason in ("step", "memory", "panic")) for said in reasons)


class FullPrefixes(PrefixCache):
    """A prefix cache that finds no memory for what it should keep."""

    def add(self, entry):
        raise MemoryError("full")


def test_a_prompt_that_cannot_be_kept_is_answered(pair):
    """Its caches were in the batch and its request in no list: it waited for ever."""
    mixture, _ = failing(pair, lambda *_: None)
    mixture.prefixes = FullPrefixes(1 << 30)
    with mixture.serve(most=4) as server:
        handles = [server.submit(prompt, max_new_tokens=4) for prompt in (PROMPTS[2], PROMPTS[4])]
        for handle in handles:
            assert len(asyncio.run(asyncio.wait_for(handle.aresult(), 30)).token_ids) == 4
    assert len(mixture.generate(PROMPTS[4], max_new_tokens=4).token_ids) == 4
