"""Methods of speculation side by side: one base model, one build of vLLM, the same prompts, each method at its best setting."""
