"""Run a benchmark: look for each method's best setting, then run all methods in turns. What is done is kept, run by run."""

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from vllm_mtp.bench.config import PLAIN, BenchConfig
from vllm_mtp.cli.engine import EngineProcess, Generation
from vllm_mtp.outputs import Output
from vllm_mtp.whole_files import write_whole

SEARCH, COMPARE = "search", "compare"
AN_ENGINE = 1 << 30
"""Bytes of an engine beside its KV cache and its weights: 0.9 GiB were seen."""
MOST_ENGINES = 16


def say_plainly(done: int, total: int, what: str) -> None:
    """Progress of a `Benchmark` as lines on standard error."""
    print(f"{done} of {total}  {what}", file=sys.stderr, flush=True)


class BenchError(ValueError):
    """A benchmark that cannot be run as it was asked for; the message says why."""


@dataclass(frozen=True)
class Setting:
    """A method with its speculative configuration; None is plain vLLM."""

    method: str
    speculative: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """A name for files and dictionaries."""
        return json.dumps([self.method, self.speculative], sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """One run to be made: a setting at a number of clients, in a round of a stage."""

    stage: str
    clients: int
    temperature: float
    round: int
    setting: Setting

    @property
    def key(self) -> tuple[str, int, float, int, str]:
        """A name for dictionaries; runs that differ in the setting alone used the same prompts one after the other."""
        return self.stage, self.clients, self.temperature, self.round, self.setting.key


class Book:
    """The finished runs of a benchmark, a JSON file each in `folder`/runs.

    Args:
        folder: of the benchmark; made when it is not there.
        config: of the benchmark. A folder of another configuration's runs is refused.

    Raises:
        BenchError: the folder holds runs of other options.
    """

    def __init__(self, folder: Path, config: BenchConfig) -> None:
        self._runs = folder / "runs"
        self._runs.mkdir(parents=True, exist_ok=True)
        mine, file = config.model_dump_json(indent=2) + "\n", folder / "config.json"
        if file.exists() and file.read_text(encoding="utf-8") != mine:
            raise BenchError(f"{folder} holds runs with other options: choose another output folder, or give the same options.")
        write_whole(file, mine)
        self.done: dict[tuple[str, int, float, int, str], Generation] = {}
        for path in sorted(self._runs.glob("*.json")):
            entry = json.loads(path.read_text(encoding="utf-8"))
            setting = Setting(entry["method"], entry["speculative"])
            cell = Cell(entry["stage"], entry["clients"], entry["temperature"], entry["round"], setting)
            outputs = [Output(**output) for output in entry["outputs"]]
            self.done[cell.key] = Generation(entry["seconds"], entry["num_forwards"], outputs)

    def put(self, cell: Cell, prompts: Sequence[str], made: Generation) -> None:
        """Keep a finished run, with its prompts and tokens."""
        entry = {
            "stage": cell.stage,
            "clients": cell.clients,
            "temperature": cell.temperature,
            "round": cell.round,
            "method": cell.setting.method,
            "speculative": cell.setting.speculative,
            "seconds": made.seconds,
            "num_forwards": made.num_forwards,
            "prompts": list(prompts),
            "outputs": [asdict(output) for output in made.outputs],
        }
        write_whole(self._runs / f"{len(self.done):05d}.json", json.dumps(entry) + "\n")
        self.done[cell.key] = made

    def group(self, stage: str, clients: int, temperature: float) -> dict[str, dict[int, Generation]]:
        """Finished runs of a stage at a number of clients: setting's key -> round -> run."""
        found: dict[str, dict[int, Generation]] = {}
        for (a_stage, a_clients, a_temperature, round_, key), made in self.done.items():
            if (a_stage, a_clients, a_temperature) == (stage, clients, temperature):
                found.setdefault(key, {})[round_] = made
        return found


def ratios(runs: Mapping[str, Mapping[int, Generation]], setting: Setting) -> list[float]:
    """Tokens a second over plain vLLM's in each round that both finished."""
    plain, ours = runs.get(Setting(PLAIN).key, {}), runs.get(setting.key, {})
    return [ours[i].tokens_per_second / plain[i].tokens_per_second for i in sorted(plain.keys() & ours.keys())]


class Engines:
    """Engines by setting, started when they are first needed and kept, at most `most` of them."""

    def __init__(self, config: BenchConfig, logs: Path, say: Callable[[str], None], most: int) -> None:
        self._config, self._logs, self._say, self._most = config, logs, say, most
        self._running: dict[str, EngineProcess] = {}
        self.warm: set[tuple[str, int]] = set()
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for engine in self._running.values():
                stack.callback(engine.close)

    def need(self, settings: Sequence[Setting]) -> dict[str, EngineProcess]:
        """The engines of `settings`, ready; others are closed when there are too many."""
        wanted = {setting.key: setting for setting in settings}
        for key in [key for key in self._running if key not in wanted]:
            if len(self._running.keys() | wanted.keys()) > self._most:
                self._running.pop(key).close()
                self.warm = {(of, clients) for of, clients in self.warm if of != key}
        new = [setting for key, setting in wanted.items() if key not in self._running]
        for setting in new:
            log = self._logs / f"engine-{len(list(self._logs.iterdir())):03d}.log"
            self._say(f"starting {setting.method} {setting.speculative or ''}; its log is {log}")
            self._running[setting.key] = EngineProcess(self._arguments(setting), log)
        for setting in new:
            self._running[setting.key].wait_until_ready()
        return {key: self._running[key] for key in wanted}

    def _arguments(self, setting: Setting) -> dict[str, Any]:
        return {
            "model": self._config.base,
            "max_num_seqs": max(self._config.clients),
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            **self._config.engine,
            **({} if setting.speculative is None else {"speculative_config": setting.speculative}),
        }


def engines_that_fit(config: BenchConfig) -> int:
    """How many engines the machine's memory holds at a time: those that stay are not started twice."""
    weights = sum(file.stat().st_size for file in Path(config.base).glob("*.safetensors"))
    an_engine = AN_ENGINE + config.engine.get("kv_cache_memory_bytes", 1 << 30) + 2 * weights
    return int(min(MOST_ENGINES, max(1, psutil.virtual_memory().available // an_engine)))


class Benchmark:
    """A benchmark in a folder; `run` goes on from what is finished there.

    Args:
        config: what to run.
        folder: where finished runs are kept.
        progress: called with the number of finished runs, of all runs, and what runs now.
    """

    def __init__(self, config: BenchConfig, folder: Path, progress: Callable[[int, int, str], None]) -> None:
        self.config, self.folder, self._progress = config, folder, progress
        self.book = Book(folder, config)

    # -- what there is to run ----------------------------------------------------------------------------------------

    def settings(self, method: str) -> list[Setting]:
        """All settings of a method."""
        return [Setting(method, speculative) for speculative in self.config.methods[method].settings()]

    def searched(self) -> dict[str, list[Setting]]:
        """The settings of every method that has a choice."""
        settings = {method: self.settings(method) for method in self.config.methods}
        return {method: some for method, some in settings.items() if len(some) > 1}

    def best(self, method: str, clients: int) -> Setting:
        """The setting that was fastest at a number of clients, against plain runs of the same rounds.

        Raises:
            BenchError: no setting's search is finished.
        """
        settings = self.settings(method)
        if len(settings) == 1:
            return settings[0]
        runs = self.book.group(SEARCH, clients, self.config.temperatures[0])
        found = [(statistics.median(values), i) for i, one in enumerate(settings) if (values := ratios(runs, one))]
        if not found:
            raise BenchError(f"No setting of {method} was tried at {clients} clients.")
        return settings[max(found)[1]]

    def num_runs(self) -> int:
        """Of the whole benchmark."""
        tried = self.config.search_rounds * sum(1 + len(settings) for settings in self.searched().values())
        compared = len(self.config.temperatures) * self.config.rounds * (1 + len(self.config.methods))
        return len(self.config.clients) * (tried + compared)

    # -- running it --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run what is not finished.

        Raises:
            EngineError: an engine did not start or died.
            OSError: a finished run cannot be kept.
        """
        most = engines_that_fit(self.config)
        with Engines(self.config, self.folder / "logs", self._say, most) as engines:
            for number, settings in enumerate(self.searched().values()):
                # Each method has rounds of its own, with plain runs in them.
                rounds = range(number * self.config.search_rounds, (number + 1) * self.config.search_rounds)
                for clients in self.config.clients:
                    self._in_turns(engines, SEARCH, clients, self.config.temperatures[0], rounds, [Setting(PLAIN), *settings])
            best = {n: [Setting(PLAIN), *(self.best(method, n) for method in self.config.methods)] for n in self.config.clients}
            # A round is all numbers of clients where the engines of all stay, so that its spread is that of minutes.
            turns = [range(i, i + 1) for i in range(self.config.rounds)]
            if len({setting.key for settings in best.values() for setting in settings}) > most:
                turns = [range(self.config.rounds)]
            for temperature, turn, clients in itertools.product(self.config.temperatures, turns, self.config.clients):
                self._in_turns(engines, COMPARE, clients, temperature, turn, best[clients])

    def _in_turns(
        self, engines: Engines, stage: str, clients: int, temperature: float, rounds: range, settings: Sequence[Setting]
    ) -> None:
        cells = [Cell(stage, clients, temperature, round_, setting) for round_ in rounds for setting in settings]
        waiting = [cell for cell in cells if cell.key not in self.book.done]
        if not waiting:
            return
        running = engines.need(settings)
        few = self.config.search_requests(clients)
        prompts = few if stage == SEARCH else self.config.requests(clients)
        for cell in waiting:
            engine, key = running[cell.setting.key], cell.setting.key
            sampling: dict[str, Any] = {"max_tokens": self.config.max_tokens, "concurrency": clients, "temperature": temperature}
            if (key, clients) not in engines.warm:
                engine.generate(few, **sampling, seed=cell.round)
            made = engine.generate(prompts, **sampling, seed=cell.round)
            engines.warm.add((key, clients))
            self.book.put(cell, prompts, made)
            self._say(f"{stage}: {clients} clients, {cell.setting.method}")

    def _say(self, text: str) -> None:
        self._progress(len(self.book.done), self.num_runs(), text)

    # -- what was found ----------------------------------------------------------------------------------------------

    def compared(self) -> Iterator[tuple[float, int, str, Setting, dict[str, dict[int, Generation]]]]:
        """(temperature, clients, method, its setting, finished runs) of every comparison, plain vLLM first."""
        for temperature in self.config.temperatures:
            for clients in self.config.clients:
                runs = self.book.group(COMPARE, clients, temperature)
                yield temperature, clients, PLAIN, Setting(PLAIN), runs
                for method in self.config.methods:
                    yield temperature, clients, method, self.best(method, clients), runs
