"""Pages of a pool by number: which are free, and how many owners the others have. No tensor, no device.

A page is *free* (on the stack), *used* (one owner or more) or *idle* (no owner, but kept for its contents by
the prefix cache). free + used + idle = num_pages, always.

What is free is a sparse set (Briggs and Torczon, "An efficient representation for sparse sets", 1993): page p
is free exactly if ``where[p] >= top`` and ``stack[where[p]] == p``. So an allocation touches no page: it
copies the numbers from ``top`` on, and moves ``top``. The count of a free page is 1 already, for its next
owner.
"""

import threading
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

MAX_PAGES = 2**31 - 1  # page ids are int32 on the device
MANY = 128  # pages from which on numpy releases a batch sooner than a loop does


class OutOfPages(RuntimeError):
    """The pool has fewer pages to give than were asked for. Nothing was allocated."""


def check_positive(name: str, value: int, limit: int = MAX_PAGES) -> int:
    """``value`` as an int. Raises TypeError, or ValueError unless it is in [1, limit]."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is a {type(value).__name__}, must be an int")
    if not 1 <= value <= limit:
        raise ValueError(f"{name} is {value}, must be in [1, {limit}]: choose another size")
    return int(value)


class PageAllocator:
    """Owner counts and a free stack for pages 0 .. num_pages - 1; every operation on a page is O(1).

    Taking n pages is one copy of n numbers. Memory: 13 bytes a page and no Python object for any, so a pool
    of millions of pages is fine. The last page freed is the first allocated again: its lines are the
    likeliest to be in the L2. Thread-safe: one reentrant lock, which an owner of the allocator may share
    (``lock``) to make its own steps atomic.

    Attributes:
        num_pages: pages of the pool.
        counts: array('i') of num_pages, owners of each page that is used; 0 if idle, 1 if free. Read only.
        lock: held during each operation.

    Raises:
        TypeError, ValueError: num_pages is no int in [1, 2**31 - 1].
    """

    def __init__(self, num_pages: int, *, lock: "threading.RLock | None" = None):
        self.num_pages = check_positive("num_pages", num_pages)
        # array, not numpy: a page number is read in a third of the time. Never resized, hence never moved.
        ascending = np.arange(num_pages, dtype=np.int32).tobytes()
        self._stack = array("i", ascending)  # free pages are those from _top on, and that at _top is next
        self._where = array("i", ascending)  # says nothing of a page that is not free
        self.counts = array("i", np.ones(num_pages, dtype=np.int32).tobytes())
        self._keep = bytearray(num_pages)  # never of a free page
        self._top = 0
        self._shared = 0
        self._idle = 0
        self.lock = threading.RLock() if lock is None else lock

    @property
    def owners(self) -> array:
        """Owners of each page, 0 of a free one, as array('i'): a copy, O(num_pages)."""
        with self.lock:
            owners = self.counts[:]
            np.frombuffer(owners, dtype=np.int32)[self._stack[self._top :]] = 0
            return owners

    @property
    def free(self) -> int:
        """Pages on the free stack."""
        return self.num_pages - self._top

    @property
    def idle(self) -> int:
        """Pages without an owner that are kept."""
        return self._idle

    @property
    def used(self) -> int:
        """Pages with one owner or more."""
        with self.lock:
            return self._top - self._idle

    @property
    def shared(self) -> int:
        """Pages with two owners or more."""
        return self._shared

    def allocate(self) -> int:
        """A free page, with one owner. Raises OutOfPages if none is free."""
        with self.lock:
            top = self._top
            if top == self.num_pages:
                raise self._out_of_pages(1)
            self._top = top + 1
            return self._stack[top]

    def allocate_batch(self, n: int) -> array:
        """n free pages as array('i'), with one owner each. OutOfPages, and none taken, if fewer are free."""
        if n < 0:
            raise ValueError(f"n is {n}, must be >= 0 pages")
        with self.lock:
            top = self._top
            end = top + n
            if end > self.num_pages:
                raise self._out_of_pages(n)
            pages = self._stack[top:end]  # in the order in which allocate() would give them
            self._top = end
            return pages

    def share(self, page: int) -> None:
        """One more owner of a used or idle page. ValueError for a free page."""
        self.share_batch((page,))

    def share_batch(self, pages: Iterable[int]) -> None:
        """One more owner of each page; of none, and ValueError, if one is free or outside the pool."""
        with self.lock:
            pages = self._in_pool(pages)
            counts = self.counts
            for done, page in enumerate(pages):
                count = counts[page] + 1
                if count == 2:
                    if self._is_free(page):
                        self._undo_share(pages[:done])
                        raise ValueError(
                            f"page {page} is free, only a page in use can be shared: allocate it first"
                        )
                    self._shared += 1
                elif count == 1:
                    self._idle -= 1
                counts[page] = count

    def release(self, page: int) -> bool:
        """One owner less. At 0 the page is free, or, if it is kept, idle; True if it became idle.

        Raises:
            ValueError: the page has no owner (a double release) or is outside the pool.
        """
        return bool(self.release_batch((page,)))

    def release_batch(self, pages: Iterable[int]) -> list[int]:
        """One owner less for each page, in order; of none, and ValueError, if one has no owner.

        Returns:
            The pages that lost their last owner and are kept, in order; the others that lost it are free.
        """
        with self.lock:
            if isinstance(pages, Sequence) and len(pages) >= MANY and self._release_at_once(pages):
                return []
            pages = self._in_pool(pages)
            counts, keep, stack, where = self.counts, self._keep, self._stack, self._where
            top, idle = self._top, []
            for done, page in enumerate(pages):
                count = counts[page] - 1
                if count == 0 and not keep[page] and ((at := where[page]) < top or stack[at] != page):
                    top -= 1
                    stack[top] = page
                    where[page] = top
                elif count > 0:
                    counts[page] = count
                    if count == 1:
                        self._shared -= 1
                elif count == 0 and keep[page]:
                    counts[page] = 0
                    self._idle += 1
                    idle.append(page)
                else:
                    self._top = top
                    self._undo_release(pages[:done])
                    raise ValueError(f"page {page} has no owner to release it: release a page once per owner")
            self._top = top
            return idle

    def keep(self, page: int) -> None:
        """From now on the used page is not freed when its last owner leaves. ValueError for a free page."""
        with self.lock:
            self._in_pool((page,))
            if self.counts[page] == 0 or self._is_free(page):
                raise ValueError(f"page {page} has no owner, only a used page can be kept: allocate it first")
            self._keep[page] = 1

    def discard(self, page: int) -> None:
        """Undoes ``keep``; an idle page becomes free. ValueError for a page that is not kept."""
        with self.lock:
            if not (0 <= page < self.num_pages and self._keep[page]):
                raise ValueError(f"page {page} is not kept, discard needs a kept one: keep() it first")
            self._keep[page] = 0
            if self.counts[page] == 0:
                self.counts[page] = 1
                self._idle -= 1
                top = self._top - 1
                self._stack[top] = page
                self._where[page] = top
                self._top = top

    def _in_pool(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        if pages and (min(pages) < 0 or max(pages) >= self.num_pages):
            page = min(pages) if min(pages) < 0 else max(pages)
            raise ValueError(f"page {page} is outside the pool, must be in [0, {self.num_pages - 1}]")
        return pages

    def _is_free(self, page: int) -> bool:
        at = self._where[page]
        return at >= self._top and self._stack[at] == page

    def _release_at_once(self, pages: Sequence[int]) -> bool:
        """Frees these pages if each has one owner, is not kept and is listed once; else changes nothing."""
        new, end = np.asarray(pages), self._top
        top = end - len(new)
        if new.dtype.kind != "i" or new.min() < 0 or new.max() >= self.num_pages:
            return False
        counts, stack, where = (
            np.frombuffer(one, dtype=np.int32) for one in (self.counts, self._stack, self._where)
        )
        if (counts[new] != 1).any() or np.frombuffer(self._keep, dtype=np.uint8)[new].any():
            return False
        at = where[new]
        if ((at >= end) & (stack[at] == new)).any():
            return False
        # What follows concerns no free page until the last line, so there is nothing to undo.
        places = np.arange(end - 1, top - 1, -1, dtype=np.int32)
        where[new] = places
        if (where[new] != places).any():  # a page listed twice, as some must be of too many, has one place
            return False
        stack[places] = new
        self._top = top
        return True

    def _undo_share(self, pages: list[int]) -> None:
        for page in pages:
            count = self.counts[page] - 1
            self.counts[page] = count
            if count == 1:
                self._shared -= 1
            elif count == 0:  # it was idle, or it could not have been shared
                self._idle += 1

    def _undo_release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            if self._is_free(page):
                self._top += 1  # it lies on top of the stack: pages come back in reverse
                continue
            count = self.counts[page] + 1
            self.counts[page] = count
            if count == 2:
                self._shared += 1
            elif count == 1:
                self._idle -= 1

    def _out_of_pages(self, n: int) -> OutOfPages:
        return OutOfPages(
            f"{n} pages asked for, {self.free} of {self.num_pages} are free: "
            "free or truncate sequences, or make the pool larger"
        )
