"""Requests with odd prompts and parameters: refused and answered as by plain vLLM (tests/fuzz/requests.py)."""

import json

import pytest

from tests.fuzz import requests

from .conftest import Engines

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("count", "seed", "layout"),
    [
        (96, 0, "quadratic"),
        *(pytest.param(2000, 1, layout, marks=pytest.mark.full) for layout in ("quadratic", "auto", "linear")),
    ],
)
def test_fuzzed_requests_are_plains(engines: Engines, count: int, seed: int, layout: str) -> None:
    summary = requests.fuzz(engines, range(count), seed, layout=layout).summary()
    assert not summary["findings"], json.dumps(summary["findings"][:5], indent=2)
    outcomes = {outcome for kinds in summary["outcomes"].values() for outcome in kinds}
    assert outcomes == {"same", "sampled", "refused by both", "refused under speculation"}
