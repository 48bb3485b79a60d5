"""PagedKVCache against a plain model of it, step by step: pages, contents, eviction order and accounts.

The model knows no page numbers, hashes or tables: a page is an object with a list of numbers. With
MLA_KERNELS_LONG_TESTS=1 the machine does over a million operations, counted (``pytest -s`` shows the counts).
"""

import os
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mla_kernels.paging import OutOfPages, OutOfSequences, PagedKVCache, Slots

PAGES, SIZE, ROWS, WIDTH = 12, 3, 5, 6
LONG = os.environ.get("MLA_KERNELS_LONG_TESTS") == "1"
CHANGES = ("allocate", "append", "append_batch", "fork", "free")  # what the million is of
DONE: Counter[str] = Counter()  # operations by name, refused ones apart


@dataclass(eq=False)
class Page:
    lines: list = field(default_factory=lambda: [None] * SIZE)
    owners: int = 0
    name: tuple | None = None  # the tokens up to its end, if it can be found by them


@dataclass
class Sequence:
    pages: list
    length: int
    ids: list  # as far as they are known without a gap
    cached: int = 0
    offered: int = 0  # pages that were committed, or found at allocation


class Model:
    def __init__(self, prefix):
        self.prefix, self.free = prefix, PAGES
        self.sequences, self.named, self.idle = {}, {}, []  # idle: pages, the next to go first
        self.hits = self.misses = self.evicted = 0

    def take(self, n, spoken_for=()):
        if n > self.free + len([page for page in self.idle if page not in spoken_for]):
            raise OutOfPages
        return [self.take_one(spoken_for) for _ in range(n)]

    def take_one(self, spoken_for):
        if self.free == 0:
            victim = next(page for page in self.idle if page not in spoken_for)
            self.idle.remove(victim)
            del self.named[victim.name]
            self.evicted += 1
        else:
            self.free -= 1
        return Page(owners=1)

    def give_up(self, pages):
        for page in reversed(pages):
            page.owners -= 1
            if page.owners == 0 and page.name is not None:
                self.idle.append(page)
            elif page.owners == 0:
                self.free += 1

    def allocate(self, count, ids):
        matched = []
        if self.prefix and ids is not None:
            while len(matched) < count // SIZE:
                page = self.named.get(tuple(ids[: SIZE * (len(matched) + 1)]))
                if page is None:
                    break
                matched.append(page)
        new = self.take(-(-count // SIZE) - len(matched), spoken_for=matched)
        for page in matched:
            page.owners += 1
        self.idle = [page for page in self.idle if page not in matched]
        cached = SIZE * len(matched)
        if self.prefix and ids is not None:
            self.hits, self.misses = self.hits + cached, self.misses + count - cached
        return Sequence(matched + new, count, list(ids or ()), cached, len(matched))

    def append(self, sequence, count, ids):
        end = sequence.length + count
        new = -(-end // SIZE) - len(sequence.pages)
        fill = sequence.length % SIZE
        last = sequence.pages[-1] if fill and count else None
        copied = last is not None and last.owners > 1
        pages = self.take(new + copied)
        if copied:
            pages[0].lines[:fill] = last.lines[:fill]
            sequence.pages.pop()
            last.owners -= 1
        elif last is not None and last.name is not None:
            del self.named[last.name]
            last.name = None
        sequence.pages += pages
        if ids is not None and len(sequence.ids) == sequence.length:
            sequence.ids += ids
        sequence.length = end

    def append_batch(self, seqs, counts, ids):
        """One after another, or none: the model is put back as it was if there is no room for one."""
        before = deepcopy(self.__dict__)
        try:
            for seq, count, own in zip(seqs, counts, ids, strict=True):
                self.append(self.sequences[seq], count, own)
        except OutOfPages:
            self.__dict__ = before
            raise

    def truncate(self, sequence, length):
        keep = -(-length // SIZE)
        self.give_up(sequence.pages[keep:])
        del sequence.pages[keep:], sequence.ids[length:]
        sequence.length, sequence.cached = length, min(length, sequence.cached)
        sequence.offered = min(length // SIZE, sequence.offered)

    def commit(self, sequence, written):
        before = len(self.named)
        full = min(written, len(sequence.ids)) // SIZE
        for i in range(sequence.offered, full if self.prefix else 0):
            sequence.offered = i + 1
            name = tuple(sequence.ids[: SIZE * (i + 1)])
            if name not in self.named:
                self.named[name] = sequence.pages[i]
                sequence.pages[i].name = name
        return len(self.named) - before


def snapshot(cache):
    return (
        cache._allocator.owners.tobytes(),
        cache._allocator._stack[cache._allocator._top :],
        cache._tables.pages.tobytes(),
        cache._tables.lengths.tobytes(),
        cache.kv_cache.clone().view(torch.int32).tolist(),
        list(cache._prefix._idle) if cache._prefix else None,
        dict(cache._prefix._page_of) if cache._prefix else None,
        [chain and (bytes(chain.tokens), list(chain.digests)) for chain in cache._chains],
        cache.usage(),
    )


# Few different tokens, so that prefixes agree by chance.
tokens = st.one_of(
    st.integers(0, 8), st.lists(st.integers(0, 1), max_size=8), st.integers(0, 8).map(lambda n: [0] * n)
)


class PagedKVCacheMachine(RuleBasedStateMachine):
    @initialize(prefix=st.sampled_from([True, True, False]))
    def build(self, prefix):
        self.cache = PagedKVCache(
            PAGES,
            SIZE,
            max_pages_per_sequence=WIDTH,
            max_sequences=ROWS,
            prefix_cache=prefix,
            dtype=torch.float32,
            device="cpu",
            head_dim=2,
        )
        self.model = Model(prefix)
        self.dead, self.number = [], 0

    def any_sequence(self, data):
        return data.draw(st.sampled_from(sorted(self.model.sequences)), label="sequence")

    def attempt(self, name, in_cache, in_model, too_long=False, full=False):
        """Both do it, or neither can: the cache then is as it was."""
        before = snapshot(self.cache)
        try:
            if too_long or full:
                raise ValueError if too_long else OutOfSequences
            expected = in_model()
        except (OutOfPages, OutOfSequences, ValueError) as error:
            with pytest.raises(type(error)):
                in_cache()
            assert snapshot(self.cache) == before
            DONE[f"{name}, refused"] += 1
            return None
        DONE[name] += 1
        return in_cache(), expected

    def fill(self, seq, slots, start):
        numbers = torch.arange(self.number, self.number + len(slots.pages), dtype=torch.float32)
        self.number += len(numbers)
        self.cache.write(slots, numbers[:, None], -numbers[:, None])
        sequence = self.model.sequences[seq]
        assert len(numbers) == sequence.length - start
        for position, number in enumerate(numbers.tolist(), start):
            sequence.pages[position // SIZE].lines[position % SIZE] = number

    @rule(tokens=tokens, commit=st.booleans())
    def allocate(self, tokens, commit):
        count, ids = (tokens, None) if isinstance(tokens, int) else (len(tokens), tokens)
        done = self.attempt(
            "allocate",
            lambda: self.cache.allocate(tokens),
            lambda: self.model.allocate(count, ids),
            too_long=count > WIDTH * SIZE,
            full=len(self.model.sequences) == ROWS,
        )
        if done:
            seq, sequence = done
            assert seq not in self.model.sequences and seq not in self.dead
            self.model.sequences[seq] = sequence
            self.fill(seq, self.cache.slots(seq, sequence.cached), sequence.cached)
            if commit:
                self.commit_all(seq)

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data(), tokens=tokens, commit=st.booleans())
    def append(self, data, tokens, commit):
        seq = self.any_sequence(data)
        sequence = self.model.sequences[seq]
        count, ids = (tokens, None) if isinstance(tokens, int) else (len(tokens), tokens)
        start = sequence.length
        done = self.attempt(
            "append",
            lambda: self.cache.append(seq, tokens),
            lambda: self.model.append(sequence, count, ids),
            too_long=start + count > WIDTH * SIZE,
        )
        if done:
            self.fill(seq, done[0], start)
            if commit:
                self.commit_all(seq)

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data(), decode=st.booleans(), with_ids=st.booleans(), commit=st.booleans())
    def append_batch(self, data, decode, with_ids, commit):
        """Any of the sequences, in any order; forks of one page may be among them."""
        alive = st.lists(st.sampled_from(sorted(self.model.sequences)), unique=True, max_size=ROWS)
        seqs = data.draw(alive, label="sequences")
        draw_list = partial(st.lists, min_size=len(seqs), max_size=len(seqs))
        counts = [1] * len(seqs) if decode else data.draw(draw_list(st.integers(0, 4)), label="counts")
        ids = [[data.draw(st.integers(0, 1)) for _ in range(n)] if with_ids else None for n in counts]
        starts = [self.model.sequences[seq].length for seq in seqs]
        flat = [token for own in ids for token in own] if with_ids else None
        done = self.attempt(
            "append_batch",
            lambda: self.cache.append_batch(seqs, None if decode else counts, flat),
            lambda: self.model.append_batch(seqs, counts, ids),
            too_long=any(start + n > WIDTH * SIZE for start, n in zip(starts, counts, strict=True)),
        )
        if done:
            stops = list(accumulate(counts))
            for seq, n, stop, start in zip(seqs, counts, stops, starts, strict=True):
                own = Slots(done[0].pages[stop - n : stop], done[0].offsets[stop - n : stop])
                assert own.pages.tolist() == self.cache.slots(seq, start).pages.tolist()
                assert own.offsets.tolist() == self.cache.slots(seq, start).offsets.tolist()
                self.fill(seq, own, start)
                if commit:
                    self.commit_all(seq)

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def fork(self, data):
        seq = self.any_sequence(data)
        sequence = self.model.sequences[seq]
        full = len(self.model.sequences) == ROWS
        done = self.attempt("fork", lambda: self.cache.fork(seq), lambda: None, full=full)
        if done:
            for page in sequence.pages:
                page.owners += 1
            twin = replace(sequence, pages=list(sequence.pages), ids=list(sequence.ids))
            self.model.sequences[done[0]] = twin

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def truncate(self, data):
        seq = self.any_sequence(data)
        sequence = self.model.sequences[seq]
        length = data.draw(st.integers(0, sequence.length + 1), label="length")
        self.attempt(
            "truncate",
            lambda: self.cache.truncate(seq, length),
            lambda: self.model.truncate(sequence, length),
            too_long=length > sequence.length,
        )

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data())
    def commit(self, data):
        seq = self.any_sequence(data)
        sequence = self.model.sequences[seq]
        written = data.draw(st.integers(0, sequence.length), label="written")
        assert self.cache.commit(seq, written) == self.model.commit(sequence, written)

    def commit_all(self, seq):
        sequence = self.model.sequences[seq]
        assert self.cache.commit(seq) == self.model.commit(sequence, sequence.length)

    @precondition(lambda self: self.model.sequences)
    @rule(data=st.data(), again=st.booleans())
    def free(self, data, again):
        seq = self.any_sequence(data)
        self.cache.free(seq)
        DONE["free"] += 1
        self.model.give_up(self.model.sequences.pop(seq).pages)
        self.dead.append(seq)
        if again:
            self.attempt("free again", lambda: self.cache.free(seq), None, too_long=True)

    @invariant()
    def agrees_with_the_model(self):
        numbers = self.check_contents()
        self.check_accounts(numbers)

    def check_contents(self):
        """Reads every sequence back through its tables; the page number of each page of the model."""
        seqs = list(self.model.sequences)
        table, lengths = self.cache.tables(seqs)
        self.cache.sync()
        rows = [self.cache.row(seq) for seq in seqs]
        assert self.cache.cache_seqlens[rows].tolist() == lengths.tolist()
        assert int(self.cache.cache_seqlens.sum()) == int(lengths.sum())
        numbers = {}
        for i, sequence in enumerate(self.model.sequences.values()):
            ids = table[i, : len(sequence.pages)].tolist()
            assert lengths[i] == sequence.length == self.cache.length(seqs[i])
            assert self.cache.cached_tokens(seqs[i]) == sequence.cached
            assert self.cache.block_table[rows[i], : len(ids)].tolist() == ids
            for number, page in zip(ids, sequence.pages, strict=True):
                assert numbers.setdefault(page, number) == number
            latents = self.cache.kv_cache[ids, :, 0].flatten(0, 1)[: sequence.length]
            lines = [line for page in sequence.pages for line in page.lines][: sequence.length]
            assert latents[:, 0].tolist() == lines
            assert (latents[:, 1] == -latents[:, 0]).all()
        assert len(set(numbers.values())) == len(numbers)  # no page of two that do not share it
        return numbers

    def check_accounts(self, numbers):
        allocator, model = self.cache._allocator, self.model
        holders = [page for sequence in model.sequences.values() for page in sequence.pages]
        owners = [0] * PAGES
        for page in holders:
            owners[numbers[page]] += 1
        assert allocator.owners.tolist() == owners
        assert all(page.owners == holders.count(page) for page in holders)
        filled = {}
        for sequence in model.sequences.values():
            for i, page in enumerate(sequence.pages):
                filled[page] = max(filled.get(page, 0), min(SIZE, sequence.length - SIZE * i))
        usage = self.cache.usage()
        assert usage.used + usage.cached + usage.free == usage.total == PAGES
        assert usage.used == len(set(holders)) == PAGES - model.free - len(model.idle)
        assert usage.shared == sum(page.owners > 1 for page in set(holders))
        assert (usage.cached, usage.free) == (len(model.idle), model.free)
        assert usage.waste_tokens == sum(SIZE - n for n in filled.values())
        assert usage.sequences == len(model.sequences)
        assert usage.tokens == sum(sequence.length for sequence in model.sequences.values())
        assert (usage.hit_tokens, usage.miss_tokens) == (model.hits, model.misses)
        assert usage.evicted_pages == model.evicted
        if model.prefix:
            assert len(self.cache._prefix._idle) == usage.cached


class TestPagedKVCache(PagedKVCacheMachine.TestCase):
    settings = settings(
        max_examples=45_000 if LONG else 200,
        stateful_step_count=50,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

    def runTest(self):
        DONE.clear()
        super().runTest()
        refused = sum(DONE[f"{name}, refused"] for name in CHANGES)
        changes = sum(DONE[name] for name in CHANGES) + refused
        print(f"{changes:,} operations, {refused:,} of them refused: {dict(DONE.most_common())}")
        assert all(DONE[name] for name in CHANGES)
        assert DONE["append_batch, refused"], "the pool never ran out: all-or-nothing was not tried"
        assert not LONG or changes > 1_000_000


if LONG:
    TestPagedKVCache = pytest.mark.timeout(0)(TestPagedKVCache)
