"""Ways to find room for the latents of sequences, timed and weighed: pages, and what one does without."""

from __future__ import annotations

import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from mla_kernels.arguments import HEAD_DIM
from mla_kernels.paging import PagedKVCache
from mla_kernels.paging.allocator import PageAllocator

from .allocations import Churn, Footprint, Latency

MEAN, SD, LONGEST = 2048, 1024, 32768  # the chapter's log-normal lengths, and its longest sequence
PAGE_SIZES = (1, 16, 32, 64, 128, 256)
BYTES_PER_TOKEN = 2 * HEAD_DIM
LIVE = 64  # sequences at a time
POOL_PAGES = 8192
TURNS = 20


def draw_lengths(n: int, seed: int) -> list[int]:
    """Tokens of ``n`` sequences."""
    variance = np.log1p((SD / MEAN) ** 2)
    drawn = np.random.default_rng(seed).lognormal(np.log(MEAN) - variance / 2, variance**0.5, n)
    return np.clip(np.rint(drawn), 1, LONGEST).astype(int).tolist()


def timer_ns(n: int = 100_000) -> int:
    """Median of what reading the clock twice takes."""
    clock, times = time.perf_counter_ns, []
    for _ in range(n):
        begin = clock()
        times.append(clock() - begin)
    return int(statistics.median(times))


def _time(operations: int, live: int, allocate: Callable[[int], object], free: Callable[[object], object]):
    """(times of allocate, times of free) in ns, the oldest of ``live`` going first."""
    clock, held = time.perf_counter_ns, deque()
    taken, given = np.empty(operations, np.int64), []
    for i in range(operations):
        begin = clock()
        room = allocate(i)
        taken[i] = clock() - begin
        held.append(room)
        del room
        if len(held) > live:
            oldest = held.popleft()
            begin = clock()
            free(oldest)
            del oldest
            given.append(clock() - begin)
    while held:
        free(held.popleft())
    return taken, given


def page_latencies(operations: int, clock_ns: int) -> Iterator[Latency]:
    """Batches of pages from the allocator, and single tokens from the cache, with and without a new page.

    The batches take turns, and a function that does nothing with them: its tail is the host's, not the
    allocator's.
    """
    found: dict[int, tuple[list, list]] = {n: ([], []) for n in (0, 1, 4, 32)}
    for _ in range(TURNS):
        for n, (takes, frees) in found.items():
            pages = PageAllocator(POOL_PAGES)
            do = (functools.partial(_batch, pages, n), pages.release_batch) if n else (_nothing, _nothing)
            taken, given = _time(max(operations // TURNS, LIVE + 1), LIVE, *do)
            takes.append(taken)
            frees.append(given)
    for n, (takes, frees) in found.items():
        if n == 0:
            yield Latency.of("nothing", "call", np.concatenate(takes), clock_ns)
            continue
        yield Latency.of("PageAllocator", f"allocate {n} pages", np.concatenate(takes), clock_ns)
        yield Latency.of("PageAllocator", f"free {n} pages", np.concatenate(frees), clock_ns)
    cache = PagedKVCache(POOL_PAGES, max_pages_per_sequence=POOL_PAGES // LIVE, max_sequences=LIVE)
    sequences = [cache.allocate(1) for _ in range(LIVE)]
    clock = time.perf_counter_ns
    times: dict[bool, list[int]] = {False: [], True: []}
    room = (POOL_PAGES // LIVE) * cache.page_size - 1
    for step in range(min(room, operations // LIVE)):
        opens = (step + 1) % cache.page_size == 0  # each holds step + 1 tokens
        for sequence in sequences:
            begin = clock()
            cache.append(sequence, 1)
            times[opens].append(clock() - begin)
    yield Latency.of("PagedKVCache", "append a token", times[False], clock_ns)
    yield Latency.of("PagedKVCache", "append a token that opens a page", times[True], clock_ns)


def _batch(pages: PageAllocator, n: int, _: int):
    return pages.allocate_batch(n)


def _nothing(_: object) -> None:
    return None


def sequence_latencies(operations: int, clock_ns: int) -> Iterator[Latency]:
    """A tensor or an allocation of its own for each sequence, of log-normal length, on the GPU.

    cudaFree waits for the GPU, which is idle here.
    """
    import torch

    from mla_kernels.launch import cuda_free, cuda_malloc

    lengths = draw_lengths(operations, seed=1)

    def tensor(i: int) -> torch.Tensor:
        return torch.empty(lengths[i], HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    _time(min(operations, 1000), LIVE, tensor, lambda room: None)  # its pool fills
    taken, given = _time(operations, LIVE, tensor, lambda room: None)
    yield Latency.of("torch", "allocate a sequence", taken, clock_ns)
    yield Latency.of("torch", "free a sequence", given, clock_ns)
    torch.cuda.synchronize()
    few = operations // 10
    taken, given = _time(few, LIVE, lambda i: cuda_malloc(lengths[i] * BYTES_PER_TOKEN), cuda_free)
    yield Latency.of("cudaMalloc", "allocate a sequence", taken, clock_ns)
    yield Latency.of("cudaMalloc", "free a sequence", given, clock_ns)


def footprints(batches: tuple[int, ...], draws: int) -> Iterator[Footprint]:
    """Bytes of batches of log-normal lengths by every layout, from allocations that were made."""
    import torch

    for b in batches:
        lengths = [draw_lengths(b, seed) for seed in range(draws)]
        tokens = [sum(own) for own in lengths]
        for page_size in PAGE_SIZES:
            pages = b * (LONGEST // page_size)
            cache = PagedKVCache(
                min(pages, 2**20),
                page_size,
                max_pages_per_sequence=LONGEST // page_size,
                max_sequences=b,
                device="cpu",
                head_dim=1,  # what counts is pages
            )
            held = []
            for own in lengths:
                sequences = [cache.allocate(n) for n in own]
                held.append(cache.usage().used * page_size * BYTES_PER_TOKEN)
                for sequence in sequences:
                    cache.free(sequence)
            yield Footprint(layout="paged", page_size=page_size, b=b, tokens=tokens, bytes=held)
        of: dict[str, list[int]] = {"padded": [], "maximum": [], "allocated": []}
        for own in lengths:
            of["padded"].append(_allocated([b * max(own)]))
            of["maximum"].append(_allocated([b * LONGEST]))
            of["allocated"].append(_allocated(own))
        torch.cuda.empty_cache()
        for layout, held in of.items():
            yield Footprint(layout=layout, b=b, tokens=tokens, bytes=held)


def _latents(tokens: int):
    import torch

    return torch.empty(tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda")


def _allocated(tokens: list[int]) -> int:
    """Bytes that torch gives out for a tensor of each number of tokens."""
    import torch

    before = torch.cuda.memory_allocated()
    made = [_latents(n) for n in tokens]
    held = torch.cuda.memory_allocated() - before
    del made
    return held


def churn_events(events: int, seed: int) -> Iterator[tuple[int, int]]:
    """(row, tokens): the sequence of a row grows to so many tokens; 0: it ends, and another begins there.

    Prompts are log-normal; replies come in steps of 64 tokens until the sequence is up to twice its prompt.
    """
    rng = np.random.default_rng(seed)
    prompts = iter(draw_lengths(events, seed + 1))
    now, end = [0] * LIVE, [0] * LIVE
    for row in rng.integers(LIVE, size=events).tolist():
        if now[row] == 0:
            now[row] = next(prompts)
            end[row] = int(now[row] * (1 + rng.random()))
        elif now[row] >= end[row]:
            now[row] = 0
        else:
            now[row] += 64
        yield row, now[row]


def pages_of_churn(events: int, seed: int) -> int:
    """Pages of 64 that the sequences of a churn have at most at once: no pool can do with fewer."""
    held, now, most = [0] * LIVE, 0, 0
    for row, tokens in churn_events(events, seed):
        now += -(-tokens // 64) - held[row]
        held[row] = -(-tokens // 64)
        most = max(most, now)
    return most


def churn_of_pages(events: int, seed: int, samples: int = 200, pool_pages: int = 2**15) -> Churn:
    """Through PagedKVCache: what it holds are the pages in use. OutOfPages where the pool has too few."""
    pages = 2 * LONGEST // 64
    cache = PagedKVCache(
        pool_pages, max_pages_per_sequence=pages, max_sequences=LIVE, device="cpu", head_dim=1
    )
    rows: list[int | None] = [None] * LIVE
    now = [0] * LIVE

    def follow(row: int, tokens: int) -> None:
        if tokens == 0:
            cache.free(rows[row])
        elif now[row] == 0:
            rows[row] = cache.allocate(tokens)
        else:
            cache.append(rows[row], tokens - now[row])
        now[row] = tokens

    def held() -> int:
        return cache.usage().used * 64 * BYTES_PER_TOKEN

    return follow_churn("PagedKVCache", events, seed, samples, follow, held, now)


def churn_of_tensors(events: int, seed: int, samples: int = 200) -> Churn:
    """A tensor for each sequence, grown by copying into a larger one: what torch took from the GPU."""
    import torch

    pool = torch.cuda.MemPool()  # of its own, so that nothing else is counted
    rows: list[torch.Tensor | None] = [None] * LIVE
    now = [0] * LIVE

    def follow(row: int, tokens: int) -> None:
        if tokens == 0:
            rows[row] = None
        else:
            grown = _latents(tokens)
            if rows[row] is not None:
                grown[: now[row]] = rows[row]
            rows[row] = grown
        now[row] = tokens

    def held() -> int:
        return sum(segment["total_size"] for segment in pool.snapshot())

    with torch.cuda.use_mem_pool(pool):
        churn = follow_churn("torch", events, seed, samples, follow, held, now)
        rows.clear()
    torch.cuda.synchronize()
    return churn


def follow_churn(
    allocator: str,
    events: int,
    seed: int,
    samples: int,
    follow: Callable[[int, int], None],
    held: Callable[[], int],
    now: list[int],
) -> Churn:
    """``follow(row, tokens)`` does each of churn_events(); ``now`` are the rows' tokens, ``held()`` bytes."""
    live_bytes, held_bytes = [], []
    every = max(1, events // samples)
    for number, (row, tokens) in enumerate(churn_events(events, seed), 1):
        follow(row, tokens)
        if number % every == 0:
            live_bytes.append(sum(now) * BYTES_PER_TOKEN)
            held_bytes.append(held())
    return Churn(allocator=allocator, events=events, live_bytes=live_bytes, held_bytes=held_bytes)
