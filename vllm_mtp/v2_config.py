"""The speculative configuration of an engine on vLLM's V2 runner, which brings our hooks into every process it is sent to."""

from typing import Any

from vllm.config import SpeculativeConfig

from vllm_mtp import compat


class MaskTokenSpeculativeConfig(SpeculativeConfig):
    """vLLM's own, and the sign that our speculator is to be chosen.

    The V1 runner imports a proposer by name, in the worker; the V2 runner imports none, so the configuration itself, as it is made
    or unpickled, replaces what must be replaced.
    """

    def use_eagle(self) -> bool:
        """False: vLLM takes it for "has a draft model with a draft KV cache". For that it would drop the last block of every
        prefix-cache hit, reserve look-ahead slots, and keep a distance to the end of prompt chunks."""
        return False

    def hook(self) -> None:
        """Replaces names of the V2 runner in this process."""
        compat.hook_v2_runner()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.hook()
