"""The wheel with nothing but what `edgemix[cpu]` asks for: a device needs no more to generate and to profile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Runs the Python of a virtual environment that has the wheel, and links to its dependencies."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=False, symlinks=os.name != "nt")
    (site,) = (folder / "venv").rglob("site-packages")
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(site)
    (distribution,) = metadata.distributions(name="edgemix", path=[str(site)])
    for name in closure(distribution, "cpu"):
        for entry in top_level(metadata.distribution(name)):
            if not (site / entry.name).exists():  # several may share a namespace
                (site / entry.name).symlink_to(entry)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(python), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)

    return run


def build_wheel(folder: Path) -> Path:
    """Built from a copy of the sources, as building leaves things behind."""
    source = folder / "source"
    for name in ("edgemix", "export", "runtime"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, capture_output=True, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def closure(distribution: metadata.Distribution, extra: str = "") -> set[str]:
    """Names of all distributions that one needs with an extra, and that those need."""
    found: set[str] = set()
    left = list(needed(distribution, extra))
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            for each in ("", *requirement.extras):
                left += needed(metadata.distribution(name), each)
    return found


def needed(distribution: metadata.Distribution, extra: str) -> Iterator[Requirement]:
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def top_level(distribution: metadata.Distribution) -> set[Path]:
    """What a distribution has put into site-packages."""
    names = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
    return {Path(str(distribution.locate_file(name))) for name in names}


def test_the_exporters_packages_are_not_there(bare):
    for package in ("torch", "transformers", "onnx"):
        assert "ModuleNotFoundError" in bare("-c", f"import {package}").stderr


def test_the_license_is_in_the_wheel(bare):
    code = (
        "from importlib.metadata import files, metadata; print(metadata('edgemix')['License-Expression']); "
        "print(next(file for file in files('edgemix') if file.name == 'LICENSE').read_text()[:400])"
    )
    result = bare("-c", code)

    assert result.stdout.startswith("Apache-2.0\n"), result.stderr
    assert "Apache License" in result.stdout


def test_the_guide_is_in_the_wheel(bare):
    pages = {page.stem: page.read_text("utf-8") for page in (ROOT / "edgemix" / "guide").glob("*.md")}

    assert json.loads(bare("-m", "edgemix", "guide", "--json").stdout)["topics"].keys() == pages.keys()
    assert bare("-m", "edgemix", "guide", "export").stdout == pages["export"]


def test_it_generates(bare, bundle):
    result = bare("-m", "edgemix", "generate", bundle, "1", "--json")

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["text"] == "+2=3"


def test_it_profiles(bare, student_bundle):
    result = bare("-m", "edgemix", "profile", student_bundle, "--quick", "--json")

    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert [subject["name"] for subject in told["subjects"]] == ["math", "code", "student", "mixture, plain", "mixture"]
    assert len(told["breakdowns"]) == 3
    assert told["machine"]["fp32_peak"] > 0


def test_what_needs_the_exporter_says_so(bare, tmp_path):
    (tmp_path / "recipe.yaml").write_text("members:\n  - {name: math, model: nowhere}\n")

    result = bare("-m", "edgemix", "export", tmp_path / "recipe.yaml", "-o", tmp_path / "out")

    assert result.returncode == 1
    assert "pip install 'edgemix[" in result.stderr
    assert "Traceback" not in result.stderr
