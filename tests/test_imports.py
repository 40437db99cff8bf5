"""The house rules for imports: who may know whom, and what stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PACKAGES = {"edgemix": ROOT / "edgemix", "edgemix.export": ROOT / "export", "edgemix.runtime": ROOT / "runtime"}
HEAVY = {"torch", "transformers", "onnxruntime", "onnx", "mobius", "peft", "bitsandbytes"}
RUNTIME = {"numpy", "onnxruntime", "tokenizers", "msgspec", "jinja2", "psutil", "safetensors", "platformdirs"}
RUNTIME |= {"llguidance", "re2", "edgemix"}
"""All that the runtime may import beside the standard library; llguidance only where a text must have a form."""
MAY_USE_RUNTIME = {
    "budget.planner",
    "budget.speed",
    "demo.run",
    "distillation.distill",
    "distillation.teacher",
    "drafting.draft_head",
    "labels.examples",
    "labels.fitting",
    "labels.members",
    "labels.parity",
    "labels.pipeline",
    "parity.against_fp32",
    "parity.against_torch",
    "parity.mixture",
    "pruning.packing",
    "quantization.graph.key_value",
    "quantization.statistics.activations",
    "stages.mixture",
    "stages.student",
    "stages.weights",
}
"""The exporter's modules that evaluate what they made."""


def modules(package: str) -> Iterator[tuple[str, Path]]:
    root = PACKAGES[package]
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join([package, *parts]).removesuffix(".__init__"), path


def imported(name: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Each module that a module imports, and whether it does so when it is itself imported."""
    tree = ast.parse(path.read_text("utf-8"))
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports do not survive the package mapping"
            assert node.module is not None
            yield node.module, node not in lazy
            yield from ((f"{node.module}.{alias.name}", node not in lazy) for alias in node.names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


CORE = [(name, path) for name, path in modules("edgemix") if not within(name, "edgemix.cli")]
CLI = [(name, path) for name, path in modules("edgemix") if within(name, "edgemix.cli")]


@pytest.mark.parametrize(("name", "path"), CORE)
def test_the_core_knows_neither_half_and_nothing_heavy(name: str, path: Path) -> None:
    for module, _ in imported(name, path):
        if name != "edgemix":  # its public names are imported when they are used
            assert not within(module, "edgemix.export"), module
            assert not within(module, "edgemix.runtime"), module
        assert module.split(".")[0] not in HEAVY, module


@pytest.mark.parametrize(("name", "path"), CLI)
def test_the_command_line_imports_the_halves_inside_commands(name: str, path: Path) -> None:
    for module, eager in imported(name, path):
        if eager:
            assert not within(module, "edgemix.export"), module
            assert not within(module, "edgemix.runtime"), module
            assert module.split(".")[0] not in HEAVY, module


@pytest.mark.parametrize(("name", "path"), list(modules("edgemix.runtime")))
def test_the_runtime_is_light(name: str, path: Path) -> None:
    for module, _ in imported(name, path):
        top = module.split(".")[0]
        assert top in RUNTIME | sys.stdlib_module_names, module
        assert not within(module, "edgemix.export"), module


@pytest.mark.parametrize(("name", "path"), list(modules("edgemix.export")))
def test_the_exporter_uses_the_runtime_only_to_evaluate(name: str, path: Path) -> None:
    for module, _ in imported(name, path):
        if name.removeprefix("edgemix.export.") not in MAY_USE_RUNTIME:
            assert not within(module, "edgemix.runtime"), module


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("edgemix", HEAVY | {"numpy", "yaml", "click", "tokenizers"}),
        ("edgemix.recipe", HEAVY | {"numpy", "tokenizers"}),
        ("edgemix.bundle.writer", HEAVY | {"numpy", "tokenizers"}),
        ("edgemix.cli", HEAVY | {"tokenizers"}),
        ("edgemix.runtime", HEAVY - {"onnxruntime"} | {"yaml", "click", "rich"}),
    ],
)
def test_what_an_import_pulls_in(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert not absent & loaded


def test_every_package_is_shipped() -> None:
    """A folder that the list forgets works in a checkout and is missing from the wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    found = {name for package in PACKAGES for name, path in modules(package) if path.name == "__init__.py"}
    assert found == set(listed)


ORDER = {
    "edgemix": ("errors", "progress", "files", "formats", "tasks", "bundle", "recipe", "results", "report", "cli"),
    "edgemix.export": (
        *("models", "data", "training", "parity", "graphs", "quantization", "pruning", "distillation", "drafting"),
        *("finetuning", "stages", "budget", "context", "labels", "pipeline", "demo"),
    ),
    "edgemix.runtime": (
        *(
            "cancellation",
            "token_progress",
            "processor",
            "results",
            "text",
            "graphs",
            "mixing",
            "classification",
            "sequences",
            "decoding",
            "options",
        ),
        *("machine", "loaded_bundle", "session", "serving", "evaluation", "mixture", "profiling"),
    ),
}
"""Folders and top modules in the order in which data passes them: none imports one that stands after it."""
BACKWARD = {
    ("edgemix.export.distillation.teacher", "stages"),
}
"""Imports against the order that are still there; the list may only become shorter."""
ALL = {name: path for package in PACKAGES for name, path in modules(package)}


def eager_imports(name: str) -> set[str]:
    """The modules of edgemix that a module imports when it is itself imported."""
    return {module for module, eager in imported(name, ALL[name]) if eager and module in ALL and module != name}


def place(name: str) -> tuple[str, str]:
    """The package of a module, and the folder or top module of it that the module belongs to."""
    package = max((package for package in PACKAGES if within(name, package)), key=len)
    return package, name.removeprefix(package).removeprefix(".").split(".")[0]


def test_imports_point_one_way() -> None:
    backward = set()
    for name in ALL:
        package, folder = place(name)
        for module in eager_imports(name):
            other_package, other = place(module)
            if package == other_package and folder != other and {folder, other} <= set(ORDER[package]):
                order = ORDER[package]
                if order.index(folder) < order.index(other):
                    backward.add((name, other))
    assert backward == BACKWARD


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {name: eager_imports(name) for name in ALL}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_folders_and_modules_stay_small() -> None:
    counts: dict[Path, int] = {}
    for path in ALL.values():
        assert len(path.read_text("utf-8").splitlines()) <= 400, path
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    assert max(counts.values()) <= 15, counts


def test_tests_replace_no_private_names() -> None:
    """A test that patches a private name tests how something is done, and not what it does."""
    pattern = re.compile(r"""monkeypatch\.setattr\([^)]*?["'](?:[\w.]*\.)?_[a-z]\w*["']""")
    found = [
        f"{path.name}: {match[0]}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for match in pattern.finditer(path.read_text("utf-8"))
    ]
    assert not found
