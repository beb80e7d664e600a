"""What is exported: values as counted, names as the dashboard has them, files that vLLM's /metrics reads."""

import gc
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.prometheus import get_prometheus_registry, unregister_vllm_metrics

import vllm_mtp
from vllm_mtp import metrics
from vllm_mtp.confidence import DraftedRequests
from vllm_mtp.config import ServingOptions
from vllm_mtp.device_counters import CountersOnDevice
from vllm_mtp.plan import Counters

DASHBOARD = json.loads((Path(vllm_mtp.__file__).parent / "grafana" / "dashboard.json").read_text())
LOSSLESS = ServingOptions(adapter="some/adapter", num_speculative_tokens=2)
LOSSY = ServingOptions(adapter="some/adapter", num_speculative_tokens=2, acceptance="confidence")
Samples = dict[str, dict[tuple[str, ...], float]]


def counted(times: int = 1) -> Counters:
    """Counters of some steps."""
    counters = Counters()
    for _ in range(times):
        for lengths in ((0, 0, 0), (2, 2, 2), (2, 2, 2)):
            counters.stepped(lengths)
        for drafted, accepted in ((2, 2), (2, 1), (1, 0)):
            counters.verified(drafted, accepted)
        counters.steps, counters.real_rows, counters.mask_rows = counters.steps + 2, counters.real_rows + 6, counters.mask_rows + 12
        counters.plan_time, counters.drafter_time = counters.plan_time + 0.25, counters.drafter_time + 0.5
        counters.confident[0] += 1
        counters.expected[0] += 2.5
        counters.unmatched += 1
    return counters


def samples(registry: Any = REGISTRY) -> Samples:
    """What /metrics has of ours: by name, and by the values of the labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name.startswith("vllm_mtp"):
                found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return metrics.folder()


def test_values_are_at_metrics_as_they_were_counted(folder: str) -> None:
    files = metrics.Files(folder, "demo", 3)
    files.write(metrics.values(counted(), LOSSY))
    found = samples()
    assert set(found) == {metric.exported for metric in metrics.METRICS}
    by_layout = {frozenset(labels): value for labels, value in found["vllm_mtp:steps_total"].items()}
    assert by_layout == {frozenset({"demo", "3", "plain"}): 1, frozenset({"demo", "3", "2,2,2"}): 2}
    total = {name: sum(by_label.values()) for name, by_label in found.items()}
    assert total["vllm_mtp:drafts_total"] == 3
    assert total["vllm_mtp:draft_tokens_total"] == 5
    assert total["vllm_mtp:accepted_tokens_total"] == 3
    assert sorted(found["vllm_mtp:accepted_tokens_total"].values()) == [0, 1, 1, 1]
    assert total["vllm_mtp:expected_tokens_total"] == 2.5
    assert total["vllm_mtp:seconds_total"] == 0.75
    assert total["vllm_mtp:info"] == 1
    files.write(metrics.values(counted(2), LOSSY))
    assert sum(samples()["vllm_mtp:drafts_total"].values()) == 6
    files.close()


def test_a_lossless_server_says_nothing_of_confidence(folder: str) -> None:
    files = metrics.Files(folder, "demo", 0)
    counters = counted()
    counters.expected[0] = 0.0
    files.write(metrics.values(counters, LOSSLESS))
    assert "vllm_mtp:expected_tokens_total" not in samples()
    assert {value for labels in samples()["vllm_mtp:accepted_tokens_total"] for value in labels} == {
        "demo",
        "0",
        "1",
        "verification",
    }
    files.close()


def test_the_next_engine_of_a_process_starts_anew(folder: str) -> None:
    for _ in range(2):
        files = metrics.Files(metrics.folder(), "demo", 0)
        files.write(metrics.values(counted(), LOSSY))
        assert sum(samples()["vllm_mtp:drafts_total"].values()) == 3
        files.close()


def test_vllms_metrics_have_ours_in_a_process_of_its_own_and_among_others(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unregister_vllm_metrics()  # as it does at each start
    files = metrics.Files(folder, "demo", 0)
    files.write(metrics.values(counted(), LOSSY))
    assert get_prometheus_registry() is REGISTRY
    assert set(samples(get_prometheus_registry())) == {metric.exported for metric in metrics.METRICS}
    files.close()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))  # with several API servers
    assert metrics.folder() == str(tmp_path)
    files = metrics.Files(metrics.folder(), "demo", 0)
    files.write(metrics.values(counted(3), LOSSY))
    assert sum(samples(get_prometheus_registry())["vllm_mtp:drafts_total"].values()) == 9
    files.close()


class Owner:
    """Of counters."""


def test_an_exporter_follows_the_counters_and_ends_with_their_owner(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "WRITE_EVERY", 0.01)
    monkeypatch.setattr(metrics, "LOG_EVERY", 0.02)
    owner, counters, log, on = Owner(), counted(), [], ["on"]
    exporter = metrics.Exporter(owner, counters, LOSSY, metrics.Files(folder, "demo", 0), log.append, lambda: bool(on))
    counters.stepped((1, 1, 0))
    end = time.monotonic() + 20
    while not log and time.monotonic() < end:
        time.sleep(0.01)
    assert "layout 1,1,0" in log[0]
    assert sum(samples()["vllm_mtp:steps_total"].values()) == 4
    assert sum(samples()["vllm_mtp:on"].values()) == 1
    counters.stepped((1, 1, 0))
    on.clear()
    del owner
    gc.collect()
    exporter.thread.join(20)
    assert not exporter.thread.is_alive()
    assert sum(samples()["vllm_mtp:steps_total"].values()) == 5
    assert sum(samples()["vllm_mtp:on"].values()) == 0


def test_the_log_line() -> None:
    assert metrics.line(counted(), counted(), 60, 2) == ""
    assert metrics.line(counted(), counted(2), 60.2, 2) == (
        "Mask-token prediction: 3 steps in 60 s, 67 % with layout 2,2,2; 9.0 rows in a step with mask rows, 6.0 of them masks; "
        "2.00 tokens a verification, drafts accepted by position 0.67 0.33, expected 0.83 0.00; by confidence 0.33 0.00, 1 of them "
        "not the target's best; 125.00 ms planning, 250.00 ms drafting and 0.00 ms handing over in a step with mask rows"
    )


def test_a_snapshot_stays() -> None:
    counters = counted()
    before = counters.snapshot()
    assert before == counters
    counters.stepped((2, 2, 2))
    counters.verified(1, 1)
    assert before == counted() != counters


COUNTED = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 4), st.lists(st.integers(0, 3), min_size=4, max_size=4)), max_size=4),
    max_size=3,
)
"""Steps: of each request how many drafts it has and how many of them are accepted (-1: it sampled nothing), and of each draft
whether it was taken (1) and no match (2)."""


@given(COUNTED)
def test_what_a_device_counts_is_what_a_host_would(steps: list[list[tuple[int, int, list[int]]]]) -> None:
    on_host, on_device = Counters(), CountersOnDevice(4, torch.device("cpu"))
    drafted = DraftedRequests.of(5, 4, torch.device("cpu"))
    for step in steps:
        states = [4, 2, 0, 3][: len(step)]
        for state, (drafts, most, kinds) in zip(states, step, strict=True):
            accepted = max(0, min(most, drafts))
            drafted.keep(torch.tensor([state]), torch.tensor([[0.5 if kind & 1 else -1.0 for kind in kinds]]))
            drafted.taken[state, :4] = torch.tensor([kind & 1 > 0 for kind in kinds])
            drafted.unmatched[state, :4] = torch.tensor([kind > 1 for kind in kinds])
            if not drafts:
                continue
            on_host.verified(drafts, accepted)
            on_host.expect([0.5 if kind & 1 else 0.0 for kind in kinds[:drafts]])
            for position, kind in enumerate(kinds[:accepted]):
                on_host.confident[position] += kind & 1
                on_host.unmatched += kind == 3
        if step:
            sampled = torch.tensor([min(most, drafts) + 1 for drafts, most, _ in step], dtype=torch.int32)
            on_device.count(torch.tensor([drafts for drafts, *_ in step]), sampled, torch.tensor(states), drafted)
            assert not drafted.verified(torch.tensor(states))[1].any()
    on_device.stepped((4, 4, 4, 4, 4))
    on_host.stepped((4, 4, 4, 4, 4))
    assert on_device.snapshot() == on_host


def test_names_are_ours_and_not_among_those_that_benchmarks_add_up() -> None:
    assert all(re.fullmatch(r"vllm_mtp:[a-z_]+", metric.name) for metric in metrics.METRICS)
    assert len({metric.name for metric in metrics.METRICS}) == len(metrics.METRICS)


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return panels + [variable["query"] for variable in DASHBOARD["templating"]["list"]]


def test_the_dashboard_shows_what_is_exported_and_nothing_else() -> None:
    shown = {name for expression in expressions() for name in re.findall(r"vllm_mtp:\w+", expression)}
    assert shown == {metric.exported for metric in metrics.METRICS}
    labels = {label for metric in metrics.METRICS for label in metric.labels} | {"model_name", "engine"}
    asked = {
        label
        for expression in expressions()
        for label in re.findall(r"by \((\w+)\)|(\w+)=~", expression)
        for label in label
        if label
    }
    told = {
        label for panel in DASHBOARD["panels"] for t in panel["targets"] for label in re.findall(r"{{(\w+)}}", t["legendFormat"])
    }
    assert asked | told <= labels
    assert asked >= {"position", "by", "layout", "part"}


def test_the_dashboards_names_of_vllm_are_vllms() -> None:
    from vllm.v1.spec_decode import metrics as of_vllm

    source = Path(of_vllm.__file__).read_text()
    shown = {name for expression in expressions() for name in re.findall(r"vllm:\w+", expression)}
    assert shown
    assert all(f'"{name.removesuffix("_total")}"' in source for name in shown)
