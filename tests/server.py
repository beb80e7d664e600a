"""A real OpenAI-compatible vLLM server on loopback, in a process group of its own, and what can be seen of it from outside."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

from vllm_mtp import demo


class ServerError(RuntimeError):
    """The server ended, or did not come up in time."""


def free_port() -> int:
    """A port of the loopback interface that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class StartedServer:
    """A server that a command starts; use it as a context manager.

    Args:
        command: what starts it.
        port: of the loopback interface, where it will listen.
        log: file for everything that the server prints.
        environment: all its variables.
        folder: where it starts; this process's, if left out.
    """

    def __init__(
        self, command: Sequence[str], port: int, log: Path, environment: dict[str, str], folder: Path | None = None
    ) -> None:
        self.command, self.port, self.log = list(command), port, log
        self.url = f"http://127.0.0.1:{port}"
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
            )

    def wait_until_ready(self, seconds: float = 900) -> None:
        """Blocks until the server answers.

        Raises:
            ServerError: it ended, or did not answer in time; the end of its log is a note of the exception.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise self._error(f"the server ended with status {self.process.returncode}")
            if self.healthy():
                return
            time.sleep(0.5)
        raise self._error(f"the server was not ready after {seconds:.0f} s")

    def _error(self, what: str) -> ServerError:
        error = ServerError(f"{what}; its log is {self.log}")
        error.add_note(self.log.read_text(errors="replace")[-4000:])
        return error

    def healthy(self) -> bool:
        """Whether /health answers with 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def complete(self, timeout: float = 120, **body: Any) -> dict[str, Any]:
        """The answer of /v1/completions; `error` in it when it was refused or failed."""
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    def metrics(self) -> dict[str, float]:
        """Counters and gauges at /metrics by name, with the position behind those that have one (`name/2`)."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("vllm:") and not sample.name.endswith(("_bucket", "_created")):
                    name = sample.name + (f"/{sample.labels['position']}" if "position" in sample.labels else "")
                    found[name] = found.get(name, 0.0) + sample.value
        return found

    def num_blocks(self) -> int:
        """KV blocks of its cache, by the labels of vLLM's own metric."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            found = re.search(r'num_gpu_blocks="(\d+)"', answer.read().decode())
        if found is None:
            raise ServerError("the server does not say how many blocks it has")
        return int(found[1])

    def wait_until_idle(self, seconds: float = 30) -> dict[str, float]:
        """Its metrics once nothing runs or waits, or after `seconds`."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            busy = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"] + metrics["vllm:kv_cache_usage_perc"]
            if not busy or time.monotonic() > end:
                return metrics
            time.sleep(0.5)

    def processes(self) -> list[psutil.Process]:
        """The server's process and all that it started."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def usage(self) -> dict[str, Any]:
        """Memory [MiB], processor time [s], open files and threads of all its processes together; memory of each too."""
        each = {}
        total = {"pss": 0.0, "private": 0.0, "cpu_seconds": 0.0, "files": 0, "threads": 0}
        for process in self.processes():
            try:
                sizes = _rollup(process.pid)
                times = process.cpu_times()
                each[f"{process.name()} {process.pid}"] = round(sizes["Pss"], 2)
                total["pss"] += sizes["Pss"]
                total["private"] += sizes["Private_Dirty"] + sizes["Private_Clean"]
                total["cpu_seconds"] += times.user + times.system
                total["files"] += process.num_fds()
                total["threads"] += process.num_threads()
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
        return {**{name: round(value, 2) for name, value in total.items()}, "processes": each}

    def stop(self, seconds: float = 60, interrupt: bool = False) -> int:
        """Ends it as a supervisor would, with SIGTERM to its first process; kills what is left of what it started.

        Args:
            seconds: that it has.
            interrupt: end it as Ctrl-C does, with SIGINT to its whole group.

        Returns:
            Its exit status.
        """
        children = self.processes()[1:]
        if self.process.poll() is None:
            if interrupt:
                os.killpg(self.process.pid, signal.SIGINT)
            else:
                self.process.terminate()
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        _, left = psutil.wait_procs(children, timeout=10)
        for process in left:
            process.send_signal(signal.SIGKILL)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()


class Server(StartedServer):
    """`python -m vllm.entrypoints.openai.api_server`.

    Args:
        speculative: the dictionary for --speculative-config, or None: plain vLLM.
        arguments: further command line arguments.
        log: file for everything that the server prints.
        model: base model folder.
        environment: variables beside this process's own.
        prefix: a command that starts it, as `taskset -c 0`.
    """

    def __init__(
        self,
        speculative: dict[str, Any] | None,
        arguments: Sequence[str],
        log: Path,
        model: Path | str = demo.BASE,
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        port = free_port()
        command = [*prefix, sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
        if speculative is not None:
            command += ["--speculative-config", json.dumps(speculative)]
        # The engine's own process, as in production; tests that look inside an engine switch it off.
        inherited = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        super().__init__(command, port, log, {**defaults, **inherited, **(environment or {})})


def _rollup(pid: int) -> dict[str, float]:
    """Sizes of a process's memory by the kernel's names (proc(5), smaps_rollup) [MiB]."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) / 1024
    return sizes
