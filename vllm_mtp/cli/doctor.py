"""`vllm-mtp doctor`: whether this machine can serve this base with this adapter, from the environment to ten decoded tokens."""

import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mtp.cli.engine import EngineError, EngineProcess
from vllm_mtp.cli.measure import num_identical
from vllm_mtp.cli.show import print_error
from vllm_mtp.machine import PACKAGES, machine
from vllm_mtp.outputs import tokens_per_forward
from vllm_mtp.safe_files import one_line
from vllm_mtp.whole_files import write_whole

Status = Literal["ok", "warning", "failed", "skipped"]
COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}
NUM_TOKENS = 10
PROMPTS = ("def __init__(self, name):\n", "import os\nimport sys\n\n\ndef main(", "    for key in sorted(", "The ")


@dataclass(frozen=True)
class DoctorOptions:
    """What the command line asked for; `vllm-mtp doctor --help` says what each is."""

    model: str
    adapter: str
    num_speculative_tokens: int | None = None
    layout: str | None = None
    json_file: Path | None = None
    decode: bool = True


@dataclass(frozen=True)
class Check:
    """One check: what was found, and what to do about it unless it is ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):
    """A check that cannot pass; the remedy is empty where the message has it."""

    def __init__(self, found: str, remedy: str = "", **figures: Any) -> None:
        super().__init__(found)
        self.remedy, self.figures = remedy, figures


@dataclass(frozen=True)
class ScratchMemory:
    """What mask rows take of the KV cache's memory.

    Attributes:
        blocks, bytes: of the scratch blocks, all layers together, of one rank.
        mask_rows: most mask rows of a step.
        rows_a_request: most mask rows that a layout gives a decoding request.
        cache_bytes: memory for the KV cache, scratch blocks included; None where it is measured when the engine starts.
    """

    blocks: int
    bytes: int
    mask_rows: int
    rows_a_request: int
    cache_bytes: int | None


def scratch_memory(config: Any) -> ScratchMemory:
    """The scratch blocks that an engine with this configuration (`VllmConfig`) will take, before there is one."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_mtp.kernel_choice import expected_attention
    from vllm_mtp.plan import most_groups
    from vllm_mtp.target import MaskTokenTarget

    target, model, cache = MaskTokenTarget(config), config.model_config, config.cache_config
    groups = most_groups(target.layouts, target.max_requests, target.max_mask_rows)
    blocks = groups * expected_attention(config, target.options).blocks_per_group(target.longest_group, cache.block_size)
    layer = FullAttentionSpec(
        block_size=cache.block_size,
        num_kv_heads=model.get_num_kv_heads(config.parallel_config),
        head_size=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
    )
    return ScratchMemory(
        blocks=blocks,
        bytes=blocks * layer.page_size_bytes * model.get_num_layers(config.parallel_config),
        mask_rows=target.max_mask_rows,
        rows_a_request=max(sum(lengths) for lengths in target.layouts),
        cache_bytes=cache.kv_cache_memory_bytes,
    )


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what vLLM logs and prints while it is imported and configured out of the report."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


class Doctor:
    """The checks, in their order; each finds out more than the one before, and one that needs a failed one's result is skipped."""

    def __init__(self, options: DoctorOptions) -> None:
        self.options = options
        self.checks: list[Check] = []
        self.config: Any = None
        self.memory: ScratchMemory | None = None

    def run(self, show: Callable[[Check], None]) -> None:
        """Runs every check and shows each as it ends."""
        for name, check, needs in (
            ("environment", self._environment, ()),
            ("vLLM", self._vllm, ("environment",)),
            ("hooks", self._hooks, ("vLLM",)),
            ("adapter", self._adapter, ("environment",)),
            ("options", self._options, ("hooks", "adapter")),
            ("memory", self._memory, ("options",)),
            ("decoding", self._decoding, ("memory",)),
        ):
            self.checks.append(self._checked(name, check, needs))
            show(self.checks[-1])

    def _checked(self, name: str, check: Callable[[], Check], needs: tuple[str, ...]) -> Check:
        stopped = {check.name for check in self.checks if check.status in ("failed", "skipped")}
        if missing := [need for need in needs if need in stopped]:
            return Check(name, "skipped", f"needs the check of {missing[0]}")
        try:
            with _quiet():
                return check()
        except Failed as failure:
            return Check(name, "failed", str(failure), failure.remedy, failure.figures)
        except Exception as error:  # a report that ends here would not say what the other checks found
            return Check(name, "failed", one_line(f"{type(error).__name__}: {error}"), "report this: the check itself failed")

    @property
    def failed(self) -> bool:
        """Whether any check has failed."""
        return any(check.status == "failed" for check in self.checks)

    # -- the checks ----------------------------------------------------------------------------------------------

    def _environment(self) -> Check:
        """Packages that import beside each other, and the plugin where vLLM looks for it."""
        versions = machine()["versions"]
        found = f"Python {platform.python_version()}, " + ", ".join(
            f"{name} {versions[name]}" for name in PACKAGES if name in versions
        )
        try:
            import torch
            import transformers  # noqa: F401
            import vllm  # noqa: F401
        except Exception as error:  # whatever a broken package raises
            remedy = "install vLLM 0.32 (docs/install.md); beside a CPU torch uninstall torchvision and torchaudio"
            raise Failed(f"{found}; {type(error).__name__}: {error}", remedy) from None
        figures = {"versions": versions, "accelerator": torch.accelerator.is_available()}
        if not any(entry.name == "mtp" for entry in importlib.metadata.entry_points(group="vllm.general_plugins")):
            raise Failed(
                f"{found}; vLLM would not find the plugin: it is not installed as a package", "run pip install .", **figures
            )
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None and "mtp" not in allowed.split(","):
            raise Failed(f"VLLM_PLUGINS={allowed} leaves the plugin out", "add mtp to VLLM_PLUGINS, or unset it", **figures)
        return Check("environment", "ok", found, figures=figures)

    def _vllm(self) -> Check:
        """Its version, and which of its two model runners it will take."""
        from vllm.platforms import current_platform

        from vllm_mtp import selection

        v2 = selection.runs_on_v2()
        runner, device = "V2" if v2 else "V1", current_platform.device_type
        figures = {"vllm": selection.vllm_version(), "runner": runner, "device": device}
        found = f"vLLM {figures['vllm']}, {runner} model runner, on {device}"
        if not v2 and not current_platform.is_cpu():
            remedy = "unset VLLM_USE_V2_MODEL_RUNNER, or serve with --enforce-eager"
            return Check("vLLM", "warning", f"{found}: there mask rows do not run under CUDA graphs", remedy, figures)
        return Check("vLLM", "ok", found, figures=figures)

    def _hooks(self) -> Check:
        """Whether this vLLM has the names that are replaced or read."""
        from vllm.platforms import current_platform

        from vllm_mtp import compat, contract, selection

        try:
            needed = contract.needed(on_v2=selection.runs_on_v2(), on_cpu=current_platform.is_cpu())
            compat.check_vllm(needed)
        except compat.UnsupportedVersion as error:
            raise Failed(str(error)) from None
        found = f"vLLM has all that is relied on; tested releases are {', '.join(compat.TESTED_VLLM)}"
        if not compat.is_tested(selection.vllm_version()):
            return Check(
                "hooks", "warning", f"{found}, and this is none of them", "try it on traffic that may fail, or install one of them"
            )
        return Check("hooks", "ok", found)

    def _adapter(self) -> Check:
        """The folder, its tensors' numbers, and the base model that it is for."""
        from vllm_mtp.adapter import AdapterError, linear_shapes, read_adapter, validate_folder

        folder, local = Path(self.options.adapter), (Path(self.options.model) / "config.json").is_file()
        try:
            config = validate_folder(folder, self.options.model)
            read_adapter(folder, linear_shapes(self.options.model) if local else None)
        except AdapterError as error:
            raise Failed(str(error)) from None
        base = one_line(config.base.name_or_path)
        found = f"{config.num_mask_tokens} mask tokens for {base}"
        figures = {"num_mask_tokens": config.num_mask_tokens, "base": base}
        if not local:
            return Check(
                "adapter", "ok", f"{found}; {self.options.model} is no folder here: compared below, by its config", figures=figures
            )
        if config.base.fingerprint is None:
            remedy = "write the adapter again, or make sure that the base is the one that it was trained on"
            return Check("adapter", "warning", f"{found}; it has no fingerprint of the base: only sizes agree", remedy, figures)
        return Check("adapter", "ok", f"{found}; sizes and fingerprint agree", figures=figures)

    def _engine_args(self, *, speculative: bool) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "model": self.options.model,
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 16,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
        }
        if speculative:
            asked = {"num_speculative_tokens": self.options.num_speculative_tokens, "layout": _layout(self.options.layout)}
            given = {name: value for name, value in asked.items() if value is not None}
            arguments["speculative_config"] = {"method": "mtp", "model": self.options.adapter, **given}
        return arguments

    def _options(self) -> Check:
        """The engine's configuration, as `vllm serve` makes it."""
        from vllm_mtp.plugin import register

        try:
            from vllm.engine.arg_utils import EngineArgs

            register()
            self.config = EngineArgs(**self._engine_args(speculative=True)).create_engine_config()
        except Exception as error:  # vLLM's own checks raise what they like
            raise Failed(one_line(str(error))) from None
        options = self.config.additional_config["mtp"]
        found = ", ".join(f"{name} {value}" for name, value in options.items() if name != "adapter" and value is not None)
        return Check("options", "ok", found, figures=options)

    def _memory(self) -> Check:
        """What the mask rows' scratch blocks take, of 16 requests in float32; in bfloat16 it is half."""
        self.memory = memory = scratch_memory(self.config)
        figures = asdict(memory)
        found = (
            f"{memory.blocks} scratch blocks, {_megabytes(memory.bytes)} for up to {memory.mask_rows} mask rows a step "
            f"({memory.rows_a_request} a request), {self.config.scheduler_config.max_num_seqs} requests, float32"
        )
        room = memory.cache_bytes
        if room is None:  # measured when an engine starts, which refuses what does not fit
            return Check("memory", "ok", found, figures=figures)
        if memory.bytes >= room:
            remedy = "ask for a smaller max_mask_rows, --max-num-seqs or --block-size, or give the KV cache more memory"
            raise Failed(f"{found}; the KV cache has {_megabytes(room)}", remedy, **figures)
        if memory.bytes > room / 2:
            return Check("memory", "warning", f"{found}, over half of the KV cache", "ask for a smaller max_mask_rows", figures)
        return Check("memory", "ok", found, figures=figures)

    def _decoding(self) -> Check:
        """Ten tokens of a few prompts, by plain vLLM and with the adapter, in float32."""
        if not self.options.decode:
            return Check("decoding", "skipped", "left out by --no-decode")
        folder = Path(tempfile.mkdtemp(prefix="vllm-mtp-doctor-"))
        try:
            with ExitStack() as stack:
                plain, ours = (
                    stack.enter_context(EngineProcess(self._engine_args(speculative=speculative), folder / f"{name}.log"))
                    for name, speculative in (("plain", False), ("mtp", True))
                )
                ours.wait_until_ready()  # ours first: if something is wrong, it is most likely there
                plain.wait_until_ready()
                a, b = (engine.generate(PROMPTS, max_tokens=NUM_TOKENS, concurrency=len(PROMPTS)) for engine in (plain, ours))
        except EngineError as error:
            raise Failed(str(error), "read the log; what vLLM alone cannot serve fails without the adapter too") from None
        same = num_identical(a.outputs, b.outputs)
        figures = {
            "prompts": len(PROMPTS),
            "identical": same,
            "tokens_per_forward": round(tokens_per_forward(b.outputs), 2),
            "scratch_blocks": _reported_blocks(folder / "mtp.log"),
            "logs": str(folder),
        }
        answers = f"{same} of {len(PROMPTS)} greedy answers of {NUM_TOKENS} tokens are plain vLLM's"
        found = f"{answers}, {figures['tokens_per_forward']} tokens a forward"
        if same < len(PROMPTS):
            raise Failed(
                f"{found} (logs: {folder})", "serve without the adapter, and report this with both logs: it is a fault", **figures
            )
        if self.memory is not None and figures["scratch_blocks"] != self.memory.blocks:
            said = f"{found}; the engine took {figures['scratch_blocks']} scratch blocks, {self.memory.blocks} were expected"
            return Check("decoding", "warning", said, f"read {folder / 'mtp.log'}", figures)
        return Check("decoding", "ok", found, figures=figures)


def _layout(text: str | None) -> Any:
    """A layout as JSON has it: a name, or a list as in `4,4,2,0,0`."""
    if text is None or not re.fullmatch(r"\[?\s*\d+(\s*,\s*\d+)*\s*\]?", text):
        return text
    return [int(number) for number in text.strip("[] ").split(",")]


def _reported_blocks(log: Path) -> int | None:
    """Scratch blocks by the engine's own start-up line."""
    found = re.search(r"Mask-token prediction is on: .* (\d+) scratch blocks", log.read_text(errors="replace"))
    return int(found[1]) if found else None


def _printer(console: Console) -> Callable[[Check], None]:
    """One line a check as it ends, where the screen is no terminal."""

    def show(check: Check) -> None:
        remedy = f"; {check.remedy}" if check.remedy else ""
        console.print(f"{check.status:8} {check.name:12} {check.found}{remedy}", markup=False, highlight=False, soft_wrap=True)

    return show


def _table(checks: list[Check]) -> Table:
    table = Table("", "check", "found", "what to do")
    for check in checks:
        table.add_row(Text(check.status, COLOURS[check.status]), check.name, Text(check.found), Text(check.remedy))
    return table


def run(options: DoctorOptions) -> int:
    """Run every check; the exit status: 0, or 1 when one failed."""
    doctor = Doctor(options)
    to_stdout = options.json_file is not None and str(options.json_file) == "-"
    console = Console(file=sys.stderr if to_stdout else sys.stdout, highlight=False)  # now, for checks redirect both
    if console.is_terminal:
        with console.status("checking"):
            doctor.run(lambda _: None)
        console.print(_table(doctor.checks))
    else:
        doctor.run(_printer(console))
    if options.json_file is not None:
        report = {
            "command": sys.argv,
            "ok": not doctor.failed,
            "model": options.model,
            "adapter": options.adapter,
            "machine": machine(),
            "checks": [asdict(check) for check in doctor.checks],
        }
        text = json.dumps(report, indent=2) + "\n"
        if to_stdout:
            sys.stdout.write(text)
        else:
            try:
                write_whole(options.json_file, text)
            except OSError as error:
                print_error(error)
                return 1
    return 1 if doctor.failed else 0
