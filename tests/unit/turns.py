"""Engines that take the times that a test says, and write down whose turn it was."""

from collections.abc import Sequence

from vllm_mtp.cli.engine import Generation
from vllm_mtp.outputs import Output


class TimedEngine:
    """Stands for an `EngineProcess`: each run takes the next of `seconds`.

    Args:
        name: what it writes into `order` at each run.
        seconds: of its runs.
        order: of the runs of all engines.
        output: of every prompt.
    """

    def __init__(self, name: str, seconds: Sequence[float], order: list[str], output: Output) -> None:
        self.name, self.seconds, self.order, self.output = name, iter(seconds), order, output

    def generate(self, prompts: Sequence[str], **_: object) -> Generation:
        self.order.append(self.name)
        return Generation(next(self.seconds), 4, [self.output for _ in prompts])
