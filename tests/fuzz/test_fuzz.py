"""A few hundred fuzzed adapters and options in every run, every kind of damage among them; the twenty thousands on request."""

import json
from pathlib import Path

import pytest

from tests.fuzz import adapters, options
from tests.fuzz.adapter_mutations import MUTATIONS
from tests.fuzz.report import Hang, Report, Violation, run


def passed(report: Report, cases: int) -> None:
    print(json.dumps(report.summary()["outcomes"]))
    assert not report.findings, json.dumps(report.summary()["findings"][:5], indent=2)
    assert report.num_cases == cases


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> adapters.Fuzzer:
    return adapters.Fuzzer(tmp_path_factory.mktemp("fuzz"), seed=0)


@pytest.mark.parametrize("kind", MUTATIONS)
def test_a_damaged_adapter_is_refused_or_read_as_its_files_say(kind: str, fuzzer: adapters.Fuzzer) -> None:
    passed(run(range(8), lambda number: fuzzer.case(number, kind), limit=adapters.SECONDS, megabytes=adapters.MEGABYTES), 8)


def test_fuzzed_options_are_served_as_written_or_refused_by_name() -> None:
    passed(options.fuzz(range(250), seed=0), 250)


@pytest.mark.parametrize("case", [455, 14415])
def test_the_largest_tau_is_served_as_written(case: int) -> None:
    passed(options.fuzz(range(case, case + 1), seed=2), 1)


@pytest.mark.full
def test_twenty_thousand_adapters() -> None:
    passed(adapters.fuzz(range(20_000), seed=1), 20_000)


@pytest.mark.full
def test_twenty_thousand_options() -> None:
    passed(options.fuzz(range(20_000), seed=1), 20_000)


def test_the_fuzzer_sees_what_may_not_happen(fuzzer: adapters.Fuzzer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")

    def opens() -> None:
        with fuzzer.witness.watching([tmp_path / "adapter"]):
            outside.read_text()

    def executes() -> None:
        with fuzzer.witness.watching([tmp_path]):
            exec("pass")

    def hangs() -> None:
        while True:
            pass

    def grows() -> None:
        bytearray(b"x" * (400 << 20))

    faults = [(opens, Violation), (executes, Violation), (hangs, Hang), (grows, Violation), (lambda: {}["key"], KeyError)]
    for fault, error in faults:

        def case(_: int, fault: object = fault) -> tuple[str, str]:
            fault()  # type: ignore[operator]
            return "fault", "not seen"

        report = run(range(1), case, limit=1 if fault is hangs else 30, megabytes=256)
        assert [finding.what.partition(":")[0] for finding in report.findings] == [error.__name__]
