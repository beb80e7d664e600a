"""Names, defaults and limits of every option: what an adapter says of itself, and what an operator may ask for.

Imports neither torch nor vLLM, so that an error in a configuration is found before anything heavy is loaded.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_MASK_TOKENS = 32
DEFAULT_TAU = 0.9
MAX_SIZE, MAX_LAYERS = 2**24, 1000  # far above any model; a stranger's number must not make us allocate without end


class StrictModel(BaseModel):
    """A frozen model in which a misspelt key is an error. With `strict=True` a value of another type is one too: 4 is no "4".

    What stands in quotes below a field is its description, which the documentation is made from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseFacts(StrictModel, strict=True):
    """What an adapter must find in the base model that it is loaded beside."""

    name_or_path: str
    """How users find the base: its name on the hub, or a folder."""
    model_type: str
    """`model_type` of the base's config.json."""
    hidden_size: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    """d, the width of the base's states."""
    num_hidden_layers: Annotated[int, Field(gt=0, le=MAX_LAYERS)]
    """The base's layers."""
    vocab_size: Annotated[int, Field(gt=0, le=MAX_SIZE)]
    """Rows of the base's embedding."""
    fingerprint: str | None = None
    """SHA-256 of the base's norm weights rounded to bfloat16 (`adapter.fingerprint`); tells two bases of one shape apart."""


class SamplerConfig(StrictModel, strict=True):
    """The sampler head (Your LLM Knows the Future, section 3.2): two blocks Linear -> SiLU -> LayerNorm over [E(y_prev); z]."""

    residual: bool = True
    """Add the mask state z to the head's output before the unembedding. The paper's head has no residual."""


class AdapterConfig(StrictModel, strict=True):
    """`config.json` of an adapter folder."""

    model_type: Literal["vllm_mtp"] = "vllm_mtp"
    """What makes a folder an adapter: the plugin acts when it reads this, and only then."""
    format_version: Literal[1] = 1
    """Raised when older servers could not read the folder."""
    kind: Literal["gated-lora"] = "gated-lora"
    """A LoRA that acts on mask rows only."""
    num_mask_tokens: Annotated[int, Field(ge=1, le=MAX_MASK_TOKENS)]
    """k: the number of mask tokens trained, and so the largest number of drafts that come from them."""
    base: BaseFacts
    """The base model that the adapter is for."""
    sampler: SamplerConfig | None = SamplerConfig()
    """The sampler head's shape. None: no sampler head; drafts are the plain head's argmax."""
    serving: "ServingDefaults | None" = None
    """Serving options that the adapter sets for its users."""
    training: dict[str, object] = Field(default_factory=dict)
    """Provenance: the command, its options, versions, steps, final losses and held-out figures. Not read by the server."""


Layout = (
    Literal["quadratic", "linear", "auto"]
    | Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_MASK_TOKENS)], ...], Field(min_length=1)]
)
"""A list gives the length of the group behind row 0, 1, .. of a request; entry j is used when exactly j drafts were accepted."""


MaskWindow = Annotated[int, Field(ge=MAX_MASK_TOKENS)]
DraftSampleMethod = Literal["greedy", "probabilistic"]
"""vLLM's own name and values (config/speculative.py, SpeculativeConfig.draft_sample_method)."""


Kernels = Literal["auto", "torch"]
Acceptance = Literal["lossless", "confidence"]
Tau = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ServingDefaults(StrictModel, strict=True):
    """Serving options that an adapter may set for its users; an operator's own options win."""

    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_MASK_TOKENS)] | None = None
    """As the operator's option of this name; so are those below."""
    layout: Layout | None = None
    candidates: Annotated[int, Field(ge=1)] | None = None
    draft_sample_method: DraftSampleMethod | None = None
    mask_window: MaskWindow | None = None
    """`vllm-mtp train` puts the length of its sequences here."""


class ServingOptions(StrictModel, strict=True):
    """What `--speculative-config` (and `--additional-config '{"mtp": {..}}'`) may say beside vLLM's own keys."""

    adapter: str
    """The adapter's folder; vLLM's key for it is `model`."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_MASK_TOKENS)]
    """k, most drafts of a request a step. Of mask tokens come at most as many as the adapter has; more are looked up (`lookup`).
    Left out: what the adapter's `serving` says, else its number of mask tokens, and with `lookup` 16 if those are fewer."""
    layout: Layout = "auto"
    """quadratic: k mask tokens behind every row, so that there are k fresh drafts whatever is accepted, for k(k+1) mask rows a
    request. linear: k behind the last row only, so that there are drafts only when all were accepted. auto: groups of each
    request's own, where they are likely to bring a token (`shaping`) for what a row costs at this batch size, measured while
    serving, or none (`load.LoadControl`); on the V2 runner the comb that promises most by the model's sizes (`load.best_comb`). A
    list: k + 1 group lengths, one behind every row."""
    mask_token_id: Annotated[int, Field(ge=1, le=MAX_SIZE)] | None = None
    """For weights that were not trained here and do not say it. Full checkpoints: the one token that every mask row is embedded as.
    Adapters for noise rows: the end of the token ids that noise is drawn from, 1 the first of them. None: an adapter of ours."""
    candidates: Annotated[int, Field(ge=1)] = 64
    """C: how many of the plain head's best tokens the sampler head scores for each mask state. The vocabulary size or more gives
    the paper's full computation."""

    draft_sample_method: DraftSampleMethod = "greedy"
    """probabilistic: drafts of a request at temperature t are drawn from softmax(scores / t) and accepted with probability
    min(1, p / q); more of them are accepted above temperature 0, and the output has the same distribution."""

    lookup: bool | None = None
    """Draft also from a request's own text, what followed its last tokens where they stood there before, when that promises more
    than mask tokens do; acceptance is as ever. With layout auto on the V1 runner, and None means yes there."""

    max_mask_rows: Annotated[int, Field(ge=1)] | None = None
    """Most mask rows of a step, however many requests it has; those beyond go without drafts. None: on a CPU as many as
    --max-num-batched-tokens leaves, on an accelerator `load.MASK_ROWS_OF_AN_ACCELERATOR`."""

    mask_window: MaskWindow | None = None
    """Mask tokens look no further back than so many tokens, themselves included, and at the request's first four; the base's own
    rows see all. They then cost no more at a long context than at a short one, and stay within the lengths that the adapter learned
    from. It changes drafts, not what is accepted. Where no kernel of this package runs (`kernels`) it is left out, with a warning.
    None: they see all."""

    kernels: Kernels = "auto"
    """auto: this package's kernels where there are some for the device, Triton's on CUDA GPUs and C++ on CPUs; which of them run
    is logged. torch: none of them, but torch's operations and the server's own attention backend, which is slower; to tell whether
    a kernel is at fault."""

    acceptance: Annotated[
        Acceptance,
        Field(
            description="lossless: drafts are verified, and the output is the base model's. confidence: a draft whose own "
            "probability is at least `tau` is taken without a match, the others are verified; the output may differ from the base "
            "model's, and requests may set their own `mtp_tau`. An adapter cannot choose it for its users."
        ),
    ] = "lossless"
    tau: Annotated[
        Tau | None,
        Field(
            description="Threshold of acceptance by confidence for requests that set none. Above 1 nothing is taken without a "
            f"match, so that only requests which ask for it are answered with loss. None: {DEFAULT_TAU}, if `acceptance` is "
            "confidence."
        ),
    ] = None

    @field_validator("layout", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _layout_fits(self) -> "ServingOptions":
        k = self.num_speculative_tokens
        if isinstance(self.layout, tuple):
            if len(self.layout) != k + 1:
                raise ValueError(
                    f"layout has {len(self.layout)} group lengths; num_speculative_tokens={k} needs {k + 1}, one behind every row"
                )
            if max(self.layout) > k:
                raise ValueError(f"layout asks for a group of {max(self.layout)} mask tokens; num_speculative_tokens is {k}")
        return self

    @model_validator(mode="after")
    def _tau_has_a_use(self) -> "ServingOptions":
        if self.tau is not None and self.acceptance == "lossless":
            raise ValueError('tau is for "acceptance": "confidence", and acceptance is lossless: give both, or neither')
        return self

    @model_validator(mode="after")
    def _lookup_is_weighed(self) -> "ServingOptions":
        if self.lookup and self.layout != "auto":
            raise ValueError(f"lookup is for layout auto, which weighs it against mask tokens; layout is {self.layout!r}")
        return self

    @property
    def default_tau(self) -> float:
        """The threshold of requests that set none; above 1 where acceptance is lossless."""
        if self.acceptance == "lossless":
            return math.inf
        return DEFAULT_TAU if self.tau is None else self.tau


PREFIX = "mtp_"
"""What the names of our options begin with among a request's `vllm_xargs`, which other extensions use too."""


class RequestOptions(StrictModel, strict=True):
    """What a request may ask for: `vllm_xargs` over HTTP, `SamplingParams.extra_args` in Python."""

    mtp_tau: Annotated[
        Tau | None,
        Field(
            description="Threshold of acceptance by confidence for this request, 0 or more: a draft whose own probability is at "
            "least this is taken without a match. Above 1: none is, and the answer is the base model's. Only on servers with "
            '`"acceptance": "confidence"`. None: the server\'s.'
        ),
    ] = None
    mtp_drafts: Annotated[
        int | None,
        Field(
            ge=0,
            description="Most drafts of this request in a step; 0: plain decoding. None, or more than the server's: the server's.",
        ),
    ] = None

    @classmethod
    def of(cls, extra_args: Mapping[str, object] | None) -> "RequestOptions":
        """Our options of a request.

        Raises:
            ValueError: one of them is unknown, or its value is not allowed; the message names it.
        """
        ours = {name: value for name, value in (extra_args or {}).items() if isinstance(name, str) and name.startswith(PREFIX)}
        if not ours:
            return NO_OPTIONS
        try:
            return cls.model_validate(ours)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                raise ValueError(f"{name} is no option of mask-token prediction: there are {', '.join(cls.model_fields)}") from None
            raise ValueError(f"{name} is {reprlib.repr(first['input'])}: {first['msg']}") from None

    @classmethod
    def checked(cls, extra_args: Mapping[str, Any] | None) -> "RequestOptions":
        """Our options of a request that `of` has seen, without looking at them again: this runs for each request in each step."""
        if not extra_args:
            return NO_OPTIONS
        return cls.model_construct(mtp_tau=extra_args.get("mtp_tau"), mtp_drafts=extra_args.get("mtp_drafts"))


NO_OPTIONS = RequestOptions()
