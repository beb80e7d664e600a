"""What this package expects of vLLM: the list is complete, this vLLM meets it, and what a vLLM has changed is named."""

import ast
import json
import logging
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner
from vllm.engine.arg_utils import EngineArgs

import vllm_mtp
from tests import compat as compat_matrix
from vllm_mtp import compat, contract, demo, selection
from vllm_mtp.plugin import register
from vllm_mtp.requirements import EitherOf, Requirement
from vllm_mtp.vllm_source import Installed, Parameters, SourceTree

PACKAGE = Path(vllm_mtp.__file__).parent
ALL = [requirement for group in contract.GROUPS.values() for requirement in group]


def flat(requirements: list[Any]) -> Iterator[Requirement]:
    for requirement in requirements:
        yield from flat(list(requirement.forms)) if isinstance(requirement, EitherOf) else [requirement]


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def listed_words() -> set[str]:
    """Everything that the contract names, word by word."""
    facts = (value for requirement in flat(ALL) for value in vars(requirement).values() if isinstance(value, str))
    return {word.strip(",") for fact in facts for part in fact.split() for word in part.split(".")}


def test_every_import_of_vllm_is_listed() -> None:
    listed = set()
    for requirement in flat(ALL):
        names = getattr(requirement, "names", None) or getattr(requirement, "name", "")
        listed |= {(requirement.module, name.split(".")[0]) for name in names.split()}
    imported = {
        (line.module.removeprefix("vllm").removeprefix("."), alias.name): str(path)
        for path, tree in sources()
        for line in ast.walk(tree)
        if isinstance(line, ast.ImportFrom) and line.module and line.module.split(".")[0] == "vllm"
        for alias in line.names
    }
    assert len(imported) > 15
    assert {name: path for name, path in imported.items() if name not in listed} == {}


VLLMS = "runner engine_args parallel_config model_config scheduler_config cache_config compilation_config vllm_config input_batch"


def test_everything_read_off_an_object_of_vllm_is_listed() -> None:
    own = {"drafter", "speculator"}  # what a runner keeps of ours
    listed, read = listed_words() | own, {}
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
                if owner in VLLMS.split() and path.parts[0] not in ("train", "cli"):
                    read[node.attr] = f"{path}: {owner}.{node.attr}"
    assert len(read) > 40
    assert {name: where for name, where in read.items() if name not in listed} == {}


def test_every_hook_is_listed_under_its_name() -> None:
    replaced = [
        ast.literal_eval(node.args[1])
        for path, tree in sources()
        for node in ast.walk(tree)
        if path.name == "compat.py" and isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_replace"
    ]
    listed = {requirement.name.split(".")[-1] for requirement in flat(ALL) if hasattr(requirement, "ours")}
    assert len(replaced) >= 7
    assert set(replaced) <= listed
    with pytest.raises(LookupError, match=r"model_runner\.GPUModelRunner\.unheard_of is replaced"):
        contract.of_hook("v1.worker.gpu.model_runner", "GPUModelRunner.unheard_of")


def test_a_name_that_two_modules_have_is_another_in_each() -> None:
    modules = ("v1.sample.rejection_sampler", "v1.worker.gpu.spec_decode.rejection_sampler")
    assert [contract.of_hook(module, "rejection_sample").module for module in modules] == list(modules)


def test_the_installed_vllm_meets_it() -> None:
    assert contract.violations(Installed(), ALL) == []


@pytest.fixture(scope="module")
def source() -> SourceTree:
    """The installed vLLM's, read."""
    tree = SourceTree(Installed().package)
    contract.violations(tree, ALL)
    return tree


Changed = Callable[[str, str, str], SourceTree]


@pytest.fixture
def changed(source: SourceTree) -> Changed:
    """(file, text, other text) -> the source with the text replaced in that file."""

    def change(file: str, old: str, new: str) -> SourceTree:
        text = source.package.joinpath(file).read_text()
        assert old in text
        tree = SourceTree(source.package)
        tree.modules = {**source.modules, file.removesuffix(".py").replace("/", "."): ast.parse(text.replace(old, new))}
        return tree

    return change


V1, V2 = "v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"
BASE = "v1/worker/gpu/spec_decode/speculator.py"


@pytest.mark.parametrize(
    ("file", "old", "new", "sentences"),
    [
        pytest.param(
            V1,
            "def _prepare_inputs(",
            "def _prepare_model_inputs(",
            ["v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs is missing"],
            id="a hook renamed",
        ),
        pytest.param(
            "engine/arg_utils.py",
            "target_parallel_config: ParallelConfig,\n    ) -> SpeculativeConfig",
            "target_parallel_config: ParallelConfig, tokens: int,\n    ) -> SpeculativeConfig",
            [
                "engine.arg_utils.EngineArgs.create_speculative_config takes (self, target_model_config, target_parallel_config, "
                "tokens), where (self, target_model_config, target_parallel_config) is expected"
            ],
            id="a hook with one parameter more",
        ),
        pytest.param(
            "v1/worker/cpu_worker.py",
            "def determine_available_memory(self)",
            "def determine_available_memory(self, *, profile: bool = True)",
            ["v1.worker.cpu_worker.CPUWorker.determine_available_memory takes (self, *, profile), where (self) is expected"],
            id="a hook with a keyword more",
        ),
        pytest.param(
            "v1/attention/backend.py",
            "    num_actual_tokens: int",
            "    num_tokens: int",
            ["v1.attention.backend.CommonAttentionMetadata takes ("],
            id="a field renamed that we give",
        ),
        pytest.param(
            "v1/attention/backend.py",
            "    block_table_tensor: torch.Tensor",
            "    block_table_tensor: torch.Tensor\n    epoch: int",
            ["v1.attention.backend.CommonAttentionMetadata takes ("],
            id="a field more that must be given",
        ),
        pytest.param(
            "v1/worker/gpu_input_batch.py",
            "self.num_tokens_no_spec",
            "self.num_known_tokens",
            ["v1.worker.gpu_input_batch.InputBatch.num_tokens_no_spec is missing"],
            id="an attribute renamed",
        ),
        pytest.param(
            "v1/kv_cache_interface.py",
            "    layer_stride: int",
            "    stride_of_layers: int",
            ["v1.kv_cache_interface.KVCacheTensor.layer_stride is missing"],
            id="a cache of another layout",
        ),
        pytest.param(
            V1,
            "slot_mappings=slot_mappings,",
            "slots=slot_mappings,",
            [
                "v1.worker.gpu_model_runner.GPUModelRunner.propose_draft_token_ids does not call "
                "propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu, slot_mappings)"
            ],
            id="called otherwise",
        ),
        pytest.param(
            BASE,
            "    @abstractmethod\n    def capture(",
            "    @abstractmethod\n    def warm_up(self) -> None:\n        pass\n\n    @abstractmethod\n    def capture(",
            ["v1.worker.gpu.spec_decode.speculator.BaseSpeculator.warm_up is abstract, and not defined here"],
            id="a method more to define",
        ),
        pytest.param(
            V2,
            "self.speculator.capture()",
            "self.speculator.capture(self.speculator.graph_pool)",
            ["v1.worker.gpu.model_runner.GPUModelRunner reads speculator.graph_pool, which is not known here"],
            id="an attribute more to have",
        ),
        pytest.param(
            "config/speculative.py", '"custom_class"', '"plugin"', ["config.speculative does not know 'custom_class'"], id="a value"
        ),
        pytest.param(
            "forward_context.py",
            "def get_forward_context(",
            "def forward_context(",
            ["forward_context.get_forward_context is missing"],
            id="a function renamed",
        ),
        pytest.param(
            "v1/worker/gpu/spec_decode/rejection_sampler_utils.py",
            "    temp,\n",
            "    heat,\n",
            [
                "v1.worker.gpu.spec_decode.rejection_sampler_utils._compute_global_logprobs_and_logsumexp has no parameter temp",
            ],
            id="a sign of another meaning",
        ),
    ],
)
def test_what_has_changed_is_named(changed: Changed, file: str, old: str, new: str, sentences: list[str]) -> None:
    found = contract.violations(changed(file, old, new), ALL)
    assert [sentence[: len(expected)] for sentence, expected in zip(found, sentences, strict=True)] == sentences


def test_the_command_reads_a_wheel_and_names_what_it_lacks(source: SourceTree, tmp_path: Path) -> None:
    files = [source.path(module) for module, tree in source.modules.items() if tree is not None]
    for name, old, new, status in (("same", "", "", 0), ("renamed", "def _prepare_inputs(", "def _prepare(", 1)):
        wheel, found = tmp_path / f"{name}.whl", tmp_path / f"{name}.json"
        with zipfile.ZipFile(wheel, "w") as archive:
            for file in files:
                text = file.read_text()
                archive.writestr(f"vllm/{file.relative_to(source.package)}", text.replace(old, new) if old else text)
        result = CliRunner().invoke(compat_matrix.app, ["contract", str(wheel), "--work", str(tmp_path), "--json", str(found)])
        assert result.exit_code == status, result.output
        missing = "v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs is missing"
        assert json.loads(found.read_text())["sources"] == {wheel.name: {"V1 runner": [missing]} if status else {}}


def test_a_parameter_more_is_no_change_where_it_is_handed_through(changed: Changed) -> None:
    text = "load_dummy_weights: bool = False,"
    assert contract.violations(changed(V2, text, text + " tier: int = 0,"), ALL) == []


def test_a_function_says_the_same_running_and_read() -> None:
    running, read = Installed(), SourceTree(Installed().package)
    for name in ("EngineArgs.create_speculative_config", "EngineArgs.create_engine_config"):
        assert running.parameters("engine.arg_utils", name) == read.parameters("engine.arg_utils", name)
    assert Parameters.parse("a, b=1, *, c, d=2, **more") == Parameters(("a", "b"), ("c", "d"), frozenset("ac"), more_keywords=True)


def test_a_kernel_is_read_where_it_does_not_say_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def __call__(self, *args: object, **kwargs: object) -> None: ...

    module, name = "v1.worker.gpu.spec_decode.rejection_sampler_utils", "_compute_global_logprobs_and_logsumexp"
    monkeypatch.setitem(sys.modules, f"vllm.{module}", SimpleNamespace(**{name: Kernel()}))
    taken = Installed().parameters(module, name)
    assert taken is not None
    assert "temp" in taken.positional


HOOK = "engine.arg_utils", "EngineArgs.create_speculative_config"


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What is logged under our name."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.mtp")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.usefixtures("unread")
def test_a_hook_that_is_gone_at_run_time_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_vllm([contract.of_hook(*HOOK)])
    monkeypatch.setattr(EngineArgs, "make_speculative_config", EngineArgs.create_speculative_config, raising=False)
    monkeypatch.delattr(EngineArgs, "create_speculative_config")
    with pytest.raises(compat.UnsupportedVersion) as refusal:
        compat.check_vllm(contract.needed(on_v2=False, on_cpu=True))
    assert "engine.arg_utils.EngineArgs.create_speculative_config is missing" in str(refusal.value)
    assert "Install a vLLM that is tested (0.30, 0.31, 0.32), or serve without the adapter" in str(refusal.value)


@pytest.mark.usefixtures("unread")
def test_what_only_an_option_needs_refuses_that_option_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.26 and 0.27 take drafts' logits in another form on the V2 runner; elsewhere they serve."""

    def _compute_global_logprobs_and_logsumexp(logits: object) -> None: ...

    utilities = "v1.worker.gpu.spec_decode.rejection_sampler_utils"
    kernel = f"vllm.{utilities}._compute_global_logprobs_and_logsumexp"
    monkeypatch.setattr(kernel, _compute_global_logprobs_and_logsumexp)
    monkeypatch.setattr(selection, "runs_on_v2", lambda: True)
    monkeypatch.setattr(selection, "vllm_version", lambda: "0.26.0")
    register()

    def start(**options: str) -> None:
        speculative = {"method": "mtp", "model": str(demo.ADAPTER), "num_speculative_tokens": 4, **options}
        EngineArgs(model=str(demo.BASE), speculative_config=speculative).create_engine_config()

    start()
    with pytest.raises(compat.UnsupportedVersion) as refusal:
        start(draft_sample_method="probabilistic")
    assert str(refusal.value) == (
        f'"draft_sample_method": "probabilistic" relies on what vLLM 0.26.0 does not have as expected: {utilities}.'
        "_compute_global_logprobs_and_logsumexp has no parameter temp. Install a vLLM that is tested (0.30, 0.31, 0.32), or "
        "leave the option out."
    )


def test_every_option_is_a_group_that_needs_more_than_a_server_without_it() -> None:
    needed = {r for on_v2 in (False, True) for on_cpu in (False, True) for r in contract.needed(on_v2=on_v2, on_cpu=on_cpu)}
    assert all(set(contract.GROUPS[group]) - needed for group in contract.OPTIONS)
    chosen = {
        group
        for on_v2 in (False, True)
        for group in contract.options(on_v2=on_v2, probabilistic=True, by_confidence=True, request_loras=True, windows=True)
    }
    assert chosen == set(contract.OPTIONS)
    assert not list(contract.options(on_v2=True, probabilistic=False, by_confidence=False, request_loras=False))


def test_without_its_first_hook_vllm_starts_as_ever(monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]) -> None:
    monkeypatch.delattr(EngineArgs, "create_speculative_config")
    compat.recognise_adapters()
    (record,) = logged
    assert record.getMessage().startswith("Adapters for mask-token prediction are not recognised")
    assert "EngineArgs.create_speculative_config is missing" in record.getMessage()


@pytest.mark.parametrize("version", ["0.99.0", "1.0.0rc1", "0.26.0", "0.33.1.dev4+g1234567", "dev"])
def test_a_version_never_tested_runs_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord], version: str
) -> None:
    compat._warn_of_untested.cache_clear()
    monkeypatch.setattr(selection, "vllm_version", lambda: version)
    for _ in range(2):
        compat.check_vllm(contract.REGISTRATION)
    (record,) = logged
    assert record.levelname == "WARNING"
    assert f"is tested on vLLM 0.30, 0.31, 0.32, and this is {version}." in record.getMessage()


@pytest.mark.parametrize("version", ["0.30.0", "0.31.2", "0.32.0", "0.32.1rc2"])
def test_a_tested_version_runs_without_a_word(
    monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord], version: str
) -> None:
    monkeypatch.setattr(selection, "vllm_version", lambda: version)
    compat.check_vllm(contract.REGISTRATION)
    assert not logged


def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "vllm_version", lambda: "0.25.1")
    with pytest.raises(compat.UnsupportedVersion, match=r"needs vLLM 0\.26 or later; this is 0\.25\.1\. Install a vLLM"):
        compat.check_vllm(contract.REGISTRATION)
