"""The README and the guide: examples run, commands parse, recipes and links are valid; and `edgemix guide`."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest
import yaml
from click.testing import CliRunner
from helpers.label_members import LabelBundle, random_classifier
from helpers.onnx_members import random_member, write_bundle

from edgemix.cli import edgemix as group
from edgemix.cli.console import Console
from edgemix.recipe.labels import LabelRecipe
from edgemix.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "edgemix" / "guide").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *GUIDE]
TOPICS = [page.stem for page in GUIDE]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
INPUT_FILES = re.compile(r"[\w-]+\.(txt|jsonl|json|yaml|gguf)")


def blocks(language: str) -> list:
    """Every fenced block of a language in README and guide, named by page and number."""
    found = []
    for page in (PAGES[0], *GUIDE):
        sources = re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        found += [pytest.param(source, id=f"{page.stem}-{number}") for number, source in enumerate(sources)]
    return found


def command_lines() -> list:
    lines = []
    for block in blocks(""):
        lines += [line.removeprefix("$ ") for line in block.values[0].splitlines() if line.startswith("$ ")]
    return sorted(set(lines))


EXAMPLES = blocks("python")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    members = {name: random_member(seed, tokens=258) for seed, name in enumerate(("math", "code", "wiki"))}
    one_hot = {name: {each: float(each == name) for each in members} for name in members}
    write_bundle(
        folder / "experts", members, domains=one_hot, chat_template=TEMPLATE, student=random_member(7, tokens=258)
    )
    reviews = {
        "minilm": random_classifier(1, ("negative", "positive")),
        "bert": random_classifier(2, ("positive", "negative")),
    }
    LabelBundle(reviews).write(folder / "reviews")
    return folder


@pytest.mark.parametrize("source", EXAMPLES)
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


@pytest.mark.parametrize("line", command_lines())
def test_commands_parse(line, experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("experts", "reviews"):
        (tmp_path / name).symlink_to(experts / name)
    (tmp_path / "SmolLM2-135M").mkdir()
    program, command_name, *arguments = shlex.split(line, comments=True)
    for argument in arguments:
        if INPUT_FILES.fullmatch(argument):
            (tmp_path / argument).touch()
    assert program == "edgemix"
    command = group.get_command(click.Context(group), command_name)
    assert command is not None
    if command_name != "lm-eval":  # whose own command line is the harness's
        command.make_context(command_name, arguments)


@pytest.mark.parametrize("source", blocks("yaml"))
def test_recipes_have_known_keys(source):
    parts = yaml.safe_load(source)
    for texts in parts.get("data", {}).values():
        texts.update({name: {"file": text} for name, text in texts.items() if isinstance(text, str)})
    kind = Recipe if "task" not in parts else LabelRecipe
    msgspec.convert({"members": [{"name": "a", "model": "b"}], **parts}, kind)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("https://"):
            assert (page.parent / target).is_file(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tools_exist(page):
    for tool in re.findall(r"tools/\w[\w/]*(?:\.py)?", page.read_text("utf-8")):
        assert (ROOT / tool).exists(), tool


def test_guide_pages_link_only_to_each_other():
    """The wheel has nothing else."""
    for page in GUIDE:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            assert target.startswith("https://") or target in {each.name for each in GUIDE}, (page.name, target)


def test_the_readme_is_short_and_names_every_page():
    readme = PAGES[0].read_text("utf-8")
    assert len(readme.splitlines()) <= 150
    for page in GUIDE:
        assert f"(edgemix/guide/{page.name})" in readme


def test_the_figure_shows_the_measurements(tmp_path):
    tool = ROOT / "tools" / "mixture_figure.py"
    subprocess.run([sys.executable, str(tool), "-o", str(tmp_path / "drawn.svg")], check=True)
    assert (tmp_path / "drawn.svg").read_text("utf-8") == (ROOT / "edgemix/guide/mixture.svg").read_text("utf-8")


def run(*arguments: str):
    return CliRunner().invoke(group, ["guide", *arguments])


def test_guide_lists_the_topics():
    result = run()
    assert result.exit_code == 0
    for topic in TOPICS:
        assert f"\n{topic} " in result.output
    assert list(json.loads(run("--json").stdout)["topics"]) == TOPICS


@pytest.mark.parametrize("topic", TOPICS)
def test_guide_prints_a_page_as_it_is_where_stdout_is_a_pipe(topic):
    text = (ROOT / "edgemix" / "guide" / f"{topic}.md").read_text("utf-8")
    assert run(topic).stdout == text
    assert json.loads(run(topic, "--json").stdout) == {"topic": topic, "text": text}


def test_guide_lays_a_page_out_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    Console().markdown("# Title\n\nSome `code` and *words*.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    shown = capsys.readouterr().out
    assert "Title" in shown
    assert "words" in shown
    assert "*words*" not in shown
    assert "|---|" not in shown


def test_guide_names_the_topics_where_one_is_unknown():
    result = run("exprot")
    assert result.exit_code == 2
    assert "there is no topic 'exprot'" in result.stderr
    assert all(topic in result.stderr for topic in TOPICS)
