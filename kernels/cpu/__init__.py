"""The kernels for CPUs, in C++: built once for this machine, with the compiler that torch.compile needs too."""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils import cpp_extension

DTYPES = (torch.float32, torch.bfloat16)
SOURCES = ("linear.cpp", "gated_lora.cpp", "comb_attention.cpp", "drafter.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-w")


class NotBuilt(RuntimeError):
    """There is no compiler, or it refused; the message says what it said."""


@lru_cache(maxsize=1)
def load() -> None:
    """Makes the operations `torch.ops.vllm_mtp.gated_lora_cpu_`, `comb_attention_cpu_`, `linear_cpu`, `gated_linear_cpu` and
    `draft_cpu`, and builds them if this machine has not yet: half a minute.

    Raises:
        NotBuilt: see there. The compiler is that of $CXX, else g++.
    """
    library = _folder() / f"vllm_mtp_{fingerprint()}.so"
    if not library.exists():
        _build(library)
    torch.ops.load_library(str(library))
    for name in ("gated_lora_cpu_", "comb_attention_cpu_"):
        torch.library.register_fake(f"vllm_mtp::{name}", _writes_in_place)
    for name in ("linear_cpu", "gated_linear_cpu"):
        torch.library.register_fake(f"vllm_mtp::{name}", _rows_of_outputs)


def has_linear() -> bool:
    """Whether `linear_cpu`, `gated_linear_cpu` and `draft_cpu` run on this processor: it has AVX-512 or AVX2
    (cpu/linear.h)."""
    load()
    return bool(torch.ops.vllm_mtp.has_linear_cpu())


def _writes_in_place(*_: object) -> None:
    return None


def _rows_of_outputs(x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, out: int, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], out)


def _folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()) / "vllm_mtp"


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Of everything that the library depends on: sources, flags, torch, compiler, processor."""
    here = Path(__file__).parent
    parts = [path.read_bytes() for path in sorted(here.glob("*.h")) + [here / name for name in SOURCES]]
    facts = (FLAGS, torch.__version__, sys.version, _compiler(), platform.machine(), _processor())
    return hashlib.sha256(b"\0".join([*parts, repr(facts).encode()])).hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _processor() -> str:
    """What -march=native depends on; a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), here)]
    links = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # Under another name first: a build that is killed leaves no library, and two at a time do not disturb each other.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [_compiler(), *FLAGS, abi, *includes, *(str(here / name) for name in SOURCES), *links, "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise NotBuilt(f"the C++ compiler {_compiler()!r} could not be started ({error}); install g++ or set CXX") from None
        if done.returncode:
            raise NotBuilt(f"{_compiler()} could not build the CPU kernels: {done.stderr.strip()[-2000:]}")
        built.replace(library)
