"""Adapter folders: a damaged one is refused with AdapterError, or read as its files say; nothing else happens.

Nothing else: no other exception, no file outside the folder opened, nothing imported, executed or unpickled, no process, no
connection, no more memory or time than the files have bytes for.
"""

import argparse
import json
import os
import random
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.folders import write_base, write_small_adapter
from tests.fuzz.adapter_mutations import EITHER, FILES, JSONS, LORA, MTP, MUTATIONS, READ, REFUSED, Case, split
from tests.fuzz.report import Report, Violation, main, run, with_kind
from vllm_mtp.adapter import Adapter, AdapterError, is_adapter, linear_shapes, read_adapter, validate_folder
from vllm_mtp.safe_files import MAX_MESSAGE

SECONDS, MEGABYTES = 5.0, 256.0
FORBIDDEN = ("exec", "compile", "import", "pickle.find_class", "marshal.loads", "os.system", "os.exec", "os.posix_spawn", "os.fork")
FORBIDDEN += (
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
    "code.__new__",
    "shutil.copyfile",
    "os.remove",
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Witness:
    """Sees what this process opens and runs while it watches (`sys.addaudithook`, which cannot be taken back).

    What Rust opens goes unseen; so the copies outside of the folder are sound, and reading one shows in the outcome.
    """

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event == "open":
            if not isinstance(arguments[0], int):  # else the file object of a descriptor that was opened before
                self.seen.append(str(arguments[0]))
        elif event in FORBIDDEN:
            self.seen.append(f"{event}: {str(arguments)[:200]}")

    @contextmanager
    def watching(self, allowed: list[Path]) -> Iterator[None]:
        """Violation for anything opened outside of the folders `allowed`, and for anything run."""
        self.seen = seen = []
        try:
            yield
        finally:
            self.seen = None
        for name in seen:
            path = Path(name)
            if not path.is_absolute() or not any(path.resolve().is_relative_to(folder.resolve()) for folder in allowed):
                raise Violation(f"opened or ran {name}")


def _raw_tensors(file: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    header, data = split(file.read_bytes())
    return {
        name: (DTYPES[entry["dtype"]], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _same(tensor: torch.Tensor, raw: tuple[torch.dtype, tuple[int, ...], bytes]) -> bool:
    dtype, shape, data = raw
    return (
        tensor.dtype == dtype and tuple(tensor.shape) == shape and tensor.contiguous().view(torch.uint8).numpy().tobytes() == data
    )


def _check_said(kept: dict[str, Any], said: dict[str, Any]) -> None:
    """Violation unless every value of the file is there as it stands; 1 is not "1", and true is not 1."""
    for key, value in said.items():
        if isinstance(value, dict) and key != "training":
            _check_said(kept[key], value)
        elif kept[key] != value or type(kept[key]) is not type(value):
            raise Violation(f"{key} is {kept[key]!r}, the file says {value!r}")


def check_meaning(folder: Path, adapter: Adapter) -> None:
    """Violation unless `adapter` is what the folder's files say, read the shortest way, without a check."""
    config, peft = (json.loads((folder / name).read_bytes()) for name in JSONS)
    tensors = {name: _raw_tensors(folder / name) for name in (LORA, MTP)}
    _check_said(
        adapter.config.model_dump(),
        {key: config[key] for key in ("num_mask_tokens", "base", "training", "sampler") if key in config},
    )
    if len(tensors[LORA]) != 2 * len(adapter.lora):
        raise Violation(f"{len(adapter.lora)} modules of {len(tensors[LORA])} tensors")
    for module, weights in adapter.lora.items():
        for which, tensor in (("A", weights.a), ("B", weights.b)):
            if not _same(tensor, tensors[LORA][f"base_model.model.{module}.lora_{which}.weight"]):
                raise Violation(f"{which} of {module} is not the file's")
        matching = [v for name, v in (peft.get("alpha_pattern") or {}).items() if module == name or module.endswith("." + name)]
        rank = weights.a.shape[0]
        scale = (matching or [peft["lora_alpha"]])[0] / (rank**0.5 if peft.get("use_rslora") is True else rank)
        if not np.isclose(weights.scale, scale, rtol=1e-12, atol=0):
            raise Violation(f"the scale of {module} is {weights.scale}, the file says {scale}")
    sampler = adapter.sampler.state_dict() if adapter.sampler is not None else {}
    read = {"mask_embeddings": adapter.mask_embeddings, **{f"sampler.{name}": tensor for name, tensor in sampler.items()}}
    if set(read) != set(tensors[MTP]) or not all(_same(read[name], raw) for name, raw in tensors[MTP].items()):
        raise Violation(f"{MTP} is not what was read")


class Fuzzer:
    """Makes the sound adapter once; each case damages a copy of it.

    Args:
        work: an empty folder.
        seed: of the cases.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.base = write_base(work / "base")
        self.outside = write_small_adapter(work / "outside", self.base)
        self.sound = {name: (self.outside / name).read_bytes() for name in FILES}
        self.shapes = linear_shapes(self.base)
        self.names, self.weights = list(MUTATIONS), [weight for _, weight in MUTATIONS.values()]
        self.witness = Witness()
        for case in range(40):  # what is imported late, by errors too, is imported now
            prepared = self._prepared(random.Random(case))
            MUTATIONS["changed_bytes" if case else "further_files"][0](prepared)
            self._outcome(prepared, READ if case == 0 else EITHER)

    def _prepared(self, rng: random.Random) -> Case:
        place = self.work / "case"
        shutil.rmtree(place, ignore_errors=True)
        folder = place / "adapter"
        folder.mkdir(parents=True)
        for name, data in self.sound.items():
            (folder / name).write_bytes(data)
        return Case(rng, folder, self.outside, folder, [folder])

    def _outcome(self, case: Case, expected: str) -> str:
        is_adapter(case.path)
        try:
            validate_folder(case.path, self.base)
            adapter = read_adapter(case.path, self.shapes)
        except AdapterError as error:
            text = str(error)
            if len(text) > MAX_MESSAGE + 4 or not text.isprintable():
                raise Violation(f"a message that is not one bounded printable line: {text[:200]!r}") from None
            if expected == READ:
                raise Violation(f"refused, but sound: {text}") from None
            return REFUSED
        if expected == REFUSED:
            raise Violation("read, but to be refused")
        self.read = adapter
        return READ

    def case(self, number: int, kind: str | None = None) -> tuple[str, str]:
        """Runs one case; its kind and what became of it.

        Args:
            number: of the case.
            kind: the mutation; drawn from the seed, and sometimes several, when left out.
        """
        rng = random.Random(f"{self.seed}/{number}")
        kinds = [kind] if kind else rng.choices(self.names, self.weights, k=rng.choice((1, 1, 1, 1, 2)))
        case = self._prepared(rng)
        try:
            expected = self._mutated(case, kinds)
            descriptors = len(os.listdir("/proc/self/fd"))
            with self.witness.watching([*case.allowed, self.base]):
                outcome = self._outcome(case, expected)
            if len(os.listdir("/proc/self/fd")) > descriptors:
                raise Violation("a file was left open")
            if outcome == READ:
                check_meaning(case.path, self.read)
        except BaseException as error:
            raise with_kind(error, " + ".join(kinds)) from None
        return " + ".join(kinds[:1]) if len(kinds) == 1 else "two of these", outcome

    @staticmethod
    def _mutated(case: Case, kinds: list[str]) -> str:
        expected = [MUTATIONS[kinds[0]][0](case)]
        for kind in kinds[1:]:
            # What is read by the second one must not be a pipe, a device or gigabytes of zeros.
            if not all(stat.S_ISREG((found := path.lstat()).st_mode) and found.st_size < 2**23 for path in case.path.iterdir()):
                break
            try:
                expected.append(MUTATIONS[kind][0](case))
            except Exception:  # the first one left nothing that the second can change
                return EITHER
        # What the second one replaces may be what was wrong before.
        return expected[0] if len(expected) == 1 else READ if expected == [READ, READ] else EITHER


def fuzz(cases: range, seed: int, progress: bool = False) -> Report:
    """Runs cases `cases` of `seed`."""
    with tempfile.TemporaryDirectory() as work:
        fuzzer = Fuzzer(Path(work), seed)
        return run(cases, fuzzer.case, limit=SECONDS, megabytes=MEGABYTES, progress=progress)


def _from_command_line(arguments: argparse.Namespace) -> Report:
    return fuzz(range(arguments.first, arguments.first + arguments.count), arguments.seed, progress=True)


if __name__ == "__main__":
    main("adapters", _from_command_line, 20_000)
