"""vLLM's features beside mask-token prediction: as in plain vLLM, or refused with the reason. In fp32, and greedy unless
said otherwise.

Each test carries the row of the table in docs/features.md that it stands for; `python -m docs.generate` writes it from the marks.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from packaging.version import Version
from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.server import Server
from vllm_mtp import demo, selection
from vllm_mtp.plugin import register
from vllm_mtp.selection import ConfigurationError

from .conftest import Engine, Engines, speculative
from .feature_models import int8_base, random_adapter_for, random_model, request_lora, retrained_base
from .test_lossless_greedy import draft_from

pytestmark = pytest.mark.engine
feature = pytest.mark.feature
OURS = speculative(demo.ADAPTER, 4)
PROMPTS = demo.prompts()[:6]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "return " term (" + " term)*\nterm ::= [a-z]+ | [0-9]+'
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "json": {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "max_tokens": 64},
    "regex": {"structured_outputs": StructuredOutputsParams(regex=r"[a-z]{3,8} = \d{2,6}(, \d{1,3})*;")},
    "grammar": {"structured_outputs": StructuredOutputsParams(grammar=GRAMMAR)},
    "choice": {"structured_outputs": StructuredOutputsParams(choice=["raise ValueError(name)", "return self", "return None"])},
    "logprobs": {"logprobs": 5},
    "chosen logprob": {"logprobs": 0},
    "prompt logprobs": {"prompt_logprobs": 3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2},
    "repetition": {"repetition_penalty": 1.4},
    "all penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.8, "repetition_penalty": 1.2, "min_tokens": 20},
    "bad words": {"bad_words": ["self", " self", "return", " return"]},
    "allowed": {"allowed_token_ids": list(range(5, 1500, 3))},
    "stop": {"stop": ["\n\n", "self."]},
    "stop included": {"stop": ["self."], "include_stop_str_in_output": True},
    "stop ids": {"stop_token_ids": list(range(5, 1500, 3))},
    "min tokens": {"stop_token_ids": list(range(5, 1500, 3)), "min_tokens": 12},
    "one token": {"max_tokens": 1},
    "ignore eos": {"ignore_eos": True, "max_tokens": 120},
}


@dataclass
class Answers:
    """What an engine answered in each case, and how many drafts were accepted for it."""

    outputs: dict[str, list[Any]]
    accepted: dict[str, float]

    def completions(self, case: str) -> list[tuple[Any, ...]]:
        """Text, tokens and ends of the answers to a case."""
        return [(c.text, list(c.token_ids), c.finish_reason, c.stop_reason) for c in (o.outputs[0] for o in self.outputs[case])]

    def cut_like(self, other: "Answers", case: str) -> "Answers":
        """The same without the tokens that the answers to a case have more than `other`'s: at most the rest of a step."""
        cut = copy.deepcopy(self)
        for mine, theirs in zip(cut.outputs[case], other.outputs[case], strict=True):
            keep = len(theirs.outputs[0].token_ids)
            assert 0 <= len(mine.outputs[0].token_ids) - keep < OURS["num_speculative_tokens"] + 1
            mine.outputs[0].token_ids = list(mine.outputs[0].token_ids)[:keep]
        return cut


def ask(engine: Engine, sampling: dict[str, Any], prompts: list[Any] = PROMPTS, **more: Any) -> list[Any]:
    """The engine's greedy answers, unless `sampling` says otherwise."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 40, **sampling})
    return engine.llm.generate(prompts, params, use_tqdm=False, **more)


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    """Token ids of each completion of each request."""
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def answers(engine: Engine) -> Answers:
    """Asks every case."""
    found = Answers({}, {})
    for case, sampling in CASES.items():
        before = engine.metric("vllm:spec_decode_num_accepted_tokens")
        found.outputs[case] = ask(engine, sampling)
        found.accepted[case] = engine.metric("vllm:spec_decode_num_accepted_tokens") - before
    return found


Both = tuple[Answers, Answers]


@pytest.fixture(scope="module")
def both(engines: Engines) -> Both:
    """Answers of plain vLLM and ours; one batch a case."""
    return answers(engines()), answers(engines(OURS))


# -- one engine each ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("json", marks=feature("structured output: JSON schema", "works")),
        pytest.param("regex", marks=feature("structured output: regular expression", "works")),
        pytest.param("grammar", marks=feature("structured output: grammar", "works")),
        pytest.param("choice", marks=feature("structured output: choice", "works")),
        pytest.param("presence", marks=feature("presence penalty", "works")),
        pytest.param("frequency", marks=feature("frequency penalty", "works")),
        pytest.param("repetition", marks=feature("repetition penalty", "works")),
        pytest.param("all penalties", marks=feature("penalties together", "works")),
        pytest.param("bad words", marks=feature("`bad_words`", "works")),
        pytest.param("allowed", marks=feature("`allowed_token_ids`", "works")),
        pytest.param("stop", marks=feature("`stop`", "works", "before vLLM 0.32 `token_ids` may go on behind the text")),
        pytest.param(
            "stop included",
            marks=feature("`include_stop_str_in_output`", "works", "before vLLM 0.32 `token_ids` may go on behind the text"),
        ),
        pytest.param("stop ids", marks=feature("`stop_token_ids`", "works")),
        pytest.param("min tokens", marks=feature("`min_tokens`", "works")),
        pytest.param("one token", marks=feature("`max_tokens` = 1", "works")),
        pytest.param("ignore eos", marks=feature("`ignore_eos`", "works")),
    ],
)
def test_greedy_answers_are_plains(both: Both, case: str) -> None:
    plain, ours = both
    if "stop" in CASES[case] and Version(selection.vllm_version()) < Version("0.32"):
        # Under any speculation these releases keep the tokens that a step gave behind a stop string; the text ends there.
        ours = ours.cut_like(plain, case)
    assert ours.completions(case) == plain.completions(case)
    assert plain.completions(case) != plain.completions("nothing")  # the feature does something here
    if case != "one token":
        assert ours.accepted[case] > 0  # beside drafts


@feature("`logprobs`", "works", "equal to plain vLLM's to 1e-4 in float32")
@pytest.mark.parametrize(("case", "number"), [("logprobs", 5), ("chosen logprob", 0)])
def test_logprobs_are_plains(both: Both, case: str, number: int) -> None:
    plain, ours = both
    assert ours.completions(case) == plain.completions(case) == plain.completions("nothing")
    assert ours.accepted[case] > 0
    for expected, found in zip(plain.outputs[case], ours.outputs[case], strict=True):
        for a, b in zip(expected.outputs[0].logprobs, found.outputs[0].logprobs, strict=True):
            assert_same_logprobs(a, b)
            assert len(b) in (number, number + 1)  # the chosen token, if it is not one of the best
        assert found.outputs[0].cumulative_logprob == pytest.approx(expected.outputs[0].cumulative_logprob, abs=1e-3)


@feature("`prompt_logprobs`", "works", "equal to plain vLLM's to 1e-4 in float32")
def test_prompt_logprobs_are_plains(both: Both) -> None:
    plain, ours = both
    for expected, found in zip(plain.outputs["prompt logprobs"], ours.outputs["prompt logprobs"], strict=True):
        assert len(found.prompt_logprobs) == len(found.prompt_token_ids) > 8
        assert found.prompt_logprobs[0] is None
        for a, b in zip(expected.prompt_logprobs[1:], found.prompt_logprobs[1:], strict=True):
            assert_same_logprobs(a, b)
            assert len(b) in (3, 4)


def assert_same_logprobs(a: dict[int, Any], b: dict[int, Any]) -> None:
    """One position's entries; those whose values are nearly tied may stand in another order."""
    assert sorted(x.logprob for x in a.values()) == pytest.approx(sorted(x.logprob for x in b.values()), abs=1e-4)
    shared = a.keys() & b.keys()
    assert len(shared) >= len(a) - 1
    assert all(a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4) for token in shared)


@feature("`seed`", "works", "same seed, same answer with a fixed `layout`; under `auto` drafts a step depend on timing, and what a "
         "seed gives with them")  # fmt: skip
def test_a_seed_gives_the_same_answer_each_time(engines: Engines) -> None:
    engine = engines(OURS)
    sampling = {"temperature": 1.0, "seed": 7}
    first = tokens(ask(engine, sampling))
    assert first == tokens(ask(engine, sampling))
    assert first[2:3] == tokens(ask(engine, sampling, PROMPTS[2:3]))  # whatever else is served
    assert first != tokens(ask(engine, {**sampling, "seed": 8}))


@feature("`n` > 1", "works")
def test_n_completions_of_one_prompt(engines: Engines) -> None:
    engine = engines(OURS)
    sampling = {"temperature": 1.0, "seed": 7, "n": 3}
    first = tokens(ask(engine, sampling, PROMPTS[:2]))
    assert first == tokens(ask(engine, sampling, PROMPTS[:2]))
    assert all(len({tuple(completion) for completion in completions}) == 3 for completions in first)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"min_p": 0.1}, marks=feature("`min_p`", "refused by vLLM", "as under any speculation")),
        pytest.param({"logit_bias": {5: 1.0}}, marks=feature("`logit_bias`", "refused by vLLM", "as under any speculation")),
    ],
)
def test_what_vllm_refuses_under_speculation(engines: Engines, sampling: dict[str, Any]) -> None:
    engine = engines(OURS)
    with pytest.raises(VLLMValidationError, match=r"min_p and logit_bias .* not yet supported with speculative decoding"):
        ask(engine, {"temperature": 1.0, **sampling})  # a greedy request drops min_p
    assert tokens(ask(engine, {"max_tokens": 4}))  # and goes on serving


@feature(
    "`logprob_token_ids`",
    "refused",
    "V1 model runner: vLLM's verification of drafts does not know it, and beside a request with `logprobs` it would end the engine",
)
def test_logprob_token_ids_are_refused(engines: Engines) -> None:
    engine = engines(OURS)
    with pytest.raises(VLLMValidationError, match=r"logprob_token_ids .* not supported with mask-token prediction"):
        ask(engine, {"max_tokens": 8, "logprobs": 2, "logprob_token_ids": [5, 6]})
    assert tokens(ask(engine, {"max_tokens": 8, "logprobs": 1}))  # and goes on serving


def test_a_lossless_server_takes_no_tau_and_as_few_drafts_as_a_request_asks_for(engines: Engines, both: Both) -> None:
    engine = engines(OURS)
    with pytest.raises(VLLMValidationError, match="mtp_tau is for servers that accept drafts by confidence"):
        ask(engine, {"extra_args": {"mtp_tau": 2}})
    for drafts, most in ((0, 1.0), (1, 2.0)):
        found, per_forward = engine.forwards(lambda drafts=drafts: tokens(ask(engine, {"extra_args": {"mtp_drafts": drafts}})))
        assert found == tokens(both[0].outputs["nothing"])
        assert most - 1 < per_forward <= most


@feature("sleep mode", "works", "vLLM ignores it on CPUs; not tried on GPUs")
def test_sleep_and_wake_up(engines: Engines, both: Both) -> None:
    engine = engines(OURS)
    engine.llm.collective_rpc("sleep", args=(1,))
    engine.llm.collective_rpc("wake_up")
    assert [ids for _, ids, *_ in both[0].completions("nothing")] == [ids for (ids,) in tokens(ask(engine, {}))]


@feature(
    "`reload_weights`", "works", "the adapter stays: drafts are worse if the weights have moved away from it, the answers are right"
)
def test_reloaded_weights_serve(engines: Engines, both: Both, tmp_path: Path) -> None:
    retrained = retrained_base(tmp_path / "base")
    engine = engines(OURS)
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(retrained)})
    found = tokens(ask(engine, {}))
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(demo.BASE)})
    again, per_forward = engine.forwards(lambda: tokens(ask(engine, {})))
    assert again == [[ids] for _, ids, *_ in both[0].completions("nothing")] != found
    assert per_forward > 1.5  # mask rows, too, are on the weights that they were on before
    assert found == tokens(ask(engines(model=str(retrained)), {}))


# -- LoRA adapters of requests --------------------------------------------------------------------------------------


@feature("request LoRA adapters (`--enable-lora`)", "works", "mask rows carry their request's adapter; V1 model runner only")
def test_requests_with_lora_adapters(engines: Engines, tmp_path: Path) -> None:
    folders = [request_lora(tmp_path / "a", 1), request_lora(tmp_path / "b", 2, ("q_proj", "down_proj"))]
    adapters = [LoRARequest("a", 1, str(folders[0])), LoRARequest("b", 2, str(folders[1])), None]
    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}

    def ask_mixed(engine: Engine) -> list[Any]:
        mixed = ask(engine, {"max_tokens": 20}, PROMPTS[:3], lora_request=adapters)
        return tokens(mixed + ask(engine, {"max_tokens": 20}, PROMPTS[:1], lora_request=adapters[:1]))

    engine = engines(**options)
    expected, without = ask_mixed(engine), tokens(ask(engine, {"max_tokens": 20}, PROMPTS[:3]))
    assert [a == b for a, b in zip(expected[:3], without, strict=True)] == [False, False, True]
    engine = engines(OURS, **options)
    found, per_forward = engine.forwards(lambda: ask_mixed(engine))
    assert found == expected
    assert per_forward > 1.05


# -- other models ---------------------------------------------------------------------------------------------------


@feature(
    "quantized base: compressed-tensors W8A8 (int8)",
    "works",
    "the LoRA stays in the model's dtype; other weight formats go the same way, untried",
)
def test_quantized_base(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = {"model": str(int8_base(tmp_path_factory.mktemp("int8") / "base"))}
    expected = tokens(ask(engines(**options), {}))
    engine = engines(OURS, **options)
    assert "CompressedTensors" in str(engine.runner.model.model.layers[0].mlp.down_proj.quant_method)
    found, per_forward = engine.forwards(lambda: tokens(ask(engine, {})))
    assert found == expected
    assert per_forward > 1.5


@feature("fp8 KV cache", "works", "of CPUs vLLM wants AVX-512 for it")
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM has no fp8 cache on processors without AVX-512")
def test_fp8_cache(engines: Engines) -> None:
    options = {"kv_cache_dtype": "fp8"}
    expected = tokens(ask(engines(**options), {}))
    engine = engines(OURS, **options)
    found, per_forward = engine.forwards(lambda: tokens(ask(engine, {})))
    assert found == expected
    assert per_forward > 1.5


@feature(
    "sliding-window beside full attention (Gemma 3 and the like)", "works", "all layers keep as many blocks as full attention does"
)
@feature("prompt embeddings (`--enable-prompt-embeds`)", "works")
def test_sliding_window_and_prompt_embeddings(
    engines: Engines, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("gemma3")
    layers = ["sliding_attention", "full_attention"]
    base = random_model(folder / "base", model_type="gemma3_text", sliding_window=40, layer_types=layers, query_pre_attn_scalar=32)
    options = {"model": str(base), "enable_prompt_embeds": True, "block_size": 32}
    embeddings = torch.randn(30, 64, generator=torch.Generator().manual_seed(1)) * 0.3
    prompts = [*PROMPTS, {"prompt_embeds": embeddings}]
    sampling = {"max_tokens": 100, "ignore_eos": True}  # far past the window
    engine = engines(**options)
    expected = tokens(ask(engine, sampling, prompts))
    engine = engines(speculative(random_adapter_for(base, folder / "adapter"), 4), **options)
    truth = [engine.encode(prompt) + ids for prompt, (ids,) in zip(PROMPTS, expected, strict=False)]

    def half_right(so_far: list[int], number: int) -> list[int]:
        for text in truth:
            if text[: len(so_far)] == so_far:
                return [*text[len(so_far) :][: number // 2], *[1] * number][:number]
        return [1] * number  # the prompt that has no tokens

    draft_from(engine, half_right, monkeypatch)
    found, per_forward = engine.forwards(lambda: tokens(ask(engine, sampling, prompts)))
    assert found == expected
    assert per_forward > 2


# -- refused before anything is loaded ------------------------------------------------------------------------------


def engine_config(**arguments: Any) -> Any:
    register()
    return EngineArgs(**{"model": str(demo.BASE), "speculative_config": OURS, **arguments}).create_engine_config()


@feature("state-space and other layers that keep a state (Mamba, Jamba, Qwen3-Next)", "refused")
@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next"])
def test_models_that_keep_a_state_are_refused(model_type: str, tmp_path: Path) -> None:
    base = random_model(tmp_path / "base", model_type=model_type)
    adapter = random_adapter_for(base, tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=f"does not support {model_type} models.* keep a state of the request"):
        engine_config(model=str(base), speculative_config=speculative(adapter, 4))


@feature("embedding, classification and reward models", "refused")
def test_pooling_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="pooling"):
        engine_config(runner="pooling", convert="embed")


@feature("multimodal models", "refused")
def test_multimodal_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelConfig, "is_multimodal_model", True)
    with pytest.raises(ConfigurationError, match="multimodal"):
        engine_config()


@feature("request LoRA adapters on the V2 model runner", "refused", "set VLLM_USE_V2_MODEL_RUNNER=0")
def test_lora_adapters_on_the_v2_runner_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "runs_on_v2", lambda: True)
    with pytest.raises(ConfigurationError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        engine_config(enable_lora=True)


class Unchanged:
    """A logits processor."""


@feature("custom logits processors (`--logits-processors`)", "refused by vLLM", "as under any speculation")
def test_logits_processors_are_refused_by_vllm(engines: Engines) -> None:
    with pytest.raises(ValueError, match="Custom logits processors are not supported when speculative decoding is enabled"):
        engines(OURS, logits_processors=[f"{__name__}:Unchanged"])


# -- the OpenAI server ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of an OpenAI server with mask-token prediction."""
    engines.close()
    folder = tmp_path_factory.mktemp("server")
    template = folder / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    arguments = ["--served-model-name", "demo", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    arguments += ["--max-num-seqs", "16", "--chat-template", str(template), "--enable-auto-tool-choice"]
    arguments += ["--tool-call-parser", "hermes"]
    with Server(OURS, arguments, folder / "log") as server:
        server.wait_until_ready()
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@feature("streaming", "works", "several tokens may come in one delta")
def test_streamed_deltas_make_plains_text(both: Both, server: OpenAI) -> None:
    for prompt, (text, ids, *_) in zip(PROMPTS, both[0].completions("nothing"), strict=True):
        options = {"stream_options": {"include_usage": True}}
        stream = server.completions.create(model="demo", prompt=prompt, max_tokens=40, temperature=0.0, stream=True, **options)
        chunks = list(stream)
        deltas = [chunk.choices[0].text for chunk in chunks if chunk.choices]
        assert "".join(deltas) == text
        assert chunks[-1].usage.completion_tokens == len(ids)
        assert 1 < len(deltas) < len(ids)


@feature("streaming", "works", "several tokens may come in one delta")
def test_streamed_logprobs_are_plains(both: Both, server: OpenAI) -> None:
    for prompt, plain in zip(PROMPTS, both[0].outputs["logprobs"], strict=True):
        stream = server.completions.create(model="demo", prompt=prompt, max_tokens=40, temperature=0.0, stream=True, logprobs=5)
        deltas = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
        expected = [by_token[token] for token, by_token in zip(plain.outputs[0].token_ids, plain.outputs[0].logprobs, strict=True)]
        assert "".join(token for delta in deltas for token in delta.tokens) == "".join(one.decoded_token for one in expected)
        assert [value for delta in deltas for value in delta.token_logprobs] == pytest.approx(
            [one.logprob for one in expected], abs=1e-4
        )
        assert 1 < len(deltas) < len(expected)


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": True}}


@feature("tool calls (named and required)", "works", "arguments fit the schema where the tool is `strict`, as in plain vLLM")
@pytest.mark.parametrize(
    ("choice", "names", "count"),
    [({"type": "function", "function": {"name": "store"}}, {"store"}, 3), ("required", {"store", "load"}, 1)],
)
def test_tool_calls_fit_their_schema(server: OpenAI, choice: Any, names: set[str], count: int) -> None:
    for prompt in PROMPTS[:count]:
        messages: Any = [{"role": "user", "content": prompt}]
        tools: Any = [tool("store"), tool("load")]
        answer = server.chat.completions.create(
            model="demo",
            messages=messages,
            tools=tools,
            tool_choice=choice,
            temperature=0.0,
            frequency_penalty=2.0,  # a small model repeats blanks or calls to the end otherwise, with plain vLLM too
            max_tokens=200,
        )
        calls: Any = answer.choices[0].message.tool_calls
        assert calls
        assert {call.function.name for call in calls} <= names
        arguments = json.loads(calls[0].function.arguments)
        assert set(arguments) == set(SCHEMA["required"])
        assert arguments["kind"] in ("a", "b")
        assert isinstance(arguments["size"], int)


@pytest.mark.parametrize("sampling", [{"extra_body": {"min_p": 0.1}}, {"logit_bias": {"5": 1.0}}])
def test_the_server_answers_400_to_what_vllm_refuses(server: OpenAI, sampling: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match="not yet supported with speculative decoding"):
        server.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=4, **sampling)
