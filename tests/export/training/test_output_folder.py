import os

import pytest

from edgemix.errors import InputError
from edgemix.export.training.output_folder import check_output, seal, sealed


def test_an_existing_output_is_refused_and_parents_are_created(tmp_path):
    check_output(tmp_path / "a" / "b" / "out")
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"out: .*file is a file"):
        check_output(tmp_path / "file" / "b" / "out")
    for taken in ("a", "file"):
        with pytest.raises(InputError, match="is there already"):
            check_output(tmp_path / taken)


def test_a_truncated_or_missing_file_breaks_the_seal(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "weights").write_bytes(bytes(100))
    assert not sealed(tmp_path)
    seal(tmp_path)
    assert sealed(tmp_path)
    os.truncate(tmp_path / "inner" / "weights", 99)
    assert not sealed(tmp_path)
    seal(tmp_path)
    (tmp_path / "inner" / "weights").unlink()
    assert not sealed(tmp_path)
    assert not sealed(tmp_path / "nowhere")
