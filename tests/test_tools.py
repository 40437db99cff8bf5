"""The tools run, and print what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.onnx_members import VOCABULARY, random_member, write_bundle
from transformers import AutoModelForCausalLM

from edgemix.export.demo.tiny import train_member, train_tokenizer
from edgemix.export.models.loading import load_tokenizer
from edgemix.export.models.location import locate
from edgemix.recipe.compression import Quantization

TEXT = "".join(f"{i} birds sat on {i * i} boughs, and <unk> wrote it down for the {i}th time.\n" for i in range(120))


@pytest.fixture
def tool(monkeypatch):
    """Import a tool by its path under tools/, without the suffix."""
    folder = Path(__file__).parents[1] / "tools"

    def load(name):
        path = folder / f"{name}.py"
        monkeypatch.syspath_prepend(path.parent)
        specification = importlib.util.spec_from_file_location(f"{name.replace('/', '_')}_tool", path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up there
        specification.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def formats(tool):
    return tool("measure/formats")


@pytest.mark.parametrize(
    ("variant", "name", "quantization"),
    [
        ("int8-dynamic", "int8-dynamic", None),
        ("int8-dynamic-rotate", "int8-dynamic", Quantization(rotate=True)),
        ("int4-hqq", "int4", Quantization(algorithm="hqq")),
        ("int4-learned-rounding-group=64", "int4", Quantization(algorithm="learned-rounding", group=64)),
        ("int4-gptq-group=128-scale-eight_bits=0.05", "int4",
         Quantization(algorithm="gptq", group=128, scale=True, eight_bits=0.05)),
    ],
)  # fmt: skip
def test_formats_by_name(formats, variant, name, quantization):
    member = formats.member(variant, "model", None)
    assert (member.format, member.quantization) == (name, quantization)


@pytest.mark.parametrize("variant", ["", "int5", "int8dynamic", "int8-rtn", "int4-best", "int4-group", "int4-group=x"])
def test_formats_that_are_none(formats, variant):
    with pytest.raises(ValueError, match=f"{variant}: "):
        formats.member(variant, "model", None)


def test_the_table_of_formats(formats, monkeypatch, tmp_path, capsys):
    train_member(tmp_path / "model", [TEXT], train_tokenizer([TEXT]), steps=2)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(formats, "STEPS", 2)
    monkeypatch.setattr(formats, "PAUSE", 0)

    def run(*variants):
        arguments = [tmp_path / "model", tmp_path / "text.txt", "-o", tmp_path / "out", "--rounds", 2, "--windows", 3]
        monkeypatch.setattr("sys.argv", ["formats.py", *map(str, arguments), "--formats", *variants])
        formats.main()
        return capsys.readouterr().out

    first = run("fp32")
    told = json.loads(run("fp32", "int4-rtn").splitlines()[-1])

    assert "int4" not in first
    assert (told["ratios_to"], list(told["formats"])) == ("int4-rtn", ["fp32", "int4-rtn"])
    whole, small = told["formats"].values()
    assert small["megabytes"] < whole["megabytes"]
    assert (small["decode_ratio"], small["forced"]) == (1, False)
    assert min(whole["decode"], whole["prefill"], whole["decode_ratio"]) > 0

    ids = load_tokenizer(locate("model", tmp_path)).backend_tokenizer.encode(TEXT.replace("<unk>", "unk")).ids
    windows = torch.tensor(np.array(ids[: 3 * 512]).reshape(3, 512))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert whole["perplexity"]["text"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_the_benchmark_compares_like_with_like(tool, monkeypatch, tmp_path, capsys):
    forms = {name: random_member(seed, tokens=VOCABULARY, padding=6) for seed, name in enumerate(("a", "b", "c"))}
    student = random_member(0, tokens=VOCABULARY, padding=6)
    bundle = write_bundle(tmp_path / "mixture", forms, weights={"a": 0.9, "b": 0.06, "c": 0.04}, student=student)
    lines = [{"prompt": "one two one two", "domain": "x"}, {"prompt": "three", "domain": "y"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [
        str(bundle),
        str(tmp_path / "prompts.jsonl"),
        "--rounds",
        "1",
        "--new",
        "12",
        "--threads",
        "1",
        "--batch",
        "3",
        "--one-graph",
        str(bundle),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "-o", str(tmp_path / "figures.json")])
    tool("benchmark/__main__").main()

    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    sides = figures["sides"]
    assert list(sides) == [
        "naive loop", "lazy", "lookup", "student", "all together",
        "one graph", "one graph, lookup", "one graph, all together", "one member", "bare ONNX Runtime",
    ]  # fmt: skip
    assert [row.get("differ") for row in sides.values()] == [None, 0, 0, 0, 0, None, 0, 0, None, None]
    assert sides["naive loop"]["times_naive"] == 1
    assert figures["throughput"]["continuous"] > 0
    assert all(row["decode"] > 0 and set(row["by_domain"]) == {"x", "y"} for row in sides.values())


def test_a_peer_that_is_not_installed(tool, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    bundle = write_bundle(tmp_path / "mixture", {"a": random_member(0, tokens=VOCABULARY)})
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}')
    arguments = [str(bundle), str(tmp_path / "prompts.jsonl"), "--peer", "llama-cpp=model.gguf"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit, match="pip install llama-cpp-python"):
        tool("benchmark/__main__").main()


def test_adaptive_weights_against_fixed_ones(tool, monkeypatch, tmp_path, capsys):
    forms = {name: random_member(seed, tokens=VOCABULARY, padding=6) for seed, name in enumerate(("a", "b"))}
    bundle = write_bundle(tmp_path / "mixture", forms, weights={"a": 0.7, "b": 0.3})
    for name, text in (("one", "ox and hen " * 30), ("two", "the owl sat " * 30)):
        (tmp_path / f"{name}.txt").write_text(text)
    files = [str(tmp_path / f"{name}.txt") for name in ("one", "two")]
    arguments = [str(bundle), *files, "--passage", "20", "--max-tokens", "100"]
    monkeypatch.setattr(sys, "argv", ["adaptive.py", *arguments])
    tool("measure/adaptive").main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(rows["a"]) == {"one", "two", "stream"}
    assert {"a", "b", "uniform", "fixed", "adaptive, 1", "adaptive, 32"} <= rows.keys()
    monkeypatch.setattr(sys, "argv", ["adaptive.py", str(bundle), files[0]])
    with pytest.raises(SystemExit, match="two texts or more"):
        tool("measure/adaptive").main()


def test_speed_of_labels(tool, tmp_path, monkeypatch, capsys):
    from helpers.label_members import LabelBundle, random_classifier

    bundle = LabelBundle({name: random_classifier(seed, "ab") for seed, name in enumerate(("x", "y"))})
    bundle.write(tmp_path / "b")
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    arguments = ["labels.py", str(tmp_path / "b"), "--texts", str(tmp_path / "t.jsonl"), "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    tool("measure/labels").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["rates"]) == ["b: mixture", "b: decision", "b: x", "b: y"]
    assert found["ratios"]["b: mixture"] == 1
