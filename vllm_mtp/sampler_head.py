"""The sampler head: a two-block MLP that turns a mask state and the token drafted before it into a state for the unembedding."""

import torch
import torch.nn.functional as F
from torch import nn


class SamplerHead(nn.Module):
    """MLP([E(y_prev); z]) of *Your LLM Knows the Future*, section 3.2: two blocks Linear -> SiLU -> LayerNorm.

    Args:
        hidden_size: width d of the base model.
        residual: add z to the output, so that an untrained head starts near the plain head.
    """

    def __init__(self, hidden_size: int, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.linear_1, self.norm_1 = nn.Linear(2 * hidden_size, hidden_size), nn.LayerNorm(hidden_size)
        self.linear_2, self.norm_2 = nn.Linear(hidden_size, hidden_size), nn.LayerNorm(hidden_size)

    def forward(self, previous: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """States for the unembedding, shape [..., d].

        Args:
            previous: embedding E(y_prev) of the token before the one to draft, shape [..., d].
            z: hidden state of the mask row, after the base's final norm, shape [..., d].
        """
        return self.step(previous, self.project(z), z)

    def project(self, z: torch.Tensor) -> torch.Tensor:
        """The part of the first linear that needs mask states only, [..., d]; drafting computes it for all of a group's
        states at once."""
        return F.linear(z, self.linear_1.weight[:, z.shape[-1] :], self.linear_1.bias)

    def step(self, previous: torch.Tensor, projected: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """`forward`, given `project(z)`."""
        first = F.linear(previous, self.linear_1.weight[:, : previous.shape[-1]])
        h = self.norm_1(F.silu(first + projected))
        h = self.norm_2(F.silu(self.linear_2(h)))
        return z + h if self.residual else h
