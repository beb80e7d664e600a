"""Makes a part of the plugin fail in every process of a server, from the moment on that a file appears.

Python imports this module at its start when its folder is on PYTHONPATH; `tests.faults` puts it there, for servers that it starts.
VLLM_MTP_TEST_FAULT names the part, VLLM_MTP_TEST_FAULT_FILE the file.
"""

import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path

PARTS = {
    "planning": ("vllm_mtp.plan", "Planner.plan"),
    "drafting": ("vllm_mtp.drafter", "Drafter.__call__"),
    "kernel": ("vllm_mtp.cpu_attention", "_Layer.forward"),
    "verifying": ("vllm_mtp.verifier", "greedy_tokens"),
}
MODULE, NAME = PARTS.get(os.environ.get("VLLM_MTP_TEST_FAULT", ""), ("", ""))


def spoil(module, file):
    """Replaces the function by one that does its work, and raises once the file is there."""
    owner = module
    *path, name = NAME.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def fails(*args, **kwargs):
        result = function(*args, **kwargs)
        if file.exists():
            # A kernel serves plain steps too; it is ours that fails, with mask rows.
            if name == "forward" and args[0].attention.step is None:
                return result
            raise RuntimeError(f"injected into {MODULE}.{NAME}")
        return result

    setattr(owner, name, fails)


class Finder(importlib.abc.MetaPathFinder):
    """Spoils the module when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            spoil(module, Path(os.environ["VLLM_MTP_TEST_FAULT_FILE"]))

        spec.loader.exec_module = exec_module
        return spec


if MODULE:
    sys.meta_path.insert(0, Finder())
