"""The training run: transformers' Trainer over packed sequences, checkpoints of what is trained, and the adapter at the end."""

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_mtp.adapter import LoRAWeights, base_facts, write_adapter
from vllm_mtp.config import AdapterConfig, SamplerConfig
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.data import DataError, Sequences, read_documents, token_stream
from vllm_mtp.train.evaluate import tokens_per_forward
from vllm_mtp.train.model import MaskedModel
from vllm_mtp.train.on_policy import continue_prompts, on_policy_sequences

WEIGHTS = "trained.safetensors"
PROMPT_TOKENS, NEW_TOKENS = 128, 128


class MaskTrainer(Trainer):
    """Trainer whose checkpoints hold only what is trained, and whose log has every term of the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.terms: dict[str, torch.Tensor] = {}
        self.num_terms = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.terms[name] = self.terms.get(name, 0) + value.detach()
        self.num_terms += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.num_terms:
            logs |= {name: round((value / self.num_terms).item(), 4) for name, value in self.terms.items()}
            self.terms, self.num_terms = {}, 0
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in unwrapped(self.model).trainable().items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unwrapped(self.model).load_trainable(load_file(Path(resume_from_checkpoint) / WEIGHTS))


def unwrapped(model: Any) -> MaskedModel:
    """The module inside torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


class Evaluation(TrainerCallback):
    """Tokens per forward on held-out prompts, logged every `eval_steps` steps and at the end."""

    def __init__(self, model: MaskedModel, prompts: list[torch.Tensor], end: int | None, every: int | None) -> None:
        self.model, self.every = model, every
        self.texts = continue_prompts(model.base, prompts, NEW_TOKENS, end)
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.figures: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps or (self.every and state.global_step % self.every == 0):
            self.model.eval()
            self.figures = tokens_per_forward(self.model, self.texts, self.prompt_lengths)
            self.model.train()
            print(json.dumps({"step": state.global_step, "tokens_per_forward": self.figures}), flush=True)


def _on_policy(model: MaskedModel, stream: torch.Tensor, end: int | None, config: TrainConfig) -> dict[str, torch.Tensor] | None:
    """Sequences continued by the base, from `OUTPUT/on_policy.safetensors` where an earlier run of the same options left them."""
    if config.on_policy == 0:
        return None
    path = config.output / "on_policy.safetensors"
    count, T = config.on_policy_sequences, config.length
    if path.exists() and (tensors := load_file(path))["input_ids"].shape == (count, T):
        return tensors
    tensors = {}
    with Progress() as progress:
        task = progress.add_task("continuing prompts with the base", total=count)
        for done in on_policy_sequences(model.base, stream, end, config):
            if isinstance(done, int):
                progress.update(task, completed=done)
            else:
                tensors = done
    save_file(tensors, path)
    return tensors


def train(config: TrainConfig) -> Path:
    """Train an adapter and write it to `config.output / "adapter"`; a killed run goes on from its last checkpoint.

    Raises:
        DataError: the data cannot be used.
        OSError: the base model cannot be loaded.
    """
    torch.manual_seed(config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    attention = "eager" if config.compile else "sdpa"  # compiled, the former is the faster one on a CPU
    base = AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32, attn_implementation=attention)
    window = getattr(base.config, "sliding_window", None)
    if window and window < config.length + config.mask_tokens and getattr(base.config, "use_sliding_window", True):
        raise DataError(f"length={config.length} is beyond the base's sliding window of {window} tokens: ask for a smaller length.")
    model, end = MaskedModel(base, config), tokenizer.eos_token_id
    stream = token_stream(tokenizer, read_documents(config.data), config.seed)
    data = Sequences(stream, _on_policy(model, stream, end, config), config)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, config))
    callbacks = []
    if config.eval_data:
        texts = read_documents(config.eval_data)[: config.eval_prompts]
        prompts = [torch.tensor(ids[:PROMPT_TOKENS]) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        callbacks = [Evaluation(model, prompts, end, config.eval_steps)]
    arguments = TrainingArguments(
        output_dir=str(config.output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=config.compile,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = MaskTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule), callbacks=callbacks)
    start = time.time()
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(config.output)))
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    terms = {name: last[name] for name in ("loss", "plain", "sampler", "consistency") if name in last}
    figures = callbacks[0].figures if callbacks else {}
    return export(model, config, {"seconds": round(time.time() - start), "final_losses": terms, "tokens_per_forward": figures})


def _factor(step: int, config: TrainConfig) -> float:
    """Learning rate over its peak: linear warm-up, then linear decay to `final_learning_rate`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 1 - (1 - config.final_learning_rate) * progress


def lora_weights(model: MaskedModel, dtype: torch.dtype) -> dict[str, LoRAWeights]:
    """Module path in the base -> its LoRA."""
    weights, parameters = {}, dict(model.student.named_parameters())
    for name, layer in model.student.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = (parameters[f"{name}.lora_{x}.default.weight"].detach().to(dtype) for x in "AB")
            weights[name.removeprefix("base_model.model.")] = LoRAWeights(a, b, layer.scaling["default"])
    return weights


def export(model: MaskedModel, config: TrainConfig, figures: dict[str, object]) -> Path:
    """Write the adapter folder `config.output / "adapter"` from the model as it stands, in bfloat16; returns the folder."""
    dtype = torch.bfloat16
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    options = config.model_dump(mode="json", exclude={"base", "data", "output", "eval_data"})
    adapter = AdapterConfig(
        num_mask_tokens=config.mask_tokens,
        base=base_facts(config.base),
        sampler=SamplerConfig(residual=config.sampler_residual) if config.sampler else None,
        training={"options": options, "versions": versions, **figures},
    )
    folder = config.output / "adapter"
    sampler = copy.deepcopy(model.sampler).to(dtype) if model.sampler is not None else None
    write_adapter(folder, adapter, lora_weights(model, dtype), model.mask_embeddings.to(dtype), sampler)
    return folder
