"""The paged latent KV cache: sequences of tokens over a pool of pages, shared where they agree."""

import threading
from array import array
from collections.abc import Sequence

import numpy as np
import torch

from mla_kernels.arguments import HEAD_DIM
from mla_kernels.paging.allocator import OutOfPages, PageAllocator, check_positive
from mla_kernels.paging.prefix import Chain, PrefixCache, count_tokens
from mla_kernels.paging.slots import Slots, write_latents
from mla_kernels.paging.tables import DeviceTables
from mla_kernels.paging.usage import Usage, count_waste


class OutOfSequences(RuntimeError):
    """Every row of the tables holds a sequence. Nothing was allocated."""


class PagedKVCache:
    """A pool of latent pages and the sequences in it.

    A sequence's length counts the tokens that it has room for; the caller writes their latents, by ``write``
    or a kernel, into the slots it was given. Pages are shared between forks and, with ``prefix_cache``,
    between sequences that begin with the same tokens; ``append`` gives no slot of a shared page: it copies
    that page first.

    Operations are atomic and all-or-nothing: arguments and room are checked before anything changes. They
    are thread-safe, by one lock a cache. Device work (copy-on-write, ``write``, ``tables``, ``sync``) goes to
    torch's current stream: threads that use different streams must order them. Write the latents of a
    sequence before it is forked, or both of its holders will not agree on what was there.

    Args:
        num_pages: pages of the pool.
        page_size: tokens a page.
        max_pages_per_sequence: columns of the table; a sequence has at most that many pages.
        max_sequences: rows of the table: sequences alive at once.
        prefix_cache: reuse pages of sequences given by token ids, also after these were freed.
        dtype, device: of the pool.
        head_dim: numbers of a token: its latent, then its rotary part.

    Attributes:
        kv_cache: (num_pages, page_size, 1, head_dim), uninitialised: the operators' argument.
        block_table: (max_sequences, max_pages_per_sequence) int32 on device, as of the last ``sync``.
        cache_seqlens: (max_sequences,) int32 on device, as of the last ``sync``; 0 in a row without sequence.

    Raises:
        TypeError, ValueError: a size that is no positive int.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        *,
        max_pages_per_sequence: int,
        max_sequences: int,
        prefix_cache: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        head_dim: int = HEAD_DIM,
    ):
        self.page_size = check_positive("page_size", page_size)
        self.max_pages_per_sequence = check_positive("max_pages_per_sequence", max_pages_per_sequence)
        self.max_sequences = check_positive("max_sequences", max_sequences)
        self.head_dim = check_positive("head_dim", head_dim)
        self._lock = threading.RLock()
        self._allocator = PageAllocator(num_pages, lock=self._lock)
        device = torch.device(device)
        self.kv_cache = torch.empty(num_pages, page_size, 1, head_dim, dtype=dtype, device=device)
        self._tables = DeviceTables(max_sequences, max_pages_per_sequence, page_size, device)
        self._prefix = PrefixCache(self._allocator, page_size) if prefix_cache else None
        self._offsets = np.arange(page_size, dtype=np.int32)
        self._offsets.flags.writeable = False  # slots are views of it
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        # An id is its row plus a growing multiple of max_sequences, so that of a freed sequence stays dead.
        self._next_id = list(range(max_sequences))
        self._id_of: list[int | None] = [None] * max_sequences
        self._chains: list[Chain | None] = [None] * max_sequences

    @property
    def block_table(self) -> torch.Tensor:
        return self._tables.block_table

    @property
    def cache_seqlens(self) -> torch.Tensor:
        return self._tables.cache_seqlens

    def allocate(self, tokens: int | Sequence[int] | np.ndarray) -> int:
        """A new sequence with room for these tokens. O(pages); with ids and a prefix cache a hash each.

        Args:
            tokens: a count >= 0, or token ids (n,). With ids and a prefix cache, full pages of the longest
                cached prefix are reused; ``cached_tokens`` says how many tokens need no write. It may be all.

        Returns:
            The id of the sequence, never given again. ``slots(id, cached_tokens(id))`` are those to write.

        Raises:
            OutOfPages, OutOfSequences: no room; nothing changed.
            TypeError, ValueError: not a count or ids, or more than max_pages_per_sequence pages.
        """
        count, ids = count_tokens(tokens)
        with self._lock:
            self._check_length(count)
            self._check_free_row()
            n = -(-count // self.page_size)
            if self._prefix is None:
                pages = self._take(n)
            else:
                chain = Chain(ids)
                matched = self._prefix.match(chain)
                self._check_room(n - len(matched), spoken_for=self._prefix.count_idle(matched))
                self._prefix.acquire(matched)
                pages = array("i", matched) + self._take(n - len(matched))
                if ids is not None:
                    self._prefix.hit_tokens += chain.cached
                    self._prefix.miss_tokens += count - chain.cached
            seq = self._occupy_row(pages, count)
            if self._prefix is not None:
                self._chains[seq % self.max_sequences] = chain
            return seq

    def append(self, seq: int, tokens: int | Sequence[int] | np.ndarray) -> Slots:
        """Room for more tokens at the end of a sequence, in a copy of its last page if that is shared.

        Args:
            tokens: a count >= 0, or token ids (n,), which the prefix cache needs to find their pages again.

        Returns:
            The slots of the new tokens, for ``write`` or the append kernel.

        Raises:
            OutOfPages: no room; nothing changed.
            TypeError, ValueError: not a live sequence, not a count or ids, or beyond max_pages_per_sequence.
        """
        count, ids = count_tokens(tokens)
        with self._lock:
            row = self._row(seq)
            tables, size = self._tables, self.page_size
            start = tables.lengths[row]
            end = start + count
            self._check_length(end)
            held, fill = -(-start // size), start % size
            new = -(-end // size) - held
            last = tables.pages[row * tables.max_pages + held - 1] if fill and count else None
            if last is not None and self._allocator.owners[last] > 1:
                pages = self._take(1 + new)
                self._copy_page(last, fill, pages)
                tables.set_pages(row, held - 1, pages)
                self._release((last,))
            else:
                if new:
                    tables.set_pages(row, held, self._take(new))
                if last is not None and self._prefix is not None:
                    self._prefix.forget(last)  # full before a truncation, and about to become another page
            tables.set_length(row, end)
            if self._prefix is not None:
                self._chains[row].extend(ids, start)
            return self._slots(row, start, end)

    def fork(self, seq: int) -> int:
        """A second sequence with the same tokens in the same pages. O(pages); copies no latent.

        Raises:
            OutOfSequences: no row is free; nothing changed.
            ValueError: not a live sequence.
        """
        with self._lock:
            row = self._row(seq)
            self._check_free_row()
            pages = self._pages(row)
            self._allocator.share_batch(pages)
            twin = self._occupy_row(pages, self._tables.lengths[row])
            if self._prefix is not None:
                self._chains[twin % self.max_sequences] = self._chains[row].copy()
            return twin

    def truncate(self, seq: int, length: int) -> None:
        """Forgets the tokens of a sequence from position ``length`` on, and gives up the pages past it.

        Raises:
            ValueError: not a live sequence, or length outside [0, its length].
        """
        with self._lock:
            row = self._row(seq)
            old = self._tables.lengths[row]
            if not 0 <= length <= old:
                raise ValueError(f"length is {length}, must be in [0, {old}]: append() adds tokens")
            pages = self._pages(row)[-(-length // self.page_size) :]
            self._tables.set_length(row, length)
            if self._prefix is not None:
                self._chains[row].truncate(length, self.page_size)
            self._release(pages[::-1])

    def free(self, seq: int) -> None:
        """Ends a sequence. Its pages become free, save those of others or of the prefix cache.

        Raises:
            ValueError: not a live sequence.
        """
        with self._lock:
            row = self._row(seq)
            pages = self._pages(row)
            self._tables.set_length(row, 0)
            self._id_of[row] = self._chains[row] = None
            self._free_rows.append(row)
            # From the end, so that of a cached prompt the tail is evicted first: its head serves more.
            self._release(pages[::-1])

    def commit(self, seq: int, written: int | None = None) -> int:
        """Lets others find a sequence's full pages: the latents of its first ``written`` tokens are there.

        "There" means written, or enqueued on the stream on which others will read. A page after a token whose
        id was not given is not found. Without a prefix cache this does nothing.

        Args:
            written: tokens from the start of the sequence; all if None.

        Returns:
            Pages that became findable. A page is offered once: if another holds its tokens, it stays unnamed.

        Raises:
            ValueError: not a live sequence, or written outside [0, its length].
        """
        with self._lock:
            row = self._row(seq)
            length = self._tables.lengths[row]
            written = length if written is None else written
            if not 0 <= written <= length:
                raise ValueError(f"written is {written}, must be in [0, {length}]: append() the tokens first")
            added, chain = 0, self._chains[row]
            while chain is not None and (digest := chain.next_digest(self.page_size, written)) is not None:
                page = self._tables.pages[row * self._tables.max_pages + len(chain.digests)]
                added += self._prefix.insert(digest, page)
                chain.digests.append(digest)
            return added

    def write(self, slots: Slots, kv_c: torch.Tensor, k_pe: torch.Tensor) -> None:
        """Puts the latents of n tokens into their slots, by torch's indexed copy on the current stream.

        Args:
            slots: of n tokens, from ``append`` or ``slots``.
            kv_c: (n, 512) of the pool's dtype and device: the latents after RMSNorm.
            k_pe: (n, 64), likewise: the rotary part, rotated.

        Raises:
            TypeError, ValueError: other shapes, dtype or device, a slot outside the pool; nothing is written.
        """
        write_latents(self.kv_cache, slots, kv_c, k_pe)

    def tables(self, seqs: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``mla_decode(q, cache.kv_cache, *cache.tables(seqs))`` needs, in new tensors, by one copy.

        Returns:
            block_table (n, width) and cache_seqlens (n,), int32 on the device, of n sequences in this order.
            width is a power of two, or max_pages_per_sequence; entries past a length may hold any page.

        Raises:
            ValueError: not a live sequence.
        """
        with self._lock:
            return self._tables.gather([self._row(seq) for seq in seqs])

    def sync(self) -> None:
        """Brings ``block_table`` and ``cache_seqlens`` up to date, by two copies at most.

        They keep their addresses, so a captured graph reads them at each replay; ``row`` says which row is
        whose. Call it, and ``tables``, outside of a capture.
        """
        with self._lock:
            self._tables.sync()

    def row(self, seq: int) -> int:
        """The row of ``block_table`` and ``cache_seqlens`` of a live sequence; it keeps it until freed."""
        with self._lock:
            return self._row(seq)

    def length(self, seq: int) -> int:
        """Tokens of a live sequence."""
        with self._lock:
            return self._tables.lengths[self._row(seq)]

    def cached_tokens(self, seq: int) -> int:
        """Tokens at the start of a live sequence that its allocation found in the prefix cache."""
        with self._lock:
            chain = self._chains[self._row(seq)]
            return 0 if chain is None else chain.cached

    def slots(self, seq: int, start: int = 0, stop: int | None = None) -> Slots:
        """Slots of the tokens at positions start .. stop - 1 (to the end if None) of a live sequence.

        They hold until its next append, truncation or end. Write only to those that no other sequence has.

        Raises:
            ValueError: not a live sequence, or not 0 <= start <= stop <= its length.
        """
        with self._lock:
            row = self._row(seq)
            length = self._tables.lengths[row]
            stop = length if stop is None else stop
            if not 0 <= start <= stop <= length:
                raise ValueError(
                    f"positions {start}, {stop} must be in order, in [0, {length}]: append() first"
                )
            return self._slots(row, start, stop)

    def usage(self) -> Usage:
        """Exact counts. O(max_sequences)."""
        with self._lock:
            pages, prefix = self._allocator, self._prefix
            found = (prefix.hit_tokens, prefix.miss_tokens, prefix.evicted_pages) if prefix else ()
            lengths, owners = self._tables.seqlens, np.frombuffer(pages.owners, dtype=np.int32)
            return Usage(
                pages.num_pages,
                pages.free,
                pages.used,
                pages.shared,
                pages.idle,
                count_waste(lengths, self._tables.table, owners, self.page_size),
                self.max_sequences - len(self._free_rows),
                int(lengths.sum(dtype=np.int64)),
                *found,
            )

    def _row(self, seq: int) -> int:
        row = seq % self.max_sequences
        if self._id_of[row] != seq:
            raise ValueError(
                f"sequence {seq} is not alive: pass what allocate() or fork() gave, before free()"
            )
        return row

    def _check_free_row(self) -> None:
        if not self._free_rows:
            raise OutOfSequences(
                f"one more sequence asked for, {self.max_sequences} are alive and max_sequences is as many: "
                "free one, or make the tables larger"
            )

    def _occupy_row(self, pages: array, length: int) -> int:
        row = self._free_rows.pop()
        seq = self._id_of[row] = self._next_id[row]
        self._next_id[row] += self.max_sequences
        self._tables.set_pages(row, 0, pages)
        self._tables.set_length(row, length)
        return seq

    def _pages(self, row: int) -> array:
        begin = row * self._tables.max_pages
        return self._tables.pages[begin : begin + -(-self._tables.lengths[row] // self.page_size)]

    def _slots(self, row: int, start: int, stop: int) -> Slots:
        first, offset = start // self.page_size, start % self.page_size
        if stop - start == 1:  # a decode step
            page = self._tables.pages[row * self._tables.max_pages + first]
            return Slots(np.array((page,), dtype=np.int32), self._offsets[offset : offset + 1])
        pages = self._tables.table[row, first : -(-stop // self.page_size)].repeat(self.page_size)
        offsets = np.arange(start, stop, dtype=np.int32) % self.page_size
        return Slots(pages[offset : offset + stop - start], offsets)

    def _check_length(self, length: int) -> None:
        limit = self.max_pages_per_sequence * self.page_size
        if length > limit:
            raise ValueError(
                f"the sequence would have {length} tokens, at most {limit} fit in its table: "
                "raise max_pages_per_sequence"
            )

    def _check_room(self, n: int, spoken_for: int = 0) -> None:
        evictable = self._allocator.idle - spoken_for
        if n > self._allocator.free + evictable:
            raise OutOfPages(
                f"{n} pages asked for, {self._allocator.free} of {self._allocator.num_pages} are free and "
                f"{evictable} evictable: free or truncate sequences, or make the pool larger"
            )

    def _take(self, n: int) -> array:
        if n > self._allocator.free:
            self._check_room(n)
            self._prefix.evict(n - self._allocator.free)
        return self._allocator.allocate_batch(n)

    def _release(self, pages) -> None:
        kept = self._allocator.release_batch(pages)
        if kept:
            self._prefix.retire(kept)

    def _copy_page(self, source: int, fill: int, pages: array) -> None:
        try:
            self.kv_cache[pages[0], :fill] = self.kv_cache[source, :fill]
        except BaseException:
            self._allocator.release_batch(pages)
            raise
