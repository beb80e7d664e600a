"""What rows cost on an accelerator, from the model's sizes: for runners whose steps overlap and cannot be timed one by one.

A step takes as long as reading the weights that its rows need, or as long as multiplying with them, whichever is more (Williams et
al. 2009, *Roofline*). Dense weights are read once for any number of rows. Experts are read as rows choose them, so that a mixture's
first rows are dear, and its rows are the cheaper the more there are.
"""

from dataclasses import dataclass
from typing import Any

FREE_ROWS = 150.0
"""Rows whose products with dense bfloat16 weights take as long as reading them: FLOP/s over bytes/s. By data sheets 153 on an A100,
206 on an H200, 209 on an A10, 295 on an H100, 419 on an L40S; products of few rows reach less of the former than of the latter.
Not measured."""
SHARPNESS = 4  # of the knee: at it, a step takes 2^(1/4) of what either takes alone
ACCEPTED = 0.6
"""Of the drafts that are looked at, those that hold: what a layout is chosen by before anything is known of the text. Adapters
bring more; it is low so that drafts which only good ones would pay for are not asked for."""
WORTH_IT = 1.05  # drafts must promise so much more than plain decoding
BITS = "bits", "weight_bits", "w_bit"  # where configurations of weight-only quantization say how wide weights are
EXPERTS = "num_experts", "num_local_experts", "n_routed_experts"
CHOSEN = "num_experts_per_tok", "num_experts_per_token", "moe_topk"


def expected_tokens(drafts: int) -> float:
    """Tokens of a request's step that verifies so many drafts."""
    return sum(ACCEPTED**i for i in range(drafts + 1))


@dataclass(frozen=True)
class Roofline:
    """A model's weights in units of all that a step with many rows reads.

    Attributes:
        experts: share that is in experts.
        chosen: share of the experts that a row goes through.
        head: share of the unembedding, which a step that drafts reads twice.
        free_rows: as `FREE_ROWS`, for this model's weights.
    """

    experts: float = 0.0
    chosen: float = 1.0
    head: float = 0.0
    free_rows: float = FREE_ROWS

    @classmethod
    def of(cls, config: Any) -> "Roofline":
        """Of a model's text configuration (transformers); what it does not say counts as a dense model in bfloat16."""

        def number(*names: str) -> int:
            return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), 0)

        width, layers = number("hidden_size"), number("num_hidden_layers")
        experts, chosen = number(*EXPERTS), number(*CHOSEN)
        heads = number("num_attention_heads")
        head_size = number("head_dim") or width // max(1, heads)
        attention = layers * width * head_size * 2 * (heads + (number("num_key_value_heads") or heads))
        intermediate = number("intermediate_size")
        mlp = layers * 3 * width * (number("shared_expert_intermediate_size") if experts else intermediate)
        of_experts = layers * experts * 3 * width * (number("moe_intermediate_size") or intermediate)
        head = width * number("vocab_size")
        total = attention + mlp + of_experts + head
        if not total:
            return cls(free_rows=FREE_ROWS * _width(config))
        return cls(
            experts=of_experts / total,
            chosen=chosen / experts if experts and chosen else 1.0,
            head=head / total,
            free_rows=FREE_ROWS * _width(config),
        )

    def step(self, rows: int, drafting: bool) -> float:
        """What a step of `rows` rows takes; 1 is to read all weights once."""
        dense = 1 - self.experts
        read = dense + self.experts * (1 - (1 - self.chosen) ** rows) + (self.head if drafting else 0)
        multiply = rows / self.free_rows * (dense + self.experts * self.chosen)
        return float((read**SHARPNESS + multiply**SHARPNESS) ** (1 / SHARPNESS))

    def gain(self, num_requests: int, drafts: int, rows: int) -> float:
        """Tokens a second of a step with so many drafts and rows a request, over those of plain decoding."""
        return expected_tokens(drafts) * self.step(num_requests, False) / self.step(num_requests * rows, True)


def _width(config: Any) -> float:
    """Bytes of a weight over those of bfloat16, where rows are multiplied in bfloat16 all the same; 1 where they are not."""
    given: Any = getattr(config, "quantization_config", None) or {}
    quantization = given if isinstance(given, dict) else vars(given)
    if quantization.get("load_in_4bit"):
        return 4 / 16
    for name in BITS:
        if isinstance(quantization.get(name), int):
            return float(min(16, quantization[name])) / 16
    groups: Any = quantization.get("config_groups") or {}
    weight_only = [
        group["weights"]["num_bits"] for group in groups.values() if group.get("weights") and not group.get("input_activations")
    ]
    return min(16, *weight_only) / 16 if weight_only else 1.0
