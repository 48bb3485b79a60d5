"""First fit against a plain map of tokens, and a churn through it and through a pool that is just enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_kernels.measure import allocators
from mla_kernels.measure.arena import Arena, churn_of_arena
from mla_kernels.paging import OutOfPages

ROOM = 400  # tokens of the map: more than the operations below can reach


class Map:
    """The same arena token by token: which block holds it."""

    def __init__(self):
        self.owners = [None] * ROOM

    def place(self, block, tokens):
        """The lowest place with so many free tokens."""
        begin = next(i for i in range(ROOM) if self.owners[i : i + tokens] == [None] * tokens)
        self.owners[begin : begin + tokens] = [block] * tokens
        return begin

    def grow(self, block, tokens):
        begin, had = self.owners.index(block), self.owners.count(block)
        if all(owner is None for owner in self.owners[begin + had : begin + tokens]):
            self.owners[begin : begin + tokens] = [block] * tokens
            return begin
        moved = self.place("new", tokens)
        self.owners = [
            None if owner == block else block if owner == "new" else owner for owner in self.owners
        ]
        return moved

    def free(self, block):
        self.owners = [None if owner == block else owner for owner in self.owners]

    @property
    def extent(self):
        return max((i + 1 for i, owner in enumerate(self.owners) if owner is not None), default=0)


operations = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from(["grow", "free"]), st.integers(1, 8)), max_size=40
)


@given(operations)
def test_blocks_lie_where_a_map_has_them(operations):
    arena, plain = Arena(), Map()
    begins, tokens = {}, {}
    for block, what, more in operations:
        if block not in begins:
            tokens[block] = more
            begins[block] = arena.place(more)
            assert begins[block] == plain.place(block, more)
        elif what == "grow":
            tokens[block] += more
            begins[block] = arena.grow(begins[block], tokens[block])
            assert begins[block] == plain.grow(block, tokens[block])
        else:
            arena.free(begins.pop(block))
            plain.free(block)
        assert arena.extent == plain.extent


def test_a_block_that_is_none_is_refused():
    arena = Arena()
    assert [arena.place(10), arena.place(10)] == [0, 10]
    for wrong in (1, 9, 11, 20):
        with pytest.raises(ValueError, match=f"no block begins at {wrong}:"):
            arena.free(wrong)
    arena.free(0)
    with pytest.raises(ValueError, match="no block begins at 0:"):
        arena.grow(0, 20)


def test_a_churn_leaves_holes_in_an_arena():
    arena, pages = (churn(5_000, seed=5, samples=50) for churn in (churn_of_arena, allocators.churn_of_pages))
    assert arena.live_bytes == pages.live_bytes
    assert all(live <= held for live, held in zip(arena.live_bytes, arena.held_bytes, strict=True))
    assert max(arena.held_bytes) > 1.2 * max(arena.live_bytes) > max(pages.held_bytes)


def test_a_pool_of_the_pages_in_use_at_most_is_enough():
    enough = allocators.pages_of_churn(5_000, seed=5)
    sampled = allocators.churn_of_pages(5_000, seed=5, samples=5_000)
    assert enough * 64 * allocators.BYTES_PER_TOKEN == max(sampled.held_bytes)
    assert allocators.churn_of_pages(5_000, seed=5, samples=5_000, pool_pages=enough) == sampled
    with pytest.raises(OutOfPages):
        allocators.churn_of_pages(5_000, seed=5, pool_pages=enough - 1)
