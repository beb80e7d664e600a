"""Whether two benchmarks agree."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agree


def report(**ratios: tuple[float, float, float]) -> dict[str, Any]:
    rows = [{"method": "plain vLLM", "clients": 1, "temperature": 0.0, "ratio": 1.0, "ratio_interval": [1.0, 1.0]}]
    rows += [
        {"method": name, "clients": 1, "temperature": 0.0, "ratio": middle, "ratio_interval": [low, high]}
        for name, (middle, low, high) in ratios.items()
    ]
    return {"results": rows}


def test_spreads_that_touch_agree_and_those_that_lie_apart_do_not() -> None:
    found = agree.compared(
        report(a=(1.2, 1.1, 1.3), b=(1.2, 1.1, 1.3), c=(1, 1, 1)), report(a=(1.4, 1.3, 1.5), b=(1.5, 1.4, 1.6), d=(1, 1, 1))
    )
    assert found == {(0.0, 1, "a"): True, (0.0, 1, "b"): False}
    with pytest.raises(ValueError, match="no method"):
        agree.compared(report(a=(1, 1, 1)), report(b=(1, 1, 1)))


@pytest.mark.parametrize(("second", "status"), [((1.25, 1.2, 1.4), 0), ((0.9, 0.8, 1.0), 1)])
def test_the_exit_status_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], second: tuple[float, ...], status: int
) -> None:
    for name, ratios in (("one", (1.2, 1.1, 1.3)), ("two", second)):
        (tmp_path / name).write_text(json.dumps(report(a=ratios)))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["agree", str(tmp_path / "one"), str(tmp_path / "two")])
    with pytest.raises(SystemExit) as end:
        agree.main()
    assert end.value.code == status
    assert f"{1 - status} of 1 agree" in capsys.readouterr().out
