"""Random models small enough to test training on: a Llama of two layers, its tokenizer, and an adapter with weights that matter."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_mtp.adapter import Adapter, base_facts
from vllm_mtp.config import AdapterConfig, SamplerConfig
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.export import lora_weights
from vllm_mtp.train.model import MaskedModel


def tiny_base(vocab_size: int = 61, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with grouped queries and weights large enough that its output depends on the whole prefix."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_config(**options: object) -> TrainConfig:
    """Training options that fit `tiny_base`."""
    defaults: dict[str, object] = {
        "base": Path("base"),
        "data": (Path("data"),),
        "output": Path("output"),
        "mask_tokens": 3,
        "length": 20,
        "groups": 5,
        "batch_size": 2,
        "steps": 4,
        "on_policy": 0.0,
        "on_policy_engine": "transformers",
        "bf16": False,
    }
    if options.get("tuning") != "full":
        defaults["rank"] = 4
    return TrainConfig.model_validate({**defaults, **options})


def tiny_masked_model(config: TrainConfig, base: LlamaForCausalLM, kind: type[MaskedModel] = MaskedModel) -> MaskedModel:
    """A model in training whose LoRA already changes mask rows."""
    model = kind(base, config)
    with torch.no_grad():
        for name, parameter in model.student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def as_adapter(model: MaskedModel) -> Adapter:
    """The adapter that training would export, not rounded."""
    config = AdapterConfig(
        num_mask_tokens=len(model.mask_embeddings),
        base=base_facts(model.base.config),
        sampler=SamplerConfig(residual=model.sampler.residual) if model.sampler is not None else None,
    )
    return Adapter(config, lora_weights(model, torch.float32), model.mask_embeddings.detach(), model.sampler)


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, `<s>` 0, `</s>` 1, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)


def save_tiny_base(folder: Path) -> None:
    """`tiny_base` over the bytes of text, with its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_base(len(tokenizer)).save_pretrained(folder)
