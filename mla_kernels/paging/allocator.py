"""Pages of a pool by number: which are free, and how many owners the others have. No tensor, no device.

A page is *free* (on the stack), *used* (one owner or more) or *idle* (no owner, but kept for its contents by
the prefix cache). free + used + idle = num_pages, always.
"""

import threading
from array import array
from collections.abc import Iterable

import numpy as np

MAX_PAGES = 2**31 - 1  # page ids are int32 on the device


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

    Memory: 9 bytes a page and no Python object for any, so a pool of millions of pages is fine. The last page
    freed is the first allocated again: its lines are the likeliest to be in the L2. Thread-safe: one
    reentrant lock, which an owner of the allocator may share (``lock``) to make its own steps atomic.

    Attributes:
        num_pages: pages of the pool.
        owners: array('i') of num_pages, owners of each page. Read only.
        lock: held during each operation.

    Raises:
        TypeError, ValueError: num_pages is no int in [1, 2**31 - 1].
    """

    def __init__(self, num_pages: int, *, lock: "threading.RLock | None" = None):
        self.num_pages = check_positive("num_pages", num_pages)
        # array, not numpy: a page number is read in a third of the time. Never resized, hence never moved.
        self._stack = array("i", np.arange(num_pages - 1, -1, -1, dtype=np.int32).tobytes())
        self.owners = array("i", bytes(4 * num_pages))
        self._keep = bytearray(num_pages)
        self._free = num_pages
        self._shared = 0
        self._idle = 0
        self.lock = threading.RLock() if lock is None else lock

    @property
    def free(self) -> int:
        """Pages on the free stack."""
        return self._free

    @property
    def idle(self) -> int:
        """Pages without an owner that are kept."""
        return self._idle

    @property
    def used(self) -> int:
        """Pages with one owner or more."""
        with self.lock:
            return self.num_pages - self._free - self._idle

    @property
    def shared(self) -> int:
        """Pages with two owners or more."""
        return self._shared

    def allocate(self) -> int:
        """A free page, with one owner. Raises OutOfPages if none is free."""
        with self.lock:
            top = self._free - 1
            if top < 0:
                raise self._out_of_pages(1)
            page = self._stack[top]
            self._free = top
            self.owners[page] = 1
            return page

    def allocate_batch(self, n: int) -> array:
        """n free pages as array('i'), with one owner each. OutOfPages, and none taken, if fewer are free."""
        if n < 0:
            raise ValueError(f"n is {n}, must be >= 0 pages")
        with self.lock:
            top = self._free - n
            if top < 0:
                raise self._out_of_pages(n)
            pages = self._stack[top : self._free]
            pages.reverse()  # in the order in which allocate() would give them
            self._free = top
            owners = self.owners
            for page in pages:
                owners[page] = 1
            return pages

    def share(self, page: int) -> None:
        """One more owner of a used or idle page. ValueError for a free page."""
        self.share_batch((page,))

    def share_batch(self, pages: Iterable[int]) -> None:
        """One more owner of each page; of none, and ValueError, if one is free or outside the pool."""
        with self.lock:
            pages = self._in_pool(pages)
            owners = self.owners
            for done, page in enumerate(pages):
                count = owners[page] + 1
                if count == 1 and not self._keep[page]:
                    self._undo_share(pages[:done])
                    raise ValueError(
                        f"page {page} is free, only a page in use can be shared: allocate it first"
                    )
                owners[page] = count
                if count == 1:
                    self._idle -= 1
                elif count == 2:
                    self._shared += 1

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
            pages = self._in_pool(pages)
            owners, keep, stack, free, idle = self.owners, self._keep, self._stack, self._free, []
            for done, page in enumerate(pages):
                count = owners[page] - 1
                if count > 1:
                    owners[page] = count
                elif count == 1:
                    owners[page] = count
                    self._shared -= 1
                elif count < 0:
                    self._free = free
                    self._undo_release(pages[:done])
                    raise ValueError(f"page {page} has no owner to release it: release a page once per owner")
                else:
                    owners[page] = count
                    if keep[page]:
                        self._idle += 1
                        idle.append(page)
                    else:
                        stack[free] = page
                        free += 1
            self._free = free
            return idle

    def keep(self, page: int) -> None:
        """From now on the used page is not freed when its last owner leaves. ValueError for a free page."""
        with self.lock:
            self._in_pool((page,))
            if self.owners[page] == 0:
                raise ValueError(f"page {page} has no owner, only a used page can be kept: allocate it first")
            self._keep[page] = 1

    def discard(self, page: int) -> None:
        """Undoes ``keep``; an idle page becomes free. ValueError for a page that is not kept."""
        with self.lock:
            if not (0 <= page < self.num_pages and self._keep[page]):
                raise ValueError(f"page {page} is not kept, discard needs a kept one: keep() it first")
            self._keep[page] = 0
            if self.owners[page] == 0:
                self._idle -= 1
                self._stack[self._free] = page
                self._free += 1

    def _in_pool(self, pages: Iterable[int]) -> list[int]:
        pages = list(pages)
        if pages and (min(pages) < 0 or max(pages) >= self.num_pages):
            page = min(pages) if min(pages) < 0 else max(pages)
            raise ValueError(f"page {page} is outside the pool, must be in [0, {self.num_pages - 1}]")
        return pages

    def _undo_share(self, pages: list[int]) -> None:
        for page in pages:
            count = self.owners[page] - 1
            self.owners[page] = count
            if count == 1:
                self._shared -= 1
            elif count == 0:  # it was idle, or it could not have been shared
                self._idle += 1

    def _undo_release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            count = self.owners[page] + 1
            self.owners[page] = count
            if count == 2:
                self._shared += 1
            elif count == 1 and self._keep[page]:
                self._idle -= 1
            elif count == 1:
                self._free -= 1  # it lies on top of the stack: pages come back in reverse

    def _out_of_pages(self, n: int) -> OutOfPages:
        return OutOfPages(
            f"{n} pages asked for, {self._free} of {self.num_pages} are free: "
            "free or truncate sequences, or make the pool larger"
        )
