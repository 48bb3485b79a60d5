"""The prefix cache as PagedKVCache uses it: what is found again, what is not, and what gives way first."""

import numpy as np
import pytest
import torch

from mla_kernels.paging import OutOfPages, PagedKVCache
from mla_kernels.paging.prefix import Chain


def small_cache(num_pages=8):
    return PagedKVCache(
        num_pages,
        4,
        max_pages_per_sequence=6,
        max_sequences=8,
        prefix_cache=True,
        dtype=torch.float32,
        device="cpu",
        head_dim=2,
    )


def test_out_of_pages_forgets_no_cached_page():
    cache = small_cache(num_pages=2)
    seq = cache.allocate([1, 2, 3, 4])
    cache.commit(seq)
    cache.truncate(seq, 3)
    with pytest.raises(OutOfPages):
        cache.append(seq, 8)
    twin = cache.allocate([1, 2, 3, 4])
    assert cache.cached_tokens(twin) == 4


def test_a_prompt_is_found_again_after_it_was_freed_by_whole_pages():
    cache = small_cache()
    prompt = list(range(10))
    first = cache.allocate(prompt)
    assert cache.cached_tokens(first) == 0
    cache.write(cache.slots(first), torch.full((10, 1), 7.0), torch.full((10, 1), 7.0))
    assert cache.commit(first) == 2
    cache.free(first)
    assert (cache.usage().used, cache.usage().cached, cache.usage().free) == (0, 2, 6)
    second = cache.allocate([*prompt[:9], 99])
    table, _ = cache.tables([second])
    assert cache.cached_tokens(second) == 8 and (cache.kv_cache[table[0, :2].long()] == 7).all()
    third = cache.allocate([*prompt[:7], 99, 8])
    assert cache.cached_tokens(third) == 4  # its second page differs in one token
    usage = cache.usage()
    assert (usage.hit_tokens, usage.miss_tokens, usage.shared) == (12, 17, 1)


def test_pages_are_found_only_once_committed_and_only_as_far_as_written():
    cache = small_cache()
    first = cache.allocate(range(8))
    assert cache.cached_tokens(cache.allocate(range(8))) == 0
    assert cache.commit(first, written=7) == 1
    assert cache.cached_tokens(cache.allocate(range(8))) == 4
    assert cache.commit(first) == 1


def test_the_same_page_after_another_page_is_not_the_same():
    cache = small_cache()
    cache.commit(cache.allocate([1, 1, 1, 1, 2, 2, 2, 2]))
    assert cache.cached_tokens(cache.allocate([2, 2, 2, 2])) == 0
    assert cache.cached_tokens(cache.allocate([3, 1, 1, 1, 2, 2, 2, 2])) == 0


def test_appended_ids_are_found_but_nothing_after_a_token_without_id():
    cache = small_cache(num_pages=20)
    first = cache.allocate([0, 1])
    cache.append(first, [2, 3, 4])
    cache.append(first, np.array([5, 6, 7, 8]))
    cache.append(first, 3)
    cache.append(first, [12, 13, 14, 15])
    assert cache.commit(first) == 2
    assert cache.cached_tokens(cache.allocate(range(16))) == 8
    cache.truncate(first, 9)
    cache.append(first, [9, 10, 11])
    assert cache.commit(first) == 1


def test_forks_are_named_by_their_own_tokens():
    cache = small_cache(num_pages=20)
    first = cache.allocate([0, 1, 2, 3, 4])
    cache.commit(first)
    second = cache.fork(first)
    cache.append(second, [5, 6, 7])
    cache.append(first, [8, 9, 10])
    assert (cache.commit(second), cache.commit(first)) == (1, 1)
    third = cache.fork(first)
    cache.truncate(third, 0)
    cache.append(third, [11, 11, 11, 11])
    cache.append(first, [12, 12, 12, 12])
    assert (cache.commit(third), cache.commit(first)) == (1, 1)
    for ids in ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 8, 9, 10, 12, 12, 12, 12], [11, 11, 11, 11]):
        seq = cache.allocate(ids)
        assert cache.cached_tokens(seq) == len(ids)
        cache.free(seq)


def test_of_two_pages_with_the_same_tokens_one_is_cached():
    cache = small_cache()
    first, second = cache.allocate([1, 2, 3, 4]), cache.allocate([1, 2, 3, 4])
    assert (cache.commit(first), cache.commit(second)) == (1, 0)
    cache.free(second)
    cache.free(first)
    assert (cache.usage().cached, cache.usage().free) == (1, 7)


def test_a_cached_page_that_is_written_again_is_not_found():
    cache = small_cache()
    first = cache.allocate([1, 2, 3, 4])
    cache.commit(first)
    cache.truncate(first, 2)
    cache.append(first, [8])
    assert cache.cached_tokens(cache.allocate([1, 2, 3, 4])) == 0
    cache.append(first, [9])
    assert cache.commit(first) == 1
    assert cache.cached_tokens(cache.allocate([1, 2, 8, 9])) == 4


def test_eviction_takes_the_least_recently_used_page_and_tails_before_heads():
    cache = small_cache(num_pages=6)
    prompts = {name: [name] * 8 for name in (1, 2, 3)}
    for prompt in prompts.values():
        seq = cache.allocate(prompt)
        cache.commit(seq)
        cache.free(seq)
    cache.free(cache.allocate(prompts[1]))  # used again: now 2 is the oldest
    assert (cache.usage().cached, cache.usage().free) == (6, 0)

    def cached(name):  # looks without touching
        return len(cache._prefix.match(Chain(np.array(prompts[name])))) * 4

    seen = []
    holder = cache.allocate(0)
    for _ in range(6):
        cache.append(holder, 4)
        seen.append([cached(name) for name in (1, 2, 3)])
    assert seen == [[8, 4, 8], [8, 0, 8], [8, 0, 4], [8, 0, 0], [4, 0, 0], [0, 0, 0]]
    assert cache.usage().evicted_pages == 6
    with pytest.raises(OutOfPages):
        cache.allocate(1)


def test_a_matched_page_is_not_evicted_for_the_rest_of_its_own_sequence():
    cache = small_cache(num_pages=3)
    old = cache.allocate([1] * 4)
    cache.commit(old)
    cache.free(old)
    newer = cache.allocate([2] * 8)
    cache.commit(newer)
    cache.free(newer)
    with pytest.raises(OutOfPages, match="3 pages asked for, 0 of 3 are free and 2 evictable"):
        cache.allocate([1] * 4 + [3] * 12)
    assert cache.usage().cached == 3
    seq = cache.allocate([1] * 4 + [3] * 8)
    assert cache.cached_tokens(seq) == 4 and cache.usage().used == 3


def test_names_of_pages_do_not_depend_on_how_ids_are_given():
    cache = small_cache(num_pages=20)
    cache.commit(cache.allocate([5, 6, 7, 8]))
    for ids in (
        (5, 6, 7, 8),
        range(5, 9),
        np.array([5, 6, 7, 8], np.int32),
        np.arange(5, 13, dtype=np.uint16)[:4],
        torch.arange(5, 9),
    ):
        assert cache.cached_tokens(cache.allocate(ids)) == 4
