"""The `vllm-mtp` command."""
