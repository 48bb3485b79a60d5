"""Pages for sequences: free ones, and cached ones that nobody owns once those are gone."""

from array import array
from collections.abc import Iterable

from mla_kernels.paging.allocator import OutOfPages, PageAllocator
from mla_kernels.paging.prefix import PrefixCache


class PageSupply:
    """The free stack, and the prefix cache (or None) behind it. Its owner holds their lock at each call."""

    def __init__(self, pages: PageAllocator, prefix: PrefixCache | None):
        self._pages = pages
        self._prefix = prefix

    def check_room(self, n: int, spoken_for: int = 0) -> None:
        """Raises OutOfPages unless n pages are free or evictable, ``spoken_for`` of those cached aside."""
        evictable = self._pages.idle - spoken_for
        if n > self._pages.free + evictable:
            raise OutOfPages(
                f"{n} pages asked for, {self._pages.free} of {self._pages.num_pages} are free and "
                f"{evictable} evictable: free or truncate sequences, or make the pool larger"
            )

    def take(self, n: int) -> array:
        """n pages with one owner each, evicting what is not free. OutOfPages, and none taken, if too few."""
        if n > self._pages.free:
            self.check_room(n)
            self._prefix.evict(n - self._pages.free)
        return self._pages.allocate_batch(n)

    def release(self, pages: Iterable[int]) -> None:
        """One owner less for each page. Without one it is free, or evictable if the prefix cache has it."""
        kept = self._pages.release_batch(pages)
        if kept:
            self._prefix.retire(kept)
