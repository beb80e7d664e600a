"""The table of features is what the tests' marks say."""

from pathlib import Path

import pytest

from tests import feature_table
from tests.feature_table import rows


def test_marks_are_read_from_decorators_and_parameters(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "@feature('one', 'refused')\ndef test_one(): ...\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.feature('two', 'works', 'well'))])\n"
        "@feature('three', 'works')\ndef test_two(x): ...\n"
    )
    (tmp_path / "test_b.py").write_text("@feature('three', 'works', 'twice')\ndef test_three(): ...\n")
    found = [(row.feature, row.verdict, row.remark, row.tests) for row in rows(tmp_path)]
    assert found == [
        ("two", "works", "well", ["test_a.py::test_two"]),
        ("three", "works", "twice", ["test_a.py::test_two", "test_b.py::test_three"]),
        ("one", "refused", "", ["test_a.py::test_one"]),
    ]


@pytest.mark.parametrize("second", ["unknown", "refused"])
def test_a_verdict_is_known_and_the_same_everywhere(tmp_path: Path, second: str) -> None:
    (tmp_path / "test_a.py").write_text(
        f"@feature('one', 'works')\ndef test_one(): ...\n@feature('one', {second!r})\ndef test_two(): ...\n"
    )
    with pytest.raises(ValueError, match="test_two"):
        feature_table.rows(tmp_path)
