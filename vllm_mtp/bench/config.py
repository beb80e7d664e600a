"""Every option of a benchmark, with its default and limits: what a YAML file of `vllm-mtp bench` may hold."""

import itertools
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from vllm_mtp import demo
from vllm_mtp.config import StrictModel
from vllm_mtp.train.documents import BadLines, read_documents

PLAIN = "plain vLLM"
Positive = Annotated[int, Field(gt=0)]


class Method(StrictModel):
    """One way to decode."""

    speculative: dict[str, Any]
    """The JSON of vLLM's `--speculative-config`."""
    search: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Options in it with the values to try. All combinations are tried, and at each number of clients the best one is compared."""
    training: Path | None = None
    """JSON file of how it was trained: `tokens`, `steps`, `minutes`, and the number of trained `parameters` or {"trained": it}; or
    an adapter's config.json. None: nothing was trained."""

    def settings(self) -> list[dict[str, Any]]:
        """The speculative configurations to try."""
        names = list(self.search)
        return [
            {**self.speculative, **dict(zip(names, values, strict=True))} for values in itertools.product(*self.search.values())
        ]


class BenchConfig(StrictModel):
    """Options of `vllm-mtp bench`."""

    model: str | None = None
    """The base model of all methods. None: the demo's."""
    engine: dict[str, Any] = Field(default_factory=lambda: {"dtype": "bfloat16"})
    """Further arguments of `vllm.LLM`, of every engine. Prefix caching is off, or later runs would skip their prompts."""
    methods: dict[str, Method] = Field(min_length=1)
    """What is compared with plain vLLM, by the name it has in the report."""
    prompts: tuple[Path, ...] = ()
    """.jsonl files with {"text": ..} in each line, a domain each; they are asked in turns. None: the demo's."""
    clients: tuple[Positive, ...] = (1, 4, 16, 32)
    """Requests in flight."""
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = (0.0,)
    """0 is greedy."""
    max_tokens: Positive = 128
    """Output tokens of a request."""
    prompts_per_run: Positive = 24
    """Requests in a run, at least four times the clients."""
    rounds: Positive = 3
    """Runs of every method at each number of clients, in turns; a ratio is of runs of one round."""
    search_prompts_per_run: Positive = 12
    """Requests in a run that looks for a method's best setting, at least the clients."""
    search_rounds: Positive = 1
    """Rounds of those."""

    @model_validator(mode="after")
    def _is_possible(self) -> "BenchConfig":
        if PLAIN in self.methods:
            raise ValueError(f"methods: {PLAIN} is what all are compared with; leave it out")
        for name, method in self.methods.items():
            if not method.settings():
                raise ValueError(f"methods.{name}.search: an option without values")
        if len(set(self.clients)) < len(self.clients):
            raise ValueError("clients: a number twice")
        return self

    @property
    def base(self) -> str:
        """The base model's name or folder."""
        return self.model or str(demo.BASE)

    def requests(self, clients: int) -> list[str]:
        """The prompts of a run that compares; DataError when they cannot be read."""
        return self._asked(max(self.prompts_per_run, 4 * clients))

    def search_requests(self, clients: int) -> list[str]:
        """The prompts of a run that looks for a setting; DataError when they cannot be read."""
        return self._asked(max(self.search_prompts_per_run, clients))

    def _asked(self, wanted: int) -> list[str]:
        return list(itertools.islice(itertools.cycle(self.in_turns), wanted))

    @cached_property
    def in_turns(self) -> list[str]:
        """All prompts, the domains in turns, as many of each."""
        if not self.prompts:
            return demo.mixed_prompts()
        domains = [[str(document.content) for document in read_documents((path,), BadLines(strict=True))] for path in self.prompts]
        return list(itertools.chain.from_iterable(zip(*domains, strict=False)))
