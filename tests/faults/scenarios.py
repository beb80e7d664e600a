"""The faults: each starts the servers that it needs, makes the fault happen while requests run, and counts what became of them."""

import asyncio
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.faults.load import ARGUMENTS, Outcome, ask, failure, leaving, long, short, speculative
from tests.server import Server
from vllm_mtp import demo

INJECTION = Path(__file__).parent / "injection"
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total"
FAILURE = "Mask-token prediction failed while"
NUM_SHORT, NUM_LONG = 50, 16


class Plain:
    """What plain vLLM answers; asked of one plain server, once."""

    def __init__(self, folder: Path) -> None:
        with Server(None, ARGUMENTS, folder / "plain.log") as server:
            server.wait_until_ready()
            requests = short(NUM_SHORT) + long(NUM_LONG)
            answers = ask(server, requests, at_once=8)
        wrong = [answer.detail for answer in answers if answer.outcome != "answered"]
        if wrong:
            raise RuntimeError(f"plain vLLM does not answer: {wrong[0]}")
        choices = [answer.choices for answer in answers]
        self.short, self.long = choices[:NUM_SHORT], choices[NUM_SHORT:]


def _serving(folder: Path, name: str, **options: Any) -> Server:
    server = Server(options.pop("config", speculative()), ARGUMENTS, folder / f"{name}.log", **options)
    try:
        server.wait_until_ready()
    except BaseException:
        server.stop()
        raise
    return server


def _later(seconds: float, action: Callable[[], Any]) -> Callable[[], Any]:
    async def meanwhile() -> None:
        await asyncio.sleep(seconds)
        await asyncio.to_thread(action)

    return meanwhile


def clients_gone(folder: Path, plain: Plain) -> Outcome:
    """Clients close their streams; requests beside and after them are served."""
    outcome = Outcome()
    with _serving(folder, "clients-gone") as server:
        for round_ in range(3):
            answers = ask(server, [*leaving(40, round_), *long(4)])
            outcome.take(answers, [None] * 40 + plain.long[:4])
            outcome.look_for_leaks(server)
        outcome.take(ask(server, short(NUM_SHORT)), plain.short)
        outcome.look_for_leaks(server)
    return outcome


def many_clients(folder: Path, plain: Plain, count: int = 500) -> Outcome:
    """500 clients at once, on a server that runs 24 requests at a time."""
    outcome, begin = Outcome(), time.monotonic()
    with _serving(folder, "many-clients") as server:
        requests = [short(NUM_SHORT)[i % NUM_SHORT] for i in range(count)]
        begin = time.monotonic()
        answers = ask(server, requests)
        outcome.facts["seconds"] = round(time.monotonic() - begin, 1)
        outcome.take(answers, [plain.short[i % NUM_SHORT] for i in range(count)])
        outcome.look_for_leaks(server)
    return outcome


def adapter_replaced(folder: Path, plain: Plain) -> Outcome:
    """The adapter's files are written over, cut short, replaced and deleted; tokens and acceptance stay what they were."""
    outcome, adapter = Outcome(), folder / "replaced-adapter"
    shutil.copytree(demo.ADAPTER, adapter)
    # In the dtype of the files: what needs no conversion is what could have stayed in them.
    arguments = ["--dtype", "bfloat16", *ARGUMENTS[2:]]
    server = Server(speculative(adapter), arguments, folder / "adapter-replaced.log")
    with server:
        server.wait_until_ready()
        mapped = [m.path for p in server.processes() for m in p.memory_maps() if str(adapter) in m.path]
        outcome.check(not mapped, f"files are mapped into the server: {mapped}")

        def work() -> tuple[list[Any], float, float]:
            """Answers one after the other, and what drafting gave meanwhile: the same whenever the adapter is the same."""
            before = server.metrics()
            answers = ask(server, short(12), at_once=1)
            after = server.metrics()
            outcome.take(answers)
            return [a.choices for a in answers], after[DRAFTS] - before[DRAFTS], after[ACCEPTED] - before[ACCEPTED]

        expected = work()
        outcome.check(expected[2] > 0, "nothing was accepted")
        files = sorted(adapter.glob("*.safetensors"))
        for name, damage in (
            ("written over", lambda file: file.write_bytes(os.urandom(file.stat().st_size))),
            ("cut short", lambda file: os.truncate(file, 100)),
            ("replaced", lambda file: (folder / "other").write_bytes(b"no adapter") and (folder / "other").replace(file)),
            ("deleted", lambda file: file.unlink()),
        ):
            before = len(outcome.missed)

            def damage_all(damage: Callable[[Path], Any] = damage) -> None:
                for file in files:
                    damage(file)

            outcome.take(ask(server, long(4, 100), _later(0.5, damage_all)))
            outcome.check(work() == expected, f"answers or acceptance change when the files are {name}")
            outcome.facts[name] = "no change" if len(outcome.missed) == before else "CHANGE"
        outcome.look_for_leaks(server)
    return outcome


def _end(folder: Path, name: str, config: Any, how: Callable[[Server], None]) -> tuple[dict[str, Any], list[Any]]:
    """A server that is ended while 16 streams run: exit status, seconds, processes that are left, and what the streams got."""
    server = Server(config, ARGUMENTS, folder / f"{name}.log")
    moment: list[float] = []
    with server:
        server.wait_until_ready()
        children = server.processes()

        def end() -> None:
            moment.append(time.monotonic())
            how(server)

        answers = ask(server, long(NUM_LONG), _later(2.0, end), timeout=45)
        try:
            status: int | None = server.process.wait(90)
        except Exception:
            status = None
        seconds = time.monotonic() - moment[0]
        _, left = psutil.wait_procs(children, timeout=10)
    outcomes = Counter(map(failure, answers))
    facts = {"status": status, "seconds": round(seconds, 1), "left_processes": len(left), "requests": dict(outcomes)}
    return facts, answers


def _as_plain_ends(folder: Path, plain: Plain, name: str, how: Callable[[Server], None]) -> Outcome:
    outcome = Outcome()
    theirs, _ = _end(folder, f"{name}-plain", None, how)
    ours, answers = _end(folder, name, speculative(), how)
    outcome.take(answers, plain.long, {"error", *theirs["requests"]} - {"answered"})
    outcome.facts = {**outcome.facts, "plain": theirs, "ours": ours}
    outcome.check(ours["status"] == theirs["status"], f"exit status {ours['status']}, plain vLLM's is {theirs['status']}")
    outcome.check(ours["status"] is not None, "the server does not end")
    outcome.check(ours["left_processes"] == 0, "processes are left")
    outcome.check(ours["seconds"] < theirs["seconds"] + 15, "the server takes longer to end than plain vLLM")
    outcome.check(outcome.failed > 0, "every stream had ended before the fault")
    return outcome


def terminated(folder: Path, plain: Plain) -> Outcome:
    """SIGTERM while decoding: vLLM's own end."""
    return _as_plain_ends(folder, plain, "terminated", lambda server: server.process.send_signal(signal.SIGTERM))


def _kill(word: str) -> Callable[[Server], None]:
    def kill(server: Server) -> None:
        (process,) = [p for p in server.processes() if word in " ".join([p.name(), *p.cmdline()])]
        process.kill()

    return kill


def worker_killed(folder: Path, plain: Plain) -> Outcome:
    """SIGKILL to the worker, as the kernel sends it when memory runs out."""
    return _as_plain_ends(folder, plain, "worker-killed", _kill("VLLM::Worker"))


def engine_killed(folder: Path, plain: Plain) -> Outcome:
    """SIGKILL to the engine's process."""
    return _as_plain_ends(folder, plain, "engine-killed", _kill("VLLM::EngineCore"))


def _injected(folder: Path, plain: Plain, part: str) -> Outcome:
    outcome, name = Outcome(), f"injected-{part}"
    trigger = folder / f"{name}.trigger"
    path = os.pathsep.join([str(INJECTION), *filter(None, [os.environ.get("PYTHONPATH", str(Path.cwd()))])])
    environment = {"PYTHONPATH": path, "VLLM_MTP_TEST_FAULT": part, "VLLM_MTP_TEST_FAULT_FILE": str(trigger)}
    with _serving(folder, name, environment=environment) as server:
        outcome.take(ask(server, short(8)), plain.short[:8])
        before = server.metrics()[DRAFTS]
        outcome.check(before > 0, "nothing was drafted before the fault")
        outcome.take(ask(server, long(NUM_LONG), _later(2.0, trigger.touch)), plain.long)
        after = server.metrics()[DRAFTS]
        outcome.check(after > before, "nothing was drafted while the fault came")
        outcome.take(ask(server, short(NUM_SHORT)), plain.short)
        outcome.check(server.metrics()[DRAFTS] == after, "drafts go on after the fault")
        outcome.look_for_leaks(server)
        log = server.log.read_text()
        outcome.facts["times_in_the_log"] = log.count(FAILURE)
        outcome.check(log.count(FAILURE) == 1, f"the log names the failure {log.count(FAILURE)} times")
        outcome.check(log.count("RuntimeError: injected into") == 1, "the log does not have the cause once")
    return outcome


def planning_fails(folder: Path, plain: Plain) -> Outcome:
    """An exception while a step is planned."""
    return _injected(folder, plain, "planning")


def drafting_fails(folder: Path, plain: Plain) -> Outcome:
    """An exception while drafts are made."""
    return _injected(folder, plain, "drafting")


def kernel_fails(folder: Path, plain: Plain) -> Outcome:
    """An exception out of the attention of mask rows, in the middle of a forward."""
    return _injected(folder, plain, "kernel")


def verifying_fails(folder: Path, plain: Plain) -> Outcome:
    """An exception in the verification of greedy steps."""
    return _injected(folder, plain, "verifying")


SCENARIOS: dict[str, Callable[[Path, Plain], Outcome]] = {
    function.__name__: function
    for function in (
        clients_gone,
        many_clients,
        adapter_replaced,
        planning_fails,
        drafting_fails,
        kernel_fails,
        verifying_fails,
        terminated,
        worker_killed,
        engine_killed,
    )
}
