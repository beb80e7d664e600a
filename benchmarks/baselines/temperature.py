"""Sampling at a temperature under speculation on a CPU, as vLLM means it: see `vllm_mtp.compat` on `expand_batch_to_tokens`.

vLLM imports a worker extension in the worker's process and nothing else of it is used:

    LLM(..., worker_extension_cls="benchmarks.baselines.temperature.Mended")
"""

from vllm_mtp.compat import replace_expand_batch_to_tokens

replace_expand_batch_to_tokens()


class Mended:
    """Adds nothing to the worker: it stands for the import of this module."""
