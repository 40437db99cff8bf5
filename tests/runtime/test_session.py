"""Conversations that read only what is new at each turn, fork, and go on in another process."""

import asyncio
import json

import numpy as np
import pytest
from helpers.onnx_members import random_member, write_bundle

from edgemix.errors import EdgemixError, InputError
from edgemix.runtime import Mixture

TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
TEMPLATE = (
    "{% for t in tools or [] %}[tool] {{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
)
LONG = "Here is a long story about a fox and an owl who lived in a forest, told in every detail. " * 3
TURNS = [LONG, "And then?", "Why?"]


@pytest.fixture(scope="module")
def talking(tmp_path_factory, pair_forms):
    """A mixture with a chat template, and the same again, loaded a second time."""
    folder = write_bundle(
        tmp_path_factory.mktemp("talking") / "bundle",
        pair_forms,
        weights={"shared": 0.7, "growing": 0.3},
        chat_template=TEMPLATE,
    )
    return [Mixture.load(folder, provider="cpu", threads=1, prefix_bytes=0) for _ in range(2)]


@pytest.fixture
def read(graph_calls):
    """Tokens read by all graphs since it was cleared."""
    return graph_calls


def by_chat(mixture, turns, **options):
    """The same conversation by `chat`, everything read again at each turn."""
    messages, answers = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answers.append(mixture.chat(messages, **options))
        messages.append({"role": "assistant", "content": answers[-1].text})
    return answers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "adaptive"},
        {"temperature": 0.8, "seed": 3, "top_k": 50},
        {"speculation": "off"},
        {"tools": TOOLS},
    ],
)
def test_turns_are_what_chat_says_and_read_only_what_is_new(talking, read, options):
    options = {"max_new_tokens": 12, **options}
    expected = by_chat(talking[0], TURNS, **options)
    session, counts = talking[0].session(), []
    for turn, answer in zip(TURNS, expected, strict=True):
        read.clear()
        found = session.send(turn, **options)
        counts.append(sum(read))
        assert found.text == answer.text
        np.testing.assert_allclose(found.log_probabilities, answer.log_probabilities, atol=1e-4)
    assert counts[0] > 2 * len(LONG)
    if "weights" not in options:  # adaptive weights hear the last tokens of a prompt again
        assert max(counts[1:]) < len(LONG)
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 3


def test_what_is_kept_does_not_grow_with_the_turns(talking):
    session = talking[0].session([{"role": "system", "content": "Be brief."}])
    for _ in range(6):
        session.send("Hm, go on, please.", max_new_tokens=4)
        assert len(session._prefixes) == 2, "one text a graph"
    assert session.messages[0]["role"] == "system"


def test_a_fork_goes_its_own_way(talking, read):
    session = talking[0].session()
    session.send(LONG, max_new_tokens=8)
    fork = session.fork()
    read.clear()
    one, other = session.send("And then?", max_new_tokens=8), fork.send("Why?", max_new_tokens=8)
    assert sum(read) < len(LONG), "neither reads the beginning again"
    assert one.text == by_chat(talking[0], [LONG, "And then?"], max_new_tokens=8)[-1].text
    assert other.text == by_chat(talking[0], [LONG, "Why?"], max_new_tokens=8)[-1].text
    assert session.messages[:2] == fork.messages[:2]
    assert session.messages[2] != fork.messages[2]


def test_a_session_goes_on_in_another_process(talking, tmp_path, read):
    session = talking[0].session()
    session.send(LONG, max_new_tokens=8)
    session.save(tmp_path / "talk")
    restored = talking[1].restore(tmp_path / "talk")
    assert restored.messages == session.messages
    read.clear()
    assert restored.send("Why?", max_new_tokens=8).text == session.send("Why?", max_new_tokens=8).text
    assert sum(read) < len(LONG)


def test_a_session_of_another_bundle_is_read_again(talking, tmp_path, mixture_of):
    session = talking[0].session()
    session.send("Hello there, how do you do?", max_new_tokens=8)
    session.save(tmp_path / "talk")
    other = mixture_of({"one": random_member(5, tokens=258)}, chat_template=TEMPLATE)
    restored = other.restore(tmp_path / "talk")
    assert restored.messages == session.messages
    assert restored.send("Why?", max_new_tokens=8).finish_reason == "length"


def test_a_turn_that_is_broken_off_keeps_what_was_said(talking):
    session = talking[0].session()
    stream = session.stream("Hello", max_new_tokens=100)
    said = next(stream).text + next(stream).text
    stream.close()
    assert session.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]


def test_a_turn_that_is_left_keeps_what_was_seen(talking):
    async def talk():
        session, seen = talking[0].session(), ""
        async for chunk in (stream := session.astream("Hello", max_new_tokens=100)):
            seen += chunk.text
            await asyncio.sleep(0.01)
            if len(seen) > 4:
                break
        await stream.aclose()
        return session.messages[-1]["content"], seen

    said, seen = asyncio.run(talk())
    assert said == seen


def test_a_session_begins_with_messages(talking):
    for wrong in ("hi", [5]):
        with pytest.raises(InputError, match="role and content"):
            talking[0].session(wrong)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(talking, graph_calls):
    session = talking[0].session()
    session.send("Hello", max_new_tokens=4)
    before = session.messages
    graph_calls.clear()

    def fail():
        if len(graph_calls) > 6:
            raise EdgemixError("no more memory")

    graph_calls.before = fail
    with pytest.raises(EdgemixError, match="memory"):
        session.send("And then?", max_new_tokens=40)
    assert session.messages == before
    with pytest.raises(InputError, match="temperature"):
        session.send("And then?", temperature=-1)


def test_sessions_for_asyncio(talking):
    async def talk():
        session = talking[0].session()
        first = await session.asend("Hello", max_new_tokens=6)
        second = "".join([chunk.text async for chunk in session.astream("And then?", max_new_tokens=6)])
        return [first.text, second], session.messages

    answers, messages = asyncio.run(talk())
    assert answers == [each.text for each in by_chat(talking[0], ["Hello", "And then?"], max_new_tokens=6)]
    assert [message["content"] for message in messages[1::2]] == answers


def test_a_damaged_file_is_refused(talking, tmp_path):
    session = talking[0].session()
    session.send(LONG, max_new_tokens=4)
    session.save(tmp_path / "talk")
    data = (tmp_path / "talk").read_bytes()
    for name, damaged in {"cut": data[:-9], "other": b"hello", "changed": data.replace(b"role", b"rule")}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(InputError, match=r"damaged|no file of"):
            talking[0].restore(tmp_path / name)
    with pytest.raises(InputError, match="there is no file"):
        talking[0].restore(tmp_path / "nothing")
    for odd in (object(), b"bytes", float("nan"), "\udcff"):
        session.messages[-1]["content"] = odd
        with pytest.raises(InputError, match="written down"):
            session.save(tmp_path / "talk")
    assert (tmp_path / "talk").read_bytes() == data


def test_a_session_of_the_first_format_keeps_its_messages(talking, tmp_path):
    """Sessions were written in a format of our own before they were safetensors files."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    header = json.dumps({"texts": [{"graph": "x", "tokens": 1, "bytes": 4, "sha256": ""}], "messages": messages})
    (tmp_path / "talk").write_bytes(b"edgemix texts that were read, 1\n" + header.encode() + b"\ndata")
    restored = talking[0].restore(tmp_path / "talk")
    assert restored.messages == messages
    assert restored.send("Why?", max_new_tokens=8).finish_reason
