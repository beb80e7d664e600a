"""Every option of training, with its default and limits: the one place that knows their names."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vllm_mtp.config import MAX_MASK_TOKENS, StrictModel

Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


class LossWeights(StrictModel):
    """How much each term of the loss counts."""

    plain_head: Weight = 1.0
    """Cross-entropy of the unembedding on mask states; it chooses the candidates that the sampler head scores."""
    sampler_head: Weight = 1.0
    """Cross-entropy of the sampler head, teacher-forced on the text."""
    consistency: Weight = 1.0
    """(real - mask)^2, mean over the width, between the states of a real row and a mask row that predict the same token."""
    position_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Mask token i counts position_decay^(i-1): a draft is worth nothing unless all before it are accepted."""


class TrainConfig(StrictModel):
    """Options of `vllm-mtp train`."""

    base: Path
    base_name: str | None = None
    """How users find the base, as the adapter names it; the folder's path by default."""
    data: tuple[Path, ...] = Field(min_length=1)
    output: Path
    eval_data: tuple[Path, ...] = ()
    """Text of held-out prompts; none: no evaluation."""
    eval_prompts: Positive = 48

    mask_tokens: Annotated[int, Field(ge=1, le=MAX_MASK_TOKENS)] = 8
    rank: Positive = 32
    alpha: Positive | None = None
    """LoRA's alpha; twice the rank by default."""
    train_mask_embeddings: bool = True
    sampler: bool = True
    sampler_residual: bool = True

    length: Annotated[int, Field(ge=8)] = 256
    """Real tokens in a sequence."""
    groups: Positive = 32
    """Groups of mask tokens behind random rows of a sequence; all share its one forward of real rows."""
    batch_size: Positive = 8
    steps: Positive = 2000
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the learning rate that is left after the linear decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Weight = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    targets: Literal["distribution", "argmax", "text"] = "distribution"
    """What mask rows learn: the base's next-token distribution at the real row of the same position, its argmax, or the text."""
    loss: LossWeights = LossWeights()

    on_policy: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of sequences that the base itself continued from a prompt of the data; the served text is the base's own."""
    on_policy_sequences: Positive = 4096
    on_policy_greedy: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share of the continuations decoded greedily; the rest are sampled at temperature 1."""
    on_policy_engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What continues the prompts; auto: vLLM where it is installed."""

    init_adapter: Path | None = None
    """Start from this adapter of the same shape instead of from nothing."""

    bf16: bool = True
    compile: bool = False
    seed: int = 0
    log_steps: Positive = 50
    save_steps: Positive = 500
    eval_steps: Positive | None = None
    """Evaluate every so many steps; None: at the end only."""

    @model_validator(mode="after")
    def _groups_fit(self) -> "TrainConfig":
        if self.length <= self.mask_tokens + 1:
            raise ValueError(f"length={self.length} leaves no row for a group of {self.mask_tokens} mask tokens: ask for more")
        return self
