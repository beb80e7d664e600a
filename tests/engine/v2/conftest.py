"""vLLM's V2 model runner on a CPU: all its Triton kernels run under Triton's interpreter, in a process started for it.

`tests/engine/test_v2_runner.py` starts that process; in any other these tests are not collected. A step takes some 50 ms.
"""

import pytest
from vllm_mtp.kernels.dispatch import interpreting

collect_ignore_glob = [] if interpreting() else ["test_*.py"]


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that start now schedule a step before the one before it has ended; vLLM never does so on CPUs of itself."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: type[CpuPlatform], config: object) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True  # type: ignore[attr-defined]

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
