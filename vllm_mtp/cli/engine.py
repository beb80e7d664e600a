"""Start vLLM engines as processes of their own and generate with them, so that two can be measured in turns."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vllm_mtp.outputs import Output


class EngineError(RuntimeError):
    """An engine did not start or died; the message has its reason and where its log is."""


@dataclass(frozen=True)
class Generation:
    """Completions in the order of their prompts, the seconds that all of them took, and the engine's steps."""

    seconds: float
    num_forwards: int
    outputs: list[Output]

    @property
    def num_tokens(self) -> int:
        """Output tokens together."""
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second, prompts included in the time."""
        return self.num_tokens / self.seconds

    def some(self, which: slice) -> "Generation":
        """Some of the completions, of a run that made one at a time: they took the seconds and the steps that were theirs."""
        outputs = self.outputs[which]
        return Generation(sum(output.seconds for output in outputs), sum(len(output.steps) for output in outputs), outputs)


class EngineProcess:
    """A vLLM engine behind a pipe; use it as a context manager.

    Args:
        engine_args: arguments of `vllm.LLM`.
        log: file for everything that the engine prints.
    """

    def __init__(self, engine_args: dict[str, Any], log: Path) -> None:
        self.log = log
        # The engine stays in the worker's process: this process is its only client, and the step loop is then all there is.
        # One thread for CPU builds: OpenMP threads wait by spinning, so two engines or a busy machine make more of them slower.
        # And for Numba, which vLLM's n-gram lookup is written in: its threads are OpenMP's, so it would give that engine more.
        defaults = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        if "kv_cache_memory_bytes" not in engine_args:  # which a CPU platform would not look at beside this
            defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"
        environment = {**defaults, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                # The installed package, also in the folder of a checkout.
                [sys.executable, "-P", "-m", "vllm_mtp.cli.engine_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        self._send(engine_args)

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _receive finds the process dead and says why

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"The engine ended with exit status {self._process.wait()}; its log is {self.log}.")
        message = json.loads(line)
        if "error" in message:
            raise EngineError(f"{message['error']} (log: {self.log})")
        return message

    def wait_until_ready(self) -> None:
        """Block until the model is loaded; EngineError when it cannot be."""
        self._receive()

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        *,
        max_tokens: int,
        concurrency: int | list[int] = 1,
        temperature: float = 0.0,
        seed: int | None = None,
        extra_args: dict[str, Any] | None = None,
    ) -> Generation:
        """Complete `prompts`, texts or tokens, at most `concurrency` at a time, each until end of text or `max_tokens`.

        With a list, prompt i starts when fewer than `concurrency[i]` are in flight.

        With a temperature above 0, prompt i is sampled with seed `seed` + i. `extra_args` are those of vLLM's SamplingParams.
        """
        sampling = {"temperature": temperature, "max_tokens": max_tokens, "extra_args": extra_args}
        self._send({"prompts": list(prompts), "concurrency": concurrency, "sampling": sampling, "seed": seed})
        message = self._receive()
        return Generation(message["seconds"], message["num_forwards"], [Output(**output) for output in message["outputs"]])

    def close(self) -> None:
        """End the process: it leaves at the end of its input, and is killed if it does not."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what a process that has died did not read
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self._process.kill()
        self.close()
