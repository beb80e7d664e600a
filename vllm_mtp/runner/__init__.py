"""All that differs between vLLM's model runners."""
