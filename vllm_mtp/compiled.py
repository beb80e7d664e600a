"""Compiles what the plugin runs beside vLLM's own graph, as vLLM compiles that."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


def compiler(vllm_config: Any) -> Callable[[Any], Any] | None:
    """How to compile a function of tensors under this configuration; None where the engine runs eagerly.

    As vLLM does for its model (compilation/wrapper.py, TorchCompileWithNoGuardsWrapper): the whole function in one graph, traced
    once and without guards. The first call marks the dimensions that vary; what else the function reads must not change.
    """
    from vllm.config import CompilationMode

    config = vllm_config.compilation_config
    if config.mode == CompilationMode.NONE:
        return None
    options = {**config.inductor_compile_config, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if vllm_config.device_config.device_type == "cpu":
        return lambda function: DirectCall(function, options)
    return lambda function: torch.compile(
        _with_code_of_its_own(function), fullgraph=True, dynamic=False, backend="inductor", options=options
    )


class DirectCall:
    """A compiled function whose graph is called without the code that Dynamo puts before it, which fetches every weight by its
    path anew: a tenth of a millisecond a call, for weights that on a CPU never become other tensors.

    Args:
        function: of tensors; it returns a tensor or a tree of tensors. The first call traces it.
        options: of torch.compile.
    """

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        # The calls of kernels and operations in C++ too: in Python each costs as much as a small kernel.
        self.options = {**{name: value for name, value in options.items() if name != "guard_filter_fn"}, "cpp_wrapper": True}
        guards = {"guard_filter_fn": options["guard_filter_fn"]}
        self.traced = torch.compile(
            _with_code_of_its_own(function), fullgraph=True, dynamic=False, backend=self._compile, options=guards
        )
        self.graph: Callable[..., Any] | None = None
        self.inputs: list[Any] = []
        self.given: list[tuple[int, int]] = []
        """(input of the graph, argument) of each input that is an argument."""
        self.sizes: list[tuple[int, int, int]] = []
        """(input of the graph, argument, dimension) of each input that is a size."""
        self.outputs: list[int] = []
        """Output of the graph of each tensor in the result."""

    def _compile(self, module: torch.fx.GraphModule, examples: list[Any], **_: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        symbolic = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
        graph: Any = compile_fx(module, examples, config_patches=self.options)

        def run(*inputs: Any) -> Any:
            outputs = graph(*inputs)
            self.seen = graph, symbolic, inputs, outputs
            return outputs

        return run

    def __call__(self, *args: torch.Tensor) -> Any:
        if self.graph is None:
            return self._first(args)
        inputs = self.inputs.copy()
        for i, argument in self.given:
            inputs[i] = args[argument]
        for i, argument, dimension in self.sizes:
            inputs[i] = args[argument].shape[dimension]
        outputs = self.graph(*inputs)
        return tree_unflatten([outputs[i] for i in self.outputs], self.structure)

    def _first(self, args: tuple[torch.Tensor, ...]) -> Any:
        """Traces the function and finds out which inputs of its graph are arguments, and which outputs make up the result."""
        result = self.traced(*args)
        graph, symbolic, inputs, outputs = self.seen
        del self.seen
        leaves, self.structure = tree_flatten(result)
        places = {id(argument): number for number, argument in enumerate(args)}
        self.inputs = list(inputs)
        for i, given in enumerate(inputs):
            if id(given) in places:
                self.given.append((i, places[id(given)]))
                self.inputs[i] = None
        symbols = {
            size.node.expr: (argument, dimension)
            for i, argument in self.given
            for dimension, size in enumerate(symbolic[i].shape)
            if isinstance(size, torch.SymInt)
        }
        for i, value in enumerate(symbolic):
            if isinstance(value, torch.SymInt):
                self.sizes.append((i, *symbols[value.node.expr]))
        self.outputs = [next(i for i, output in enumerate(outputs) if output is leaf) for leaf in leaves]
        self.graph = graph
        return result


def _with_code_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a code object that nothing else has.

    Dynamo keeps graphs by code object, and without guards the first one found is taken: that of another engine in this process, or
    of another method under the same decorator.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    return types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
