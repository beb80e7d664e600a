"""Every option of training, with its default and limits: the one place that knows their names."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vllm_mtp.config import MAX_MASK_TOKENS, StrictModel

RECIPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "gated-lora": {},
    "self-distill": {"targets": "argmax", "groups": 16, "loss": {"consistency": 0.0}},
}
FULL_DEFAULTS: dict[str, Any] = {"sampler": False, "learning_rate": 1e-5}
"""What is otherwise than the fields' own defaults where nothing is given."""
ADAPTER_ONLY = {"rank", "rank_of", "alpha", "train_mask_embeddings", "sampler_residual", "init_adapter"}
"""Options without a use where all weights are trained."""

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class LossWeights(StrictModel):
    """How much each term of the loss counts."""

    plain_head: Weight = 1.0
    """Cross-entropy of the unembedding on mask states; it chooses the candidates that the sampler head scores."""
    sampler_head: Weight = 1.0
    """Cross-entropy of the sampler head, teacher-forced on the text; self-distill: on its own drafts."""
    consistency: Weight = 1.0
    """(real - mask)^2, mean over the width, between the states of a real row and a mask row that predict the same token.
    self-distill: 0 by default, and the real rows are the teacher's."""
    position_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Mask token i counts position_decay^(i-1): a draft is worth nothing unless all before it are accepted. self-distill: slot i,
    where slot 0 is the row before the mask tokens, counts position_decay^i."""


class TrainConfig(StrictModel):
    """Options of `vllm-mtp train`."""

    base: Path
    """The base model, with its tokenizer: a folder or its name on the hub."""
    base_name: str | None = None
    """How users find the base, as the adapter names it; its name on the hub or the folder's path by default."""
    data: tuple[Path, ...] = Field(min_length=1)
    """Text files, .jsonl files with {"messages": [..]} or {"text": ..} in each line, saved datasets, or folders of text;
    repeatable."""
    strict: bool = False
    """A bad line or a chat that the template refuses ends the run; else they are left out, counted and reported."""
    output: Path
    """Folder for checkpoints and, as `adapter` in it, the adapter."""
    eval_data: tuple[Path, ...] = ()
    """Held-out texts and chats, read like the data: tokens per forward are counted on what the base writes after their beginnings.
    None: no evaluation."""
    eval_prompts: Positive = 48
    """How many of them."""

    recipe: Literal["gated-lora", "self-distill"] = "gated-lora"
    """gated-lora: mask rows learn what the base says of a text (*Your LLM Knows the Future*). self-distill: what the frozen base
    says of the tokens that they draft themselves (*Multi-Token Prediction via Self-Distillation*)."""
    tuning: Literal["lora", "full"] = "lora"
    """lora: gated LoRA learns, and the base stays as it is. full, with self-distill: all weights of the base and one mask token in
    a slot of its vocabulary; the output is a model that drafts for itself, and its own text differs from the base's."""
    mask_token_id: Annotated[int | None, Field(ge=0)] = None
    """With `tuning` full, the slot of the vocabulary for the mask token; None: the first that the tokenizer does not use."""

    mask_tokens: Annotated[int, Field(ge=1, le=MAX_MASK_TOKENS)] = 8
    """k, the most drafts that the adapter can give. self-distill: each step draws their number, from 1 to this."""
    rank: Positive = 32
    """LoRA's rank, on every linear layer that `causal_lm.linears` finds."""
    rank_of: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+=[1-9][0-9]*$")], ...] = ()
    """Another rank for layers whose names have a part: `mlp=16`; where several do, the last one's. Repeatable."""
    alpha: Positive | None = None
    """LoRA's alpha; twice a layer's rank by default."""
    train_mask_embeddings: bool = True
    """False: mask embeddings stay as they began."""
    sampler: bool = True
    """Train a sampler head; with `tuning` full there is none."""
    sampler_residual: bool = True
    """As `residual` of the adapter's sampler head."""

    length: Annotated[int, Field(ge=8)] = 256
    """Real tokens in a sequence."""
    groups: Positive = 32
    """Groups of mask tokens behind random rows of a sequence; all share its one forward of real rows. self-distill, 16 by default:
    regions of a sequence, each of `length` / `groups` rows, its mask tokens included."""
    batch_size: Positive = 8
    """Sequences a step."""
    steps: Positive = 2000
    """Optimizer steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """AdamW's highest rate; it falls linearly after the warm-up. 1e-5 by default with `tuning` full."""
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the learning rate that is left after the linear decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps in which the rate rises from 0."""
    weight_decay: Weight = 0.0
    """AdamW's."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    targets: Literal["distribution", "argmax", "text"] = "distribution"
    """What mask rows learn: the base's next-token distribution at the real row of the same position, its argmax, or the text.
    self-distill: the teacher's argmax (hard, the default) or its distribution (soft, a KL divergence)."""
    loss: LossWeights = LossWeights()
    """What each term of the loss counts; see below."""

    on_policy: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of sequences that the base itself continued from a prompt of the data; the served text is the base's own."""
    on_policy_sequences: Positive = 4096
    """How many such sequences are generated before the first step."""
    on_policy_greedy: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share of the continuations decoded greedily; the rest are sampled at temperature 1."""
    on_policy_engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What continues the prompts; auto: vLLM where it is installed."""

    init_adapter: Path | None = None
    """Start from this adapter of the same shape, a folder or its name on the hub, instead of from nothing."""

    bf16: bool | None = None
    """Compute in bfloat16; trained weights stay in float32. None: on GPUs, and on CPUs that multiply it (AVX-512 BF16, AMX); others
    take several times as long."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what is in them: a third slower, in less memory."""
    fsdp: bool = False
    """Under torchrun: each process holds its part of the base only (FSDP2), and layers are put together while they compute, for
    bases that one device cannot hold. Not with `tuning` full."""
    logit_rows: Positive = 8192
    """Rows whose logits exist at a time; where a step has more, they are computed again in the backward pass."""
    compile: bool = False
    """torch.compile: a minute or two to start, then a quarter faster."""
    seed: int = 0
    """Of data and weights."""
    report_to: tuple[str, ...] = ()
    """Where else the log goes, as transformers names it: `tensorboard`, .. Its package must be installed."""
    log_steps: Positive = 50
    """Write losses every so many steps."""
    save_steps: Positive = 500
    """Write a checkpoint every so many steps."""
    eval_steps: Positive | None = None
    """Count tokens per forward on the held-out prompts every so many steps; None: at the end only."""

    @field_validator("data", "eval_data", "report_to", "rank_of", mode="before")
    @classmethod
    def _one_is_enough(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_recipe(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        defaults = RECIPE_DEFAULTS.get(str(values.get("recipe")), {})
        if values.get("tuning") == "full":
            defaults = {**defaults, **FULL_DEFAULTS}
        loss = values.get("loss", {})
        if isinstance(loss, LossWeights):
            loss = loss.model_dump(exclude_unset=True)
        both = {"loss": {**defaults["loss"], **loss}} if "loss" in defaults and isinstance(loss, dict) else {}
        return {**defaults, **values, **both}

    @model_validator(mode="after")
    def _options_fit_the_recipe(self) -> "TrainConfig":
        if self.fsdp and (self.tuning == "full" or self.compile):
            raise ValueError("fsdp is for a base that stays as it is, and not compiled: leave tuning=full and compile out")
        if self.tuning == "full":
            if self.recipe != "self-distill":
                raise ValueError("tuning=full is for recipe=self-distill: the other one leaves the base as it is")
            if unused := sorted(ADAPTER_ONLY & self.model_fields_set):
                raise ValueError(f"{unused[0]} is for an adapter, and tuning=full trains the model itself: leave it out")
            if self.sampler:
                raise ValueError("tuning=full has no sampler head, for a full checkpoint has no place for one: leave it out")
        elif self.mask_token_id is not None:
            raise ValueError("mask_token_id is for tuning=full: an adapter has mask embeddings of its own")
        if self.recipe == "self-distill":
            if self.targets == "text":
                raise ValueError("recipe=self-distill learns nothing of the text: ask for targets=argmax or distribution")
            if self.length // self.groups <= self.mask_tokens:
                raise ValueError(
                    f"a region of length={self.length} / groups={self.groups} rows has no place for a token and "
                    f"{self.mask_tokens} mask tokens: ask for fewer groups or more length"
                )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> "TrainConfig":
        if self.length <= self.mask_tokens + 1:
            raise ValueError(f"length={self.length} leaves no row for a group of {self.mask_tokens} mask tokens: ask for more")
        return self
