"""A training run from options to adapter: base and data are loaded, the base continues prompts, the Trainer trains."""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
from accelerate import PartialState
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from vllm_mtp.adapter import fingerprint_folder, read_adapter
from vllm_mtp.cpu_memory import FreedMemory
from vllm_mtp.train.config import TrainConfig
from vllm_mtp.train.curves import LOSSES, write_history
from vllm_mtp.train.data import Corpus, Sequences, first_prompts, read_corpus
from vllm_mtp.train.documents import BadLines, DataError, read_documents
from vllm_mtp.train.export import export, export_checkpoint, load_adapter
from vllm_mtp.train.model import MaskedModel, TrainedModel
from vllm_mtp.train.on_policy import continue_prompts, end_tokens, on_policy_sequences
from vllm_mtp.train.parts import in_parts, is_in_parts
from vllm_mtp.train.self_distill import FullStudent, GatedStudent, add_mask_token
from vllm_mtp.train.trainer import MaskTrainer, last_checkpoint
from vllm_mtp.whole_files import whole, write_whole

PROMPT_TOKENS, NEW_TOKENS = 192, 128
# They change what is reported, how long and how fast, not what is trained.
KEPT_MEMORY = 1 << 30
"""Bytes of freed memory that a process on a CPU keeps for its next step."""
FREE_OPTIONS = {
    *("output", "base_name", "strict", "steps", "compile", "fsdp", "report_to"),
    *("eval_data", "eval_prompts", "eval_steps", "log_steps", "save_steps"),
}


def train(config: TrainConfig) -> Path:
    """Train an adapter and write it to `config.output / "adapter"`, or a model to `config.output / "model"` where all weights
    learn; returns that folder. A killed run goes on from its last checkpoint.

    Under `torchrun` or `accelerate launch` the processes share each step's sequences, and `config.output`.

    Raises:
        DataError: data or output folder cannot be used.
        OSError: the base model cannot be loaded.
    """
    if any(os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("1", "true") for kind in ("FSDP", "DEEPSPEED")):
        raise DataError("FSDP and DeepSpeed of accelerate cannot hold the base: launch plain processes, and give --fsdp.")
    cuda = torch.cuda.is_available()
    processes = PartialState(cpu=not cuda, timeout=timedelta(days=1))  # the others wait while one generates
    if config.batch_size % processes.num_processes:
        raise DataError(f"batch_size={config.batch_size} cannot be shared by {processes.num_processes} processes.")
    if processes.is_main_process:
        _claim_output(config)
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    base = _base(config, processes, cuda=cuda)
    model, ends = _model(base, tokenizer, config), end_tokens(tokenizer, base.generation_config)
    if config.init_adapter is not None:
        assert isinstance(model, MaskedModel)
        load_adapter(model, read_adapter(config.init_adapter))
    data, prompts = _data(tokenizer, ends, config, processes)
    data.on_policy = _on_policy(model, data.corpus, ends, processes)
    continued: Callable[[], list[torch.Tensor]] = partial(continue_prompts, base, prompts, NEW_TOKENS, ends)
    if config.tuning == "lora":  # a base that never changes always continues them in the same way
        continued = cache(continued)
        if processes.is_main_process or config.fsdp:
            continued()

    if config.compile and not cuda:
        base.set_attn_implementation("eager")  # compiled, it is the faster one on a CPU; generating with it is the slower one

    trainer = _trainer(model, data, continued, [len(prompt) for prompt in prompts], processes.num_processes)
    start = time.time()
    trainer.train(resume_from_checkpoint=last_checkpoint(config.output))
    folder = config.output / ("adapter" if config.tuning == "lora" else "model")
    if not trainer.figures and (processes.is_main_process or config.fsdp):  # the run had ended before
        trainer.evaluate()
    if processes.is_main_process:
        history = trainer.state.log_history
        last = next((entry for entry in reversed(history) if "loss" in entry), {})
        figures: dict[str, object] = {
            "seconds_since_last_resume": round(time.time() - start),
            "final_losses": {name: last[name] for name in LOSSES if name in last},
            "tokens_per_forward": trainer.figures,
        }
        write_history(history, config.output)
        if isinstance(model, FullStudent):
            export_checkpoint(model, tokenizer, folder, figures)
        else:
            export(model, folder, figures)
    processes.wait_for_everyone()
    return folder


def computes_in_bf16(asked: bool | None) -> bool:
    """Whether training computes in bfloat16: as asked for, else where that is the faster way."""
    if asked is not None:
        return asked
    return torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _base(config: TrainConfig, processes: PartialState, *, cuda: bool) -> PreTrainedModel:
    """The base, on this process's device or its part of it."""
    if not cuda:
        FreedMemory().keep(KEPT_MEMORY)
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        config.base,
        dtype=torch.bfloat16 if cuda and computes_in_bf16(config.bf16) and config.tuning == "lora" else torch.float32,
        **(in_parts(processes) if config.fsdp else {}),
    )
    assert is_in_parts(base) is config.fsdp
    if not config.fsdp:
        base.to(processes.device)  # type: ignore[arg-type]
    return base


def _model(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> MaskedModel | FullStudent:
    """What the recipe trains."""
    if config.recipe == "gated-lora":
        return MaskedModel(base, config)
    if config.tuning == "lora":
        return GatedStudent(base, config)
    num_tokens = max(tokenizer.get_vocab().values()) + 1
    return FullStudent(base, config, add_mask_token(base, num_tokens, config.mask_token_id), num_tokens)


def _trainer(
    model: MaskedModel | FullStudent,
    data: Sequences,
    texts: Callable[[], Sequence[torch.Tensor]],
    prompt_lengths: Sequence[int],
    num_processes: int,
) -> MaskTrainer:
    config = model.options
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    arguments = TrainingArguments(
        output_dir=str(config.output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // num_processes,
        bf16=computes_in_bf16(config.bf16),
        use_cpu=not torch.cuda.is_available(),
        torch_compile=config.compile,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.log_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if config.eval_data else "no",
        eval_steps=config.eval_steps or config.steps,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        seed=config.seed,
        report_to=list(config.report_to),
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
    )
    try:
        return MaskTrainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data,  # not read: tokens per forward are counted instead
            optimizers=(optimizer, schedule),
            texts=texts,
            prompt_lengths=prompt_lengths,
        )
    except (RuntimeError, ValueError) as error:  # of an integration that there is not, or whose package is not installed
        raise DataError(f"--report-to {' '.join(config.report_to)}: {error}") from error


def _claim_output(config: TrainConfig) -> None:
    """Make the output folder, or check that the run in it had the same options."""
    config.output.mkdir(parents=True, exist_ok=True)
    file = config.output / "options.json"
    options = json.loads(config.model_dump_json(exclude=FREE_OPTIONS))
    if file.exists():
        before = json.loads(file.read_text())
        for name, value in options.items():
            earlier = before.get(name, TrainConfig.model_fields[name].default)  # an option that the run was older than
            if earlier != value:
                found = f"{config.output} holds a run with {name}={earlier}, now {value}"
                raise DataError(f"{found}: choose another output, or the same option.")
    write_whole(file, json.dumps(options, indent=2) + "\n")


def _data(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], config: TrainConfig, processes: PartialState
) -> tuple[Sequences, list[torch.Tensor]]:
    """What is learned, and the prompts to count tokens per forward on; too little data is found before the base generates."""
    bad, bad_prompts = BadLines(config.strict), BadLines(config.strict)
    data = Sequences(read_corpus(tokenizer, read_documents(config.data, bad), ends, config.seed, bad), None, config)
    prompts: list[torch.Tensor] = []
    if config.eval_data:
        documents = read_documents(config.eval_data, bad_prompts)[: config.eval_prompts]
        prompts = first_prompts(tokenizer, documents, PROMPT_TOKENS, ends, bad_prompts)
    if processes.is_main_process:
        bad.report("data")
        bad_prompts.report("prompts")
    return data, prompts


def _on_policy(model: TrainedModel, corpus: Corpus, ends: Sequence[int], processes: PartialState) -> dict[str, torch.Tensor] | None:
    """Sequences continued by the base, from `OUTPUT/on_policy.safetensors` where an earlier run made the same ones."""
    config = model.options
    if config.on_policy == 0:
        return None
    path = config.output / "on_policy.safetensors"
    settings = config.model_dump(
        mode="json", include={"on_policy_sequences", "on_policy_greedy", "on_policy_engine", "length", "seed"}
    )
    made_for = json.dumps({**settings, "base": fingerprint_folder(config.base), "tokens": corpus.digest()})
    missing = not _was_made_for(path, made_for)
    processes.wait_for_everyone()  # before one of them writes it
    if missing and (processes.is_main_process or config.fsdp):
        if processes.num_processes > 1:
            if config.on_policy_engine == "vllm":
                raise DataError("on_policy_engine=vllm runs in one process only: start without torchrun, or ask for transformers.")
            config = config.model_copy(update={"on_policy_engine": "transformers"})
        tensors: dict[str, torch.Tensor] = {}
        with Progress(disable=not processes.is_main_process) as progress:
            task = progress.add_task("continuing prompts with the base", total=config.on_policy_sequences)
            for done in on_policy_sequences(model.base, corpus, ends, config):
                if isinstance(done, int):
                    progress.update(task, completed=done)
                else:
                    tensors = done
        if processes.is_main_process:
            with whole(path) as part:
                save_file(tensors, part, {"made_for": made_for})
    processes.wait_for_everyone()
    return load_file(path)


def _was_made_for(path: Path, made_for: str) -> bool:
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("made_for") == made_for


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Learning rate over its peak: linear warm-up, then linear decay to `final_learning_rate`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 1 - (1 - config.final_learning_rate) * progress
