"""Prefix hits and evictions of a trace against a plain model, and what a small cache does to them."""

import pytest

from mla_kernels.serving import chats, token_ids
from mla_kernels.serving.prefix_replay import DEPLOYMENTS, Deployment, replay

TRACE = chats(60, 5.0, seed=2)


def hits_of_a_plain_cache(requests, capacity_pages: int, page_size: int = 64) -> tuple[int, int]:
    """(hit tokens, evicted pages) where a page is known by all the tokens up to its end.

    Pages are known from the least to the most recently used, of one request its last page first.
    """
    known, hits, evictions = {}, 0, 0
    for request in requests:
        prompt = token_ids(request.prompt).tobytes()
        whole = prompt + token_ids((request.reply,)).tobytes()
        pages = [whole[: 8 * end] for end in range(page_size, len(whole) // 8 + 1, page_size)]
        found = 0
        while found < len(prompt) // 8 // page_size and pages[found] in known:
            del known[pages[found]]  # in use now
            found += 1
        hits += found * page_size
        evicted = max(0, len(known) + -(-len(whole) // 8 // page_size) - capacity_pages)
        for page in list(known)[:evicted]:
            del known[page]
        evictions += evicted
        known |= dict.fromkeys(reversed(pages))
    return hits, evictions


@pytest.mark.parametrize("capacity_tokens", [20_000, 60_000, 10_000_000])
def test_hits_and_evictions_are_those_of_a_plain_cache(capacity_tokens):
    found = replay(TRACE, capacity_tokens)
    assert (found.hit_tokens, found.evicted_pages) == hits_of_a_plain_cache(TRACE, capacity_tokens // 64)
    assert found.prompt_tokens == sum(request.context_tokens for request in TRACE)
    assert (found.evicted_pages == 0) == (capacity_tokens == 10_000_000)


def test_less_room_finds_no_more():
    rates = [replay(TRACE, tokens).hit_rate for tokens in (20_000, 60_000, 10_000_000)]
    assert rates == sorted(rates) and rates[0] < rates[-1]


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="capacity is 100 tokens, must be over"):
        replay(TRACE, 100)


def test_room_is_what_the_weights_leave():
    small, large = (Deployment(70, 61, card) for card in (80, 141))
    assert small.capacity_tokens == int(2e9 / (61 * 1152)) < large.capacity_tokens
    assert Deployment(100, 61, 80).capacity_tokens == 0
    assert {d.weight_gb for d in DEPLOYMENTS} == {7, 30, 70}
