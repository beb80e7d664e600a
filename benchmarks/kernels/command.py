"""What the commands of this folder have in common: options, a device, an output file that a later run continues."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Command:
    """A command that has begun.

    Attributes:
        output: its JSON.
        smoke: whether shapes are tiny and times mean nothing.
        only: parts of names, one of which is in each that is wanted; all are if empty.
        end: of the time for beginning something, as `time.monotonic` counts.
        device: a GPU; with `smoke`, the CPU with Triton's interpreter where there is none.
        run: what the file holds.
    """

    output: Path
    smoke: bool
    only: Sequence[str]
    end: float
    device: Any
    run: dict[str, Any]

    @classmethod
    def begin(cls, doc: str | None, without_a_gpu: str) -> "Command":
        """Parses the command line, before Triton is imported.

        Args:
            doc: the module's.
            without_a_gpu: why it does not run without one.

        Raises:
            SystemExit: there is no GPU, or the file is of another machine.
        """
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--output", type=Path, required=True, help="JSON, with other files beside it; continued if it is there")
        parser.add_argument("--only", nargs="+", default=[], help="what has one of these in its name")
        parser.add_argument("--minutes", type=float, default=60, help="begin nothing after so long")
        parser.add_argument("--smoke", action="store_true", help="tiny shapes; under Triton's interpreter where there is no GPU")
        options = parser.parse_args()
        end = time.monotonic() + 60 * options.minutes

        import torch

        if not torch.cuda.is_available():
            if not options.smoke:
                raise SystemExit(f"No CUDA GPU: {without_a_gpu}; --smoke runs tiny shapes without one.")
            os.environ["TRITON_INTERPRET"] = "1"
        from . import report
        from .timing import facts

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = report.load(options.output, {**facts(device), "smoke": options.smoke})
        return cls(options.output, options.smoke, options.only, end, device, run)

    def wants(self, name: str) -> bool:
        """Whether something of this name is asked for."""
        return not self.only or any(part in name for part in self.only)

    def in_time(self, name: str) -> bool:
        """Whether something of this name may begin; says so if not."""
        if time.monotonic() < self.end:
            return True
        print(f"time is up; the same command goes on with {name}", flush=True)
        return False

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Puts a result into the file."""
        from . import report

        self.run["cells"][name] = result
        report.save(self.output, self.run)
