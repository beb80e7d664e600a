"""Run cases by number, count what became of them, stop those that hang."""

import argparse
import faulthandler
import json
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track


class Violation(AssertionError):
    """A case had an outcome that it may not have."""


class Hang(BaseException):
    """A case took longer than it may. No subclass of Exception: nothing may take it for an error of its own."""


PATIENCE = 10.0
"""Times as long by the clock as in processor time: a machine may be busy with other things."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Hang in the block after `seconds` of processor time, and where it waits and computes nothing, after PATIENCE times as
    many by the clock; code that does not come back even then ends the process with its stack."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds} s")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, PATIENCE * seconds))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    for timer, _, after in timers:
        signal.setitimer(timer, after)
    faulthandler.dump_traceback_later(max(60.0, 2 * PATIENCE * seconds), exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def reset_peak() -> float:
    """Lets the kernel measure this process's peak of memory anew (proc(5), clear_refs); what it has now, in megabytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_megabytes()


def peak_megabytes() -> float:
    """The most memory that this process has had since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


@dataclass
class Finding:
    """A case that went wrong; `kind` and `case` repeat it."""

    case: int
    kind: str
    what: str
    detail: str


@dataclass
class Report:
    """What became of the cases."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    """Most seconds of processor time that a case took."""
    grown: float = 0.0
    """Most megabytes that a case took."""

    @property
    def num_cases(self) -> int:
        """Cases together."""
        return sum(sum(counts.values()) for counts in self.outcomes.values())

    def add(self, kind: str, outcome: str) -> None:
        """Counts one case."""
        self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def summary(self) -> dict[str, Any]:
        """Cases by kind and outcome, and every finding."""
        return {
            "cases": self.num_cases,
            "seconds": round(self.seconds, 1),
            "slowest_case_seconds": round(self.slowest, 3),
            "most_megabytes_of_a_case": round(self.grown, 1),
            "outcomes": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.outcomes.items())},
            "findings": [vars(finding) for finding in self.findings],
        }


def run(
    cases: range, case: Callable[[int], tuple[str, str]], *, limit: float, megabytes: float | None = None, progress: bool = False
) -> Report:
    """Runs each case of `cases`.

    Args:
        case: number -> kind and outcome; raises Violation, or whatever it was not prepared for, with the kind in `kind`.
        limit: seconds of processor time that a case may take.
        megabytes: memory that a case may take beyond what the process has before it; None: without a limit.
        progress: show a bar on standard error.
    """
    report, begin = Report(), time.monotonic()
    for number in track(cases, "cases", disable=not progress):
        started, before = time.process_time(), reset_peak()
        try:
            with time_limit(limit):
                kind, outcome = case(number)
            grown = peak_megabytes() - before
            report.grown = max(report.grown, grown)
            if megabytes is not None and grown > megabytes:
                raise with_kind(Violation(f"memory grew by {grown:.0f} MB"), kind)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            kind, outcome = getattr(error, "kind", "unknown"), "FINDING"
            detail = "".join(traceback.format_exception(error)[-3:])
            report.findings.append(Finding(number, kind, f"{type(error).__name__}: {str(error)[:300]}", detail[-2000:]))
        report.add(kind, outcome)
        report.slowest = max(report.slowest, time.process_time() - started)
    report.seconds = time.monotonic() - begin
    return report


def with_kind(error: BaseException, kind: str) -> BaseException:
    """The error, with the kind of case that it came from."""
    error.kind = kind  # type: ignore[attr-defined]
    return error


def main(name: str, cases: Callable[[argparse.Namespace], Report], count: int) -> None:
    """The command line of a fuzzer: a summary as JSON; exit status 1 when there is a finding."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.fuzz.{name}")
    parser.add_argument("--count", type=int, default=count, help="cases to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--json", type=Path, help="write the summary to this file")
    arguments = parser.parse_args()
    report = cases(arguments)
    summary = {"command": sys.argv[1:], "seed": arguments.seed, **report.summary()}
    text = json.dumps(summary, indent=2)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    print(text)
    sys.exit(1 if report.findings else 0)
