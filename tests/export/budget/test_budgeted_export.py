"""A recipe and a budget in, a bundle within it out; on two tiny experts that were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import onnx_ir as ir
import pytest
from helpers.distillation_setting import recipe_in, write_setting
from helpers.exports import gguf_recipe

from edgemix.bundle.reader import read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.errors import EdgemixError, InputError
from edgemix.export.budget import check, planner
from edgemix.export.budget.plan import ResourceBudget
from edgemix.export.budget.student_size import draft_bytes, student_bytes
from edgemix.export.distillation.student import Shape
from edgemix.export.drafting import draft_head
from edgemix.export.pipeline import export_bundle
from edgemix.export.stages import blocks
from edgemix.export.stages import inputs as inputs_stage
from edgemix.export.stages import members as members_stage
from edgemix.formats import candidate_formats
from edgemix.recipe.compression import Pruning, Quantization, Student
from edgemix.recipe.schema import Data, MemberRecipe, Recipe
from edgemix.runtime import Mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edgemix.bundle.manifest import Manifest


@pytest.fixture(scope="module", autouse=True)
def _short_gates() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_stage, "GATE_TOKENS", 512)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_setting(tmp_path_factory.mktemp("setting"))


def recipe(folder: Path, **changes: Any) -> Recipe:
    options = {"student": None, "quantization": Quantization("gptq")}
    return msgspec.structs.replace(recipe_in(folder), **(options | changes))


def size(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def ends(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Manifest, Path]]:
    """Bundles in one format: size, manifest and folder."""
    output = tmp_path_factory.mktemp("ends")
    return {
        weight_format: (size(output / weight_format), manifest, output / weight_format)
        for weight_format in ("int4", "int8")
        if (manifest := export_bundle(recipe(folder, format=weight_format), output / weight_format, force=True))
    }


@pytest.fixture(scope="module")
def between(folder: Path, ends: dict[str, tuple[int, Manifest]], tmp_path_factory: pytest.TempPathFactory):
    """Bundles with budgets between int4 and int8: budget, folder, manifest."""
    output, (low, high) = (
        tmp_path_factory.mktemp("between"),
        (ends[weight_format][0] for weight_format in ("int4", "int8")),
    )
    found = []
    for share in (0.2, 0.7):
        limit, bundle = int(low + share * (high - low)), output / f"{share}"
        found.append((limit, bundle, export_bundle(recipe(folder), bundle, force=True, budget=ResourceBudget(limit))))
    return found


def test_a_budget_holds_and_is_used(between) -> None:
    for limit, bundle, manifest in between:
        assert 0.97 * limit < size(bundle) <= limit
        assert size(bundle) == pytest.approx(manifest.budget.chosen.bytes, rel=0.01)
        assert size(bundle) <= 1.005 * manifest.budget.chosen.bytes
        assert read_manifest(bundle) == manifest
        verify_bundle(bundle, manifest)
        assert manifest.budget.measured is manifest.budget.seconds is None
    with Mixture.load(bundle, provider="cpu") as mixture:
        assert mixture.generate("the cat", max_new_tokens=4).token_ids


def test_what_was_chosen_is_told(between) -> None:
    _, _, manifest = between[0]
    mixed = [member for member in manifest.members if member.format == "int4"]
    assert any(0 < member.eight_bits < 1 for member in mixed)
    figures = manifest.budget
    assert figures.losses.keys() == {"animals", "numbers"}
    weights = manifest.weights.default
    assert figures.chosen.loss == pytest.approx(sum(weights[name] * loss for name, loss in figures.losses.items()))
    assert figures.chosen in figures.curve


def test_a_larger_budget_loses_less(between, ends) -> None:
    losses = [ends["int4"][1].quantization.kl, *(manifest.quantization.kl for _, _, manifest in between)]
    losses.append(ends["int8"][1].quantization.kl)
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.7 * losses[0]
    estimates = [manifest.budget.chosen.loss for _, _, manifest in between]
    assert estimates == sorted(estimates, reverse=True)


def test_room_for_everything(folder: Path, tmp_path: Path) -> None:
    manifest = export_bundle(recipe(folder), tmp_path / "bundle", budget=ResourceBudget(10**7))
    assert {member.format for member in manifest.members} == {"fp16"}
    assert size(tmp_path / "bundle") == pytest.approx(manifest.budget.chosen.bytes, rel=0.01)


def test_too_small_a_budget_is_refused(folder: Path, ends, tmp_path: Path) -> None:
    smallest = r"0\.3[45] MB"
    assert 336_000 < ends["int4"][0] < 354_000
    with pytest.raises(InputError, match=rf"a budget of 0\.10 MB is too small: .* has {smallest}\nPrune the members"):
        export_bundle(recipe(folder), tmp_path / "bundle", budget=ResourceBudget(100_000))


def test_members_with_a_format_of_their_own_keep_it(folder: Path, ends, tmp_path: Path) -> None:
    members = (MemberRecipe("animals", "animals", format="int8"), MemberRecipe("numbers", "numbers"))
    limit = (2 * ends["int4"][0] + 3 * ends["int8"][0]) // 5
    manifest = export_bundle(recipe(folder, members=members), tmp_path / "b", force=True, budget=ResourceBudget(limit))
    assert manifest.members[0].format == "int8"
    assert manifest.budget.losses.keys() == {"numbers"}
    assert 0.9 * limit < size(tmp_path / "b") <= limit
    members = tuple(msgspec.structs.replace(member, format="int4") for member in members)
    with pytest.raises(InputError, match="every member of the recipe has a format of its own"):
        export_bundle(recipe(folder, members=members), tmp_path / "b", budget=ResourceBudget(limit))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": Data(), "quantization": Quantization()},
            r"a budget \(--budget, --max-tpot\) needs text\nName some under data: calibration:",
        ),
        ({"quantization": Quantization("hqq")}, "member animals: a budget chooses bits layer by layer, which .* hqq"),
        (
            {"quantization": Quantization(eight_bits=0.3)},
            "member animals: a budget chooses bits, and so does eight_bits",
        ),
    ],
)
def test_what_a_budget_cannot_do_is_refused(folder: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(recipe(folder, **changes), tmp_path / "bundle", budget=ResourceBudget(10**6))


def test_a_gguf_file_that_fits_keeps_its_own_quantization(tmp_path: Path, monkeypatch) -> None:
    for name in ("learn_rounding", "quantization_costs"):
        monkeypatch.setattr(blocks, name, None)
    built = gguf_recipe(tmp_path / "m", {}, "Q4_0", format="int8")
    manifest = export_bundle(built, tmp_path / "b", budget=ResourceBudget(10**7))
    assert [(member.format, member.eight_bits) for member in manifest.members] == [("int4", 0)]
    assert manifest.budget.chosen.loss == 0
    assert size(tmp_path / "b") == pytest.approx(manifest.budget.chosen.bytes, rel=0.02)  # a short curve


def test_a_student_counts_with_what_it_drafts_with(folder: Path, ends, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(draft_head, "MIN_VOCABULARY", 100)
    limit = int(1.9 * ends["int4"][0])
    student = Student(steps=2, prune=Pruning(ffn=0.34))
    manifest = export_bundle(recipe(folder, student=student), tmp_path / "b", force=True, budget=ResourceBudget(limit))
    assert manifest.student is not None
    assert manifest.student.draft is not None
    assert size(tmp_path / "b") <= limit
    assert size(tmp_path / "b") == pytest.approx(manifest.budget.chosen.bytes, rel=0.01)


def test_the_size_of_a_student_of_fewer_layers() -> None:
    """SmolLM2-135M's graph in int4, and what a third of its layers would have."""
    whole = Shape(30, 2 * 576**2 + 2 * 192 * 576, 3 * 1536 * 576, 49_152 * 576)
    third = whole._replace(layers=10)
    layers = 20 * (whole.attention + whole.ffn) * (0.5 + 2 / 32 + 0.5 / 32)
    found = student_bytes(third, "int4", whole, 93_974_012, "int4", group=32)
    assert found == pytest.approx(93_974_012 - layers, rel=1e-3)
    tables = 1.0625 * whole.head
    assert student_bytes(third, "fp16", whole, 93_974_012, "int4", group=32) == pytest.approx(
        2 * 10 * (whole.attention + whole.ffn) + 2 / 1.0625 * tables, rel=0.05
    )
    assert student_bytes(whole, "int8", whole, 93_974_012, "int4", group=32) == pytest.approx(145_352_534, rel=0.01)


def test_the_size_of_a_smaller_head() -> None:
    """8,192 of 49,152 tokens in 8-bit blocks, 10 layers of nodes."""
    shape = Shape(10, 0, 0, 49_152 * 576)
    assert draft_bytes(shape, "int4", 49_152) == pytest.approx(8_192 * 576 * 1.0625, rel=0.05)
    assert draft_bytes(shape, "fp16", 49_152) == pytest.approx(8_192 * 576 * 2, rel=0.05)
    assert draft_bytes(shape, "int4", 16_000) == 0


def test_pruned_members_are_smaller(folder: Path, ends, tmp_path: Path) -> None:
    """Their weights are stored without zeros, so more of them get 8 bits."""
    members = tuple(MemberRecipe(name, name, prune=Pruning(sparsity=0.6, recover=0)) for name in ("animals", "numbers"))
    limit = ends["int4"][0]
    manifest = export_bundle(recipe(folder, members=members), tmp_path / "b", force=True, budget=ResourceBudget(limit))
    assert all(member.sparse for member in manifest.members)
    assert size(tmp_path / "b") <= limit
    assert size(tmp_path / "b") == pytest.approx(manifest.budget.chosen.bytes, rel=0.03)


class Clock:
    """Times by size, a microsecond a byte of the graphs' data, for what is measured at export; `real` says otherwise of
    mixed graphs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, real: Callable[[float], float] = lambda time: time) -> None:
        self.calls = 0
        self._real = real
        for module in (planner, check):
            monkeypatch.setattr(module, "decoding_times", self)

    def __call__(self, graphs, prompt, *, target, progress):
        self.calls += 1
        assert len(prompt) > 8
        alone = {name: weight_seconds(graph.path) for name, graph in graphs.items()}
        mixed = any(graph.path.parent.name not in candidate_formats("cpu") for graph in graphs.values())
        together = sum(alone.values())
        return planner.DecodingTimes(alone, self._real(together) if mixed else together)


def weight_seconds(graph: Path) -> float:
    """A microsecond for each byte of the weights, wherever they lie; scales and zero points are read for nothing."""
    initializers = ir.load(graph).graph.initializers.items()
    weights = [value for name, value in initializers if not name.endswith((".scales", ".zero_points"))]
    return 1e-6 * sum(value.const_value.nbytes for value in weights)


def bundle_seconds(manifest: Manifest, bundle: Path) -> float:
    return sum(weight_seconds(bundle / member.graph) for member in manifest.members)


def test_a_limit_of_time_holds(folder: Path, ends, tmp_path: Path, monkeypatch) -> None:
    low, high = (bundle_seconds(*ends[weight_format][1:]) for weight_format in ("int4", "int8"))
    limit = low + 0.5 * (high - low)
    clock = Clock(monkeypatch)
    manifest = export_bundle(recipe(folder), tmp_path / "b", force=True, budget=ResourceBudget(seconds=limit))
    assert 0.95 * limit < manifest.budget.measured <= limit
    assert manifest.budget.measured == pytest.approx(manifest.budget.chosen.seconds, rel=0.02)
    assert clock.calls == 6  # int4, int8, two members in fp16, the choice, the bundle
    with pytest.raises(InputError, match=r"a budget of .* ms a token is too small: the fastest"):
        export_bundle(recipe(folder), tmp_path / "b", budget=ResourceBudget(seconds=0.9 * low))


def test_a_choice_that_is_slower_than_estimated_is_made_again(folder: Path, ends, tmp_path: Path, monkeypatch) -> None:
    low, high = (bundle_seconds(*ends[weight_format][1:]) for weight_format in ("int4", "int8"))
    limit = low + 0.7 * (high - low)
    Clock(monkeypatch, lambda time: 1.08 * time)
    manifest = export_bundle(recipe(folder), tmp_path / "b", force=True, budget=ResourceBudget(seconds=limit))
    assert manifest.budget.measured <= limit
    assert bundle_seconds(manifest, tmp_path / "b") < 0.96 * limit


def test_a_bundle_over_its_budget_fails_unless_forced(folder: Path, ends, tmp_path: Path, monkeypatch) -> None:
    limit = 1.01 * bundle_seconds(*ends["int4"][1:])
    Clock(monkeypatch)
    monkeypatch.setattr(check, "decoding_times", lambda graphs, *_, **__: planner.DecodingTimes({}, 1.2 * limit))
    # The gates have let all members pass at 8 bits of theirs; with int4 they need force anyway.
    monkeypatch.setattr(members_stage, "enforce", lambda *_, **__: False)
    with pytest.raises(EdgemixError, match=r"not within its budget: a token takes .* ms, more than") as caught:
        export_bundle(recipe(folder), tmp_path / "b", budget=ResourceBudget(seconds=limit))
    assert not isinstance(caught.value, InputError)
    assert not (tmp_path / "b").exists()
    found = []
    monkeypatch.setattr(blocks, "gptq_blocks", lambda *_, **__: found.append(1))
    manifest = export_bundle(recipe(folder), tmp_path / "b", force=True, budget=ResourceBudget(seconds=limit))
    assert manifest.budget.measured == pytest.approx(1.2 * limit)
    assert found == []  # what was made before is good


def test_time_is_measured_on_the_graphs_themselves(folder: Path, tmp_path: Path) -> None:
    manifest = export_bundle(recipe(folder), tmp_path / "b", force=True, budget=ResourceBudget(seconds=10.0))
    assert 0 < manifest.budget.measured < 10
    assert 0 < manifest.budget.chosen.seconds < 10


def test_a_plan_survives_an_interruption(folder: Path, ends, tmp_path: Path, monkeypatch) -> None:
    budget, fitted = ResourceBudget((ends["int4"][0] + ends["int8"][0]) // 2), recipe(folder, weights="fit")
    costs = []
    real = blocks.quantization_costs
    monkeypatch.setattr(blocks, "quantization_costs", lambda *a, **k: costs.append(1) or real(*a, **k))
    with monkeypatch.context() as patch:

        def cut(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(blocks, "gptq_blocks", cut)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(fitted, tmp_path / "b", force=True, budget=budget)
    monkeypatch.setattr(planner, "plan_formats", cut)
    manifest = export_bundle(fitted, tmp_path / "b", force=True, budget=budget)
    assert len(costs) == 2
    assert manifest.weights.method == "fit"
    assert size(tmp_path / "b") <= budget.bytes
