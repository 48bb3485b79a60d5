"""Prefix hits of a trace against a plain model of an unbounded cache, and what a small one does to them."""

import pytest

from mla_kernels.serving import chats, token_ids
from mla_kernels.serving.prefix_replay import DEPLOYMENTS, Deployment, replay

TRACE = chats(60, 5.0, seed=2)


def hits_of_an_endless_cache(requests, page_size: int) -> int:
    """Whole pages of each prompt whose tokens, from the first on, some earlier request had."""
    known, hits = set(), 0
    for request in requests:
        prompt = token_ids(request.prompt).tolist()
        whole = prompt + token_ids((request.reply,)).tolist()
        found = 0
        for end in range(page_size, len(prompt) + 1, page_size):
            if tuple(prompt[:end]) not in known:
                break
            found = end
        hits += found
        known.update(tuple(whole[:end]) for end in range(page_size, len(whole) + 1, page_size))
    return hits


def test_an_endless_cache_finds_what_was_there():
    found = replay(TRACE, capacity_tokens=10_000_000)
    # a prompt that is found whole keeps its last token to be computed
    expected = hits_of_an_endless_cache(TRACE, 64)
    assert expected - 64 * len(TRACE) * 0.05 <= found.hit_tokens <= expected
    assert found.evicted_pages == 0
    assert found.prompt_tokens == sum(request.context_tokens for request in TRACE)


def test_less_room_finds_no_more():
    rates = [replay(TRACE, tokens).hit_rate for tokens in (20_000, 60_000, 10_000_000)]
    assert rates == sorted(rates) and rates[0] < rates[-1]
    assert replay(TRACE, 20_000).evicted_pages > 0


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="capacity is 100 tokens, must be over"):
        replay(TRACE, 100)


def test_room_is_what_the_weights_leave():
    small, large = (Deployment(70, 61, card) for card in (80, 141))
    assert small.capacity_tokens == int(2e9 / (61 * 1152)) < large.capacity_tokens
    assert Deployment(100, 61, 80).capacity_tokens == 0
    assert {d.weight_gb for d in DEPLOYMENTS} == {7, 30, 70}
