"""Kernels for mask rows, imported as `vllm_mtp.kernels`: one folder an operation, its formula in plain torch beside the kernel.

Nothing here imports vLLM, and nothing imports Triton before a kernel runs.
"""
