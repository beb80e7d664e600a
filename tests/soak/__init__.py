"""Hours of mixed traffic on a real server: memory, acceptance, errors, and greedy answers beside plain vLLM's."""
