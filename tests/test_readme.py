"""What the README shows runs as it stands, on a bundle whose members have the example's names."""

import asyncio
import re
from pathlib import Path

import pytest
from helpers.onnx_members import random_member, write_bundle

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    members = {name: random_member(seed, tokens=258) for seed, name in enumerate(("math", "code", "wiki"))}
    one_hot = {name: {each: float(each == name) for each in members} for name in members}
    write_bundle(
        folder / "experts", members, domains=one_hot, chat_template=TEMPLATE, student=random_member(7, tokens=258)
    )
    return folder


@pytest.mark.parametrize("source", EXAMPLES, ids=[text.splitlines()[-1].strip()[:30] for text in EXAMPLES])
def test_examples_run(source, experts, monkeypatch, capsys):
    monkeypatch.chdir(experts)
    names = {"__name__": "example"}
    exec(compile(source, "README.md", "exec"), names)
    if "app" in names:
        check_web_handler(names)
    else:
        assert capsys.readouterr().out.strip()


def check_web_handler(names):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"2 + 3 =", "more_body": False}

    async def send(event):
        sent.append(event)

    asyncio.run(names["app"]({"type": "http"}, receive, send))
    names["server"].close()
    body = b"".join(event.get("body", b"") for event in sent)
    alone = names["mixture"].generate("2 + 3 =", max_new_tokens=64, speculation="off").text
    assert (sent[0]["status"], body.decode()) == (200, alone)
    names["mixture"].close()


def test_there_is_one_for_each_use():
    assert len(EXAMPLES) >= 5
