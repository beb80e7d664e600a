"""Request LoRA adapters (`--enable-lora`) beside mask rows.

vLLM's kernels add each row the adapter of its request, going by one mapping of the step's rows (lora/punica_wrapper), which the
runner makes for the N rows that it scheduled. Mask rows carry their request's adapter too, so that they speak for the model that
the request is served by: while a step with mask rows runs, the mapping is one of N + M rows.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from vllm_mtp.layout import Groups

P = ParamSpec("P")
T = TypeVar("T")


class RequestLoRAs:
    """The request adapters of a served model.

    Args:
        target: a loaded vLLM model, its layers wrapped for request adapters or not.
    """

    def __init__(self, target: torch.nn.Module) -> None:
        self.manager: Any = getattr(target, "lora_manager", None)
        self.of_the_base = False
        if self.manager is not None:
            from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

            for module in target.modules():
                if isinstance(module, (LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)):
                    self._make_optional(module)

    def _make_optional(self, wrapper: Any) -> None:
        adapted = wrapper.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return wrapper.base_layer(*args, **kwargs) if self.of_the_base else adapted(*args, **kwargs)

        wrapper.forward = forward

    def without(self, function: Callable[P, T]) -> Callable[P, T]:
        """`function` of the target's embedding or unembedding, for rows that the mapping does not know: the base model's."""
        if self.manager is None:
            return function

        @wraps(function)
        def base(*args: P.args, **kwargs: P.kwargs) -> T:
            self.of_the_base = True
            try:
                return function(*args, **kwargs)
            finally:
                self.of_the_base = False

        return base

    @contextmanager
    def mapped(self, groups: Groups) -> Iterator[None]:
        """Lets a step's mask rows carry the adapters of their requests; after it, the mapping is the runner's again."""
        # lora/model_manager.py, LoRAModelManager: the mapping that the runner set when it prepared the step.
        mapping = None if self.manager is None else self.manager._last_mapping
        if mapping is None:
            yield
            return
        last_rows = (groups.query_start_cpu[1 : -groups.num_groups] - 1).tolist()
        adapters = [mapping.index_mapping[row] for row in last_rows]
        requests = groups.request[groups.group_of_row].tolist()
        rows = (*mapping.index_mapping[: groups.num_real], *(adapters[request] for request in requests))
        self.manager.set_adapter_mapping(dataclasses.replace(mapping, index_mapping=rows))
        try:
            yield
        finally:
            self.manager.set_adapter_mapping(mapping)
