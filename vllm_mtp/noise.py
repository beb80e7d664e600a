"""Random numbers as a function of seed, position and token: without a generator or state, and the same in every process."""

import torch

WORD = 0xFFFFFFFF
FACTORS = 0x7FEB352D, 0x297A2D39  # odd, and below 2^31: see `_mixed`


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise [R, C], float32: the argmax of log p + noise over tokens is a sample of p.

    vLLM's verification draws from generators (V1) and from hashes of other families (V2, v1/worker/gpu/sample/gumbel.py: Murmur 3,
    Philox), so a draft shares no noise with the test that it must pass, whatever its seed.

    Args:
        seeds: of each request, [R], int64.
        positions: of each draw, [R], int64, below 2^32.
        tokens: that the noise is for, [R, C], int64.
    """
    of_request = _mixed(_mixed(seeds & WORD) ^ ((seeds >> 32) & WORD))
    of_draw = _mixed(of_request ^ positions)
    bits = _mixed(of_draw[:, None] ^ tokens)
    # The numbers near 0 decide an argmax, and there float32 is finest.
    uniform = (bits.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit words, held in int64.

    Nothing reaches 2^63: inductor writes C++, where integers that overflow are undefined, and with torch 2.13 some products were
    wrong.
    """
    x = (x + 0x9E3779B9) & WORD  # or 0, a likely seed, position and token, would stay 0
    x = ((x ^ (x >> 16)) * FACTORS[0]) & WORD
    x = ((x ^ (x >> 15)) * FACTORS[1]) & WORD
    return x ^ (x >> 16)
