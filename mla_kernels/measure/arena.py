"""One contiguous piece of memory, given out first fit: what a cache without pages would be. Simulated.

Nothing is allocated and no latent is copied: the arena only says which tokens would lie where.
"""

from __future__ import annotations

from bisect import bisect_left

from .allocations import Churn
from .allocators import BYTES_PER_TOKEN, LIVE, follow_churn

FIRST_FIT = "first fit (simulated)"


class Arena:
    """Blocks of tokens in an endless piece of memory, each at the lowest place where it fits.

    ``extent`` is where the last block ends. It does the best first fit can: a block that grows stays where
    it is if the tokens after it are free, and is copied only else. O(blocks) an operation.
    """

    def __init__(self):
        self._begins: list[int] = []
        self._ends: list[int] = []

    @property
    def extent(self) -> int:
        """Tokens from the start of the arena to the end of its last block."""
        return self._ends[-1] if self._ends else 0

    def place(self, tokens: int) -> int:
        """Where a new block of ``tokens`` > 0 begins."""
        begin = number = 0
        while number < len(self._begins) and begin + tokens > self._begins[number]:
            begin = self._ends[number]
            number += 1
        self._begins.insert(number, begin)
        self._ends.insert(number, begin + tokens)
        return begin

    def grow(self, begin: int, tokens: int) -> int:
        """Where the block that began at ``begin`` begins with ``tokens`` of them, no fewer than it had.

        It moves as a copy does: its old place becomes free after the new one was found.
        """
        number = self._find(begin)
        if number + 1 == len(self._begins) or begin + tokens <= self._begins[number + 1]:
            self._ends[number] = begin + tokens
            return begin
        moved = self.place(tokens)
        self.free(begin)
        return moved

    def free(self, begin: int) -> None:
        """Ends the block that begins there."""
        number = self._find(begin)
        del self._begins[number], self._ends[number]

    def _find(self, begin: int) -> int:
        """Raises ValueError where no block begins."""
        number = bisect_left(self._begins, begin)
        if number == len(self._begins) or self._begins[number] != begin:
            raise ValueError(f"no block begins at {begin}: pass what place() or grow() gave last")
        return number


def churn_of_arena(events: int, seed: int, samples: int = 200) -> Churn:
    """Through an arena: what it holds reaches to the end of its last block."""
    arena, now = Arena(), [0] * LIVE
    begins = [0] * LIVE

    def follow(row: int, tokens: int) -> None:
        if tokens == 0:
            arena.free(begins[row])
        elif now[row] == 0:
            begins[row] = arena.place(tokens)
        else:
            begins[row] = arena.grow(begins[row], tokens)
        now[row] = tokens

    def held() -> int:
        return arena.extent * BYTES_PER_TOKEN

    return follow_churn(FIRST_FIT, events, seed, samples, follow, held, now)
