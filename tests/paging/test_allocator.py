"""PageAllocator against a dict of owner counts, its errors, and its accounts after each refusal."""

import random
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.paging import OutOfPages, PageAllocator
from mla_kernels.paging.allocator import MANY


def state(pages):
    return pages.owners.tobytes(), pages._stack[pages._top :], pages.free, pages.idle, pages.shared


def check_accounts(pages):
    """The counters against a recount of owners, and the stack against the pages that are free."""
    free = set(pages._stack[pages._top :])
    assert len(free) == pages.free
    assert all(pages._where[page] == at for at, page in enumerate(pages._stack[pages._top :], pages._top))
    idle = {page for page in range(pages.num_pages) if pages._keep[page] and pages.owners[page] == 0}
    assert free == {page for page in range(pages.num_pages) if pages.owners[page] == 0} - idle
    assert pages.idle == len(idle)
    assert pages.used == sum(count > 0 for count in pages.owners)
    assert pages.shared == sum(count > 1 for count in pages.owners)
    assert pages.free + pages.used + pages.idle == pages.num_pages


def test_million_operations_against_a_dict():
    rng = random.Random(0)
    pages = PageAllocator(500)
    owners, held = {}, []  # the model: owners by page, and the pages once for each owner
    for step in range(1_000_000):
        action = rng.random()
        if action < 0.40:
            if len(owners) == 500:
                with pytest.raises(OutOfPages):
                    pages.allocate()
            else:
                page = pages.allocate()
                assert page not in owners
                owners[page] = 1
                held.append(page)
        elif action < 0.45:
            n = rng.randrange(1, 40)
            if n > 500 - len(owners):
                with pytest.raises(OutOfPages):
                    pages.allocate_batch(n)
            else:
                batch = pages.allocate_batch(n)
                assert len(set(batch)) == n and owners.keys().isdisjoint(batch)
                owners.update(dict.fromkeys(batch, 1))
                held.extend(batch)
        elif held:
            i = rng.randrange(len(held))
            if action < 0.50:
                pages.share(held[i])
                owners[held[i]] += 1
                held.append(held[i])
            else:
                held[i], held[-1] = held[-1], held[i]
                page = held.pop()
                pages.release(page)
                owners[page] -= 1
                if owners[page] == 0:
                    del owners[page]
        if pages.free != 500 - len(owners):
            pytest.fail(f"step {step}: {pages.free} free, the model has {500 - len(owners)}")
        if step % 50_000 == 0:
            assert {page: count for page, count in enumerate(pages.owners) if count} == owners
            check_accounts(pages)
    pages.release_batch(owners.keys())
    check_accounts(pages)


def test_pages_come_lowest_first_and_the_last_freed_again():
    pages = PageAllocator(4)
    assert [pages.allocate() for _ in range(3)] == [0, 1, 2]
    pages.release(1)
    assert pages.allocate() == 1


def test_out_of_pages_says_how_many_and_takes_none():
    pages = PageAllocator(5)
    pages.allocate_batch(3)
    before = state(pages)
    with pytest.raises(OutOfPages, match=r"3 pages asked for, 2 of 5 are free: free or truncate"):
        pages.allocate_batch(3)
    assert state(pages) == before
    pages.allocate_batch(2)
    with pytest.raises(OutOfPages, match="1 pages asked for, 0 of 5 are free"):
        pages.allocate()


def test_a_kept_page_is_idle_after_its_last_owner_until_discarded():
    pages = PageAllocator(3)
    page, other = pages.allocate(), pages.allocate()
    pages.share(page)
    pages.keep(page)
    assert not pages.release(page) and pages.release(page)
    assert (pages.free, pages.used, pages.idle) == (1, 1, 1)
    pages.share(page)
    assert (pages.free, pages.used, pages.idle) == (1, 2, 0)
    assert pages.release_batch([page]) == [page]
    pages.discard(page)
    assert (pages.free, pages.used, pages.idle) == (2, 1, 0)
    check_accounts(pages)
    assert pages.allocate() == page and list(pages.owners) == [1, 1, 0]
    pages.release_batch([page, other])
    check_accounts(pages)


@pytest.mark.parametrize("verb", ["share_batch", "release_batch"])
@pytest.mark.parametrize("bad", [3, -1, 10, 1 << 40])
def test_a_batch_with_one_wrong_page_changes_nothing(verb, bad):
    pages = PageAllocator(10)
    pages.allocate_batch(3)
    pages.share(1)
    pages.keep(2)
    pages.release(2)
    batch = [0, 1, 2, bad] if verb == "share_batch" else [0, 1, bad]
    before = state(pages)
    with pytest.raises(ValueError, match=f"page {bad} "):
        getattr(pages, verb)(batch)
    assert state(pages) == before
    check_accounts(pages)


def test_a_negative_number_is_no_page_even_if_python_would_take_it():
    pages = PageAllocator(2)
    pages.allocate_batch(2)
    for verb in (pages.share, pages.release, pages.keep, pages.discard):
        with pytest.raises(ValueError, match="page -1 is"):
            verb(-1)
    assert list(pages.owners) == [1, 1]


def test_a_page_twice_in_a_batch_counts_twice_or_is_refused_whole():
    pages = PageAllocator(6)
    pages.allocate_batch(4)
    pages.share_batch([1, 2])
    pages.keep(3)
    before = state(pages)
    with pytest.raises(ValueError, match="page 1 has no owner"):
        pages.release_batch([0, 2, 3, 1, 1, 1])
    assert state(pages) == before
    check_accounts(pages)
    pages.release_batch([1, 1])
    assert pages.owners[1] == 0
    check_accounts(pages)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_large_release_is_the_same_as_one_page_after_another_or_none(data):
    """From MANY pages on numpy does it, unless pages are shared, kept, free or listed twice."""
    size = 2 * MANY
    few = st.lists(st.integers(0, size - 1), max_size=3)
    pages, single = PageAllocator(size), PageAllocator(size)
    used, shared, kept = data.draw(st.integers(MANY, size)), data.draw(few), data.draw(few)
    for each in (pages, single):
        each.release_batch(each.allocate_batch(size))  # the stack and the places are no longer in order
        in_use = set(each.allocate_batch(used))
        each.share_batch([page for page in shared if page in in_use])
        for page in in_use.intersection(kept):
            each.keep(page)
    batch = [
        *data.draw(st.permutations(sorted(in_use)))[: data.draw(st.integers(MANY, used))],
        *data.draw(few),
    ]
    before = state(pages)
    try:
        idle = [page for page in batch if single.release(page)]
    except ValueError:
        with pytest.raises(ValueError, match="has no owner to release it"):
            pages.release_batch(batch)
        assert state(pages) == before
    else:
        assert pages.release_batch(batch) == idle
        assert state(pages) == state(single)
        assert pages.allocate_batch(pages.free) == single.allocate_batch(single.free)
    check_accounts(pages)


@pytest.mark.parametrize("bad", [-1, 500, 1 << 40, 1 << 70])
def test_a_large_release_outside_the_pool_changes_nothing(bad):
    pages = PageAllocator(500)
    batch = [*pages.allocate_batch(2 * MANY)[:MANY], bad]
    before = state(pages)
    with pytest.raises(ValueError, match=f"page {bad} is outside the pool"):
        pages.release_batch(batch)
    assert state(pages) == before


def test_an_allocation_of_any_size_writes_to_no_page():
    pages = PageAllocator(1000)
    pages.release_batch(pages.allocate_batch(700))
    memory = [bytes(part) for part in (pages._stack, pages._where, pages.counts, pages._keep)]
    assert pages.owners.tolist() == [0] * 1000
    batch = pages.allocate_batch(900)
    assert [bytes(part) for part in (pages._stack, pages._where, pages.counts, pages._keep)] == memory
    assert [page for page, count in enumerate(pages.owners) if count == 1] == sorted(batch)


def test_refuses_what_is_no_page_to_keep_or_discard():
    pages = PageAllocator(2)
    with pytest.raises(ValueError, match="page 0 has no owner"):
        pages.keep(0)
    page = pages.allocate()
    pages.keep(page)
    pages.release(page)
    with pytest.raises(ValueError, match=f"page {page} has no owner"):
        pages.keep(page)
    pages.discard(page)
    with pytest.raises(ValueError, match="page 1 is not kept"):
        pages.discard(1)
    with pytest.raises(ValueError, match="n is -1"):
        pages.allocate_batch(-1)


@pytest.mark.parametrize("num_pages, error", [(0, ValueError), (2**31, ValueError), (1.0, TypeError)])
def test_refuses_impossible_pools(num_pages, error):
    with pytest.raises(error, match="num_pages is"):
        PageAllocator(num_pages)


def test_eight_threads_lose_no_page(eager_threads):
    pages = PageAllocator(200)
    failures = []

    def churn(seed):
        rng, held = random.Random(seed), []
        start.wait()
        try:
            for _ in range(2500):
                if rng.random() < 0.5:
                    try:
                        held.extend(pages.allocate_batch(rng.randrange(1, 8)))
                    except OutOfPages:
                        continue
                elif held:
                    again = held[: rng.randrange(4)]
                    pages.share_batch(again)
                    held.extend(again)
                    rng.shuffle(held)
                    n = rng.randrange(1, 12)
                    pages.release_batch(held[-n:])
                    del held[-n:]
        except Exception as error:
            failures.append(error)
        kept.update(held)

    kept, start = Counter(), threading.Barrier(8)
    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {page: count for page, count in enumerate(pages.owners) if count} == dict(kept)
    check_accounts(pages)
