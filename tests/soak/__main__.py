"""Two hours (or as long as asked) of mixed traffic on a real server with the demo model in float32.

    python -m tests.soak --minutes 120 --output soak.json
    python -m tests.soak --minutes 3 --warm-up 1 --eager --output try.json
    python -m tests.soak --minutes 60 --layout auto --output auto.json
    python -m tests.soak --judge soak.json            # read a finished or broken-off run again

Every cycle of 150 s asks the same requests at the same moments (`tests.soak.traffic`): bursts of short and long, free and
structured, greedy and sampled ones, streams, clients that go away, parameters that are refused. At the beginning a plain server
answers the greedy ones; every later answer to them must have the same tokens. Exit status 0, or 1 when a bar is missed, or 2 for
wrong usage.
"""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.server import Server
from tests.soak import report
from tests.soak.client import Answer, send
from tests.soak.traffic import CYCLE_SECONDS, Asked, cycle
from vllm_mtp import demo
from vllm_mtp.machine import machine
from vllm_mtp.whole_files import write_whole

SAMPLE_SECONDS, SAVE_SECONDS, DRAIN_SECONDS = 10.0, 60.0, 120.0
# A cache of 64 blocks: the first cycle touches all of them.
ARGUMENTS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "24", "--num-gpu-blocks-override", "64")
NUM_DRAFTS = 4
WARM_UP_MINUTES = 30.0
"""oneDNN keeps the 1024 matrix products that it compiled last, one for every number of rows and layer, some 260 KiB each. At the
default rate it takes half an hour of new batch sizes to fill that; ONEDNN_PRIMITIVE_CACHE_CAPACITY makes it smaller."""
KEPT_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "OMP_NUM_THREADS", "VLLM_CPU_KVCACHE_SPACE")
"""Of the environment, what changes a server's memory and stands in the file."""


class Soak:
    """One run: what was sent and answered, and what the server looked like meanwhile.

    Args:
        requests: of a cycle.
        expected: plain vLLM's answer to each that is compared.
        output: JSON file, written anew every minute.
        found: what is known before it begins.
    """

    def __init__(self, requests: list[Asked], expected: dict[int, Any], output: Path, found: dict[str, Any]) -> None:
        self.requests, self.expected, self.output = requests, expected, output
        self.outcomes: dict[str, Counter[str]] = {}
        self.found: dict[str, Any] = {**found, **dict.fromkeys(("sent", "tokens", "compared", "differing"), 0)}
        self.found |= {"findings": [], "samples": [], "missed_samples": []}

    def count(self, index: int, answer: Answer) -> None:
        """Takes the answer to request `index` of the cycle."""
        request, found = self.requests[index], self.found
        outcome = answer.outcome
        found["tokens"] += answer.num_tokens
        wanted = "refused" if request.kind == "refused" else "answered" if request.cancel_after is None else "cancelled"
        if outcome == "answered" and wanted == "cancelled":  # it came to its end before
            outcome = "cancelled"
        if outcome != wanted:
            self._finding(index, answer.detail)
        if outcome == "answered" and request.compared:
            found["compared"] += 1
            if answer.choices != self.expected[index]:
                found["differing"] += 1
                self._finding(index, f"answered {answer.choices}, by plain vLLM {self.expected[index]}")
        self.outcomes.setdefault(request.kind, Counter())[outcome] += 1

    def _finding(self, index: int, what: str) -> None:
        if len(self.found["findings"]) < 200:
            self.found["findings"].append({"at": self.seconds, "request": index, "kind": self.requests[index].kind, "what": what})

    @property
    def seconds(self) -> float:
        """Since traffic began."""
        return round(time.monotonic() - self.begin, 1)

    def sample(self, server: Server) -> None:
        """Adds what the server looks like now."""
        metrics = {name.removeprefix("vllm:"): value for name, value in server.metrics().items() if report.kept(name)}
        self.found["samples"].append(
            {"at": self.seconds, "sent": self.found["sent"], "tokens": self.found["tokens"], **server.usage(), "metrics": metrics}
        )

    def memory(self) -> float:
        """Private memory of the server's processes in the last sample [MiB]."""
        return self.found["samples"][-1]["private"] if self.found["samples"] else 0.0

    def save(self, complete: bool = False) -> None:
        """Writes the file, whole or not at all."""
        outcomes = {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.outcomes.items())}
        text = json.dumps({**self.found, "outcomes": outcomes, "complete": complete}, indent=1)
        write_whole(self.output, text + "\n")

    async def run(self, server: Server, minutes: float, progress: Progress) -> None:
        """Traffic for `minutes`, then whatever runs is waited for."""
        self.begin = time.monotonic()
        bar = progress.add_task("traffic", total=minutes * 60)
        running: set[asyncio.Task[None]] = set()
        watch = asyncio.create_task(self._watch(server, progress, bar))
        # A connection of its own for every request, as clients behind no proxy have: connections come and go too.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            for number in range(int(minutes * 60 / CYCLE_SECONDS) + 1):
                for index, request in enumerate(self.requests):
                    at = number * CYCLE_SECONDS + request.at
                    if at >= minutes * 60 or watch.done():
                        break
                    await asyncio.sleep(max(0.0, self.begin + at - time.monotonic()))
                    task = asyncio.create_task(self._ask(session, server.url, index, f"cycle {number}"))
                    running.add(task)
                    task.add_done_callback(running.discard)
            await asyncio.sleep(max(0.0, self.begin + minutes * 60 - time.monotonic()))
            if running:
                await asyncio.wait(running, timeout=DRAIN_SECONDS)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await asyncio.sleep(2)  # what clients left behind is aborted a moment later
        self.sample(server)
        self.found["unanswered"] = len(running)

    async def _ask(self, session: aiohttp.ClientSession, url: str, index: int, salt: str) -> None:
        self.found["sent"] += 1
        self.count(index, await send(session, url, self.requests[index], salt))

    async def _watch(self, server: Server, progress: Progress, bar: Any) -> None:
        saved = 0.0
        while server.process.poll() is None:
            try:
                await asyncio.to_thread(self.sample, server)
            except Exception as error:  # of one sample; the traffic goes on
                self.found["missed_samples"].append({"at": self.seconds, "why": repr(error)})
            if self.seconds - saved >= SAVE_SECONDS:
                self.save()
                saved = self.seconds
            words = f"{self.found['sent']} sent, {len(self.found['findings'])} findings, {self.memory():.0f} MiB"
            progress.update(bar, completed=self.seconds, description=words)
            await asyncio.sleep(SAMPLE_SECONDS)


async def plain_answers(server: Server, requests: list[Asked]) -> dict[int, Any]:
    """What plain vLLM answers to the requests that are compared."""
    gate = asyncio.Semaphore(8)
    async with aiohttp.ClientSession() as session:

        async def one(index: int, request: Asked) -> tuple[int, Any]:
            async with gate:
                answer = await send(session, server.url, request, "plain")
            if answer.outcome != "answered":
                raise RuntimeError(f"plain vLLM does not answer request {index}: {answer.detail}")
            return index, answer.choices

        return dict(await asyncio.gather(*(one(i, request) for i, request in enumerate(requests) if request.compared)))


EPILOG = """Examples:

    python -m tests.soak --minutes 120 --output soak.json

    python -m tests.soak --minutes 3 --warm-up 1 --eager --output try.json

    python -m tests.soak --judge soak.json --warm-up 20
"""
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=EPILOG)
def main(
    output: Annotated[Path | None, typer.Option(help="JSON file, written anew every minute; a plot beside it.")] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="Traffic.")] = 120,
    warm_up: Annotated[
        float | None, typer.Option(min=0, help="Minutes after which memory must be flat.", show_default="30")
    ] = None,
    layout: Annotated[str, typer.Option(help="Of the mask rows. Acceptance is only judged where it is not auto.")] = "quadratic",
    requests_per_minute: Annotated[float, typer.Option(min=1, help="Offered load.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the cycle of requests.")] = 0,
    eager: Annotated[bool, typer.Option("--eager", help="Do not compile: starts sooner.")] = False,
    judge: Annotated[Path | None, typer.Option(help="Judge this file of an earlier run; nothing is started.")] = None,
) -> None:
    """Mixed traffic on a real server: memory and acceptance flat, no error, greedy answers as plain vLLM gives them."""
    if judge is not None:
        found = json.loads(judge.read_text())
        raise typer.Exit(_judge(found if warm_up is None else {**found, "warm_up": warm_up}, judge))
    if output is None:
        raise typer.BadParameter("give --output a file, or --judge one")
    arguments = [*ARGUMENTS, *(["--enforce-eager"] if eager else [])]
    speculative = {"method": "mtp", "model": str(demo.ADAPTER), "num_speculative_tokens": NUM_DRAFTS, "layout": layout}
    requests, logs = cycle(seed, requests_per_minute), output.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("plain vLLM's answers", total=None)
        with Server(None, arguments, logs / "plain.log") as server:
            server.wait_until_ready()
            expected = asyncio.run(plain_answers(server, requests))
        progress.update(bar, total=1, completed=1)
        known = {
            "command": sys.argv,
            "machine": machine(),
            "server": arguments,
            "environment": {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
            "speculative": speculative | {"model": "demo adapter"},
            "minutes": minutes,
            "warm_up": WARM_UP_MINUTES if warm_up is None else warm_up,
            "requests_per_minute": requests_per_minute,
            "requests_of_a_cycle": len(requests),
            "compared_of_a_cycle": len(expected),
        }
        with Server(speculative, arguments, logs / "server.log") as server:
            server.wait_until_ready()
            soak = Soak(requests, expected, output, known)
            try:
                asyncio.run(soak.run(server, minutes, progress))
            finally:
                soak.found["server_status"] = server.process.poll()  # None: it still runs
                soak.save(complete=True)
    raise typer.Exit(_judge(json.loads(output.read_text()), output))


def _judge(found: dict[str, Any], file: Path) -> int:
    figures = report.figures(found)
    Path(file.with_suffix(".figures.json")).write_text(json.dumps(figures, indent=2) + "\n")
    report.plot(found, file.with_suffix(".png"))
    print(json.dumps(figures, indent=2))
    return 1 if figures["missed"] else 0


if __name__ == "__main__":
    app()
