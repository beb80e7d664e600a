"""What the plugin did, for Prometheus and for the log.

The counters are in the worker, which drafts and verifies; /metrics is served by another process, and vLLM has no message that would
carry them there (its scheduler's statistics are a closed set, and a `vllm.stat_logger_plugins` entry point would switch statistics
on wherever the plugin is installed). So they take the way that prometheus_client has for servers of several processes: the worker
keeps its values in files, and what answers /metrics reads them (prometheus_client/multiprocess.py).

The folder is made by the process that makes the engine's configuration, which is the API server, and travels with it. With several
API servers it is vLLM's own (`PROMETHEUS_MULTIPROC_DIR`), which their /metrics read in any case. The first tensor-parallel rank of
each engine writes, once a second, and one line a minute goes to the log.
"""

import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_mtp.config import ServingOptions
from vllm_mtp.plan import Counters
from vllm_mtp.shaping import SHAPED

WRITE_EVERY, LOG_EVERY = 1.0, 60.0
"""Seconds."""
FILE_SIZE = 1 << 18
"""More than the values of 32 drafts and all layouts take."""


@dataclass(frozen=True)
class Metric:
    """A counter or a gauge.

    Attributes:
        name: without `_total`, which Prometheus puts behind a counter's name.
        text: what it counts.
        labels: beside `model_name` and `engine`, which all have.
        kind: counter or gauge.
    """

    name: str
    text: str
    labels: tuple[str, ...] = ()
    kind: str = "counter"

    @property
    def exported(self) -> str:
        """Its name at /metrics."""
        return self.name + "_total" * (self.kind == "counter")


INFO = Metric(
    "vllm_mtp:info",
    "1; what the engine serves with.",
    ("adapter", "k", "layout", "acceptance", "tau", "draft_sample_method", "candidates", "lookup"),
    "gauge",
)
ON = Metric("vllm_mtp:on", "1; 0 once an exception in the plugin has ended speculation, which the log has.", (), "gauge")
STEPS = Metric(
    "vllm_mtp:steps",
    "Steps, by layout: lengths of groups behind row 0, 1, ..; shaped: each request's own; plain: no masks.",
    ("layout",),
)
EXPANDED = Metric("vllm_mtp:expanded_steps", "Steps that had mask rows.")
REAL_ROWS = Metric("vllm_mtp:real_rows", "Rows that vLLM scheduled, of steps that had mask rows.")
MASK_ROWS = Metric("vllm_mtp:mask_rows", "Mask rows.")
DRAFTS = Metric("vllm_mtp:drafts", "Verifications of a request's drafts, as vllm:spec_decode_num_drafts counts them.")
DRAFT_TOKENS = Metric("vllm_mtp:draft_tokens", "Drafts that were verified, by position.", ("position",))
ACCEPTED = Metric(
    "vllm_mtp:accepted_tokens",
    "Drafts that were accepted, by position, and by what: verification, or the drafter's confidence.",
    ("position", "by"),
)
EXPECTED = Metric(
    "vllm_mtp:expected_tokens",
    "Drafts that the drafter expects to be accepted: of each verified draft, its probability times those of the drafts before it.",
    ("position",),
)
LOOKUP_DRAFTS = Metric("vllm_mtp:lookup_draft_tokens", "Those of the drafts that were looked up in their request's own text.")
LOOKUP_ACCEPTED = Metric("vllm_mtp:lookup_accepted_tokens", "Those of the accepted drafts that were looked up.")
UNMATCHED = Metric("vllm_mtp:unmatched_tokens", "Drafts accepted by confidence where the target's best token was another.")
SECONDS = Metric(
    "vllm_mtp:seconds",
    "Time of the host: plan (of mask rows), drafter (its forward; on the V1 runner), hand_over (choosing groups, reading drafts).",
    ("part",),
)
METRICS = (
    *(INFO, ON, STEPS, EXPANDED, REAL_ROWS, MASK_ROWS, DRAFTS, DRAFT_TOKENS, ACCEPTED),
    *(EXPECTED, LOOKUP_DRAFTS, LOOKUP_ACCEPTED, UNMATCHED, SECONDS),
)


class Value(NamedTuple):
    """A metric's value at some labels."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


def layout_name(lengths: tuple[int, ...]) -> str:
    """A layout as a label."""
    if lengths == SHAPED:
        return "shaped"
    return ",".join(map(str, lengths)) if any(lengths) else "plain"


def values(counters: Counters, options: ServingOptions, on: bool = True) -> Iterator[Value]:
    """What is exported of an engine's counters, its options, and whether it still speculates."""
    tau = options.default_tau if options.acceptance == "confidence" else ""
    told = options.model_dump(mode="json")
    told |= {"k": options.num_speculative_tokens, "layout": _layout(options), "tau": tau}
    yield Value(INFO, tuple(str(told[label]) for label in INFO.labels), 1)
    yield Value(ON, (), on)
    for lengths, steps in counters.layouts.items():
        yield Value(STEPS, (layout_name(lengths),), steps)
    for metric, value in (
        (EXPANDED, counters.steps),
        (REAL_ROWS, counters.real_rows),
        (MASK_ROWS, counters.mask_rows),
        (DRAFTS, counters.drafts),
        (LOOKUP_DRAFTS, counters.lookup_drafted),
        (LOOKUP_ACCEPTED, counters.lookup_accepted),
        (UNMATCHED, counters.unmatched),
    ):
        yield Value(metric, (), value)
    for position in range(options.num_speculative_tokens):
        label = str(position)
        confident = counters.confident[position]
        yield Value(DRAFT_TOKENS, (label,), counters.drafted[position])
        yield Value(ACCEPTED, (label, "verification"), counters.accepted[position] - confident)
        if options.acceptance == "confidence":
            yield Value(ACCEPTED, (label, "confidence"), confident)
        if options.acceptance == "confidence" or any(counters.expected):
            yield Value(EXPECTED, (label,), counters.expected[position])
    for part, seconds in (("plan", counters.plan_time), ("drafter", counters.drafter_time), ("hand_over", counters.draft_time)):
        yield Value(SECONDS, (part,), seconds)


def _layout(options: ServingOptions) -> str:
    return options.layout if isinstance(options.layout, str) else layout_name(options.layout)


def line(before: Counters, now: Counters, seconds: float, k: int) -> str:
    """What was done between two states of the counters, in a line; empty if nothing was.

    Args:
        before, now: the counters.
        seconds: between them.
        k: most drafts a request.
    """
    layouts = {lengths: steps - before.layouts.get(lengths, 0) for lengths, steps in now.layouts.items()}
    total = sum(layouts.values())
    if not total:
        return ""
    most, count = max(layouts.items(), key=lambda item: item[1])
    expanded = max(1, now.steps - before.steps)
    real, masks = now.real_rows - before.real_rows, now.mask_rows - before.mask_rows
    drafts = max(1, now.drafts - before.drafts)
    accepted, confident, expected = (
        [new - old for new, old in zip(getattr(now, name)[:k], getattr(before, name)[:k], strict=True)]
        for name in ("accepted", "confident", "expected")
    )
    parts = [
        f"{total} steps in {seconds:.0f} s, {100 * count / total:.0f} % with layout {layout_name(most)}",
        f"{(real + masks) / expanded:.1f} rows in a step with mask rows, {masks / expanded:.1f} of them masks",
        f"{1 + sum(accepted) / drafts:.2f} tokens a verification, drafts accepted by position {_shares(accepted, drafts)}",
    ]
    if any(expected):
        parts[-1] += f", expected {_shares(expected, drafts)}"
    if lookups := now.lookups - before.lookups:
        of_them = now.lookup_accepted - before.lookup_accepted, now.lookup_drafted - before.lookup_drafted
        parts.append(f"{100 * lookups / drafts:.0f} % of them of drafts from the text, {of_them[0]} of {of_them[1]} accepted")
    if any(confident):
        best = f"{now.unmatched - before.unmatched} of them not the target's best"
        parts.append(f"by confidence {_shares(confident, drafts)}, {best}")
    planning, drafting = now.plan_time - before.plan_time, now.drafter_time - before.drafter_time
    handing = now.draft_time - before.draft_time
    parts.append(
        f"{1e3 * planning / expanded:.2f} ms planning, {1e3 * drafting / expanded:.2f} ms drafting and "
        f"{1e3 * handing / expanded:.2f} ms handing over in a step with mask rows"
    )
    return "Mask-token prediction: " + "; ".join(parts)


def _shares(counts: list[Any], of: int) -> str:
    return " ".join(f"{count / of:.2f}" for count in counts)


class Files:
    """A worker's values, where prometheus_client's collector of files finds them.

    Args:
        folder: of the files.
        model_name, engine: labels of all metrics, as vLLM has them.
    """

    def __init__(self, folder: str, model_name: str, engine: int) -> None:
        self.labels = {"model_name": model_name, "engine": str(engine)}
        # Names as prometheus_client has them, and others than those that vLLM may have open in this process.
        paths = {
            "counter": Path(folder, f"counter_mtp{os.getpid()}.db"),
            "gauge": Path(folder, f"gauge_max_mtp{os.getpid()}.db"),
        }
        for path in paths.values():
            path.unlink(missing_ok=True)  # of an engine before in this process
            # Mapped memory behind which a full disk has no room ends the process that writes to it.
            path.write_bytes(bytes(FILE_SIZE))
        self.files = {kind: MmapedDict(str(path)) for kind, path in paths.items()}

    def write(self, found: Iterator[Value]) -> None:
        """Sets values."""
        now = time.time()
        for metric, labels, value in found:
            names = (*self.labels, *metric.labels)
            key = mmap_key(metric.name, metric.exported, list(names), [*self.labels.values(), *labels], metric.text)
            self.files[metric.kind].write_value(key, value, now)

    def close(self) -> None:
        """Closes the files; they stay."""
        for file in self.files.values():
            file.close()


class Exporter:
    """Writes the counters of an engine to files and the log, in a thread of its own, until its owner is gone.

    Args:
        owner: of the counters.
        counters: read while they are counted up; each value is right, and they may be a step apart.
        options: of the engine.
        files: None: to the log alone.
        log: takes a line.
        is_on: whether the engine still speculates.
    """

    def __init__(
        self,
        owner: object,
        counters: Counters,
        options: ServingOptions,
        files: Files | None,
        log: Callable[[str], None],
        is_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self.counters, self.options, self.files, self.log, self.is_on = counters, options, files, log, is_on
        self.logged, self.logged_at = counters.snapshot(), time.monotonic()
        self.written: tuple[Counters, bool] | None = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name="vllm-mtp metrics", daemon=True)
        self.thread.start()
        weakref.finalize(owner, self.stopping.set)

    def _run(self) -> None:
        while not self.stopping.wait(WRITE_EVERY):
            self.write()
            if time.monotonic() - self.logged_at >= LOG_EVERY:
                self.log_line()
        self.write()
        if self.files is not None:
            self.files.close()

    def write(self) -> None:
        """Brings the files up to date."""
        now = self.counters.snapshot(), self.is_on()
        if self.files is not None and now != self.written:
            self.files.write(values(now[0], self.options, now[1]))
        self.written = now

    def log_line(self) -> None:
        """Writes a line for the time since the last one, if there was a step."""
        now, at = self.counters.snapshot(), time.monotonic()
        if text := line(self.logged, now, at - self.logged_at, self.options.num_speculative_tokens):
            self.log(text)
        self.logged, self.logged_at = now, at


_folder: tempfile.TemporaryDirectory[str] | None = None
_collector: MultiProcessCollector | None = None


def folder() -> str:
    """The folder for the files of an engine whose configuration this process makes; what they hold is at /metrics from now on.

    The folder of an engine before is forgotten, as vLLM forgets that engine's metrics.
    """
    global _folder, _collector  # noqa: PLW0603
    if shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return shared
    if _folder is not None and _collector is not None:
        _folder.cleanup()
        REGISTRY.unregister(_collector)  # type: ignore[arg-type]
    _folder = tempfile.TemporaryDirectory(prefix="vllm-mtp-metrics-")
    _collector = MultiProcessCollector(None, path=_folder.name)  # type: ignore[no-untyped-call]
    REGISTRY.register(_collector)  # type: ignore[arg-type]
    return _folder.name


def export(
    owner: object, counters: Counters, options: ServingOptions, vllm_config: Any, logger: Any, is_on: Callable[[], bool]
) -> Exporter:
    """Starts to export what an engine's worker counts.

    Args:
        owner: of the counters; they are exported while it lives.
        counters, options: of the engine.
        vllm_config: its configuration, which holds the folder (`compat`).
        logger: of the log line.
        is_on: as `Exporter` takes it.
    """
    files, path = None, getattr(vllm_config.speculative_config, "mask_token_metrics", None)
    name, engine = vllm_config.model_config.served_model_name, vllm_config.parallel_config.data_parallel_index
    try:
        if path is None or not Path(path).is_dir():
            raise FileNotFoundError("the API server's folder for them is not on this machine")
        files = Files(path, name, engine)
    except OSError as error:
        logger.warning("Metrics of mask-token prediction are in the log alone, and not at /metrics: %s", error)
    return Exporter(owner, counters, options, files, logger.info, is_on)
