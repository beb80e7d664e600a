"""Compiles what the plugin runs beside vLLM's own graph, as vLLM compiles that."""

import types
from collections.abc import Callable
from typing import Any

import torch


def compiler(vllm_config: Any) -> Callable[[Any], Any] | None:
    """How to compile a function under this configuration; None where the engine runs eagerly.

    As vLLM does for its model (compilation/wrapper.py, TorchCompileWithNoGuardsWrapper): the whole function in one graph, traced
    once and without guards. The first call marks the dimensions that vary; what else the function reads must not change.
    """
    from vllm.config import CompilationMode

    config = vllm_config.compilation_config
    if config.mode == CompilationMode.NONE:
        return None
    options = {**config.inductor_compile_config, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return lambda function: torch.compile(
        _with_code_of_its_own(function), fullgraph=True, dynamic=False, backend="inductor", options=options
    )


def _with_code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a code object that nothing else has.

    Dynamo keeps graphs by code object, and without guards the first one found is taken: that of another engine in this process, or
    of another method under the same decorator.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
