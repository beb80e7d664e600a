"""Registered but not selected, the plugin leaves vLLM as it is. Each check runs in a process of its own, fresh from import."""

import subprocess
import sys
import textwrap


def run(code: str) -> str:
    """What `code` prints in a new interpreter without plugins."""
    environment = {"PATH": "/usr/bin:/bin", "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "HOME": "/tmp"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


SNAPSHOT = """
    import importlib, types
    MODULES = '''
        vllm.engine.arg_utils vllm.config.speculative vllm.config.vllm vllm.v1.core.sched.scheduler vllm.v1.core.kv_cache_manager
        vllm.v1.worker.gpu_model_runner vllm.v1.worker.gpu_worker vllm.v1.worker.gpu.model_runner
        vllm.v1.worker.gpu.spec_decode vllm.v1.worker.gpu.spec_decode.rejection_sampler vllm.v1.worker.gpu.model_states.default
        vllm.v1.worker.cpu_model_runner vllm.v1.worker.cpu_worker vllm.v1.worker.gpu_input_batch
        vllm.v1.sample.rejection_sampler vllm.v1.sample.sampler vllm.v1.attention.backend vllm.v1.attention.backends.cpu_attn
        vllm.v1.attention.backends.registry vllm.model_executor.layers.attention.attention vllm.model_executor.layers.linear
        vllm.model_executor.models.llama vllm.model_executor.models.registry vllm.v1.spec_decode.custom_class_proposer
        vllm.transformers_utils.configs.speculators.algos
    '''.split()
    modules = [importlib.import_module(name) for name in MODULES]

    def snapshot():
        seen = {}
        for module in modules:
            for name, value in vars(module).items():
                seen[module.__name__, name] = value
                if isinstance(value, type) and value.__module__ == module.__name__:
                    seen |= {(module.__name__, name, key): entry for key, entry in vars(value).items()}
                if isinstance(value, dict):
                    seen |= {(module.__name__, name, repr(key)): entry for key, entry in value.items()}
        return seen
"""


def test_registration_touches_one_name() -> None:
    changed = run(
        SNAPSHOT
        + """
    before = snapshot()
    from vllm_mtp.plugin import register
    register()
    once = snapshot()
    register()
    twice = snapshot()
    assert all(once[key] is twice[key] for key in once), 'not idempotent'
    print(*sorted('.'.join(key) for key in before | once if before.get(key) is not once.get(key)))
    """
    )
    assert changed == "vllm.engine.arg_utils.EngineArgs.create_speculative_config"


def test_registration_imports_no_runner() -> None:
    imported = run(
        """
    import sys
    from vllm_mtp.plugin import register
    register()
    runners = ('vllm.v1.worker', 'vllm.model_executor.models.llama', 'vllm_mtp.runner')
    print(*sorted(name for name in sys.modules if name.startswith(runners)))
    """
    )
    assert imported == ""


def test_vllm_is_held_against_the_contract_without_an_import() -> None:
    imported = run(
        """
    import sys
    from vllm_mtp import contract
    from vllm_mtp.vllm_source import Installed
    tree = Installed()
    for on_v2 in (False, True):
        assert contract.violations(tree, contract.needed(on_v2=on_v2, on_cpu=not on_v2)) == []
    assert [contract.violations(tree, contract.GROUPS[group]) for group in contract.OPTIONS] == [[]] * len(contract.OPTIONS)
    print(*sorted(name for name in sys.modules if name.split('.')[0] in ('vllm', 'torch', 'triton')))
    """
    )
    assert imported == ""


def test_other_speculative_configurations_pass_through_unchanged() -> None:
    out = run(
        """
    from vllm.engine.arg_utils import EngineArgs
    seen = []
    EngineArgs.create_speculative_config = lambda self, target, parallel: seen.append(self.speculative_config) or 'made'
    from vllm_mtp.plugin import register
    register()
    ngram = {'method': 'ngram', 'num_speculative_tokens': 3}
    for config in (None, ngram, {'method': 'mtp', 'num_speculative_tokens': 1}, {'method': 'mtp', 'model': 'x/y'}):
        args = EngineArgs(model='m', speculative_config=config)
        assert args.create_speculative_config(1, 2) == 'made'
        assert seen[-1] is config and not args.additional_config
    print(len(seen))
    """
    )
    assert out == "4"
