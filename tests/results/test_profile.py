"""The profile's file: what was written is read again, and nothing else is believed."""

from __future__ import annotations

import msgspec
import pytest
from helpers.profiles import sample_profile

from edgemix.errors import InputError
from edgemix.results import profile as module
from edgemix.results.profile import encode_profile, read_profile


def test_what_is_written_is_read_again(tmp_path):
    (tmp_path / "profile.json").write_bytes(encode_profile(sample_profile()))

    assert read_profile(tmp_path / "profile.json") == sample_profile()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a profile"),
        ("[]", "is not a profile"),
        ('{"schema": 7}', "schema 7, not 1"),
        ('{"schema": 1}', "missing required field `bundle`"),
        ('{"schema": 1, "x": 1}', "unknown field `x`"),
        ("[" * 100_000, "is not a profile"),
    ],
)
def test_anything_else_is_refused(tmp_path, text, message):
    (tmp_path / "profile.json").write_text(text)

    with pytest.raises(InputError, match=r"profile\.json") as refused:
        read_profile(tmp_path / "profile.json")
    assert message in str(refused.value)


def test_an_unknown_key_deep_inside_is_refused(tmp_path):
    document = msgspec.json.decode(encode_profile(sample_profile()))
    document["subjects"][0]["decode"][0]["tpot"]["p75"] = 1
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(document))

    with pytest.raises(InputError, match="unknown field `p75`"):
        read_profile(tmp_path / "profile.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "profile.json").write_bytes(encode_profile(sample_profile()))
    monkeypatch.setattr(module, "MAX_BYTES", 100)

    with pytest.raises(InputError, match="more than 100 bytes"):
        read_profile(tmp_path / "profile.json")


def test_there_is_none(tmp_path):
    with pytest.raises(InputError, match="there is no profile"):
        read_profile(tmp_path / "profile.json")
