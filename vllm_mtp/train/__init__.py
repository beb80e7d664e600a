"""Training of mask tokens, gated LoRA and the sampler head on a frozen Hugging Face causal LM."""
