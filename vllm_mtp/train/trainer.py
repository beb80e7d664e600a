"""transformers' Trainer with checkpoints of what is trained, every term of the loss in the log, and tokens per forward."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vllm_mtp.train.evaluate import tokens_per_forward
from vllm_mtp.train.model import MaskedModel
from vllm_mtp.train.on_policy import continue_prompts

WEIGHTS = "trained.safetensors"
NEW_TOKENS = 128


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

    def _masked_model(self) -> MaskedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's for a full disk is a RuntimeError
            free = shutil.disk_usage(self.args.output_dir).free >> 10  # type: ignore[arg-type]
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"checkpoint {folder} could not be written (free space on its disk: {free} KiB): {error}") from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self._masked_model().trainable().items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._masked_model().load_trainable(load_file(Path(resume_from_checkpoint) / WEIGHTS))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in `folder`. The Trainer writes its state last; a killed run may leave one without it."""

    def whole(checkpoint: Path) -> bool:
        try:
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        except (OSError, ValueError):
            return False
        return True

    checkpoints = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdecimal()]
    newest_first = sorted(checkpoints, key=lambda path: -int(path.name.rpartition("-")[2]))
    return next((str(path) for path in newest_first if whole(path)), None)


class Evaluation(TrainerCallback):
    """Tokens per forward on held-out prompts, printed every `every` steps and at the end; the last ones are in `figures`."""

    def __init__(self, model: MaskedModel, prompts: list[torch.Tensor], ends: Sequence[int], every: int | None) -> None:
        self.model, self.every = model, every
        # The base never changes, so neither do its continuations.
        self.texts = continue_prompts(model.base, prompts, NEW_TOKENS, ends)
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.figures: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self._evaluate(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._evaluate(state.global_step)

    def _evaluate(self, step: int) -> None:
        self.figures = tokens_per_forward(self.model, self.texts, self.prompt_lengths)
        print(json.dumps({"step": step, "tokens_per_forward": self.figures}), flush=True)
