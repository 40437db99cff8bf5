"""A plan is used where it applies, and an invalid one changes nothing."""

from __future__ import annotations

import logging

import msgspec
import platformdirs
import pytest
from platformdirs.macos import MacOS
from platformdirs.unix import Unix
from platformdirs.windows import Windows

from edgemix.bundle.reader import read_manifest
from edgemix.errors import EdgemixError
from edgemix.runtime import Mixture
from edgemix.runtime.graphs.providers import PROVIDERS
from edgemix.runtime.machine.plan import CACHE, RuntimePlan, cache_folder, find_plan, key_of, write_plan

CPU = PROVIDERS["cpu"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def manifest(student_bundle):
    return read_manifest(student_bundle)


def planned(manifest, **changes):
    fields = {"threads": 1, "speculation": "lookup", "drafts": False, "tpot": 0.01, "created": "now"}
    return RuntimePlan(key_of(manifest, CPU), **(fields | changes))


def test_a_plan_is_found_again(manifest, cache):
    path = write_plan(planned(manifest))

    assert path.is_relative_to(cache)
    assert find_plan(manifest, CPU) == planned(manifest)


def test_there_is_no_plan(manifest, cache):
    assert find_plan(manifest, CPU) is None
    assert not cache.exists()


def test_a_plan_is_for_one_bundle_one_machine_and_one_provider(manifest, bundle, monkeypatch):
    write_plan(planned(manifest))

    assert find_plan(read_manifest(bundle), CPU) is None
    assert find_plan(manifest, PROVIDERS["cuda"]) is None
    monkeypatch.setattr("edgemix.runtime.machine.plan.installed_version", lambda _: "9.9.9")
    assert find_plan(manifest, CPU) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"{",
        lambda data: data.replace(b'"threads": 1', b'"threads": "1"'),
        lambda data: data.replace(b'"threads": 1', b'"threads": 0'),
        lambda data: data.replace(b'"threads": 1', b'"threads": 1000000'),
        lambda data: data.replace(b'"lookup"', b'"guess"'),
        lambda data: data.replace(b'"threads"', b'"thread"'),
        lambda data: data.replace(b'"threads"', b'"more": 1, "threads"'),
        lambda data: data.replace(b'"schema": 1', b'"schema": 2'),
        lambda data: data.replace(b'"key": "', b'"key": "x'),
        lambda data: data + b" " * (1 << 20),
        lambda _: b"[" * 50_000,
    ],
)
def test_a_damaged_plan_is_ignored_with_a_warning(manifest, student_bundle, caplog, damage):
    path = write_plan(planned(manifest))
    path.write_bytes(damage(path.read_bytes()))

    with caplog.at_level(logging.WARNING), Mixture.load(student_bundle, "cpu") as mixture:
        assert mixture.plan is None
        assert mixture.drafting is not None
    assert "is ignored" in caplog.text


def test_the_mixture_follows_the_plan(manifest, student_bundle, opened):
    write_plan(planned(manifest))

    with Mixture.load(student_bundle, "cpu") as mixture:
        assert mixture.plan == planned(manifest)
        assert mixture.drafting is None
    assert opened == [1, 1]


def test_arguments_take_precedence(manifest, student_bundle, opened):
    write_plan(planned(manifest))

    with Mixture.load(student_bundle, "cpu", threads=2, drafts=True) as mixture:
        assert mixture.drafting is not None
        assert mixture.plan.speculation == "auto"
    assert opened == [2, 2, 2]


def test_without_the_plan_and_for_the_student_alone(manifest, student_bundle):
    write_plan(planned(manifest))

    with Mixture.load(student_bundle, "cpu", plan=False) as mixture:
        assert mixture.plan is None
    with Mixture.load(student_bundle, "cpu", student=True) as student:
        assert student.plan is None


@pytest.mark.parametrize(
    "case",
    [
        ("off", "auto", []),
        ("off", "lookup", [(False, True)]),
        ("lookup", "auto", [(False, True)]),
        ("student", "auto", [(True, False)]),
        ("auto", "auto", [(True, True)]),
        ("student", "off", []),
    ],
    ids=str,
)
def test_the_plan_defines_auto_and_texts_stay_the_same(manifest, student_bundle, monkeypatch, case):
    """For each mode of the plan and of the call: whether student and text draft."""
    from edgemix.runtime.decoding import generate

    way, asked, drafting = case
    seen = []

    class Spied(generate.SpeculativeDecoding):
        def __init__(self, *arguments, student, lookup, **options):
            seen.append((student is not None, lookup))
            super().__init__(*arguments, student=student, lookup=lookup, **options)

    monkeypatch.setattr(generate, "SpeculativeDecoding", Spied)
    write_plan(planned(manifest, speculation=way, drafts=True))

    with Mixture.load(student_bundle, "cpu") as mixture:
        text = mixture.generate("1", max_new_tokens=8, speculation=asked).text

    assert text == "+2=3"
    assert seen == drafting


@pytest.fixture
def opened(monkeypatch):
    """Thread counts with which graphs were opened."""
    from edgemix.runtime.graphs import decoder

    found, original = [], decoder.open_session

    def spied(graph, provider, *, threads=None, **options):
        found.append(threads)
        return original(graph, provider, threads=threads, **options)

    monkeypatch.setattr(decoder, "open_session", spied)
    return found


def test_the_folder_follows_the_systems_rules(monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "edgemix"

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home/.cache/edgemix"

    monkeypatch.setattr(platformdirs, "PlatformDirs", MacOS)
    assert cache_folder() == tmp_path / "home/Library/Caches/edgemix"

    monkeypatch.setattr(platformdirs, "PlatformDirs", Windows)
    monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda _: str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local/edgemix"


def test_no_home_for_a_cache(monkeypatch, manifest, student_bundle):
    monkeypatch.delenv(CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # without a home, ~ stays as it is

    assert find_plan(manifest, CPU) is None
    with pytest.raises(EdgemixError, match="no folder for plans"):
        write_plan(planned(manifest))


def test_a_folder_that_cannot_be_made(manifest, cache):
    cache.write_text("a file")

    assert find_plan(manifest, CPU) is None
    with pytest.raises(EdgemixError, match="writing"):
        write_plan(planned(manifest))


def test_the_file_names_what_it_applies_to(manifest):
    told = msgspec.json.decode(write_plan(planned(manifest)).read_bytes())

    assert manifest.checksum in told["key"]
    assert "cpu" in told["key"]
