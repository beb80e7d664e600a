"""A server's /metrics and its answers to requests' options."""

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from tests.server import Server
from vllm_mtp import demo, metrics

from ..unit.test_metrics import expressions
from .conftest import Engines, speculative

pytestmark = [pytest.mark.engine, pytest.mark.full]
K = 4


@pytest.fixture(scope="module", params=["one folder an engine", "a shared folder"])
def server(request: pytest.FixtureRequest, engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a worker of its own; as with several API servers, or without."""
    engines.close()
    folder = tmp_path_factory.mktemp("server")
    arguments = ["--served-model-name", "demo", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    arguments += ["--max-num-seqs", "16", "--per-request-spec-decode-metrics", "summary"]
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("shared"))} if request.param == "a shared folder" else None
    ours = speculative(demo.ADAPTER, K, acceptance="confidence", tau=2)
    with Server(ours, arguments, folder / "log", environment=shared) as started:
        started.wait_until_ready()
        yield started.url


def client(server: str) -> OpenAI:
    return OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def at_metrics(server: str) -> dict[str, float]:
    """Sums of vLLM's and our metrics over their labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(vllm\w*:\w+)(?:{.*})? (\S+)$", httpx.get(f"{server}/metrics").text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def complete(server: str, **asked: Any) -> dict[str, Any]:
    """What a server says of drafts beside its answer."""
    answer = client(server).completions.create(
        model="demo", prompt=demo.prompts()[0], max_tokens=41, temperature=0.0, extra_body={"vllm_xargs": asked, "ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 41
    return answer.model_extra["metrics"]["speculative_decoding"]  # type: ignore[index]


def settled(server: str) -> dict[str, float]:
    """Metrics once the worker has written what it counted: within a second."""
    time.sleep(2 * metrics.WRITE_EVERY)
    return at_metrics(server)


def test_metrics_move_and_are_vllms(server: str) -> None:
    before = settled(server)
    told = [complete(server), complete(server, mtp_tau=0), complete(server, mtp_drafts=1), complete(server, mtp_tau=0.7)]
    after = settled(server)
    moved = {name: after[name] - before.get(name, 0.0) for name in after}
    for ours, vllms in (("drafts", "num_drafts"), ("draft_tokens", "num_draft_tokens"), ("accepted_tokens", "num_accepted_tokens")):
        assert moved[f"vllm_mtp:{ours}_total"] == moved[f"vllm:spec_decode_{vllms}_total"] > 0
    assert moved["vllm_mtp:drafts_total"] == sum(t["num_spec_steps"] for t in told)
    assert moved["vllm_mtp:accepted_tokens_total"] == sum(t["num_accepted_draft_tokens"] for t in told)
    assert told[1]["mean_acceptance_length"] == 1 + K
    assert moved["vllm_mtp:unmatched_tokens_total"] > 0
    assert moved["vllm_mtp:mask_rows_total"] > moved["vllm_mtp:real_rows_total"] > 0
    assert all(moved[f"vllm_mtp:{name}_total"] > 0 for name in ("steps", "expanded_steps", "expected_tokens", "seconds"))
    assert after["vllm_mtp:info"] == 1


def test_the_dashboards_names_are_at_metrics(server: str) -> None:
    complete(server)
    shown = {name for expression in expressions() for name in re.findall(r"vllm\w*:\w+", expression)}
    assert len(shown) > len(metrics.METRICS)
    assert shown <= settled(server).keys()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mtp_tau": -1}, "mtp_tau is -1"),
        ({"mtp_tau": "high"}, "mtp_tau is 'high'"),
        ({"mtp_drafts": 1.5}, "mtp_drafts is 1.5"),
        ({"mtp_layout": "linear"}, "mtp_layout is no option of mask-token prediction: there are mtp_tau, mtp_drafts"),
    ],
)
def test_wrong_options_are_answered_with_400(server: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=re.escape(message)):
        complete(server, **asked)
    assert complete(server, mtp_drafts=2)["num_draft_tokens"] > 0  # and goes on serving
