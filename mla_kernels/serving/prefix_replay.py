"""Prompts that share prefixes, through the paged cache itself: what share of their tokens is already there?

Simulated in that nothing is computed: requests come one after the other, each is allocated, committed and
freed, so the pages of its prompt and reply stay findable until they are evicted. The cache is the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla_kernels.paging import PagedKVCache

from .requests import Request, token_ids

BYTES_PER_TOKEN = 2 * 576  # of a layer, bf16


@dataclass(frozen=True)
class Deployment:
    """A model on a card. ``weight_gb`` as the chapter has it; it states neither layers nor reserve: assumed.

    ``layers``: those of DeepSeek-V2-Lite (27) and DeepSeek-V3 (61), and 40 between. ``reserve``: share of the
    card that activations and buffers take.
    """

    weight_gb: float
    layers: int
    card_gb: float
    reserve: float = 0.1

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the rest of the card has room for."""
        room = self.card_gb * (1 - self.reserve) - self.weight_gb
        return max(0, int(room * 1e9 / (self.layers * BYTES_PER_TOKEN)))


DEPLOYMENTS = tuple(
    Deployment(weight_gb, layers, card_gb)
    for weight_gb, layers in ((7, 27), (30, 40), (70, 61))
    for card_gb in (80, 141)
)


@dataclass(frozen=True)
class Replay:
    """What came of a trace at one capacity."""

    capacity_tokens: int
    prompt_tokens: int
    hit_tokens: int
    evicted_pages: int

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that need no prefill."""
        return self.hit_tokens / self.prompt_tokens


def replay(requests: Sequence[Request], capacity_tokens: int, page_size: int = 64) -> Replay:
    """Raises ValueError where the longest request does not fit."""
    longest = max(request.context_tokens + request.generated_tokens for request in requests)
    if capacity_tokens < longest + page_size:
        raise ValueError(f"capacity is {capacity_tokens} tokens, must be over {longest}: take a larger card")
    cache = PagedKVCache(
        capacity_tokens // page_size,
        page_size,
        max_pages_per_sequence=-(-longest // page_size),
        max_sequences=1,
        prefix_cache=True,
        device="cpu",
        head_dim=1,
    )
    prompt_tokens = hit_tokens = 0
    for request in requests:
        sequence = cache.allocate(token_ids(request.prompt))
        prompt_tokens += request.context_tokens
        hit_tokens += cache.cached_tokens(sequence)
        cache.append(sequence, token_ids((request.reply,)))
        cache.commit(sequence)
        cache.free(sequence)
    return Replay(capacity_tokens, prompt_tokens, hit_tokens, cache.usage().evicted_pages)
