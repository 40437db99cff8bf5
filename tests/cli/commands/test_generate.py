"""`generate`: only the text on stdout."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from click.testing import CliRunner

from edgemix.cli import edgemix


def generate(bundle, *arguments: str, stdin: bytes | None = None):
    return CliRunner().invoke(edgemix, ["generate", str(bundle), *arguments], input=stdin)


def test_the_prompt_is_read_from_argument_file_or_stdin(bundle, tmp_path):
    (tmp_path / "prompt.txt").write_text("1\n")

    for result in (
        generate(bundle, "1"),
        generate(bundle, stdin=b"1\n"),
        generate(bundle, "-", stdin=b"1\r\n"),
        generate(bundle, "--file", str(tmp_path / "prompt.txt")),
    ):
        assert (result.exit_code, result.stdout, result.stderr) == (0, "+2=3\n", "")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--weights", "programs"], "ef x\n"),
        (["--weights", "code=1"], "ef x\n"),
        (["--weights", "code=2,math=1", "--combine", "log-linear"], "ef x\n"),
        (["--weights", "code=1", "-n", "2"], "ef\n"),
        (["--weights", "code=1", "--stop", "q", "--stop", " x"], "ef\n"),
        (["--weights", "code=1", "--temperature", "1", "--seed", "1", "--top-k", "1", "--min-p", "0.5"], "ef x\n"),
        (["--weights", "code=1", "--provider", "cpu", "--threads", "1", "--no-verify"], "ef x\n"),
    ],
)
def test_options_reach_the_mixture(bundle, options, text):
    result = generate(bundle, "d", *options)

    assert (result.exit_code, result.stdout) == (0, text)


def test_json_is_one_object_at_the_end(bundle):
    result = generate(bundle, "1", "--json")

    output = json.loads(result.stdout)
    assert (output["prompt"], output["provider"], output["student"]) == ("1", "cpu", False)
    assert output["text"] == "+2=3"
    assert bytes(output["token_ids"][:-1]) == b"+2=3"
    assert output["finish_reason"] == "stop"
    assert len(output["log_probabilities"]) == 5
    assert all(math.isfinite(figure) for figure in output["timings"].values())


def test_the_student_alone(student_bundle):
    assert generate(student_bundle, "1").stdout == "+2=3\n"
    assert generate(student_bundle, "1", "--student").stdout == "+2\n"
    assert json.loads(generate(student_bundle, "1", "--student", "--json").stdout)["student"] is True


def test_a_bundle_without_a_student(bundle):
    result = generate(bundle, "1", "--student")

    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no student\nAdd student: to its recipe" in result.stderr


@pytest.mark.parametrize("options", [["--student", "--weights", "code=1"], ["--weights", "programs", "--student"]])
def test_the_student_has_no_weights(student_bundle, options):
    result = generate(student_bundle, "1", *options)

    assert result.exit_code == 2
    assert "--weights mixes the members, and --student leaves them out" in result.stderr


def test_a_rate_that_is_not_a_number_is_null_in_json(bundle):
    """JSON has no NaN; a completion of one token has no rate."""
    assert json.loads(generate(bundle, "1", "-n", "1", "--json").stdout)["timings"]["tpot"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1", "--weights", "physics=1"], "weights for 'physics': there is no such member\nMembers: math, code."),
        (["1", "--weights", "physics"], "no weights for a domain 'physics'\nDomains: numbers, programs."),
        (["x" * 5000], "the prompt has 5000 tokens, more than the context of 4096"),
        (["1", "--stop", ""], "a stop string must not be empty"),
    ],
)
def test_errors_of_the_mixture(bundle, arguments, message):
    result = generate(bundle, *arguments)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_cuda_where_there_is_none(bundle, monkeypatch):
    from edgemix.runtime.graphs import providers

    monkeypatch.setattr(providers, "why_not", lambda provider: "no driver")

    result = generate(bundle, "1", "--provider", "cuda")

    assert result.exit_code == 1
    assert result.stderr.startswith("error: the provider 'cuda' does not work here: no driver")


def test_the_program_itself(bundle):
    """A real process: bytes in, bytes out, nothing on stderr."""
    command = [sys.executable, "-m", "edgemix", "generate", str(bundle)]
    result = subprocess.run(command, input=b"1", capture_output=True, check=False)

    assert (result.returncode, result.stdout, result.stderr) == (0, b"+2=3\n", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such pipes")
def test_a_reader_that_closes_the_pipe(bundle):
    command = f"'{sys.executable}' -m edgemix generate '{bundle}' x -n 2000 | head -c 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, check=False)

    assert result.stderr == b""


def test_constrained_text(bundle, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false}'
    )

    assert generate(bundle, "1", "--choice", "+2", "--choice", "no").stdout == "+2\n"
    assert generate(bundle, "1", "--regex", r"\+[0-9]=3").stdout == "+2=3\n"
    assert json.loads(generate(bundle, "1", "--json-schema", str(schema)).stdout)["n"] in (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a["], "a["),
        (["--regex", "a", "--choice", "b"], "regex and choices"),
        (["--json-schema", "nowhere.json"], "nowhere.json"),
    ],
)
def test_invalid_constraints_are_refused(bundle, options, message):
    result = generate(bundle, "1", *options)

    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_attribution_shows_each_members_share(bundle):
    result = generate(bundle, "d", "--weights", "code=0.5,math=0.5", "--attribution")
    output = json.loads(generate(bundle, "d", "--weights", "code=0.5,math=0.5", "--attribution", "--json").stdout)

    assert result.stdout.startswith("ef x\n")
    assert "Attribution" in result.stdout
    code = output["members"].index("code")
    assert all(shares[code] > 0.9 for shares in output["responsibilities"])
    assert len(output["member_logprobs"]) == len(output["token_ids"])


def test_json_names_the_weights_that_were_used(bundle):
    def weights(*arguments):
        return json.loads(generate(bundle, "d", *arguments, "--json").stdout)["weights"]

    assert weights() == "fixed"
    assert weights("--weights", "adaptive") == "adaptive"
    assert weights("--weights", "code=1") == {"code": 1.0}
