"""The machine's description, parsed from text and looked up here."""

from __future__ import annotations

import builtins
from importlib import metadata

import pytest

from edgemix.runtime.graphs import providers
from edgemix.runtime.machine import system
from edgemix.runtime.processor import cpu_quota, parse_cpuinfo


def test_instruction_sets_of_an_x86_processor():
    text = (
        "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nflags\t\t: fpu avx2 avx avx512f strange\n\nprocessor\t: 1\n"
    )

    assert parse_cpuinfo(text) == ("Some CPU @ 2.0GHz", ("avx", "avx2", "avx512f"))


def test_instruction_sets_of_an_arm_processor():
    assert parse_cpuinfo("Features\t: fp asimd asimddp i8mm\n") == ("", ("asimd", "asimddp", "i8mm"))


def test_a_system_without_cpuinfo_has_unknown_instruction_sets():
    assert parse_cpuinfo("") == ("", ())


def test_this_machine():
    found = system.describe()

    assert found.processor.name
    assert 1 <= found.processor.default_threads <= found.processor.usable_cores <= found.processor.logical_cores
    assert 0 < found.memory.available <= found.memory.total
    assert [state.name for state in found.providers] == ["cpu", "cuda", "cuda-graphs"]
    assert found.providers[0].works
    assert found.can_run
    assert found.packages["numpy"] == metadata.version("numpy")


def test_a_container_limit_below_the_memory_counts(monkeypatch):
    monkeypatch.setattr(system, "read_text", lambda path: "1000000\n" if path.name == "memory.max" else "")

    found = system.describe().memory

    assert found.total == 1_000_000
    assert found.available <= found.total


@pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n"])
def test_no_container_limit(monkeypatch, text):
    monkeypatch.setattr(system, "read_text", lambda path: text)

    assert system.describe().memory.total > 1 << 27


def test_without_onnxruntime_no_provider_works_and_a_remedy_is_given(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *rest, **more):
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return imported(name, *rest, **more)

    providers._onnxruntime.cache_clear()
    providers.why_not.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    try:
        found = system.describe()
    finally:
        providers._onnxruntime.cache_clear()

    assert not found.can_run
    assert not found.can_export
    assert "edgemix[cpu]" in found.providers[0].remedy


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/not/seen/here\n", {"cpu.max": "400000 100000"}, 4.0),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu,cpuacct:/x\n", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("", {"cpu.max": "200000 100000"}, 2.0),
        ("", {"cpu.max": "nonsense"}, None),
        ("0::/../../etc\n", {}, None),
    ],
)
def test_a_containers_quota_is_known(tmp_path, own, files, expected):
    """32 threads in a container with two CPUs wait for each other most of the time."""
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "own") == expected
