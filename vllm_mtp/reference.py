"""What the engine must compute, for one request in plain torch: a full forward over prefix and mask tokens for every step.

No cache and no batch: slow, and easy to check against *Your LLM Knows the Future*. The oracle of the engine's tests.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from vllm_mtp.adapter import Adapter, LoRAWeights, check_base, read_adapter
from vllm_mtp.causal_lm import attend_as_defined, unembedding
from vllm_mtp.mask_attention import KEPT


class ReferenceModel:
    """A base model and, where there is one, its adapter.

    Args:
        base: a causal LM of transformers; nothing is changed but how it computes attention, where that would leave something out.
        adapter: None: plain decoding only.
        mask_window: as `ServingOptions` has it; for a base without windows of its own.
    """

    def __init__(self, base: Any, adapter: Adapter | None = None, mask_window: int | None = None) -> None:
        attend_as_defined(base)
        self.base, self.adapter, self.mask_window = base.eval(), adapter, mask_window
        self.embed, self.unembed = base.get_input_embeddings(), unembedding(base)
        self.sampler = adapter.sampler.to(base.device, base.dtype) if adapter and adapter.sampler else None

    @classmethod
    def from_folder(
        cls,
        base: str | Path,
        adapter: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        mask_window: int | None = None,
    ) -> "ReferenceModel":
        """From a model folder and an adapter folder; AdapterError where they do not belong together."""
        loaded = read_adapter(adapter) if adapter is not None else None
        if loaded is not None:
            check_base(loaded.config, base)
        return cls(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), loaded, mask_window)

    @torch.no_grad()
    def real_states(self, ids: list[int]) -> torch.Tensor:
        """States of the tokens' rows after the final norm, without adapter, shape [tokens, d]."""
        return self.base.get_decoder()(input_ids=torch.tensor([ids], device=self.base.device), use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def mask_states(self, prefix_ids: list[int], k: int) -> torch.Tensor:
        """States after the final norm of mask tokens 1..k at positions L..L+k-1 behind a prefix of L tokens, shape [k, d]."""
        adapter = self._adapter(k)
        masks = adapter.embeddings(self.embed, k, self.base.device).to(self.base.dtype)
        real = self.embed(torch.tensor(prefix_ids, device=self.base.device))
        with self._gated_lora(adapter, len(prefix_ids)):
            rows, seen = torch.cat([real, masks])[None], self._seen(len(prefix_ids), k)
            found = self.base.get_decoder()(inputs_embeds=rows, attention_mask=seen, use_cache=False)
            return found.last_hidden_state[0, len(prefix_ids) :]

    def _seen(self, prefix: int, k: int) -> torch.Tensor | None:
        """What is added to the scores of prefix and mask tokens, [1, 1, prefix + k, prefix + k]; None: causal attention."""
        if self.mask_window is None:
            return None
        ahead = torch.arange(prefix + k)[:, None] - torch.arange(prefix + k)
        seen = ahead >= 0
        first = torch.arange(prefix + k) < min(KEPT, prefix)
        seen[prefix:] &= (ahead[prefix:] < self.mask_window) | first
        hidden = torch.zeros(seen.shape, dtype=self.base.dtype).masked_fill(~seen, torch.finfo(self.base.dtype).min)
        return hidden[None, None].to(self.base.device)

    def drafts(self, ids: list[int], k: int) -> list[int]:
        """The k drafts after `ids`, whose last token y_0 was sampled by the row before it.

        The group stands behind that row, so its prefix is `ids[:-1]`; y_i = argmax W Sampler(E(y_{i-1}), z_i) for i = 1..k.
        """
        return [draft for draft, _ in self.drafts_with_confidence(ids, k)]

    @torch.no_grad()
    def drafts_with_confidence(self, ids: list[int], k: int) -> list[tuple[int, float]]:
        """The k drafts after `ids`, and the probability max softmax W Sampler(E(y_{i-1}), z_i) of each."""
        previous, drafts = ids[-1], []
        for z in self.mask_states(ids[:-1], k):
            state = z if self.sampler is None else self.sampler(self.embed(torch.tensor(previous, device=z.device)), z)
            probability, best = self.unembed(state).softmax(-1).max(-1)
            previous = int(best)
            drafts.append((previous, probability.item()))
        return drafts

    def decode(
        self,
        prompt_ids: list[int],
        max_tokens: int,
        k: int,
        layout: Literal["plain", "linear", "quadratic"],
        end: int | None = None,
        tau: float = math.inf,
    ) -> tuple[list[int], list[int]]:
        """Greedy decoding: the new tokens, `end` included, and the number of tokens that each forward emitted, the prompt's first.

        Args:
            prompt_ids: at least one token.
            max_tokens: the most new tokens.
            k: drafts after every emitted token; not used by `plain`.
            layout: `quadratic` has a group behind every row and so drafts after every forward; `linear` has one behind the
                last row, and drafts only where everything before it was accepted.
            end: end-of-text token; decoding stops after it.
            tau: a draft whose probability is at least this is taken without a match.
        """
        tokens: list[int] = []
        forwards: list[int] = []
        fresh = False  # whether a group stands behind the row that was accepted last
        while len(tokens) < max_tokens and not (tokens and tokens[-1] == end):
            ids = prompt_ids + tokens
            found = self.drafts_with_confidence(ids, k) if fresh and layout != "plain" else []
            proposed = [draft for draft, _ in found]
            checked = self.unembed(self.real_states(ids + proposed)[len(ids) - 1 :]).argmax(-1).tolist()
            accepted = 0
            while accepted < len(proposed) and (proposed[accepted] == checked[accepted] or found[accepted][1] >= tau):
                accepted += 1
            new = [*proposed[:accepted], checked[accepted]][: max_tokens - len(tokens)]
            if end in new:
                new = new[: new.index(end) + 1]  # type: ignore[arg-type]
            tokens += new
            forwards.append(len(new))
            fresh = layout == "quadratic" or accepted == len(proposed)
        return tokens, forwards

    def _adapter(self, k: int) -> Adapter:
        if self.adapter is None:
            raise ValueError("mask tokens need an adapter, and none was given")
        if not 1 <= k <= self.adapter.config.num_mask_tokens:
            raise ValueError(f"k is {k}; the adapter has {self.adapter.config.num_mask_tokens} mask tokens")
        return self.adapter

    @contextmanager
    def _gated_lora(self, adapter: Adapter, num_real: int) -> Iterator[None]:
        """y = W x on all rows, plus scale B A x on rows [num_real:], while the context lasts."""

        def hook(lora: LoRAWeights) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], torch.Tensor]:
            def add(_: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
                x = args[0][..., num_real:, :]  # layers of experts drop the batch dimension
                delta = (x @ lora.a.to(x).T) @ lora.b.to(x).T * lora.scale
                return torch.cat([y[..., :num_real, :], y[..., num_real:, :] + delta], -2)

            return add

        handles = [self.base.get_submodule(name).register_forward_hook(hook(lora)) for name, lora in adapter.lora.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
