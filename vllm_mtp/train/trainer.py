"""transformers' Trainer with checkpoints of what is trained, every term of the loss in the log, and tokens per forward."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vllm_mtp.train.curves import EVALUATED
from vllm_mtp.train.evaluate import tokens_per_forward
from vllm_mtp.train.model import TrainedModel
from vllm_mtp.train.parts import is_in_parts

WEIGHTS = "trained.safetensors"


class MaskTrainer(Trainer):
    """Trainer whose checkpoints hold only what is trained, and whose log has every term of the loss and tokens per forward.

    Args:
        texts: held-out prompts with the model's own continuations, of which the first process counts tokens per forward.
        prompt_lengths: tokens of each prompt.
    """

    def __init__(
        self,
        *args: Any,
        texts: Callable[[], Sequence[torch.Tensor]] = tuple,
        prompt_lengths: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.terms: dict[str, torch.Tensor] = {}
        self.num_terms = 0
        self.texts, self.prompt_lengths = texts, prompt_lengths
        self.figures: dict[str, float] = {}

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # Items are random draws. In their order a run with other `steps` goes on where it was, and processes share each step's.
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        for name, value in outputs.items():
            if name != "loss":
                self.terms[name] = self.terms.get(name, 0) + value.detach()
        self.num_terms += 1
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.num_terms:
            means = {name: self.accelerator.reduce(value / self.num_terms, "mean") for name, value in self.terms.items()}
            logs |= {name: round(value.item(), 4) for name, value in means.items()}
            self.terms, self.num_terms = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Tokens per forward: of the quadratic layout and the head that drafts to the log, all of them to `figures`."""
        logged: dict[str, float] = {}
        if self.prompt_lengths and (self.is_world_process_zero() or is_in_parts(self._trained_model().base)):
            self.figures = tokens_per_forward(self._trained_model(), self.texts(), self.prompt_lengths)
            way = "quadratic.plain." if self._trained_model().sampler is None else "quadratic.sampler."
            shown = {name: value for name, value in self.figures.items() if name.startswith(way) and ".free." not in name}
            logged = {f"{EVALUATED}{name}": value for name, value in shown.items()}
            self.log(dict(logged))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged

    def _trained_model(self) -> TrainedModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's for a full disk is a RuntimeError
            free = shutil.disk_usage(self.args.output_dir).free >> 10  # type: ignore[arg-type]
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"checkpoint {folder} could not be written (free space on its disk: {free} KiB): {error}") from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The state that makes a checkpoint whole is written next: not before every process has written its part.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self._trained_model().trainable().items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._trained_model().load_trainable(load_file(Path(resume_from_checkpoint) / WEIGHTS))


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
