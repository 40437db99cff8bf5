"""Two profiles, ratio by ratio: what is better or worse beyond the spread, and numbers that make no sense."""

from __future__ import annotations

import msgspec
import pytest
from helpers.profiles import quantiles, sample_profile

from edgemix.results.profile import Decode
from edgemix.results.profile_comparison import LOADING, MACHINE, compare_profiles


def ratios(this, other):
    return {(ratio.about, ratio.figure): ratio for ratio in compare_profiles(this, other).ratios}


def with_tpot(tpot, profile=None):
    """The sample with one member's only context."""
    profile = profile or sample_profile()
    first = msgspec.structs.replace(profile.results[0], decode=(Decode(64, tpot),))
    return msgspec.structs.replace(profile, results=(first, *profile.results[1:]))


def test_a_profile_is_the_same_as_itself():
    comparison = compare_profiles(sample_profile(), sample_profile())

    assert comparison.differences == ()
    assert {ratio.verdict for ratio in comparison.ratios} == {"same"}
    assert {ratio.ratio for ratio in comparison.ratios} == {1.0}
    assert {ratio.about for ratio in comparison.ratios} == {
        *(MACHINE, LOADING, "math", "code", "student", "mixture, plain", "mixture")
    }


def test_slower_is_worse_for_times_and_for_rates():
    found = ratios(sample_profile(2.0), sample_profile())

    assert found["math", "TPOT, context 64"].ratio == pytest.approx(2)
    assert found["math", "TPOT, context 64"].verdict == "worse"
    assert found["mixture, plain", "rate, 16 texts"].ratio == pytest.approx(0.5)
    assert found["mixture, plain", "rate, 16 texts"].verdict == "worse"
    assert found[LOADING, "load, cold"].verdict == "worse"
    assert found[LOADING, "files"].verdict == "same"


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [(1.05, 0.02, "worse"), (1.05, 0.2, "same"), (0.9, 0.02, "better"), (0.9, 0.3, "same"), (1.01, 0.0, "same")],
)
def test_a_difference_within_the_spread_is_none(ratio, spread, verdict):
    found = ratios(with_tpot(quantiles(0.01 * ratio, spread)), with_tpot(quantiles(0.01, spread)))

    assert found["math", "TPOT, context 64"].verdict == verdict


def test_only_what_both_have_is_compared():
    other = msgspec.structs.replace(sample_profile(), results=sample_profile().results[:1])
    other = msgspec.structs.replace(other, machine=msgspec.structs.replace(other.machine, int8_peak=None))

    found = ratios(sample_profile(), other)

    assert {about for about, _ in found} == {MACHINE, LOADING, "math"}
    assert (MACHINE, "int8 peak") not in found


def test_what_else_is_different_is_told():
    machine = msgspec.structs.replace(sample_profile().machine, threads=8, processor="Another")
    other = msgspec.structs.replace(sample_profile(), machine=machine, digest="1" * 64, weights="adaptive", quick=True)

    told = "\n".join(compare_profiles(sample_profile(), other).differences)

    for part in ("another bundle", "another threads: 2 and 8", "another processor", "adaptive", "--quick"):
        assert part in told


@pytest.mark.parametrize("absurd", [0.0, -1.0, 5e-324, 1.7e308, 10**400])
def test_numbers_that_make_no_sense_have_no_ratio(absurd):
    other = with_tpot(msgspec.structs.replace(quantiles(0.01), p50=absurd, spread=absurd))

    for ratio in (*ratios(sample_profile(), other).values(), *ratios(other, sample_profile()).values()):
        assert ratio.ratio is None or ratio.ratio > 0
