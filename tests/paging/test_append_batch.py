"""PagedKVCache.append_batch: what one after another would give, for all of the sequences or for none."""

import random
import threading

import numpy as np
import pytest
import torch

from mla_kernels.paging import OutOfPages, PagedKVCache, Slots, slot_mapping


def small_cache(num_pages=12, page_size=4, **options):
    defaults = {"max_pages_per_sequence": 6, "max_sequences": 6, "dtype": torch.float32, "head_dim": 2}
    return PagedKVCache(num_pages, page_size, device="cpu", **(defaults | options))


def fill(cache, slots, values):
    numbers = torch.as_tensor(values, dtype=torch.float32)[:, None]
    cache.write(slots, numbers, -numbers)


def read(cache, seq):
    slots = cache.slots(seq)
    return cache.kv_cache[slots.pages.astype(np.int64), slots.offsets.astype(np.int64), 0, 0].tolist()


def pages_of(cache, seq):
    return list(dict.fromkeys(cache.slots(seq).pages.tolist()))


def state(cache):
    tables = cache._tables
    return cache.usage(), bytes(tables.pages), bytes(tables.lengths), bytes(cache._allocator.owners)


def test_a_decode_step_is_a_token_each_in_the_order_asked_for():
    cache = small_cache()
    seqs = [cache.allocate(n) for n in (3, 4, 0, 6)]  # pages 0, 1, none, 2 and 3
    order = [seqs[3], seqs[1], seqs[0], seqs[2]]
    slots = cache.append_batch(order)
    assert slots.pages.tolist() == [3, 4, 0, 5] and slots.offsets.tolist() == [2, 0, 3, 0]
    assert slots.pages.dtype == slots.offsets.dtype == np.int32
    assert [cache.length(seq) for seq in seqs] == [4, 5, 1, 7]
    cache.sync()
    assert cache.cache_seqlens.tolist() == [4, 5, 1, 7, 0, 0]
    assert cache.block_table[1, :2].tolist() == [1, 4] and cache.block_table[2, 0] == 5


def test_counts_of_their_own():
    cache = small_cache()
    seqs = [cache.allocate(n) for n in (3, 4, 0)]
    slots = cache.append_batch(seqs, [6, 0, 4])
    assert slots.pages.tolist() == [0, 2, 2, 2, 2, 3, 4, 4, 4, 4]
    assert slots.offsets.tolist() == [3, 0, 1, 2, 3, 0, 0, 1, 2, 3]
    assert [cache.length(seq) for seq in seqs] == [9, 4, 4]


@pytest.mark.parametrize("counts", [None, []])
def test_of_nothing_is_nothing(counts):
    cache = small_cache()
    before = state(cache)
    assert [part.shape for part in cache.append_batch([], counts)] == [(0,), (0,)]
    assert state(cache) == before


def test_of_forks_all_but_the_last_copy_their_page():
    cache = small_cache()
    first = cache.allocate(6)
    fill(cache, cache.slots(first), range(6))
    forks = [first, cache.fork(first), cache.fork(first)]
    fill(cache, cache.append_batch(forks), [10, 11, 12])
    assert [pages_of(cache, seq) for seq in forks] == [[0, 2], [0, 3], [0, 1]]
    assert [read(cache, seq) for seq in forks] == [[0, 1, 2, 3, 4, 5, 10 + i] for i in range(3)]
    assert cache.usage().shared == 1


def test_a_fork_that_does_not_take_part_keeps_the_page():
    cache = small_cache()
    first = cache.allocate(6)
    fill(cache, cache.slots(first), range(6))
    second, third = cache.fork(first), cache.fork(first)
    fill(cache, cache.append_batch([second, third], [1, 3]), [10, 11, 12, 13])
    assert [pages_of(cache, seq) for seq in (first, second, third)] == [[0, 1], [0, 2], [0, 3, 4]]
    assert read(cache, first) == [0, 1, 2, 3, 4, 5] and read(cache, third)[4:] == [4, 5, 11, 12, 13]
    assert read(cache, second)[4:] == [4, 5, 10]


def test_a_count_of_zero_copies_nothing():
    cache = small_cache()
    first = cache.allocate(6)
    second = cache.fork(first)
    before = cache.usage()
    cache.append_batch([first, second], [0, 0])
    assert cache.usage() == before


def test_out_of_pages_for_one_changes_none():
    cache = small_cache(5)
    seqs = [cache.allocate(4) for _ in range(3)]
    forks = [cache.allocate(3)]
    forks.append(cache.fork(forks[0]))
    before = state(cache)
    with pytest.raises(OutOfPages, match=r"4 pages asked for, 1 of 5 are free and 0 evictable"):
        cache.append_batch([*seqs, *forks])  # a page each of three, and a copy
    assert state(cache) == before
    cache.append_batch([seqs[0], forks[1]], [1, 0])  # one does fit


def test_a_failed_copy_changes_nothing(monkeypatch):
    cache = small_cache()
    first = cache.allocate(6)
    second = cache.fork(first)
    before = state(cache)

    def fails(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.Tensor, "index_select", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.append_batch([second, first], [9, 9])
    assert state(cache) == before


def test_ids_let_others_find_the_pages():
    cache = small_cache(prefix_cache=True)
    first, second = cache.allocate([1, 2, 3]), cache.allocate([5] * 4)
    cache.append_batch([second, first], [2, 2], [6, 7, 4, 8])
    cache.append_batch([second, first], ids=np.array([9, 9]))
    cache.commit(first), cache.commit(second)
    assert cache.cached_tokens(cache.allocate([1, 2, 3, 4, 8])) == 4
    cache.append_batch([second], ids=[10])
    cache.commit(second)
    assert cache.cached_tokens(cache.allocate([5, 5, 5, 5, 6, 7, 9, 10])) == 8


def test_a_page_that_is_written_again_is_not_found():
    cache = small_cache(prefix_cache=True)
    seq, other = cache.allocate([1, 2, 3, 4]), cache.allocate(1)
    cache.commit(seq)
    cache.truncate(seq, 3)
    cache.append_batch([other, seq], ids=[7, 8])
    assert cache.cached_tokens(cache.allocate([1, 2, 3, 4])) == 0


def test_nor_is_one_beside_a_copy_or_the_last_of_its_forks():
    cache = small_cache(prefix_cache=True, max_sequences=8)
    alone, first, other = cache.allocate([1, 2, 3, 4]), cache.allocate([5, 6, 7, 8]), cache.allocate([9])
    cache.commit(alone), cache.commit(first)
    cache.truncate(alone, 3), cache.truncate(first, 3)
    forks, copied = [first, cache.fork(first)], cache.fork(other)
    cache.append_batch([alone, copied, *forks])
    assert cache.cached_tokens(cache.allocate([1, 2, 3, 4])) == 0
    assert cache.cached_tokens(cache.allocate([5, 6, 7, 8])) == 0


def test_evicts_what_nobody_owns():
    cache = small_cache(4, prefix_cache=True)
    cached = cache.allocate(range(8))
    cache.commit(cached)
    cache.free(cached)
    seqs = [cache.allocate(4), cache.allocate(4)]
    cache.append_batch(seqs)
    assert (cache.usage().evicted_pages, cache.usage().free) == (2, 0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"seqs": [0, 1, 0]}, ValueError, "sequence 0 is listed twice"),
        ({"seqs": [0, 7]}, ValueError, "sequence 7 is not alive"),
        ({"seqs": [0, -1]}, ValueError, "sequence -1 is not alive"),
        ({"counts": [1]}, ValueError, r"counts have shape \(1,\), must be \(2,\)"),
        ({"counts": [1, -2]}, ValueError, "a count is -2"),
        ({"counts": [1, 0.5]}, TypeError, "counts are float64"),
        ({"counts": [1, 22]}, ValueError, "25 tokens, at most 24 fit"),
        ({"counts": [1, 2**63 - 1]}, ValueError, "at most 24 fit"),
        ({"ids": [1]}, ValueError, "ids are 1 ids, must be the ids of the 2 new tokens"),
        ({"ids": 2}, ValueError, "ids are a count"),
        ({"ids": [0.5, 1]}, TypeError, "token ids are float64"),
    ],
)
def test_refuses_and_changes_nothing(change, error, text):
    cache = small_cache(prefix_cache=True)
    arguments = {"seqs": [cache.allocate(3), cache.allocate(3)]} | change
    before = state(cache)
    with pytest.raises(error, match=text):
        cache.append_batch(**arguments)
    assert state(cache) == before


def test_threads_that_append_for_their_own_sequences(eager_threads):
    cache = small_cache(4000, max_pages_per_sequence=60, max_sequences=32)
    root = cache.allocate(6)
    fill(cache, cache.slots(root), [-1] * 6)
    failures = []

    def decode(seed):
        rng = random.Random(seed)
        try:
            mine = {cache.fork(root): [-1.0] * 6 for _ in range(6)}
            for step in range(60):
                seqs = rng.sample(sorted(mine), 4)
                counts = [rng.randrange(4) for _ in seqs]
                values = [float(seed * 1000 + step)] * sum(counts)
                fill(cache, cache.append_batch(seqs, counts), values)
                for seq, n in zip(seqs, counts, strict=True):
                    mine[seq] += values[:n]
            for seq, expected in mine.items():
                assert read(cache, seq) == expected
                cache.free(seq)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (cache.usage().used, cache.usage().tokens) == (2, 6)


def test_slot_mapping_is_what_the_append_kernel_takes():
    slots = Slots(np.array([2**31 // 64, 0], np.int32), np.array([63, 5], np.int32))
    mapping = slot_mapping(slots, 64, torch.device("cpu"))
    assert mapping.dtype == torch.int64 and mapping.tolist() == [2**31 + 63, 5]
    assert slot_mapping(Slots(*(part[:0] for part in slots)), 64, torch.device("cpu")).shape == (0,)
