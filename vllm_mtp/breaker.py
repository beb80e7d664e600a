"""What happens when code of ours fails: speculation ends, serving does not."""

from collections.abc import Callable

from vllm.logger import init_logger

logger = init_logger("vllm.mtp")
failures: list[str] = []
"""What ended speculation in this process. Whoever measures or compares in it has to look: answers stay right without us."""


class Breaker:
    """Opens at the first exception in code of ours, and stays open: from then on steps have no mask rows and no drafts, as in plain
    vLLM, until the server is started anew. What has failed once would mostly fail in the next step too.

    Where a model is split over ranks it does not open, and the rank ends, and with it the engine: a rank that leaves mask rows out
    while another one has them would wait for it forever.

    Args:
        num_ranks: tensor-parallel ranks of the engine.

    Attributes:
        cause: what failed, None as long as nothing has.
    """

    def __init__(self, num_ranks: Callable[[], int]) -> None:
        self.num_ranks = num_ranks
        self.cause: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether speculation has ended."""
        return self.cause is not None

    def trip(self, part: str, error: Exception) -> None:
        """Ends speculation and says why, once, with the traceback.

        Args:
            part: what was being done, as the log says it.
            error: the exception that is being handled.

        Raises:
            SystemExit: the rank must end.
        """
        if self.num_ranks() > 1:
            logger.error(
                "Mask-token prediction failed while %s. The engine ends, for its ranks may not differ in a step.",
                part,
                exc_info=error,
            )
            # vLLM looks for workers that have ended. Of an exception in another rank than the first it learns only when its time
            # limit for a step is over, 300 s (v1/executor/multiproc_executor.py).
            raise SystemExit(1) from error
        if self.cause is None:
            self.cause = f"{part}: {type(error).__name__}: {error}"
            failures.append(self.cause)
            logger.error(
                "Mask-token prediction failed while %s and is off until the server is started anew. "
                "Requests are served on, without drafts.",
                part,
                exc_info=error,
            )
