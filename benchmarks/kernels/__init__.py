"""Times of the mask-row kernels beside their floors. Needs torch and Triton alone, no vLLM, and runs from an unpacked checkout."""

from importlib.util import find_spec
from pathlib import Path

import vllm_mtp

if find_spec("vllm_mtp.kernels") is None:  # not installed: setup.cfg's mapping of kernels/ by hand
    vllm_mtp.__path__.append(str(Path(__file__).parents[2]))
