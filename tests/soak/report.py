"""From the samples of a run to its figures, the bars that it missed, and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.soak.traffic import CYCLE_SECONDS

WINDOW_MINUTES = 10.0
TOLERANCE = 0.02
ACCEPTED, DRAFTS, DRAFTED = (
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
)
AT_POSITION = "spec_decode_num_accepted_tokens_per_pos_total"
LEFT_OVER = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
"""Gauges that are 0 when nothing runs."""


def kept(name: str) -> bool:
    """Whether a metric of vLLM is worth its place in the samples."""
    name = name.removeprefix("vllm:")
    return name.startswith("spec_decode") or name in (*LEFT_OVER, "num_preemptions_total", "generation_tokens_total")


def acceptance(samples: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Between the first and the last of `samples`: tokens of a verification (1 + accepted / drafts, vLLM's mean acceptance length),
    and how often the first draft was accepted."""
    first, last = samples[0]["metrics"], samples[-1]["metrics"]
    grown = {name: last.get(name, 0) - first.get(name, 0) for name in (ACCEPTED, DRAFTS, f"{AT_POSITION}/0")}
    if not grown[DRAFTS]:
        return None
    return {
        "length": 1 + grown[ACCEPTED] / grown[DRAFTS],
        "first_draft": grown[f"{AT_POSITION}/0"] / grown[DRAFTS],
        "verifications": grown[DRAFTS],
    }


def _between(samples: Sequence[dict[str, Any]], begin: float, end: float) -> list[dict[str, Any]]:
    return [sample for sample in samples if begin * 60 - 1 <= sample["at"] <= end * 60 + 11]


def in_use(samples: Sequence[dict[str, Any]]) -> list[float]:
    """MiB that each cycle of requests leaves in use: its lowest sample.

    The worker keeps up to 256 MiB of freed memory and more until it looks, once a minute, and then hands it back
    (`vllm_mtp.cpu_memory`), so samples swing by 300 MiB; what they fall to is what is in use.
    """
    cycles: dict[int, list[float]] = {}
    for sample in samples:
        cycles.setdefault(int(sample["at"] // CYCLE_SECONDS), []).append(sample["private"])
    most = max(map(len, cycles.values()))
    return [min(of_cycle) for of_cycle in cycles.values() if len(of_cycle) > most / 2]  # of a piece of one the lowest says little


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """The figures, and the bars that were missed by name.

    Memory is what is `in_use`: at the start the median over the cycles of ten minutes after the warm-up, at the end over those of
    the last ten; acceptance is that of the first and of the last ten minutes of traffic. Shorter runs have windows of a third of
    the run. Memory is private memory (USS): of shared pages, libraries above all, PSS counts a share, which grows when another
    server of the same installation ends.
    """
    samples, total = found["samples"], found["samples"][-1]["at"] / 60
    total = min(total, found["minutes"])
    window = min(WINDOW_MINUTES, total / 3)
    after = min(found["warm_up"], total - 2 * window)
    spans = {"start": (after, after + window), "end": (total - window, total)}
    memory = {name: _median(in_use(_between(samples, *span))) for name, span in spans.items()}
    kept_too = {
        word: {name: pick([sample["private"] for sample in _between(samples, *span)]) for name, span in spans.items()}
        for word, pick in (("median", _median), ("lowest", min), ("highest", max))
    }
    rest = _between(samples, after, total)
    cycles = in_use(rest)
    slope = float(np.polyfit(np.arange(len(cycles)) * CYCLE_SECONDS / 3600, cycles, 1)[0]) if len(cycles) > 2 else 0.0
    accepted = [acceptance(_between(samples, *span)) for span in ((0, window), (total - window, total))]
    lengths = [found_["length"] for found_ in accepted if found_ is not None]
    last = samples[-1]
    left = {name: last["metrics"].get(name, 0.0) for name in LEFT_OVER}
    failed = sum(counts.get("failed", 0) for counts in found.get("outcomes", {}).values())
    missed = []
    if abs(memory["end"] / memory["start"] - 1) > TOLERANCE:
        missed.append("memory")
    judged = found["speculative"]["layout"] != "auto"
    if len(lengths) < 2 or (judged and abs(lengths[1] / lengths[0] - 1) > TOLERANCE):
        missed.append("acceptance")
    if failed or found.get("unanswered"):
        missed.append("errors")
    if found["differing"] or not found["compared"]:
        missed.append("equality")
    if any(left.values()):
        missed.append("left over")
    if found.get("server_status") is not None or not found.get("complete"):
        missed.append("server")
    return {
        "minutes": round(total, 1),
        "requests": found["sent"],
        "tokens_received": found["tokens"],
        "outcomes": found.get("outcomes"),
        "errors": failed + found.get("unanswered", 0),
        "compared_with_plain": found["compared"],
        "differing": found["differing"],
        "window_minutes": window,
        "memory_mib": {**memory, "with_kept": kept_too, "change": memory["end"] / memory["start"] - 1, "slope_mib_per_hour": slope},
        "acceptance": {
            "first": accepted[0],
            "last": accepted[1],
            "change": lengths[1] / lengths[0] - 1 if len(lengths) > 1 else None,
        },
        "files": [rest[0]["files"], rest[-1]["files"]],
        "threads": [rest[0]["threads"], rest[-1]["threads"]],
        "preemptions": last["metrics"].get("num_preemptions_total"),
        "left_over_at_the_end": left,
        "cores_used": round((samples[-1]["cpu_seconds"] - samples[0]["cpu_seconds"]) / (samples[-1]["at"] - samples[0]["at"]), 3),
        "missed_samples": len(found.get("missed_samples", ())),
        "missed": missed,
    }


def plot(found: dict[str, Any], file: Path) -> None:
    """Memory, and acceptance of every five minutes, over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    samples = found["samples"]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 7))
    top.plot(
        [s["at"] / 60 for s in samples], [s["private"] for s in samples], linewidth=0.9, label="with freed memory that is kept"
    )
    lowest = in_use(samples)
    top.step((np.arange(len(lowest)) + 1) * CYCLE_SECONDS / 60, lowest, where="pre", label="in use: the lowest of each cycle")
    top.axvline(found["warm_up"], color="grey", linestyle=":", label="end of the warm-up")
    top.set(ylabel="private memory of all processes [MiB]", ylim=(0, 1.15 * max(s["private"] for s in samples)))
    top.legend(loc="lower right")
    ends = np.arange(5.0, samples[-1]["at"] / 60 + 0.2, 5.0)
    points = [(end, acceptance(_between(samples, end - 5, end))) for end in ends if len(_between(samples, end - 5, end)) > 1]
    bottom.plot([end - 2.5 for end, _ in points], [a["length"] if a else np.nan for _, a in points], marker="o")
    top_length = max((a["length"] for _, a in points if a), default=2.0)
    bottom.set(xlabel="minutes", ylabel="mean acceptance length, 5 minutes", ylim=(1, 1.1 * top_length))
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
