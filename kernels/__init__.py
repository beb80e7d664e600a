"""Kernels for mask rows, imported as `vllm_mtp.kernels`. None yet: the engine runs on torch operations and vLLM's own kernels."""
