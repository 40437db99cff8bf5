"""Whole exports: stored stages, refusals, reproducible bytes."""

import msgspec
import numpy as np
import pytest
from helpers.exports import TEXT, Spy, graphs
from helpers.tiny_models import tiny_model, tiny_tokenizer

from edgemix.bundle.manifest import NGRAMS, DraftGraph
from edgemix.bundle.reader import draft_tokens, ngram_table, read_manifest
from edgemix.bundle.verify import verify_bundle
from edgemix.bundle.writer import BundleWriter
from edgemix.errors import EdgemixError, InputError, ParityError, RecipeError
from edgemix.export.distillation import distill
from edgemix.export.drafting import draft_head, ngrams
from edgemix.export.drafting.draft_head import cut_head
from edgemix.export.pipeline import export_bundle
from edgemix.export.stages import blocks, models
from edgemix.export.stages import graphs as graph_stage
from edgemix.export.stages import members as members_stage
from edgemix.export.stages import mixture as mixture_stage
from edgemix.export.stages import student as student_stage
from edgemix.progress import NO_PROGRESS
from edgemix.recipe.compression import Student
from edgemix.recipe.schema import Data, MemberRecipe, Quantization, Recipe
from edgemix.recipe.text_sources import TextSource
from edgemix.runtime import Mixture
from edgemix.runtime.evaluation.evaluate import evaluate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two members with one tokenizer, their vocabularies padded to different sizes, and a text."""
    folder = tmp_path_factory.mktemp("recipe")
    for name, size in (("one", 288), ("two", 320)):
        tiny_model("llama", vocab_size=size, rms_norm_eps=1e-5 * len(name)).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


def recipe(folder, **changes):
    members = (MemberRecipe("one", "one", format="fp32"), MemberRecipe("two", "two"))
    text = {"prose": TextSource("text.txt")}
    options = {"members": members, "data": Data(validation=text, max_tokens=600), "format": "int8", "folder": folder}
    return Recipe(**(options | changes))


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "bundle"
    return output, export_bundle(recipe(folder, weights="fit"), output)


def test_bundle_is_whole_and_runs(exported):
    output, manifest = exported
    assert read_manifest(output) == manifest
    verify_bundle(output, manifest)
    assert [(m.name, m.format, m.quantization is None) for m in manifest.members] == [
        ("one", "fp32", True),
        ("two", "int8", False),
    ]
    assert not any(member.forced for member in manifest.members)
    assert not (output.parent / f".{output.name}.partial").exists()
    with Mixture.load(output, provider="cpu") as mixture:
        distribution = mixture.next_token_distribution("the quick")
        assert distribution.shape == (manifest.tokenizer.vocabulary,) == (259,)
        assert distribution.sum() == pytest.approx(1)


def test_fitted_weights_are_the_most_likely(exported):
    output, manifest = exported
    assert manifest.weights.method == "fit"
    assert sum(manifest.weights.default.values()) == pytest.approx(1)
    assert manifest.weights.domains["prose"] == pytest.approx(manifest.weights.default)  # one domain is all text
    with Mixture.load(output, provider="cpu") as mixture:
        best = mixture.score(TEXT[:1500]).log_probabilities.sum()
        for share in np.linspace(0, 1, 11):
            other = mixture.score(TEXT[:1500], weights={"one": share, "two": 1 - share}).log_probabilities.sum()
            assert best >= other - 1.0


def test_the_cost_of_quantization_to_the_mixture(exported, folder, tmp_path):
    """Measured where every member has passed its gate; a member's own loss counts by its weight, and not in full."""
    _, manifest = exported
    figures = manifest.quantization
    assert figures.weights == manifest.weights.default
    assert figures.tokens > 500
    assert 0 < figures.kl < 2 * manifest.members[1].quantization.kl
    two = MemberRecipe("two", "two")
    for name, changes, measured in (
        ("no text", {"data": Data()}, True),  # the first member's graph writes some
        ("a member", {"members": (two,)}, False),
        ("fp32", {"format": "fp32"}, False),
    ):
        assert (export_bundle(recipe(folder, **changes), tmp_path / name).quantization is not None) == measured


def test_kept_distributions_survive_an_interruption(folder, tmp_path, monkeypatch):
    for data in (recipe(folder).data, Data()):
        kept = Spy(monkeypatch, "keep_distributions", members_stage)
        with monkeypatch.context() as patch:

            def cut(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(mixture_stage, "compare_mixtures", cut)
            with pytest.raises(KeyboardInterrupt):
                export_bundle(recipe(folder, data=data), tmp_path / "bundle")
        manifest = export_bundle(recipe(folder, data=data), tmp_path / "bundle")
        assert len(kept.calls) == 1  # the first member is stored in fp32
        assert manifest.quantization.kl > 0


def test_same_recipe_same_bytes(exported, folder, tmp_path):
    again = export_bundle(recipe(folder, weights="fit"), tmp_path / "again")
    assert graphs(tmp_path / "again") == graphs(exported[0])
    assert again == exported[1]


def test_finished_stages_are_kept(folder, tmp_path, monkeypatch):
    class PowerCut(BaseException):
        pass

    graph, stored = Spy(monkeypatch, "export_graph", graph_stage), Spy(monkeypatch, "quantize", members_stage)
    with monkeypatch.context() as patch:

        def cut(*_, **__):
            raise PowerCut

        patch.setattr(members_stage, "check_quantized", cut)  # after both graphs and the first member's format
        with pytest.raises(PowerCut):
            export_bundle(recipe(folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert (len(graph.calls), len(stored.calls)) == (2, 2)
    export_bundle(recipe(folder), tmp_path / "bundle")
    assert (len(graph.calls), len(stored.calls)) == (2, 3)
    assert (tmp_path / "bundle" / "edgemix.json").is_file()


def test_other_inputs_are_other_stages(folder, tmp_path, monkeypatch):
    stored = Spy(monkeypatch, "quantize", members_stage)
    monkeypatch.setattr(BundleWriter, "finish", lambda *_: None)  # every export stops before its last step
    export_bundle(recipe(folder), tmp_path / "bundle")
    export_bundle(recipe(folder), tmp_path / "bundle")
    assert len(stored.calls) == 2
    export_bundle(recipe(folder, format="int4", quantization=Quantization("hqq")), tmp_path / "bundle", force=True)
    assert len(stored.calls) == 3  # the first member has its own format


def test_over_the_limit_stops_and_force_records(folder, tmp_path, monkeypatch):
    real = members_stage.check_quantized
    monkeypatch.setattr(
        members_stage, "check_quantized", lambda *a, **k: msgspec.structs.replace(real(*a, **k), kl=9.0, kl_limit=0.5)
    )
    stored = Spy(monkeypatch, "quantize", members_stage)
    with pytest.raises(ParityError, match=r"member 'two'.*kl 9 \(limit 0\.5\)"):
        export_bundle(recipe(folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    manifest = export_bundle(recipe(folder), tmp_path / "bundle", force=True)
    assert [member.forced for member in manifest.members] == [False, True]
    assert len(stored.calls) == 2  # the stages of the refused export are good


def test_given_weights_are_normalized(folder, tmp_path):
    manifest = export_bundle(recipe(folder, weights={"one": 3, "two": 1}), tmp_path / "bundle")
    assert manifest.weights.method == "given"
    assert manifest.weights.default == {"one": 0.75, "two": 0.25}


def test_other_tokenizer_is_refused_before_any_work(folder, tmp_path, monkeypatch):
    graph = Spy(monkeypatch, "export_graph", graph_stage)
    (folder / "other").mkdir()
    tiny_model("llama", vocab_size=288).save_pretrained(folder / "other")
    tiny_tokenizer(merges=(("a", "c"),)).save_pretrained(folder / "other")
    members = (MemberRecipe("one", "one"), MemberRecipe("other", "other"))
    with pytest.raises(InputError, match="members one and other have different tokenizers"):
        export_bundle(recipe(folder, members=members), tmp_path / "bundle")
    assert graph.calls == []


def test_too_small_a_vocabulary_is_refused(folder, tmp_path):
    tiny_model("llama", vocab_size=160).save_pretrained(folder / "narrow")
    tiny_tokenizer().save_pretrained(folder / "narrow")
    with pytest.raises(InputError, match=r"narrow.*160 .* 259"):
        export_bundle(recipe(folder, members=(MemberRecipe("narrow", "narrow"),)), tmp_path / "bundle")


def test_all_mistakes_are_reported_at_once(folder, tmp_path):
    with pytest.raises(RecipeError) as caught:
        export_bundle(recipe(folder, weights={"one": -1}, format="int3"), tmp_path / "bundle")
    assert "int3" in str(caught.value)


def test_a_recipe_may_limit_the_context(folder, tmp_path):
    manifest = export_bundle(recipe(folder, context=48), tmp_path / "bundle")
    assert [entry.config.context for entry in manifest.members] == [48, 48]
    with Mixture.load(tmp_path / "bundle", provider="cpu", threads=1) as mixture:
        assert len(mixture.generate("ab", max_new_tokens=200).token_ids) <= 48


def test_cuda_bundles_are_half_precision(folder, tmp_path):
    members = (MemberRecipe("one", "one", format="fp16"), MemberRecipe("two", "two", format="int4"))
    manifest = export_bundle(recipe(folder, members=members, target="cuda"), tmp_path / "bundle", force=True)
    assert [member.config.dtype for member in manifest.members] == ["float16", "float16"]
    with Mixture.load(tmp_path / "bundle", provider="cpu") as mixture:
        assert mixture.generate("the quick", max_new_tokens=4).token_ids


def test_a_short_write_is_a_full_disk(folder, tmp_path, monkeypatch):
    """numpy tells of a full disk without an errno, and the export called it a bug."""

    def cut_short(*_, **__):
        raise OSError("65536 requested and 26112 written")

    monkeypatch.setattr(members_stage, "quantize", cut_short)
    with pytest.raises(EdgemixError, match="26112 written") as caught:
        export_bundle(recipe(folder), tmp_path / "bundle")
    assert "Free some space" in caught.value.remedy


def test_enormous_weights_are_normalized(folder, tmp_path):
    manifest = export_bundle(recipe(folder, weights={"one": 1e308, "two": 1e308}), tmp_path / "bundle")
    assert manifest.weights.default == {"one": 0.5, "two": 0.5}


def int4_recipe(folder, **changes):
    (folder / "training.txt").write_text(TEXT[::-1])
    data = Data(calibration={"prose": TextSource("training.txt")}, max_tokens=600)
    options = {"members": (MemberRecipe("one", "one"),), "data": data, "format": "int4"}
    return recipe(folder, **(options | {"quantization": Quantization(steps=3)} | changes))


def test_int4_is_trained_where_there_is_text(folder, tmp_path):
    export_bundle(int4_recipe(folder), tmp_path / "auto", force=True)
    export_bundle(
        int4_recipe(folder, quantization=Quantization("learned-rounding", steps=3)), tmp_path / "distil", force=True
    )
    export_bundle(int4_recipe(folder, quantization=Quantization("rtn")), tmp_path / "rtn", force=True)
    export_bundle(int4_recipe(folder, data=Data()), tmp_path / "no-text", force=True)
    bare = int4_recipe(folder, data=Data(), quantization=Quantization("rtn"))
    export_bundle(bare, tmp_path / "rtn-no-text", force=True)
    found = {name: graphs(tmp_path / name) for name in ("auto", "distil", "rtn", "no-text", "rtn-no-text")}
    assert found["auto"] == found["distil"] != found["rtn"]
    assert found["no-text"] == found["rtn-no-text"]


def test_trained_blocks_are_kept_over_an_interruption(folder, tmp_path, monkeypatch):
    trained = Spy(monkeypatch, "learn_rounding", blocks)
    with monkeypatch.context() as patch:

        def cut(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(members_stage, "check_quantized", cut)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(int4_recipe(folder), tmp_path / "bundle", force=True)
    export_bundle(int4_recipe(folder), tmp_path / "bundle", force=True)
    assert len(trained.calls) == 1


def test_members_may_have_their_own_quantization(folder, tmp_path):
    members = (MemberRecipe("one", "one", quantization=Quantization("rtn", group=64)), MemberRecipe("two", "one"))
    export_bundle(int4_recipe(folder, members=members, data=Data()), tmp_path / "bundle", force=True)
    sizes = [(tmp_path / "bundle/members" / name / "model.onnx.data").stat().st_size for name in ("one", "two")]
    assert sizes[0] < sizes[1]


def test_each_quantization_setting_changes_the_graph(folder, tmp_path):
    parts = {"rotate": {"rotate": True}, "scale": {"scale": True}, "eight_bits": {"eight_bits": 0.5}}
    found, sizes = {}, {}
    for name, options in ({"gptq": {}} | parts).items():
        bundle = tmp_path / name
        export_bundle(int4_recipe(folder, quantization=Quantization("gptq", **options)), bundle, force=True)
        found[name] = tuple(graphs(bundle).values())
        sizes[name] = (bundle / "members/one/model.onnx.data").stat().st_size
    assert len(set(found.values())) == 4
    assert sizes["gptq"] == sizes["scale"] == sizes["rotate"] < sizes["eight_bits"]


def test_activations_may_be_rotated_first(folder, tmp_path):
    plain, rotated = (
        export_bundle(int4_recipe(folder, format="int8-dynamic", quantization=quantization), tmp_path / name)
        for name, quantization in (("plain", Quantization()), ("rotated", Quantization(rotate=True)))
    )
    assert graphs(tmp_path / "plain") != graphs(tmp_path / "rotated")
    assert not rotated.members[0].forced
    assert plain.members[0].source == rotated.members[0].source


def test_a_prepared_model_is_kept_over_an_interruption(folder, tmp_path, monkeypatch):
    prepared, quantization = Spy(monkeypatch, "prepare_model", models), Quantization("gptq", scale=True)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "gptq_blocks", _cut)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(int4_recipe(folder, quantization=quantization), tmp_path / "bundle", force=True)
    export_bundle(int4_recipe(folder, quantization=quantization), tmp_path / "bundle", force=True)
    assert len(prepared.calls) == 1


def _cut(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": Quantization("learned-rounding"), "data": Data()}, "quantization.algorithm: needs text"),
        ({"quantization": Quantization(scale=True), "data": Data()}, "quantization.scale: needs text"),
        ({"quantization": Quantization("rtn", eight_bits=0.5)}, "goes with algorithm learned-rounding or gptq"),
        ({"quantization": Quantization(eight_bits=2)}, "eight_bits: is 2; it may be 0 to 1"),
        ({"quantization": Quantization(group=33)}, "is 33; it may be 16, 32"),
        ({"quantization": Quantization(steps=0)}, "steps: is 0"),
        ({"student": Student()}, "needs text; name some under data: training:"),
    ],
)
def test_invalid_compression_settings_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(RecipeError, match=message):
        export_bundle(int4_recipe(folder, **changes), tmp_path / "bundle")


def student_recipe(folder, **changes):
    (folder / "training.txt").write_text(TEXT[::-1])
    data = Data(validation={"prose": TextSource("text.txt")}, training={"more": TextSource("training.txt")})
    options = {"data": data, "weights": "fit", "student": Student(format="int8", steps=2, batch=2, length=32, top_k=8)}
    return recipe(folder, **(options | changes))


def test_a_student_is_distilled_from_the_mixture_as_it_ships(folder, tmp_path, monkeypatch):
    distilled = Spy(monkeypatch, "make_student", student_stage)
    manifest = export_bundle(student_recipe(folder), tmp_path / "bundle")
    ((_, weights, *_),) = distilled.calls
    assert weights == manifest.weights.default
    assert (manifest.student.name, manifest.student.graph, manifest.student.format) == (
        "student", "student/model.onnx", "int8",
    )  # fmt: skip
    assert manifest.student.quantization.kl < manifest.student.quantization.kl_limit
    verify_bundle(tmp_path / "bundle", manifest)
    loaded = {"provider": "cpu", "threads": 1}
    with (
        Mixture.load(tmp_path / "bundle", **loaded) as both,
        Mixture.load(tmp_path / "bundle", **loaded, student=True) as student,
    ):
        assert student.generate("the quick", max_new_tokens=4).token_ids
        found = evaluate(both, {"prose": [TEXT[:300]]}, student=student)
    assert found.row("student").overall.acceptance > 0.1


def test_ngrams_are_counted_in_the_training_text(folder, tmp_path):
    """N-grams draft what followed in the text; generated text does not change."""
    text = {"prose": TextSource("text.txt")}
    manifest = export_bundle(recipe(folder, data=Data(training=text)), tmp_path / "bundle")
    verify_bundle(tmp_path / "bundle", manifest)
    assert manifest == read_manifest(tmp_path / "bundle")
    assert manifest.ngrams > 10
    with Mixture.load(tmp_path / "bundle", provider="cpu", threads=1) as mixture:
        brown = mixture.tokenizer.encode("the quick brow")
        (token,) = mixture.tokenizer.encode("n")
        assert mixture.ngrams.guess(brown).token == token
        texts = [
            mixture.generate("the quick", speculation=way, max_new_tokens=24).token_ids for way in ("off", "lookup")
        ]
    assert texts[0] == texts[1]
    for changes in ({"data": Data(training=text), "ngrams": 0}, {"data": Data(calibration=text)}):
        manifest = export_bundle(recipe(folder, **changes), tmp_path / "bundle")
        assert manifest.ngrams == 0
        assert not (tmp_path / "bundle" / NGRAMS).exists()
        with Mixture.load(tmp_path / "bundle", provider="cpu", threads=1) as mixture:
            assert mixture.ngrams is None


def test_ngrams_are_kept_over_an_interruption(folder, tmp_path, monkeypatch):
    counted, output = Spy(monkeypatch, "count_ngrams", ngrams), tmp_path / "bundle"
    wanted = recipe(folder, data=Data(training={"prose": TextSource("text.txt")}))

    def interrupted(wanted):
        with monkeypatch.context() as broken:
            broken.setattr(members_stage, "check_quantized", _cut)
            with pytest.raises(KeyboardInterrupt):
                export_bundle(wanted, output)
        return [*tmp_path.glob(f".bundle.partial/**/{NGRAMS}")]

    assert interrupted(wanted) == interrupted(wanted) != []
    assert len(counted.calls) == 1
    assert interrupted(msgspec.structs.replace(wanted, ngrams=0)) == [], "it would count where bytes are counted"
    manifest = export_bundle(wanted, output)
    assert manifest.ngrams == len(ngram_table(output, manifest)) > 10


def test_a_student_of_a_large_vocabulary_drafts_its_frequent_tokens(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(draft_head, "MIN_VOCABULARY", 100)
    manifest = export_bundle(student_recipe(folder), tmp_path / "bundle")
    assert manifest.student.draft == DraftGraph("student/draft.onnx", "student/draft_tokens.json", 64)
    verify_bundle(tmp_path / "bundle", manifest)
    assert manifest == read_manifest(tmp_path / "bundle")
    tokens = draft_tokens(tmp_path / "bundle", manifest, manifest.student.draft)
    with Mixture.load(tmp_path / "bundle", provider="cpu", threads=1) as mixture:
        assert {*mixture.tokenizer.encode(TEXT[::-1]), *manifest.tokenizer.eos} <= {*tokens}
        (drafter,) = mixture.drafting.graphs
        assert (drafter.vocabulary, drafter.tokens.tolist()) == (64, tokens)
        texts = [
            mixture.generate("the quick", speculation=way, max_new_tokens=24).token_ids for way in ("off", "student")
        ]
    assert texts[0] == texts[1]
    own = [entry.size for name, entry in manifest.files.items() if name.startswith("student/")]
    assert len(own) == 4, "no weights of its own"


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (lambda *_: False, "that has an unknown structure"),
        (lambda _, output, __: output.write_bytes(b"no graph"), "with a cut one it does not run"),
        (
            lambda source, output, tokens: cut_head(source, output, tokens[::-1]),
            "with a cut one its logits differ",
        ),
    ],
)
def test_a_student_that_cannot_be_cut_drafts_with_its_whole_head(folder, tmp_path, monkeypatch, cut, reason):
    monkeypatch.setattr(draft_head, "MIN_VOCABULARY", 100)
    monkeypatch.setattr(draft_head, "cut_head", cut)
    lines = []
    monkeypatch.setattr(type(NO_PROGRESS), "log", lambda _, line: lines.append(line))
    manifest = export_bundle(student_recipe(folder), tmp_path / "bundle")
    assert manifest.student.draft is None
    assert [line for line in lines if line.startswith("student: drafts with its whole head") and reason in line]
    assert not [name for name in manifest.files if "draft" in name]


def test_a_distilled_student_is_kept_over_an_interruption_and_a_refusal(folder, tmp_path, monkeypatch):
    real = members_stage.check_quantized

    def bad(source, path, *arguments, **options):
        figures = real(source, path, *arguments, **options)
        return msgspec.structs.replace(figures, kl=9.0) if path.parent.name == "student" else figures

    monkeypatch.setattr(members_stage, "check_quantized", bad)
    trained = []
    monkeypatch.setattr(distill, "train", lambda *a, real=distill.train, **k: trained.append(1) or real(*a, **k))
    graph = Spy(monkeypatch, "export_graph", graph_stage)
    with monkeypatch.context() as patch:

        def cut(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(graph_stage, "export_graph", lambda *a, **k: graph(*a, **k) if len(graph.calls) < 2 else cut())
        with pytest.raises(KeyboardInterrupt):
            export_bundle(student_recipe(folder), tmp_path / "bundle")
    with pytest.raises(ParityError, match="'student'"):
        export_bundle(student_recipe(folder), tmp_path / "bundle")
    manifest = export_bundle(student_recipe(folder), tmp_path / "bundle", force=True)
    assert (len(trained), len(graph.calls)) == (1, 3)
    assert (manifest.student.forced, manifest.members[1].forced) == (True, False)
