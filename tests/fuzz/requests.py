"""Requests: a speculating engine refuses what plain vLLM refuses, with the same words, answers greedy requests with the same
tokens, keeps to what sampled requests ask for, and serves on.

Both engines run in this process, one after the other, on the demo model in float32: the plain one first, for all requests.
"""

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.progress import track
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams

from tests.engine.conftest import Engine, Engines, speculative  # sets vLLM's environment; before vLLM
from tests.fuzz.report import Finding, Report, main, time_limit
from vllm_mtp import demo

BATCH, BATCH_SECONDS = 48, 300.0
VOCABULARY, MODEL_LEN = 2048, 512
REFUSED_UNDER_SPECULATION = (
    "min_p and logit_bias sampling parameters are not yet supported with speculative decoding",
    "logprob_token_ids sampling parameter is not supported with mask-token prediction",
)
ODD_EXTRA: tuple[Any, ...] = (
    {},
    {"mtp": {"layout": "linear"}},
    {"mask_token_id": 5, "num_speculative_tokens": 99},
    {"kv_transfer_params": None},
    {"": None, "\0": "\x1b[2J"},
    {"mtp_drafts": 0},
    {"mtp_drafts": 2, "mtp_tau": None},
    {"a": 2**64},
    {"a": -(2**63) - 1},
    {"a": [[[{"b": 1e308}]]]},
    {"x": "y" * 100_000},
    {"__class__": "__import__('os')"},
)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}}, "required": ["n"]}
STRUCTURED: tuple[dict[str, Any], ...] = (
    {"choice": ["self", "return None", "raise"]},
    {"choice": []},
    {"regex": r"[a-z]{2,5} = \d+;"},
    {"regex": "("},
    {"regex": r"(a|b)*\1"},
    {"json": SCHEMA},
    {"json": "{"},
    {"json": {"type": "no such type"}},
    {"json": {"$ref": "#"}},
    {"json_object": True},
    {"grammar": 'root ::= "a" root | "b"'},
    {"grammar": "root ::= nothing"},
    {"grammar": ""},
    {"regex": "a", "choice": ["b"]},
    {},
)


@dataclass
class Asked:
    """One request: a kind for the summary, its prompt, and the arguments of SamplingParams."""

    kind: str
    prompt: Any
    sampling: dict[str, Any]


def _ids(rng: random.Random) -> list[int]:
    length = (
        rng.choice((1, 1, 2, 3, 5, 8, 16, 31, 32, 33, 40, 64))
        if rng.random() < 0.93
        else rng.choice((127, 128, 129, 500, 508, 511))
    )
    match rng.randrange(5):
        case 0:
            return [rng.choice((0, 1, 2, VOCABULARY - 1, VOCABULARY - 2, rng.randrange(VOCABULARY)))] * length
        case 1:
            return [rng.choice((0, 1, VOCABULARY - 1)) for _ in range(length)]
        case _:
            return [rng.randrange(VOCABULARY) for _ in range(length)]


def _prompt(rng: random.Random, texts: list[str]) -> tuple[str, Any]:
    draw = rng.random()
    if draw < 0.08:
        odd = rng.choice(
            (
                [],
                [VOCABULARY],
                [3, 2**31 - 1, 3],
                [2**31],
                [2**63],
                [-1],
                [5, -5, 5],
                [7] * MODEL_LEN,
                [7] * (MODEL_LEN + 1),
                [7] * 5000,
            )
        )
        return "odd prompt", {"prompt_token_ids": odd}
    if draw < 0.4:
        text = rng.choice(texts)
        return "text", text[-rng.randrange(1, 200) :]
    if draw < 0.45:
        return "odd text", rng.choice(
            ("", " ", "\0", "\u202e\U0001f600", "<|endoftext|><s></s>[MASK]<mask>", "\ufffd" * 20, "a" * 3000)
        )
    return "token ids", {"prompt_token_ids": _ids(rng)}


def _tokens(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 3, 50)))]


PARAMETERS: dict[str, Callable[[random.Random], Any]] = {
    "top_p": lambda rng: rng.choice((0.0, 1e-9, 0.1, 0.9, 1.0, 1.1, -1.0, math.nan)),
    "top_k": lambda rng: rng.choice((-2, -1, 0, 1, 2, 50, VOCABULARY, VOCABULARY + 1, 2**31 - 1)),
    "min_p": lambda rng: rng.choice((0.0, 1e-6, 0.1, 1.0, 1.1, -0.1)),
    "presence_penalty": lambda rng: rng.choice((-2.0, -1.5, 0.5, 2.0, 2.1, math.nan)),
    "frequency_penalty": lambda rng: rng.choice((-2.0, -0.3, 0.7, 2.0, -2.1)),
    "repetition_penalty": lambda rng: rng.choice((0.0, 1e-3, 0.5, 1.3, 10.0, -1.0, math.inf)),
    "stop": lambda rng: rng.choice(("", "e", [], [" "], ["self", "\n"], ["x" * 2000], ["\0"], [""], ["e", "re", "ret"])),
    "stop_token_ids": lambda rng: rng.choice(
        ([], [0], [VOCABULARY - 1], _tokens(rng), list(range(VOCABULARY)), [VOCABULARY], [-1])
    ),
    "bad_words": lambda rng: rng.choice(([], ["self", " self"], ["return"] * 3, [""], ["\n"], [" "], ["e", "a", "i"])),
    "logit_bias": lambda rng: rng.choice(({}, {5: 100.0}, {5: -100.0}, {0: 1.0}, {VOCABULARY: 1.0}, {-1: 1.0}, {7: 1e9})),
    "allowed_token_ids": lambda rng: rng.choice(
        ([], [0], [1], [VOCABULARY - 1], _tokens(rng), [VOCABULARY], [-1], list(range(5, 900)))
    ),
    "min_tokens": lambda rng: rng.choice((-1, 0, 1, 3, 8, 13)),
    "ignore_eos": lambda rng: rng.random() < 0.5,
    "include_stop_str_in_output": lambda rng: rng.random() < 0.5,
    "skip_special_tokens": lambda rng: rng.random() < 0.5,
    "detokenize": lambda rng: rng.random() < 0.5,
    "n": lambda rng: rng.choice((0, 1, 2, 3, -1)),
    "seed": lambda rng: rng.choice((None, -1, 0, 1, 2**31, 2**63 - 1, -(2**63))),
    "logprobs": lambda rng: rng.choice((-2, -1, 0, 1, 5, 20, 21, True)),
    "prompt_logprobs": lambda rng: rng.choice((-2, 0, 1, 5, 21)),
    "structured_outputs": lambda rng: rng.choice(STRUCTURED),
    "extra_args": lambda rng: rng.choice(ODD_EXTRA),
    "output_kind": lambda rng: rng.choice((RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY)),
    "stream_interval": lambda rng: rng.choice((0, 1, 3, 100)),
    "thinking_token_budget": lambda rng: rng.choice((-2, -1, 0, 5, 1.5)),
    "repetition_detection": lambda rng: rng.choice(((0, 0, 0), (2, 1, 2), (1, 2, 2), (3, 1, 1), (20, 1, 4))),
    "logprob_token_ids": lambda rng: rng.choice(([], [0, 5], [VOCABULARY - 1], [VOCABULARY])),
    "flat_logprobs": lambda rng: rng.random() < 0.5,
}


def asked(seed: int, number: int, texts: list[str]) -> Asked:
    """Request `number` of `seed`."""
    rng = random.Random(f"{seed}/{number}")
    kind, prompt = _prompt(rng, texts)
    for _ in range(rng.choice((1, 8, 8, 8))):  # what is refused tests little: mostly drawn again
        names = rng.sample(list(PARAMETERS), rng.choice((0, 1, 1, 1, 2, 2, 3, 5)))
        sampling = {name: PARAMETERS[name](rng) for name in names}
        sampling["temperature"] = (
            0.0 if rng.random() < 0.75 else rng.choice((1e-6, 0.01, 0.7, 1.0, 2.0, 2.1, -0.1, math.nan, math.inf))
        )
        sampling["max_tokens"] = rng.randint(1, 12) if rng.random() < 0.9 else rng.choice((-1, 0, 1, 40, 10**6, 2**40))
        if sampling["max_tokens"] > 40 and len(str(prompt)) < 2000:
            sampling["max_tokens"] = 12  # runs to the model's end only where that is near
        try:
            _parameters(sampling)
            break
        except Exception:
            continue
    if names and kind in ("text", "token ids"):
        kind = names[0] if len(names) == 1 else "several parameters"
    return Asked(kind, prompt, sampling)


def _parameters(sampling: dict[str, Any]) -> SamplingParams:
    made = dict(sampling)
    if made.get("structured_outputs") is not None:
        made["structured_outputs"] = StructuredOutputsParams(**made["structured_outputs"])
    if made.get("repetition_detection") is not None:
        most, least, count = made["repetition_detection"]
        made["repetition_detection"] = RepetitionDetectionParams(most, least, count)
    return SamplingParams(**made)


@dataclass
class Answer:
    """What became of a request: the words of a refusal, or its completions as (tokens, text, why it ended, what stopped it)."""

    refusal: str = ""
    completions: tuple[Any, ...] = ()
    logprobs: tuple[Any, ...] = ()


SENTINEL = Asked("sentinel", {"prompt_token_ids": [5, 6, 7, 8, 9]}, {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True})


def answers(engine: Engine, batch: list[Asked]) -> list[Answer]:
    """What `engine` makes of a batch: the requests are added one by one, and run together."""
    core = engine.llm.llm_engine
    found = [Answer() for _ in batch]
    for i, request in enumerate(batch):
        try:
            core.add_request(str(i), request.prompt, _parameters(request.sampling))
        except Exception as error:
            found[i] = Answer(refusal=f"{type(error).__name__}: {error}")
    ended: dict[int, dict[int, Any]] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            for completion in output.outputs:
                if completion.finish_reason is not None:
                    ended.setdefault(int(output.request_id), {})[completion.index] = completion
    for i, by_index in ended.items():
        completions = [by_index[index] for index in sorted(by_index)]
        found[i] = Answer(
            completions=tuple((tuple(c.token_ids), c.text, c.finish_reason, c.stop_reason) for c in completions),
            logprobs=tuple(None if c.logprobs is None else len(c.logprobs) for c in completions),
        )
    return found


def difference(request: Asked, plain: Answer, ours: Answer) -> str:  # noqa: PLR0911
    """What is wrong with our answer beside plain vLLM's; empty: nothing."""
    sampling = request.sampling
    if ours.refusal != plain.refusal:
        biased = sampling.get("min_p", 0) > 1e-5 or sampling.get("logit_bias")
        reasons = (bool(biased), sampling.get("logprob_token_ids") is not None)
        known = any(there and words in ours.refusal for there, words in zip(reasons, REFUSED_UNDER_SPECULATION, strict=True))
        if known:  # where plain vLLM refuses too, for something else, which is named first is not said
            return ""
        return f"refused with {ours.refusal[:200]!r}, by plain vLLM with {plain.refusal[:200]!r}"
    if ours.refusal:
        return ""
    if sampling["temperature"] == 0:
        return "" if ours == plain else f"answered {ours}, by plain vLLM {plain}"
    if len(ours.completions) != sampling.get("n", 1) or ours.logprobs != tuple(
        None if sampling.get("logprobs") is None else len(tokens) for tokens, *_ in ours.completions
    ):
        return f"{len(ours.completions)} completions with {ours.logprobs} logprobs"
    for tokens, _, reason, _ in ours.completions:
        if reason == "error" and any(reason == "error" for *_, reason, _ in plain.completions):
            continue  # a grammar, or what is allowed beside it, lets no token go on
        allowed = sampling.get("allowed_token_ids") or range(VOCABULARY)
        ends = (1, *(sampling.get("stop_token_ids") or ()))
        if (
            not 0 < len(tokens) <= max(sampling["max_tokens"], 1)
            or not all(token in allowed or token in ends for token in tokens)
            or reason not in ("stop", "length", "repetition")
        ):
            return f"sampled {tokens}, ended by {reason}"
    return ""


def fuzz(engines: Engines, cases: range, seed: int, progress: bool = False, **options: Any) -> Report:
    """Runs requests `cases` of `seed` in a plain engine and in a speculating one.

    Args:
        engines: starts them.
        options: `layout` and other options of ours.
    """
    texts = demo.prompts()
    requests = {number: asked(seed, number, texts) for number in cases}
    batches = [list(cases[i : i + BATCH]) for i in range(0, len(cases), BATCH)]
    report, begin = Report(), time.monotonic()
    found: dict[str, dict[int, Answer]] = {}
    for name, speculation in (("plain", None), ("ours", speculative(demo.ADAPTER, 4, **options))):
        engine, found[name] = engines(speculation), {}
        usual = answers(engine, [SENTINEL])[0]
        for batch in track(batches, f"{name}, batches of {BATCH}", disable=not progress):
            started = time.process_time()
            with time_limit(BATCH_SECONDS):
                *outputs, sentinel = answers(engine, [*(requests[number] for number in batch), SENTINEL])
            found[name] |= dict(zip(batch, outputs, strict=True))
            if sentinel != usual:
                report.findings.append(Finding(batch[0], "sentinel", f"{name} answers {sentinel} now, {usual} before", str(batch)))
            report.slowest = max(report.slowest, time.process_time() - started)
    for number, request in requests.items():
        plain, ours = found["plain"][number], found["ours"][number]
        wrong = difference(request, plain, ours)
        if wrong:
            report.findings.append(Finding(number, request.kind, wrong, f"{str(request.prompt)[:300]} {request.sampling}"))
        greedy = request.sampling["temperature"] < 1e-5
        outcome = (
            "refused by both" if plain.refusal else "refused under speculation" if ours.refusal else "same" if greedy else "sampled"
        )
        report.add(request.kind, "FINDING" if wrong else outcome)
    report.seconds = time.monotonic() - begin
    return report


def _from_command_line(arguments: argparse.Namespace) -> Report:
    engines = Engines()
    try:
        return fuzz(engines, range(arguments.first, arguments.first + arguments.count), arguments.seed, progress=True)
    finally:
        engines.close()


if __name__ == "__main__":
    main("requests", _from_command_line, 2_000)
