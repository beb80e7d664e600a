"""Operations with a plain torch reference beside their fast versions; imported as `vllm_mtp.kernels`."""
