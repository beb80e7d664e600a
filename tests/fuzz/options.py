"""Serving options: what an operator writes is taken as it stands, or refused by one clear error that names the option.

Through vLLM's own path, `EngineArgs.create_speculative_config`, with options from --speculative-config, its flags,
--additional-config and the adapter's defaults. What is not for this plugin must come out as vLLM alone gives it.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.folders import BASE, write_base, write_small_adapter
from tests.fuzz.report import Report, Violation, main, run, with_kind
from vllm_mtp import load
from vllm_mtp.config import MAX_MASK_TOKENS, ServingOptions
from vllm_mtp.layout import group_lengths
from vllm_mtp.plan import most_groups
from vllm_mtp.plugin import register
from vllm_mtp.safe_files import MAX_MESSAGE, AdapterError
from vllm_mtp.selection import ConfigurationError

SECONDS = 5.0
TRAINED = 4  # mask tokens of the small adapter
LOOKED_UP = 16  # drafts without a number, where texts give some too
DEFAULTS = {
    "layout": "auto",
    "candidates": 64,
    "draft_sample_method": "greedy",
    "max_mask_rows": None,
    "mask_window": None,
    "kernels": "auto",
    "acceptance": "lossless",
    "tau": None,
}
OPERATORS = ("lookup", "max_mask_rows", "kernels", "acceptance", "tau")  # an adapter may not choose them
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 4, 5, 8, 31, 32, 33, 2**31, 2**63, 2**64, 10**30, 10**400),
    *(0.0, 1.0, 4.0, 4.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *("", "4", "4.0", "true", "null", "auto", "linear", "quadratic", "Linear", "auto ", "greedy", "probabilistic", "\0", "\x1b[2J"),
    *("lossless", "confidence", 0.5, 0.99),
    *("x" * 5000, "\ud800", "\u202e", "../..", "/dev/zero", "{}", "[4]", "%s"),
    *([], {}, [[]], [None], ["auto"], [4, 4, 4, 4, 4], [0, 0, 0, 0, 0], [4], [True] * 5, ["4"] * 5, [4.0] * 5, [5] * 5, [-1] * 5),
    *([4] * 6, [2, 2, 2], [1, 1], (4, 4, 4, 4, 4), [4] * 100_000, [10**400], {"a": 1}, {"auto": None}, {"layout": "auto"}),
)
UNKNOWN = (
    "layuot",
    "adapter",
    "",
    " ",
    "draft_tensor_parallel_size",
    "quantization",
    "disable_padded_drafter_batch",
    "mtp_tau",
    "__class__",
)


def _whole(value: Any, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


VALID: dict[str, Callable[[Any], bool]] = {
    "num_speculative_tokens": lambda value: _whole(value, 1, MAX_MASK_TOKENS),
    "layout": lambda value: (
        (isinstance(value, str) and value in ("quadratic", "linear", "auto"))
        or (isinstance(value, list | tuple) and len(value) > 0 and all(_whole(n, 0, MAX_MASK_TOKENS) for n in value))
    ),
    "candidates": lambda value: _whole(value, 1),
    "draft_sample_method": lambda value: isinstance(value, str) and value in ("greedy", "probabilistic"),
    "lookup": lambda value: value is None or type(value) is bool,
    "max_mask_rows": lambda value: value is None or _whole(value, 1),
    "mask_window": lambda value: value is None or _whole(value, MAX_MASK_TOKENS),
    "kernels": lambda value: isinstance(value, str) and value in ("auto", "torch"),
    "acceptance": lambda value: isinstance(value, str) and value in ("lossless", "confidence"),
    "tau": lambda value: value is None or (type(value) in (int, float) and 0 <= value <= sys.float_info.max),
}


def looks_up(options: dict[str, Any]) -> bool:
    """Whether drafts come from texts too."""
    return options.get("layout", "auto") == "auto" and options.get("lookup") is not False


def at_fault(options: dict[str, Any]) -> set[str]:
    """The options that cannot be served by the small adapter, by this file's own reading of docs/options.md."""
    wrong = {name for name, value in options.items() if name not in VALID or not VALID[name](value)}
    k, layout = options["num_speculative_tokens"], options.get("layout", "auto")
    if "num_speculative_tokens" not in wrong:
        if k > TRAINED and not looks_up(options):
            wrong.add("num_speculative_tokens")
        if "layout" not in wrong and not isinstance(layout, str) and (len(layout) != k + 1 or max(layout) > k):
            wrong.add("layout")
    if options.get("lookup") is True and not looks_up(options):
        wrong.add("lookup")
    if options.get("tau") is not None and options.get("acceptance", "lossless") == "lossless":
        wrong.add("tau")
    return wrong


class Fuzzer:
    """Makes a base, adapters and vLLM's configuration of the base once; each case asks for options.

    Args:
        work: an empty folder.
        seed: of the cases.
    """

    def __init__(self, work: Path, seed: int) -> None:
        register()
        self.work, self.seed = work, seed
        self.base = write_base(work / "base")
        more = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
        (self.base / "config.json").write_text(json.dumps({**BASE, **more}))
        self.adapter = write_small_adapter(work / "adapter", self.base)
        self.changed = Path(shutil.copytree(self.adapter, work / "changed"))
        self.arguments = EngineArgs(model=str(self.base), skip_tokenizer_init=True)
        self.model_config, self.parallel_config = self.arguments.create_model_config(), ParallelConfig()
        self.parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        self.original = EngineArgs.create_speculative_config.vllm_mtp_original  # type: ignore[attr-defined]
        # The first configuration of a process takes longer than a case may: vLLM's source is read for the contract.
        first = copy.copy(self.arguments)
        first.speculative_config = {"method": "mtp", "model": str(self.adapter)}
        first.create_speculative_config(self.model_config, self.parallel_config)

    # -- what is asked for ---------------------------------------------------------------------------------------

    def _options(self, rng: random.Random, share: float, dashes: bool) -> dict[Any, Any]:
        """Options, each present with probability `share`; most values are odd ones."""
        options: dict[Any, Any] = {}
        for name in VALID:
            if rng.random() < share:
                usual = {"num_speculative_tokens": rng.randint(1, 5), "layout": rng.choice(("auto", "linear", [2, 2, 2]))}
                usual |= {"acceptance": "confidence", "tau": 0.9, "lookup": rng.choice((True, False, None))}
                value = usual.get(name, DEFAULTS.get(name)) if rng.random() < 0.5 else rng.choice(ODD)
                options[name.replace("_", "-") if dashes and rng.random() < 0.2 else name] = value
        if rng.random() < 0.1:
            options[rng.choice(UNKNOWN)] = rng.choice(ODD)
        return options

    def _asked(self, rng: random.Random) -> tuple[str, EngineArgs, dict[str, Any] | None]:
        """Kind of case, the engine's arguments, and the adapter's defaults where it has some."""
        arguments = copy.copy(self.arguments)
        arguments.max_num_batched_tokens = rng.choice((None, 1, 2, 64, 2048, 8192))
        arguments.max_num_seqs = rng.choice((None, 1, 16, 1024))
        kind = rng.choice(("value", "value", "value", "several", "several", "additional", "defaults", "flags", "whole", "parser"))
        model = str(self.adapter)
        asked: Any = {"method": "mtp", "model": model}
        serving = None
        match kind:
            case "value":
                asked[rng.choice(list(VALID))] = rng.choice(ODD)
            case "several":
                asked |= self._options(rng, 0.5, dashes=True)
            case "additional":
                asked |= self._options(rng, 0.2, dashes=False)
                mtp = self._options(rng, 0.4, dashes=False) if rng.random() < 0.7 else rng.choice(ODD)
                arguments.additional_config = {"mtp": mtp} if rng.random() < 0.9 else rng.choice(ODD)
            case "defaults":
                serving = self._options(rng, 0.4, dashes=False)
                asked |= {"model": str(self.changed), **self._options(rng, 0.2, dashes=False)}
            case "flags":
                asked |= self._options(rng, 0.2, dashes=True)
                for name, flag in (("method", "spec_method"), ("model", "spec_model"), ("num_speculative_tokens", "spec_tokens")):
                    if rng.random() < 0.5:
                        usual = {"method": "mtp", "model": model, "num_speculative_tokens": 3}[name]
                        odd = [
                            value for value in ODD if name != "model" or not isinstance(value, str)
                        ]  # vLLM asks the hub for names
                        setattr(arguments, flag, usual if rng.random() < 0.8 else rng.choice(odd))
                        if rng.random() < 0.8:
                            asked.pop(name, None)
            case "whole":
                asked = rng.choice(
                    (
                        rng.choice(ODD),
                        {rng.choice((1, None, True, 2.5)): 3, **asked},
                        {**asked, "method": rng.choice(ODD)},
                        {**asked, "model": rng.choice([value for value in ODD if not isinstance(value, str)])},
                        {**asked, "model": rng.choice((str(self.base), "/dev/zero", model + "/"))},
                        {key: value for key, value in asked.items() if key != "method"},
                    )
                )
            case "parser":
                asked |= self._options(rng, 0.4, dashes=True)
                text = json.dumps(asked)
                parsed = self.parser.parse_args(["--model", str(self.base), "--speculative-config", text])
                asked = parsed.speculative_config
        arguments.speculative_config = asked
        return kind, arguments, serving

    # -- what must become of it ----------------------------------------------------------------------------------

    def _expected(  # noqa: PLR0911
        self, arguments: EngineArgs, serving: dict[str, Any] | None
    ) -> tuple[set[str], dict[str, Any]] | None:
        """Names of which one must be in the error (none: no error), and the options; None: not for us."""
        written = arguments.speculative_config or {}
        if not isinstance(written, dict) or not all(isinstance(key, str) for key in written):
            return None
        asked = {key.replace("-", "_"): value for key, value in written.items()}
        twice = len(asked) < len(written)
        faults = {name for name in asked if [key.replace("-", "_") for key in written].count(name) > 1}
        for name, flag in (("method", "spec_method"), ("model", "spec_model"), ("num_speculative_tokens", "spec_tokens")):
            value = getattr(arguments, flag)
            if value is not None:
                if name in asked:
                    twice = True
                    faults.add(name)
                asked[name] = value
        model = asked.get("model")
        if asked.get("method") not in ("mtp", None) or not isinstance(model, str):
            return None
        if model.rstrip("/") not in (str(self.adapter), str(self.changed)):
            return None
        if twice:
            return faults, {}
        if serving is not None and (bad := {name for name, value in serving.items() if not self._may_default(name, value)}):
            return bad, {}
        if arguments.additional_config and not isinstance(arguments.additional_config, dict):
            return {"additional-config"}, {}
        more = (arguments.additional_config or {}).get("mtp", {})
        if not isinstance(more, dict):
            return {"mtp"}, {}
        defaults = {name: value for name, value in (serving or {}).items() if value is not None}
        own = {name: value for name, value in asked.items() if name not in ("method", "model")}
        merged = {**defaults, **more, **own}
        merged.setdefault("num_speculative_tokens", LOOKED_UP if looks_up(merged) else TRAINED)
        wrong = at_fault(merged)
        return wrong, merged if wrong else {**merged, "lookup": looks_up(merged)}

    @staticmethod
    def _may_default(name: str, value: Any) -> bool:
        return name in VALID and name not in OPERATORS and (value is None or VALID[name](value))

    def case(self, number: int) -> tuple[str, str]:
        """Runs one case; its kind and what became of it."""
        rng = random.Random(f"{self.seed}/{number}")
        kind, arguments, serving = self._asked(rng)
        try:
            if serving is not None:
                values = json.loads((self.adapter / "config.json").read_text())
                (self.changed / "config.json").write_text(json.dumps({**values, "serving": serving}))
                try:  # what JSON cannot say, or parsers refuse
                    json.dumps(serving, ensure_ascii=False, allow_nan=False).encode()
                except ValueError:
                    serving = {"config.json": None}
            return kind, self._outcome(arguments, self._expected(arguments, serving))
        except BaseException as error:
            raise with_kind(error, kind) from None

    def _outcome(self, arguments: EngineArgs, expected: tuple[set[str], dict[str, Any]] | None) -> str:
        if expected is None:
            return self._as_plain(arguments)
        faults, options = expected
        written = copy.deepcopy(arguments.speculative_config)
        try:
            config = arguments.create_speculative_config(self.model_config, self.parallel_config)
        except (ConfigurationError, AdapterError) as error:
            text = str(error)
            if not faults:
                raise Violation(f"refused, but sound: {text[:200]}") from None
            # A name of blanks or control characters cannot stand there as it is.
            if not any(name in text or not name.strip() or not name.isprintable() for name in faults):
                raise Violation(f"the message names none of {faults}: {text[:300]}") from None
            if len(text) > MAX_MESSAGE + 4 or not text.isprintable():
                raise Violation(f"a message that is not one bounded printable line: {text[:200]!r}") from None
            return "refused"
        if faults:
            raise Violation(f"accepted, but {faults} cannot be served")
        if arguments.speculative_config != written:
            raise Violation("the operator's own dictionary was changed")
        if config.num_speculative_tokens != options["num_speculative_tokens"]:
            raise Violation(f"{config.num_speculative_tokens} drafts, {options['num_speculative_tokens']} were asked for")
        taken = arguments.additional_config["mtp"]
        served = ServingOptions.model_validate(json.loads(json.dumps(taken)))  # as a worker reads them
        for name, value in {**DEFAULTS, **options}.items():
            have = getattr(served, name)
            wanted = tuple(value) if isinstance(value, list) else float(value) if isinstance(have, float) else value
            if have != wanted:
                raise Violation(f"{name} is {have!r}, {value!r} was asked for")
        self._check_rows(served, arguments)
        return "served"

    def _check_rows(self, options: ServingOptions, arguments: EngineArgs) -> None:
        """The numbers that workers make of options."""
        rows, k = arguments.max_num_batched_tokens or 2048, options.num_speculative_tokens
        longest = min(k, TRAINED)
        budget = load.mask_row_budget(options.max_mask_rows, rows, on_cpu=True)
        layouts = load.fitting_layouts(longest, rows, budget) if options.layout == "auto" else [group_lengths(options.layout, k)]
        if not 1 <= budget <= rows or not layouts or most_groups(layouts, arguments.max_num_seqs or 256, budget) < 0:
            raise Violation(f"{budget} mask rows of {rows}, layouts {layouts}")
        left = arguments.max_num_scheduled_tokens
        if left is not None and not 0 < left <= rows:
            raise Violation(f"{left} of {rows} rows are left for the scheduler")

    def _as_plain(self, arguments: EngineArgs) -> str:
        def tried(create: Callable[..., Any]) -> tuple[str, str]:
            own = copy.copy(arguments)
            own.speculative_config = copy.deepcopy(arguments.speculative_config)
            try:
                return "plain", str(create(own, self.model_config, self.parallel_config))
            except Exception as error:
                return f"vLLM's {type(error).__name__}", str(error)

        ours, plain = tried(EngineArgs.create_speculative_config), tried(self.original)
        if ours != plain:
            raise Violation(f"vLLM alone gives {plain}, with us {ours}")
        return "left to vLLM" if plain[0] == "plain" else "refused by vLLM"


def fuzz(cases: range, seed: int, progress: bool = False) -> Report:
    """Runs cases `cases` of `seed`."""
    with tempfile.TemporaryDirectory() as work:
        fuzzer = Fuzzer(Path(work), seed)
        return run(cases, fuzzer.case, limit=SECONDS, progress=progress)


def _from_command_line(arguments: argparse.Namespace) -> Report:
    return fuzz(range(arguments.first, arguments.first + arguments.count), arguments.seed, progress=True)


if __name__ == "__main__":
    main("options", _from_command_line, 20_000)
