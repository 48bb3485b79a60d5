"""PagedKVCache case by case: what each promise of its docstrings looks like."""

import random
import threading

import numpy as np
import pytest
import torch

from mla_kernels.paging import OutOfPages, OutOfSequences, PagedKVCache, Slots
from mla_kernels.paging.slots import write_latents
from mla_kernels.reference import mla_decode_reference


def small_cache(num_pages=8, page_size=4, **options):
    defaults = {"max_pages_per_sequence": 6, "max_sequences": 4, "dtype": torch.float32, "head_dim": 2}
    return PagedKVCache(num_pages, page_size, device="cpu", **(defaults | options))


def fill(cache, slots, value):
    n = len(slots.pages)
    cache.write(slots, torch.full((n, 1), float(value)), torch.full((n, 1), -float(value)))


def read(cache, seq):
    slots = cache.slots(seq)
    return cache.kv_cache[slots.pages.astype(np.int64), slots.offsets.astype(np.int64), 0, 0].tolist()


def pages_of(cache, seq):
    return list(dict.fromkeys(cache.slots(seq).pages.tolist()))


def test_whoever_writes_first_into_a_shared_page_copies_it():
    cache = small_cache()
    first = cache.allocate(6)
    fill(cache, cache.slots(first), 1)
    second = cache.fork(first)
    assert pages_of(cache, first) == pages_of(cache, second) == [0, 1]
    fill(cache, cache.append(second, 1), 2)
    assert (pages_of(cache, first), pages_of(cache, second)) == ([0, 1], [0, 2])
    fill(cache, cache.append(first, 1), 3)
    assert pages_of(cache, first) == [0, 1]  # alone in it again: no copy
    assert read(cache, first) == [1.0] * 6 + [3.0] and read(cache, second) == [1.0] * 6 + [2.0]


def test_a_fork_at_a_page_boundary_copies_nothing():
    cache = small_cache()
    first = cache.allocate(4)
    second = cache.fork(first)
    cache.append(second, 1)
    assert (pages_of(cache, first), pages_of(cache, second)) == ([0], [0, 1])


@pytest.mark.parametrize("start, n", [(0, 1), (3, 1), (3, 2), (5, 9), (4, 4), (2, 0)])
def test_slots_of_an_append_are_the_next_lines_of_its_pages(start, n):
    cache = small_cache()
    cache.allocate(3)  # so that page ids are not positions
    seq = cache.allocate(start)
    slots = cache.append(seq, n)
    table, lengths = cache.tables([seq])
    expected = [(int(table[0, t // 4]), t % 4) for t in range(start, start + n)]
    assert list(zip(*(part.tolist() for part in slots), strict=True)) == expected
    assert slots.pages.dtype == slots.offsets.dtype == np.int32
    assert lengths.tolist() == [start + n]


def test_tables_follow_the_order_asked_for_and_sync_the_rows():
    cache = small_cache()
    seqs = [cache.allocate(n) for n in (5, 0, 9)]
    table, lengths = cache.tables([seqs[2], seqs[0]])
    assert lengths.tolist() == [9, 5] and table.shape == (2, 4)
    assert table[0, :3].tolist() == [2, 3, 4] and table[1, :2].tolist() == [0, 1]
    assert table.dtype == lengths.dtype == torch.int32 and table.is_contiguous()
    assert cache.tables([])[0].shape == (0, 1)
    addresses = cache.block_table.data_ptr(), cache.cache_seqlens.data_ptr()
    cache.sync()
    assert cache.cache_seqlens.tolist() == [5, 0, 9, 0]
    cache.free(seqs[2])
    assert cache.cache_seqlens.tolist() == [5, 0, 9, 0]  # until asked
    cache.sync()
    assert cache.cache_seqlens.tolist() == [5, 0, 0, 0]
    assert addresses == (cache.block_table.data_ptr(), cache.cache_seqlens.data_ptr())


def test_tables_given_out_do_not_change_with_the_cache():
    cache = small_cache()
    seq = cache.allocate(4)
    table, lengths = cache.tables([seq])
    cache.free(seq)
    cache.allocate(8)
    cache.tables([cache.allocate(8)])
    assert table[0, 0] == 0 and lengths.tolist() == [4]


def test_out_of_pages_leaves_the_tables_and_tells_the_numbers():
    cache = small_cache()
    first = cache.allocate(6)
    second = cache.fork(first)
    cache.allocate(20)
    before = cache.usage()
    with pytest.raises(OutOfPages, match=r"2 pages asked for, 1 of 8 are free and 0 evictable: free or"):
        cache.append(second, 3)  # a copy of the shared page, and one more
    with pytest.raises(OutOfPages, match="3 pages"):
        cache.allocate(9)
    assert cache.usage() == before and cache.length(second) == 6
    assert pages_of(cache, first) == pages_of(cache, second)


def test_a_failed_copy_changes_nothing(monkeypatch):
    cache = small_cache()
    first = cache.allocate(6)
    cache.fork(first)
    before = cache.usage(), bytes(cache._tables.pages), bytes(cache._tables.lengths)

    class Broken:
        def __getitem__(self, index):
            raise RuntimeError("device fault")

    monkeypatch.setattr(cache, "kv_cache", Broken())
    with pytest.raises(RuntimeError, match="device fault"):
        cache.append(first, 1)
    assert before == (cache.usage(), bytes(cache._tables.pages), bytes(cache._tables.lengths))


def test_rows_run_out_and_ids_are_never_given_again():
    cache = small_cache(max_sequences=2)
    first, second = cache.allocate(1), cache.allocate(1)
    for full in (lambda: cache.allocate(1), lambda: cache.fork(first)):
        with pytest.raises(OutOfSequences, match="2 are alive"):
            full()
    cache.free(first)
    third = cache.fork(second)
    assert third not in (first, second) and cache.row(third) == 0
    for stale in (
        lambda: cache.free(first),
        lambda: cache.append(first, 1),
        lambda: cache.fork(first),
        lambda: cache.truncate(first, 0),
        lambda: cache.tables([second, first]),
        lambda: cache.commit(-1),
    ):
        with pytest.raises(ValueError, match="is not alive"):
            stale()


@pytest.mark.parametrize("tokens", [-1, True, 2.0, "ab", [0.5], [[1]], None])
def test_refuses_what_is_neither_a_count_nor_ids(tokens):
    cache = small_cache()
    seq = cache.allocate(3)
    for call in (lambda: cache.allocate(tokens), lambda: cache.append(seq, tokens)):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert cache.usage().tokens == 3


def test_refuses_lengths_out_of_range():
    cache = small_cache()
    seq = cache.allocate(20)
    for call, text in (
        (lambda: cache.allocate(25), "25 tokens, at most 24 fit"),
        (lambda: cache.append(seq, 5), "25 tokens, at most 24 fit"),
        (lambda: cache.truncate(seq, 21), "length is 21"),
        (lambda: cache.commit(seq, 21), "written is 21"),
        (lambda: cache.slots(seq, 3, 2), "positions 3, 2"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_write_refuses_what_does_not_fit_and_writes_nothing():
    cache = small_cache()
    slots = cache.append(cache.allocate(0), 2)
    cache.kv_cache.zero_()
    one = torch.ones(2, 1)
    outside = Slots(np.array([0, 8], np.int32), np.array([0, 0], np.int32))
    for error, *arguments in (
        (ValueError, slots, torch.ones(3, 1), one),
        (ValueError, slots, one, torch.ones(2, 2)),
        (ValueError, slots, one, torch.ones(2)),
        (TypeError, slots, one, one.double()),
        (ValueError, slots, one.to("meta"), one),
        (ValueError, outside, one, one),
        (ValueError, Slots(outside.offsets - 1, outside.offsets), one, one),
    ):
        with pytest.raises(error):
            cache.write(*arguments)
    assert not cache.kv_cache.any()
    write_latents(cache.kv_cache, slots, one, one)
    assert cache.kv_cache.sum() == 4


@pytest.mark.parametrize("name", ["page_size", "max_pages_per_sequence", "max_sequences", "head_dim"])
def test_refuses_sizes_below_one(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        small_cache(**{name: 0})


def test_waste_counts_a_shared_page_once_and_none_if_it_is_full_to_someone():
    cache = small_cache()
    first = cache.allocate(6)
    assert cache.usage().waste_tokens == 2
    second = cache.fork(first)
    assert cache.usage().waste_tokens == 2
    cache.truncate(second, 5)
    assert cache.usage().waste_tokens == 2
    cache.truncate(second, 3)
    assert cache.usage().waste_tokens == 2
    cache.truncate(first, 4)
    assert cache.usage().waste_tokens == 0  # second fills three lines of a page that first fills
    cache.free(first)
    assert cache.usage().waste_tokens == 1


def test_the_oracle_sees_no_difference_between_forked_pages_and_a_contiguous_cache():
    generator = torch.Generator().manual_seed(0)
    cache = PagedKVCache(40, 16, device="cpu", max_pages_per_sequence=8, max_sequences=8)
    cache.kv_cache.fill_(float("nan"))
    latents = {}

    def write(seq, slots, before=()):
        lines = torch.randn(len(slots.pages), 576, generator=generator).bfloat16()
        cache.write(slots, lines[:, :512], lines[:, 512:])
        latents[seq] = torch.cat([*before, lines])

    root = cache.allocate(37)
    write(root, cache.slots(root))
    gap = cache.allocate(20)
    forks = [cache.fork(root) for _ in range(3)]
    for seq, n in zip(forks, (1, 30, 11), strict=True):
        write(seq, cache.append(seq, n), [latents[root]])
    cache.free(gap)
    cache.truncate(forks[1], 20)
    write(forks[1], cache.append(forks[1], 25), [latents[forks[1]][:20]])
    seqs = [forks[2], root, forks[0], forks[1]]

    lengths = torch.tensor([len(latents[seq]) for seq in seqs], dtype=torch.int32)
    contiguous = torch.zeros(len(seqs), 128, 576, dtype=torch.bfloat16)
    for i, seq in enumerate(seqs):
        contiguous[i, : lengths[i]] = latents[seq]
    q = torch.randn(len(seqs), 2, 3, 576, generator=generator).bfloat16()
    pages = contiguous.view(-1, 16, 1, 576)
    in_order = torch.arange(len(pages), dtype=torch.int32).view(len(seqs), -1)
    expected = mla_decode_reference(q, pages, in_order, lengths, causal=True)
    result = mla_decode_reference(q, cache.kv_cache, *cache.tables(seqs), causal=True)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    assert cache.usage().shared == 2  # of its three pages, all forks still have two, or one, of root's


def test_eight_threads_leave_a_consistent_cache(eager_threads):
    cache = small_cache(150, max_pages_per_sequence=8, max_sequences=40, prefix_cache=True)
    failures, refused = [], []

    def churn(seed):
        rng = random.Random(seed)
        mine = {}  # contents by sequence; None for tokens that another thread wrote
        start.wait()
        try:
            for step in range(2500):
                action = rng.random()
                value = seed * 10_000 + step
                try:
                    if action < 0.3 or not mine:
                        ids = [rng.randrange(2)] * rng.randrange(16)
                        seq = cache.allocate(ids)
                        known = cache.cached_tokens(seq)
                        fill(cache, cache.slots(seq, known), value)
                        cache.commit(seq)
                        mine[seq] = [None] * known + [value] * (len(ids) - known)
                        continue
                    seq = rng.choice(list(mine))
                    if action < 0.55:
                        n = rng.randrange(4)
                        if len(mine[seq]) + n <= 32:
                            fill(cache, cache.append(seq, n), value)
                            mine[seq] += [value] * n
                    elif action < 0.65:
                        mine[cache.fork(seq)] = list(mine[seq])
                    elif action < 0.7:
                        cache.truncate(seq, len(mine[seq]) // 2)
                        del mine[seq][len(mine[seq]) // 2 :]
                    elif action < 0.75:
                        usage = cache.usage()
                        assert usage.used + usage.cached + usage.free == 150
                    else:
                        found = read(cache, seq)
                        expected = mine.pop(seq)
                        assert len(found) == len(expected)
                        assert all(b is None or a == b for a, b in zip(found, expected, strict=True))
                        cache.free(seq)
                except (OutOfPages, OutOfSequences) as error:
                    refused.append(error)
            for seq in mine:
                cache.free(seq)
        except Exception as error:
            failures.append(error)

    start = threading.Barrier(8)
    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    usage = cache.usage()
    assert (usage.used, usage.shared, usage.tokens, usage.sequences, usage.waste_tokens) == (0, 0, 0, 0, 0)
    assert usage.cached + usage.free == usage.total and usage.hit_tokens > 0 and refused
    assert not any(cache._allocator.owners)
    assert sorted(cache._prefix._idle) == sorted(cache._prefix._digest_of)
