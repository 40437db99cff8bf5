"""The table of weight formats: the one place that names them, but for those that implement one."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from edgemix.export.budget.costs import member_costs
from edgemix.export.budget.plan import Cost, ResourceBudget, plan_formats
from edgemix.formats import BLOCK_FORMATS, FORMAT_SPECS, FORMATS, HEAD_FORMAT, MIXED_BITS, candidate_formats

ROOT = Path(__file__).parents[1]
MAY_NAME_FORMATS = {
    "edgemix/formats.py": "the table",
    "export/quantization/formats.py": "what writes each format",
    "edgemix/recipe/schema.py": "the default of a recipe",
    "edgemix/recipe/compression.py": "the default of a student",
    "edgemix/recipe/labels.py": "the default of a recipe over labels",
}
OTHER_MEANINGS = {
    "edgemix/bundle/graph_io.py": "int8: a key-value cache",
    "edgemix/recipe/validation.py": "int8: a key-value cache",
    "export/budget/planner.py": "int8: a key-value cache",
    "export/stages/members.py": "int8: a key-value cache",
    "export/distillation/teacher.py": "nf4: a layer of bitsandbytes",
    "export/quantization/algorithms/nf4.py": "nf4: a code of bitsandbytes",
    "export/training/qlora.py": "nf4: a layer of bitsandbytes",
    "edgemix/report/sections/hardware.py": "fp32 and int8: a machine's peak rates",
    "runtime/profiling/limits.py": "int8: numpy's type",
}


def _named(path):
    """The lines of a module with a string that is the name of a format, docstrings aside."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return [node.lineno for node in nodes if isinstance(node, ast.Constant) and node.value in FORMATS]


def test_only_the_table_and_the_implementations_name_formats():
    """A new format is a new row, and what writes it: nothing else may have a list of formats to forget it in."""
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("edgemix", "export", "runtime")
        for path in (ROOT / folder).rglob("*.py")
        if _named(path)
    }
    assert found == MAY_NAME_FORMATS.keys() | OTHER_MEANINGS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_agree_with_themselves(name):
    row = FORMAT_SPECS[name]
    assert row.targets
    assert row.block_bits in (None, row.bits)
    assert not row.mixed_bits or row.block_bits
    assert row.reference == (name == "fp32")
    assert row.compute_dtype("cpu") == "float32"
    assert row.compute_dtype("cuda") == ("float32" if row.reference else "float16")


def test_formats_are_found_by_what_they_are():
    assert BLOCK_FORMATS == {4: "int4", 8: "int8"}
    assert (MIXED_BITS, HEAD_FORMAT) == ("int4", "int8")


@pytest.mark.parametrize(("limit", "chosen"), [(500, "int4"), (750, "packed"), (1000, "packed"), (1700, "fp16")])
def test_a_budget_chooses_a_row_that_is_added(limit, chosen, monkeypatch):
    """A quantized format that the planner did not know by name was planned as if it lost nothing."""
    row = replace(FORMAT_SPECS["int8"], name="packed", block_bits=None, targets=("cpu",))
    monkeypatch.setitem(FORMAT_SPECS, "packed", row)
    assert "packed" in candidate_formats("cpu")
    assert "packed" not in candidate_formats("cuda")
    sizes = {"int4": 400, "int8": 900, "packed": 700, "fp16": 1600}
    member = member_costs(
        "m",
        1.0,
        {name: Cost(sizes[name]) for name in candidate_formats("cpu")},
        groups=[],
        shapes={"linear": (64, 64)},
        losses={"linear": {4: 0.4, 8: 0.01}},
        block=32,
    )
    plan = plan_formats([member], ResourceBudget(limit))
    assert (plan.members[0].format, plan.cost.bytes) == (chosen, sizes[chosen])
