"""What steps cost on a server, kept from one start to the next, so that `auto` need not find it out again."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_mtp.forecast import StepCost
from vllm_mtp.machine import machine

logger = init_logger("vllm.mtp")

SECONDS = 60.0
"""Between two writes."""
MOST_BYTES = 1 << 16
NUM_TERMS = len(StepCost.BELIEVED)
Term = Annotated[float, Field(gt=-1e3, lt=1e3)]


class _Kept(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    facts: dict[str, Any]
    terms: tuple[Annotated[float, Field(gt=0, lt=1e3)], Term, Term, Term, Term, Term, Term, Term]


def facts(config: VllmConfig) -> dict[str, Any]:
    """What the cost of steps depends on: model, options, vLLM's version (all in vLLM's own hash) and the machine."""
    here, device = machine(), config.device_config.device_type
    return {
        "configuration": config.compute_hash(),
        "vllm-mtp": here["versions"].get("vllm-mtp"),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{here['processor']} ({here['vectors']})",
        "threads": torch.get_num_threads(),
    }


class CostCache:
    """The file that holds the terms of `forecast.StepCost`, in vLLM's cache folder. What is wrong with it is said in the log, once,
    and stops nothing.

    Args:
        known: `facts`; servers of other ones have other files.
        folder: where to; None: `VLLM_CACHE_ROOT`.
    """

    def __init__(self, known: dict[str, Any], folder: Path | None = None) -> None:
        self.facts = known
        key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or Path(envs.VLLM_CACHE_ROOT)) / "vllm_mtp" / "step_cost" / f"{key}.json"
        self.is_written, self.next_write = True, time.monotonic() + SECONDS

    def read(self) -> list[float] | None:
        """The terms that were kept; None where there are none."""
        try:
            with self.path.open("rb") as file:
                kept = _Kept.model_validate_json(file.read(MOST_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            logger.warning("step costs of an earlier start are not used, %s: %s", self.path, _reason(error))
            return None
        logger.info("step costs of an earlier start: %s", self.path)
        return list(kept.terms)

    def keep(self, terms: Sequence[float]) -> None:
        """Writes the terms, at most once in `SECONDS`."""
        if not self.is_written or time.monotonic() < self.next_write:
            return
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Without a sync, which a step would wait for: a file that is lost with the machine is found out again.
            kept = _Kept.model_validate({"facts": self.facts, "terms": tuple(map(float, terms))})
            part.write_text(kept.model_dump_json(indent=1), encoding="utf-8")
            part.replace(self.path)
        except (OSError, ValidationError) as error:
            self.is_written = False
            with suppress(OSError):
                part.unlink(missing_ok=True)
            logger.warning("step costs are not kept for the next start, %s: %s", self.path, _reason(error))
        self.next_write = time.monotonic() + SECONDS


def _reason(error: OSError | ValidationError) -> str:
    return str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
