"""The same texts for asyncio, and work that ends when nobody waits for it any more."""

import asyncio
import os
import threading

import pytest
from helpers.onnx_members import write_bundle

from edgemix.errors import EdgemixError, InputError
from edgemix.runtime import Mixture

PROMPT = "Once upon a time"


@pytest.fixture
def slow(graph_calls):
    """Graphs that take their time; counts the calls."""
    pause = threading.Event()
    graph_calls.before = lambda: pause.wait(0.005)
    return graph_calls


def working():
    return [thread for thread in threading.enumerate() if thread.name == "edgemix"]


def test_it_is_what_the_plain_calls_give(pair):
    async def ask():
        one, several = await asyncio.gather(
            pair.agenerate(PROMPT, max_new_tokens=9), pair.agenerate([PROMPT, "x"], max_new_tokens=9)
        )
        chunks = [chunk async for chunk in pair.astream(PROMPT, max_new_tokens=9)]
        return one, several, chunks

    one, several, chunks = asyncio.run(ask())
    assert one.text == pair.generate(PROMPT, max_new_tokens=9).text
    assert [each.text for each in several] == [each.text for each in pair.generate([PROMPT, "x"], max_new_tokens=9)]
    assert "".join(chunk.text for chunk in chunks) == one.text == chunks[-1].completion.text


def test_the_loop_goes_on_meanwhile(pair, slow):
    async def ask():
        task = asyncio.create_task(pair.agenerate(PROMPT, max_new_tokens=5))
        turns = 0
        while not task.done():
            turns += 1
            await asyncio.sleep(0.001)
        return turns

    assert asyncio.run(ask()) > 5


def test_a_stream_that_is_left_stops_the_work(pair, slow):
    async def ask():
        async for _ in (stream := pair.astream(PROMPT, max_new_tokens=4000)):
            break
        await stream.aclose()
        return len(slow), working()

    called, threads = asyncio.run(ask())
    assert not threads, "closing waits until the work has ended"
    assert called < 50


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT * 400])
def test_a_task_that_is_cancelled_stops_the_work(pair, slow, prompt):
    async def ask():
        task = asyncio.create_task(pair.agenerate(prompt[:3000], max_new_tokens=1000))
        while not slow:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(slow), working()

    called, threads = asyncio.run(ask())
    assert not threads
    assert called < 50, "a long prompt is called off between two calls, too"


def test_errors_come_where_they_are_awaited(pair, graph_calls):
    def fail():
        raise EdgemixError("no more memory")

    async def ask():
        with pytest.raises(InputError, match="temperature"):
            pair.astream(PROMPT, temperature=-1)
        with pytest.raises(InputError, match="temperature"):
            await pair.agenerate(PROMPT, temperature=-1)
        graph_calls.before = fail
        with pytest.raises(EdgemixError, match="no more memory"):
            await pair.agenerate(PROMPT)

    asyncio.run(ask())


def test_tickets_of_a_server_can_be_awaited(pair):
    prompts = ["a fox", "an owl", "hen", "x"]
    alone = [pair.generate(prompt, max_new_tokens=12, speculation="off").text for prompt in prompts]

    async def ask(server, prompt):
        return "".join([chunk.text async for chunk in server.submit(prompt, max_new_tokens=12)])

    async def all_of_them():
        with pair.serve(most=2) as server:
            streamed = await asyncio.gather(*(ask(server, prompt) for prompt in prompts))
            waited = [await server.submit(prompt, max_new_tokens=12).aresult() for prompt in prompts[:2]]
        return streamed, [each.text for each in waited]

    streamed, waited = asyncio.run(all_of_them())
    assert (streamed, waited) == (alone, alone[:2])


def test_a_ticket_that_is_left_is_cancelled(pair, slow):
    async def ask():
        with pair.serve(most=1) as server:
            async for _ in (chunks := aiter(server.submit(PROMPT, max_new_tokens=4000))):
                break
            await chunks.aclose()
            return await server.submit("x", max_new_tokens=3).aresult()  # there is room again

    assert len(asyncio.run(ask()).token_ids) == 3
    assert len(slow) < 100


def test_an_error_reaches_the_one_who_awaits_a_ticket(pair, graph_calls):
    def fail():
        raise EdgemixError("no more memory")

    async def ask():
        with pair.serve() as server:
            graph_calls.before = fail
            with pytest.raises(EdgemixError, match="no more memory"):
                await server.submit(PROMPT).aresult()

    asyncio.run(ask())


class Panic(BaseException):
    """What a library in Rust raises where it fails badly is no Exception."""


def test_a_panic_reaches_the_one_who_waits(pair, graph_calls):
    def fail():
        raise Panic("in a library")

    async def ask():
        with pair.serve() as server:
            graph_calls.before = fail
            for waited in (pair.agenerate(PROMPT), server.submit(PROMPT).aresult()):
                with pytest.raises(EdgemixError, match="Panic"):
                    await waited
            graph_calls.before = lambda: None
            assert (await server.submit(PROMPT, max_new_tokens=3).aresult()).token_ids  # others are served

    asyncio.run(ask())


def test_what_nobody_asks_for_is_not_made(pair, slow):
    async def ask():
        stream = pair.astream(PROMPT, max_new_tokens=200)
        await anext(stream)
        await asyncio.sleep(0.2)
        made = len(slow)
        await stream.aclose()
        return made

    assert asyncio.run(ask()) < 20


def test_work_ends_with_its_loop(pair, slow):
    loop = asyncio.new_event_loop()
    stream = pair.astream(PROMPT, max_new_tokens=4000)
    loop.run_until_complete(anext(stream))
    loop.close()
    for thread in working():
        thread.join(5)
    assert not working()


def test_a_ticket_has_one_reader(pair):
    async def ask():
        with pair.serve() as server:
            ticket = server.submit(PROMPT, max_new_tokens=20)
            return await asyncio.gather(ticket.aresult(), ticket.aresult(), return_exceptions=True)

    one, other = asyncio.run(ask())
    assert len(one.token_ids) == 20
    assert isinstance(other, InputError)


def test_a_result_can_be_awaited_again(pair):
    """The generator of the first time was still open, and its request busy."""

    async def ask():
        with pair.serve() as server:
            ticket = server.submit(PROMPT, max_new_tokens=3)
            return await ticket.aresult(), await ticket.aresult(), ticket.result()

    one, second, third = asyncio.run(ask())
    assert one == second == third


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork_the_mixture_says_so_and_does_not_hang(tmp_path, pair_forms):
    """ONNX Runtime's threads stay in the parent: a call, or the end of a session, would wait for them for ever."""
    pair = Mixture.load(write_bundle(tmp_path / "bundle", pair_forms), provider="cpu", threads=2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            pair.generate(PROMPT)
            told = "it ran"
        except EdgemixError as error:
            told = f"{error.message} {error.remedy}"
        pair.close()
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    told = os.read(read, 1000).decode()
    os.waitpid(child, 0)
    assert "forked" in told
    assert "spawn" in told
    assert pair.generate(PROMPT, max_new_tokens=1).text is not None
