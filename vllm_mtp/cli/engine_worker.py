"""One vLLM engine in a process of its own, driven step by step over a pipe: one JSON object a line in, one a line out.

    python -m vllm_mtp.cli.engine_worker < requests

The first line in holds the arguments of `vllm.LLM`, each one after it a generation to run. `vllm_mtp.cli.engine` is the other end.
"""

import json
import os
import sys
import time
from collections import deque
from typing import Any, TextIO


def _take_stdout() -> TextIO:
    """The pipe to the parent, taken away from everything else that may write to standard output."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def generate(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Complete `prompts` with at most `concurrency` in flight; tokens and text of every step by request.

    `concurrency` may be a list: prompt i starts when fewer than `concurrency[i]` are in flight.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    prompts = (tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt for prompt in request["prompts"])
    waiting = deque(enumerate(prompts))
    outputs: list[dict[str, Any]] = [{"tokens": [], "steps": [], "pieces": []} for _ in waiting]
    limits = request["concurrency"]
    limits = limits if isinstance(limits, list) else [limits] * len(waiting)
    running = num_forwards = 0
    start = time.perf_counter()
    while waiting or running:
        while waiting and running < limits[waiting[0][0]]:
            index, ids = waiting.popleft()
            seed = None if request.get("seed") is None else request["seed"] + index
            params = SamplingParams(**request["sampling"], seed=seed, output_kind=RequestOutputKind.DELTA)
            engine.add_request(str(index), {"prompt_token_ids": ids}, params)
            outputs[index]["seconds"] = -time.perf_counter()
            running += 1
        num_forwards += 1
        for result in engine.step():
            output, delta = outputs[int(result.request_id)], result.outputs[0]
            if delta.token_ids:
                output["tokens"].extend(delta.token_ids)
                output["steps"].append(len(delta.token_ids))
                output["pieces"].append(delta.text)
            elif delta.text:  # text held back until the last token
                output["pieces"][-1] += delta.text
            if result.finished:
                output["seconds"] += time.perf_counter()
                running -= 1
    return {"seconds": time.perf_counter() - start, "num_forwards": num_forwards, "outputs": outputs}


def main() -> None:
    pipe = _take_stdout()

    def reply(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    try:
        from vllm import LLM

        from vllm_mtp.breaker import failures

        llm = LLM(**json.loads(sys.stdin.readline()))
        reply({"ready": True})
        for line in sys.stdin:
            generation = generate(llm, json.loads(line))
            if failures:
                raise RuntimeError(f"speculation ended while {failures[0]}")
            reply(generation)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
