"""Which page holds the latents of which tokens: full pages found again by the tokens that led up to them.

A latent depends on its token, its position and, from the second layer on, every token before it. So a page is
named by a chained hash, digest = H(digest of the page before | token ids of this page), and two sequences
share a page exactly if all their tokens up to its end agree. The digest has 128 bits (BLAKE2b): among
2**40 pages, two of different tokens meet with probability 2**-49, so tokens are not compared again.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from mla_kernels.paging.allocator import PageAllocator

ROOT = bytes(16)  # the parent of a sequence's first page
TOKEN_BYTES = 8


def count_tokens(tokens: int | Sequence[int] | np.ndarray) -> tuple[int, np.ndarray | None]:
    """Tokens given as a count or by ids: how many, and the ids as (n,) int64, or None.

    Raises:
        TypeError, ValueError: neither a count >= 0 nor a flat sequence of integers.
    """
    if type(tokens) is int or isinstance(tokens, np.integer):  # a bool is no count
        if tokens < 0:
            raise ValueError(f"tokens is {tokens}, must be a count >= 0 or token ids: truncate() takes away")
        return int(tokens), None
    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise ValueError(f"token ids have shape {ids.shape}, must be (n,): pass one sequence at a time")
    if len(ids) and ids.dtype.kind not in "iu":
        raise TypeError(f"token ids are {ids.dtype}, must be integers: pass a count or ids")
    return len(ids), ids.astype(np.int64)


class Chain:
    """The tokens of one sequence as far as their ids were given, and the digests of its committed pages."""

    __slots__ = ("cached", "digests", "tokens")

    def __init__(self, ids: np.ndarray | None = None):
        self.tokens = bytearray() if ids is None else bytearray(ids.tobytes())  # int64 each
        self.digests: list[bytes] = []
        self.cached = 0  # tokens found in the cache at allocation

    def copy(self) -> "Chain":
        twin = Chain()
        twin.tokens, twin.digests, twin.cached = self.tokens[:], self.digests[:], self.cached
        return twin

    def extend(self, ids: np.ndarray | None, length: int) -> None:
        """Ids of the tokens from position ``length`` on; ignored after tokens without ids."""
        if ids is not None and len(self.tokens) == TOKEN_BYTES * length:
            self.tokens += ids.tobytes()

    def truncate(self, length: int, page_size: int) -> None:
        del self.tokens[TOKEN_BYTES * length :]
        del self.digests[length // page_size :]
        self.cached = min(self.cached, length)

    def next_digest(self, page_size: int, length: int) -> bytes | None:
        """The digest of the page after the committed ones; None if ``length`` tokens do not fill it."""
        size = TOKEN_BYTES * page_size
        begin = size * len(self.digests)
        if begin + size > min(len(self.tokens), TOKEN_BYTES * length):
            return None
        parent = self.digests[-1] if self.digests else ROOT
        return blake2b(parent + self.tokens[begin : begin + size], digest_size=16).digest()


class PrefixCache:
    """Pages by digest, and the idle ones among them in the order in which they go: least recently used first.

    A page in here is kept by the allocator: without an owner it is idle, evictable, and counts as cached, not
    as used. Not thread-safe by itself: its owner holds the allocator's lock.

    Attributes:
        hit_tokens, miss_tokens: tokens of allocated sequences found here, and not found.
        evicted_pages: pages that gave way to an allocation.
    """

    def __init__(self, pages: PageAllocator, page_size: int):
        self._pages = pages
        self._page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.hit_tokens = 0
        self.miss_tokens = 0
        self.evicted_pages = 0

    def match(self, chain: Chain) -> list[int]:
        """Pages of the longest cached prefix; their digests enter ``chain``. Changes nothing else."""
        pages, length = [], len(chain.tokens) // TOKEN_BYTES
        while (digest := chain.next_digest(self._page_size, length)) is not None:
            page = self._page_of.get(digest)
            if page is None:
                break
            chain.digests.append(digest)
            pages.append(page)
        chain.cached = len(pages) * self._page_size
        return pages

    def count_idle(self, pages: Iterable[int]) -> int:
        """How many of these pages have no owner."""
        return sum(page in self._idle for page in pages)

    def acquire(self, pages: list[int]) -> None:
        """One more owner of each matched page."""
        self._pages.share_batch(pages)
        for page in pages:
            self._idle.pop(page, None)

    def retire(self, pages: Iterable[int]) -> None:
        """These pages lost their last owner: the last of them is now the most recently used of all."""
        for page in pages:
            self._idle[page] = None

    def insert(self, digest: bytes, page: int) -> bool:
        """Names a used page, unless another page has these tokens already."""
        if digest in self._page_of:
            return False
        self._pages.keep(page)
        self._page_of[digest] = page
        self._digest_of[page] = digest
        return True

    def forget(self, page: int) -> None:
        """The page is about to change: nobody may find it any more. Nothing happens if nobody could."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
            self._idle.pop(page, None)
            self._pages.discard(page)

    def evict(self, n: int) -> None:
        """Frees the n least recently used idle pages. There must be as many."""
        for _ in range(n):
            self.forget(next(iter(self._idle)))
        self.evicted_pages += n
