"""`init`, and the errors of `export` before it imports torch."""

from __future__ import annotations

import json
import subprocess
import sys

from click.testing import CliRunner

from edgemix.cli import edgemix


def run(*arguments: object):
    return CliRunner().invoke(edgemix, list(map(str, arguments)))


def test_init_writes_the_recipe_once(tmp_path):
    file = tmp_path / "mine.yaml"

    assert "edgemix export" in run("init", file).stdout
    written = file.read_text()
    again = run("init", file)

    assert written.startswith("#")
    assert again.exit_code == 2
    assert again.stderr.startswith(f"error: {file} exists already")
    assert file.read_text() == written


def test_init_json(tmp_path):
    assert json.loads(run("init", tmp_path / "r.yaml", "--json").stdout) == {"recipe": str(tmp_path / "r.yaml")}


def test_init_with_models(tmp_path):
    run("init", tmp_path / "r.yaml", "--model", "./here", "--model", "hub/id")

    written = (tmp_path / "r.yaml").read_text()
    assert "./here" in written
    assert "hub/id" in written


def test_init_in_a_missing_folder(tmp_path):
    result = run("init", tmp_path / "nowhere" / "r.yaml")

    assert result.exit_code == 1
    assert result.stderr.startswith("error: writing ")


def test_export_reports_every_mistake_of_a_recipe_at_once(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("members:\n  - name: a\n    model: ./missing\nformat: int5\nsede: 1\n")

    result = run("export", recipe, "-o", tmp_path / "out", "--json")

    assert result.exit_code == 2
    for line in (3, 4, 5):
        assert f"recipe.yaml:{line}:" in result.stderr
    assert json.loads(result.stdout)["error"]["kind"] == "RecipeError"
    assert not (tmp_path / "out").exists()


def test_export_without_the_extra_names_it(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("members:\n  - name: a\n    model: hub/id\n")
    code = "import sys; sys.modules['torch'] = None; from edgemix.cli import main; main()"
    command = [sys.executable, "-c", code, "export", str(recipe), "-o", str(tmp_path / "out")]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert result.stderr == (
        "error: edgemix export needs the package torch, which is not installed\npip install 'edgemix[export,cpu]'\n"
    )
