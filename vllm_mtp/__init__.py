"""vllm-mtp: mask-token prediction for a stock vLLM server."""

__version__ = "0.1.0"
