"""Every name of vLLM (relative to its package) that is replaced: what, when, why, and until when.

All of them are there in vLLM 0.26 to 0.33; what exactly is expected of each says `vllm_mtp.contract`.

`engine.arg_utils.EngineArgs.create_speculative_config` (at registration)
    `method` is a closed list and `SpeculativeConfig` refuses unknown keys, so an adapter of ours is turned into `custom_class`
    before it is built. Until vLLM has a registry of speculative methods.

`sampling_params.SamplingParams._validate_spec_decode` (when selected, where requests come in)
    Refuses a request whose options for us are wrong, before it is in the engine. Until speculators may check requests.
    On the V1 runner also `logprob_token_ids`, as vLLM refuses `min_p`. The rejection sampler takes what its sampler gives for the
    bonus token as logits of the whole vocabulary; such a request beside one with `logprobs` ends the engine. Until it knows the
    parameter.

Both runners, when selected, in workers:

`v1.worker.gpu_model_runner.GPUModelRunner.initialize_kv_cache`, `v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache`
    Scratch blocks behind the scheduler's, and the cache for the drafter: it is given neither. Until a drafter may reserve blocks.
`v1.worker.gpu_worker.Worker.determine_available_memory`, `v1.worker.cpu_worker.CPUWorker.determine_available_memory`
    The memory of the scratch blocks comes off what the scheduler may use. Until the same.

V1 runner, when selected, in workers:

`v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs`
    A step in which no request has a draft is prepared and sampled as in plain vLLM. The runner asks only whether speculation is
    configured, and then runs the verification of nothing: a third of a small model's step. Until it looks at the step's drafts.
`model_executor.layers.utils.dispatch_cpu_unquantized_gemm` (CPU)
    Where the processor allows, linear layers in bfloat16 are packed for a kernel of ours instead of vLLM's, which takes 1.5 times
    as long for the rows of a step (`cpu_linear`). It is where vLLM chooses among its own, also when weights are loaded anew. Until
    one of those is as fast and takes a gated LoRA.
`v1.sample.rejection_sampler.rejection_sample` (acceptance by confidence)
    Rows of drafts that are taken without a match become certain, behind all that the request asks of its logits and in front of the
    draws. Until the rejection sampler has a hook there.
`v1.sample.rejection_sampler.expand_batch_to_tokens` (CPU)
    The CPU build's `expand_kernel` writes into an int64 copy of its output, so temperature, top-p and top-k reach the rejection
    sampler uninitialised, and sampled output under any speculation has the wrong distribution. Until that kernel writes its output.
`v1.sample.rejection_sampler._rejection_greedy_sample.kernel`, `_rejection_random_sample`, `_sample_recovered_tokens` (CPU, 0.30)
    The CPU build puts its kernels in the place of Triton's by names that 0.30 no longer calls, so any speculation ends with
    "Cannot inspect kernel parameters". Its launchers of other kernels are given them as it is done here. Until 0.30 is dropped.

V2 runner, when selected, in every process that holds the configuration:

`v1.worker.gpu.model_runner.init_speculator`
    Our speculator: the function is a chain of vLLM's own. Until it loads a class by name, as V1 does.
`v1.worker.gpu.model_runner.GPUModelRunner.load_model`
    The adapter goes into the loaded model: only speculators with a draft model are handed the target. Until all are.
`v1.worker.gpu.spec_decode.rejection_sampler.rejection_sample` (acceptance by confidence, in workers)
    As on the V1 runner, and until the same. The name in the rejection sampler's module, which its `_verify` calls.

On instances of the engine that selected us, where they belong: the target's `forward` (`expansion`), its linear layers' `apply`
(`gated_lora`), its attention layers' methods and their implementations' (`mask_attention`, `cpu_attention`); on the V1 runner,
on CPUs and for acceptance by confidence, `rejection_sampler.forward` (`verifier`); on the V2 runner its model
state's `prepare_attn` and, for acceptance by confidence, `add_request`, and the runner's `sample` (`runner.v2`).

All wrappers are idempotent and hand through whatever is not ours.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from packaging.version import InvalidVersion, Version

from vllm_mtp import contract
from vllm_mtp.requirements import Requirement
from vllm_mtp.vllm_source import Installed

TESTED_VLLM = ("0.30", "0.31", "0.32")
"""Minor releases on which engine tests pass (`python -m tests.compat`); which of them, says docs/support.md."""
OLDEST_VLLM = "0.26"
"""The oldest one whose source has all that is relied on; nothing is known of those before it."""
REMEDY = f"Install a vLLM that is tested ({', '.join(TESTED_VLLM)}), or"
WITHOUT = "serve without the adapter by leaving --speculative-config out."


class UnsupportedVersion(RuntimeError):
    """The installed vLLM lacks something that this package relies on."""


def check_vllm(requirements: Iterable[Requirement], option: str = "") -> None:
    """Looks whether the installed vLLM has what is relied on; warns once if it is one that was never tested.

    Args:
        requirements: what is relied on.
        option: which the operator can leave out to be served all the same; without one, that is the adapter.

    Raises:
        UnsupportedVersion: it has not.
    """
    from vllm_mtp.selection import vllm_version

    version = vllm_version()
    try:
        release = Version(version).release
    except InvalidVersion:  # built from a source tree without tags
        release = None
    if release is not None and release < Version(OLDEST_VLLM).release:
        raise UnsupportedVersion(f"mask-token prediction needs vLLM {OLDEST_VLLM} or later; this is {version}. {REMEDY} {WITHOUT}")
    _refuse(_violations(tuple(requirements)), version, option)
    if not is_tested(version):
        _warn_of_untested(version)


def is_tested(version: str) -> bool:
    """Whether the engine tests have run on this vLLM."""
    try:
        return ".".join(map(str, Version(version).release[:2])) in TESTED_VLLM
    except InvalidVersion:
        return False


@functools.cache
def _violations(requirements: tuple[Requirement, ...]) -> tuple[str, ...]:
    """Of the installed vLLM; reading its source takes half a second, and it stays the same."""
    return tuple(contract.violations(Installed(), requirements))


def _refuse(violations: Sequence[str], version: str, option: str = "") -> None:
    if violations:
        more = f" (and {len(violations) - 3} more)" if len(violations) > 3 else ""
        raise UnsupportedVersion(
            f"{option or 'mask-token prediction'} relies on what vLLM {version} does not have as expected: "
            f"{'; '.join(violations[:3])}{more}. {REMEDY} {'leave the option out.' if option else WITHOUT}"
        )


@functools.cache
def _warn_of_untested(version: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.mtp").warning(
        "Mask-token prediction is tested on vLLM %s, and this is %s. All names and signatures that it relies on are as expected, "
        "so it runs; whether they still mean the same is not known.",
        ", ".join(TESTED_VLLM),
        version,
    )


def recognise_adapters() -> None:
    """Makes `--speculative-config '{"method": "mtp", "model": "<adapter>", ..}'` select us when that is an adapter of ours."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.logger import init_logger

    try:
        _replace(EngineArgs, "create_speculative_config", _create_speculative_config)
    except UnsupportedVersion as error:  # vLLM itself must start, for whoever does without us
        init_logger("vllm.mtp").warning("Adapters for mask-token prediction are not recognised: %s", error)


def _replace(owner: Any, name: str, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Makes `owner.name` what `replacement` makes of the original; once, however often it is called."""
    if hasattr(getattr(owner, name, None), "vllm_mtp_original"):
        return
    from vllm_mtp.selection import vllm_version

    module, within = (owner.__name__, name) if inspect.ismodule(owner) else (owner.__module__, f"{owner.__name__}.{name}")
    hook = contract.of_hook(module.removeprefix("vllm."), within)
    _refuse(contract.violations(Installed(), [hook]), vllm_version())
    original = getattr(owner, name)
    new = functools.wraps(original)(replacement(original))
    new.vllm_mtp_original = original  # type: ignore[attr-defined]
    setattr(owner, name, new)


def _create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        from vllm.platforms import current_platform
        from vllm.sampling_params import SamplingParams

        from vllm_mtp import selection

        asked = selection.asked_for(self)
        if asked is None:
            return original(self, target_model_config, target_parallel_config)
        on_v2, on_cpu = selection.runs_on_v2(), current_platform.is_cpu()
        check_vllm(contract.needed(on_v2=on_v2, on_cpu=on_cpu))
        options = selection.resolve(
            asked,
            self.additional_config or {},
            target_model_config,
            target_parallel_config,
            request_loras=bool(self.enable_lora),
        )
        chosen = contract.options(
            on_v2=on_v2,
            probabilistic=options.draft_sample_method == "probabilistic",
            by_confidence=options.acceptance == "confidence",
            request_loras=bool(self.enable_lora),
            windows=on_cpu and len(set(getattr(target_model_config.hf_text_config, "layer_types", None) or ())) > 1,
        )
        for group in chosen:
            check_vllm(contract.GROUPS[group], contract.OPTIONS[group])
        self.additional_config = {**(self.additional_config or {}), "mtp": options.model_dump(mode="json")}
        if on_cpu:  # for vLLM's cache of compiled graphs, whose key it is part of: ours call these kernels
            from vllm_mtp.kernels import cpu

            self.additional_config["mtp_kernels"] = cpu.fingerprint()
        if self.disable_hybrid_kv_cache_manager is None:
            # Layers with a sliding window then have the same blocks as those without, and a fork has one block table for all.
            # Nothing changes for models whose layers are all alike.
            self.disable_hybrid_kv_cache_manager = True
        if (rows := selection.scheduled_rows(options, self)) is not None:
            self.max_num_scheduled_tokens = rows
        given = self.speculative_config, self.spec_method, self.spec_model, self.spec_tokens
        self.speculative_config, self.spec_method, self.spec_model, self.spec_tokens = (
            selection.as_custom_class(options),
            None,
            None,
            None,
        )
        try:
            config = original(self, target_model_config, target_parallel_config)
        finally:
            self.speculative_config, self.spec_method, self.spec_model, self.spec_tokens = given
        if on_v2:
            config = selection.for_v2_runner(
                config, options, target_model_config.hf_text_config, self.max_num_seqs, self.max_num_batched_tokens
            )
        from vllm_mtp import metrics

        # Into whatever process the configuration is sent.
        config.mask_token_options, config.mask_token_metrics = options, metrics.folder()
        _replace(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
        return config

    return create_speculative_config


def _validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate_spec_decode(self: Any, speculative_config: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        from vllm_mtp import selection

        original(self, speculative_config)
        options = getattr(speculative_config, "mask_token_options", None)
        if options is None:
            return
        on_v2 = speculative_config.model != selection.PROPOSER
        try:
            selection.check_request(self.extra_args, options, on_v2=on_v2)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="extra_args") from None
        if self.logprob_token_ids is not None and not on_v2:
            raise VLLMValidationError(
                "The logprob_token_ids sampling parameter is not supported with mask-token prediction on vLLM's V1 model runner.",
                parameter="logprob_token_ids",
            )

    return validate_spec_decode


def hook_v1_runner() -> None:
    """Gives our proposer its scratch blocks and its runner; called once the proposer is selected, in the worker."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _replace(GPUModelRunner, "initialize_kv_cache", _initialize_kv_cache)
    _replace(GPUModelRunner, "_prepare_inputs", _prepare_inputs_of_a_step_without_drafts)
    _hook_worker()
    if current_platform.is_cpu():
        from vllm.model_executor.layers import utils

        _replace(utils, "dispatch_cpu_unquantized_gemm", _dispatch_cpu_unquantized_gemm)
        replace_expand_batch_to_tokens()
        _give_cpu_kernels_to_launchers()


def hook_rejection_sample() -> None:
    """Lets drafts be taken without a match on the V1 runner; called in the worker once the operator has asked for it."""
    from vllm.v1.sample import rejection_sampler

    _replace(rejection_sampler, "rejection_sample", _rejection_sample)


def hook_v2_rejection_sample() -> None:
    """`hook_rejection_sample` for the V2 runner."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    _replace(rejection_sampler, "rejection_sample", _v2_rejection_sample)


def hook_v2_runner() -> None:
    """Puts our speculator where vLLM chooses among its own; called once it is selected, in whatever process holds the
    configuration, for the V2 runner imports no class by name."""
    from vllm.v1.worker.gpu import model_runner

    _replace(model_runner, "init_speculator", _init_speculator)
    _replace(model_runner.GPUModelRunner, "load_model", _load_model)
    _replace(model_runner.GPUModelRunner, "initialize_kv_cache", _initialize_kv_cache)
    _hook_worker()


def _hook_worker() -> None:
    from vllm.platforms import current_platform

    module = "cpu_worker" if current_platform.is_cpu() else "gpu_worker"
    worker = getattr(importlib.import_module(f"vllm.v1.worker.{module}"), "CPUWorker" if current_platform.is_cpu() else "Worker")
    _replace(worker, "determine_available_memory", _determine_available_memory)


def _ours(runner: Any) -> Any:
    """The runner's proposer (V1) or speculator (V2) if it is ours, else None."""
    from vllm_mtp.target import MaskTokenTarget

    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    return drafter if isinstance(drafter, MaskTokenTarget) else None


def _init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_speculator(vllm_config: Any, device: Any, *args: Any) -> Any:
        from vllm_mtp import selection

        if not selection.selected(vllm_config):
            return original(vllm_config, device, *args)
        from vllm_mtp.runner.v2 import MaskTokenSpeculator

        return MaskTokenSpeculator(vllm_config, device)

    return init_speculator


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        speculator = _ours(self)
        if speculator is not None:
            speculator.load_model(self)

    return load_model


def _initialize_kv_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        drafter = _ours(self)
        if drafter is None:
            return original(self, kv_cache_config, *args, **kwargs)
        original(self, drafter.with_scratch_blocks(kv_cache_config), *args, **kwargs)
        drafter.bind(self)
        return None

    return initialize_kv_cache


def _prepare_inputs_of_a_step_without_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if _ours(self) is None or scheduler_output.scheduled_spec_decode_tokens:
            return original(self, scheduler_output, *args, **kwargs)
        configured, self.speculative_config = self.speculative_config, None
        try:
            return original(self, scheduler_output, *args, **kwargs)
        finally:
            self.speculative_config = configured

    return _prepare_inputs


def _rejection_sample(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_mtp import confidence

    def rejection_sample(
        draft_token_ids: Any,
        num_draft_tokens: Any,
        max_spec_len: Any,
        cu_num_draft_tokens: Any,
        draft_probs: Any,
        target_logits: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return original(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            confidence.certain(target_logits, draft_token_ids),
            *args,
            **kwargs,
        )

    return rejection_sample


def _v2_rejection_sample(original: Callable[..., Any]) -> Callable[..., Any]:
    from vllm_mtp import confidence

    def rejection_sample(
        target_logits: Any,
        draft_logits: Any,
        draft_sampled: Any,
        cu_num_logits: Any,
        pos: Any,
        idx_mapping: Any,
        expanded_idx_mapping: Any,
        expanded_local_pos: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return original(
            confidence.certain(target_logits, draft_sampled, expanded_idx_mapping, expanded_local_pos),
            draft_logits,
            draft_sampled,
            cu_num_logits,
            pos,
            idx_mapping,
            expanded_idx_mapping,
            expanded_local_pos,
            *args,
            **kwargs,
        )

    return rejection_sample


def _determine_available_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    def determine_available_memory(self: Any) -> int:
        available = original(self)
        drafter = _ours(self.model_runner)
        return available if drafter is None else drafter.without_scratch_memory(available, self.model_runner)

    return determine_available_memory


def _dispatch_cpu_unquantized_gemm(original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        import torch
        from vllm.config import get_current_vllm_config_or_none

        from vllm_mtp import selection
        from vllm_mtp.cpu_linear import PanelLinear, fits_panels

        packed = getattr(layer, "cpu_linear", None)
        config = get_current_vllm_config_or_none()
        if isinstance(packed, PanelLinear):
            packed.load(layer.weight)
        elif config is not None and selection.selected(config) and selection.uses_kernels(config) and fits_panels(layer):
            layer.cpu_linear = PanelLinear(layer.weight)
        else:
            return original(layer, remove_weight)
        if remove_weight:
            layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        return None

    return dispatch_cpu_unquantized_gemm


def replace_expand_batch_to_tokens() -> None:
    """Temperature, top-p and top-k reach the rejection sampler; may be called any number of times."""
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        """x[i] once for each token of request i, [num_tokens]; `replace_from` becomes `replace_to`."""
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        return torch.where(x == replace_from, replace_to, x).to(x.dtype).repeat_interleave(counts.long(), output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def _give_cpu_kernels_to_launchers() -> None:
    from vllm.v1.sample import rejection_sampler

    kernels = sys.modules.get("vllm.utils.cpu_triton_utils")  # the CPU runner has imported it, where there is one
    for name in ("rejection_greedy_sample", "rejection_random_sample", "sample_recovered_tokens"):
        launcher: Any = getattr(rejection_sampler, f"_{name}", None)
        kernel = getattr(kernels, f"{name}_kernel", None)  # later releases register theirs, and have no such names
        # A function is what `triton.jit` leaves of a kernel where there is no Triton.
        if kernel is not None and inspect.isfunction(getattr(launcher, "kernel", None)):
            launcher.kernel = kernel
