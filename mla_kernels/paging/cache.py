"""The paged latent KV cache: sequences of tokens over a pool of pages, shared where they agree."""

import threading
from array import array
from collections.abc import Sequence

import numpy as np
import torch

from mla_kernels.arguments import HEAD_DIM
from mla_kernels.paging.allocator import PageAllocator, check_positive
from mla_kernels.paging.growth import count_each, ids_of_each, plan_growth
from mla_kernels.paging.prefix import Chain, PrefixCache, count_tokens
from mla_kernels.paging.rows import SequenceRows
from mla_kernels.paging.slots import Slots, to_device, write_latents
from mla_kernels.paging.supply import PageSupply
from mla_kernels.paging.tables import DeviceTables
from mla_kernels.paging.usage import Usage, count_waste


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
        self._supply = PageSupply(self._allocator, self._prefix)
        self._rows = SequenceRows(max_sequences)
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
            self._rows.check_free()
            n = -(-count // self.page_size)
            if self._prefix is None:
                pages = self._supply.take(n)
            else:
                chain = Chain(ids)
                matched = self._prefix.match(chain)
                self._supply.check_room(n - len(matched), spoken_for=self._prefix.count_idle(matched))
                self._prefix.acquire(matched)
                pages = array("i", matched) + self._supply.take(n - len(matched))
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
            row = self._rows.row(seq)
            tables, size = self._tables, self.page_size
            start = tables.lengths[row]
            end = start + count
            self._check_length(end)
            held, fill = -(-start // size), start % size
            new = -(-end // size) - held
            last = tables.pages[row * tables.max_pages + held - 1] if fill and count else None
            if last is not None and self._allocator.counts[last] > 1:
                pages = self._supply.take(1 + new)
                self._copy_page(last, fill, pages)
                tables.set_pages(row, held - 1, pages)
                self._supply.release((last,))
            else:
                if new:
                    tables.set_pages(row, held, self._supply.take(new))
                if last is not None and self._prefix is not None:
                    self._prefix.forget(last)  # full before a truncation, and about to become another page
            tables.set_length(row, end)
            if self._prefix is not None:
                self._chains[row].extend(ids, start)
            return self._tables.slots(row, start, end)

    def append_batch(
        self,
        seqs: Sequence[int],
        counts: Sequence[int] | np.ndarray | None = None,
        ids: Sequence[int] | np.ndarray | None = None,
    ) -> Slots:
        """``append`` for many sequences, as if for one after another, but for all of them or for none.

        Args:
            seqs: n sequences, none twice.
            counts: (n,) tokens of each, >= 0; None: one each, a decode step.
            ids: (total,) the ids of the new tokens, sequence by sequence, for the prefix cache.

        Returns:
            The slots of the new tokens, sequence by sequence.

        Raises:
            OutOfPages: no room for all; nothing changed.
            TypeError, ValueError: a sequence twice or not alive, counts or ids of another type or number, or
                a sequence beyond max_pages_per_sequence; nothing changed.
        """
        seqs = list(seqs)
        counts = count_each(counts, len(seqs))
        known = None if ids is None else ids_of_each(ids, counts)
        with self._lock:
            rows, tables = self._rows.distinct_rows(seqs), self._tables
            self._check_length(int(counts.max(initial=0)))  # so that no sum overflows
            grown = plan_growth(tables, np.frombuffer(self._allocator.counts, dtype=np.int32), rows, counts)
            self._check_length(int(grown.ends.max(initial=0)))
            if total := int(grown.takes.sum()):
                taken = self._supply.take(total)
                pages = np.array(taken, dtype=np.int32)
                if grown.sources:
                    self._copy_pages(grown.sources, grown.targets(pages), taken)
                tables.scatter_pages(*grown.cells(), pages)
                self._supply.release(grown.sources)
            tables.set_lengths(grown.rows, grown.ends)
            if self._prefix is not None:
                for page in grown.continued.tolist():
                    self._prefix.forget(page)
                for i, own in enumerate(known or ()):
                    self._chains[rows[i]].extend(own, int(grown.starts[i]))
            return grown.slots(tables)

    def fork(self, seq: int) -> int:
        """A second sequence with the same tokens in the same pages. O(pages); copies no latent.

        Raises:
            OutOfSequences: no row is free; nothing changed.
            ValueError: not a live sequence.
        """
        with self._lock:
            row = self._rows.row(seq)
            self._rows.check_free()
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
            row = self._rows.row(seq)
            old = self._tables.lengths[row]
            if not 0 <= length <= old:
                raise ValueError(f"length is {length}, must be in [0, {old}]: append() adds tokens")
            pages = self._pages(row)[-(-length // self.page_size) :]
            self._tables.set_length(row, length)
            if self._prefix is not None:
                self._chains[row].truncate(length, self.page_size)
            self._supply.release(pages[::-1])

    def free(self, seq: int) -> None:
        """Ends a sequence. Its pages become free, save those of others or of the prefix cache.

        Raises:
            ValueError: not a live sequence.
        """
        with self._lock:
            row = self._rows.row(seq)
            pages = self._pages(row)
            self._tables.set_length(row, 0)
            self._chains[row] = None
            self._rows.vacate(row)
            # From the end, so that of a cached prompt the tail is evicted first: its head serves more.
            self._supply.release(pages[::-1])

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
            row = self._rows.row(seq)
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
        """Puts the latents of n tokens into their slots, on the current stream; the host does not wait.

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
            return self._tables.gather(self._rows.rows(seqs))

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
            return self._rows.row(seq)

    def length(self, seq: int) -> int:
        """Tokens of a live sequence."""
        with self._lock:
            return self._tables.lengths[self._rows.row(seq)]

    def cached_tokens(self, seq: int) -> int:
        """Tokens at the start of a live sequence that its allocation found in the prefix cache."""
        with self._lock:
            chain = self._chains[self._rows.row(seq)]
            return 0 if chain is None else chain.cached

    def slots(self, seq: int, start: int = 0, stop: int | None = None) -> Slots:
        """Slots of the tokens at positions start .. stop - 1 (to the end if None) of a live sequence.

        They hold until its next append, truncation or end. Write only to those that no other sequence has.

        Raises:
            ValueError: not a live sequence, or not 0 <= start <= stop <= its length.
        """
        with self._lock:
            row = self._rows.row(seq)
            length = self._tables.lengths[row]
            stop = length if stop is None else stop
            if not 0 <= start <= stop <= length:
                raise ValueError(
                    f"positions {start}, {stop} must be in order, in [0, {length}]: append() first"
                )
            return self._tables.slots(row, start, stop)

    def usage(self) -> Usage:
        """Exact counts. O(max_sequences)."""
        with self._lock:
            pages, prefix = self._allocator, self._prefix
            found = (prefix.hit_tokens, prefix.miss_tokens, prefix.evicted_pages) if prefix else ()
            lengths, owners = self._tables.seqlens, np.frombuffer(pages.counts, dtype=np.int32)
            return Usage(
                pages.num_pages,
                pages.free,
                pages.used,
                pages.shared,
                pages.idle,
                count_waste(lengths, self._tables.table, owners, self.page_size),
                self._rows.alive,
                int(lengths.sum(dtype=np.int64)),
                *found,
            )

    def _occupy_row(self, pages: array, length: int) -> int:
        seq = self._rows.occupy()
        row = seq % self.max_sequences
        self._tables.set_pages(row, 0, pages)
        self._tables.set_length(row, length)
        return seq

    def _pages(self, row: int) -> array:
        begin = row * self._tables.max_pages
        return self._tables.pages[begin : begin + -(-self._tables.lengths[row] // self.page_size)]

    def _check_length(self, length: int) -> None:
        limit = self.max_pages_per_sequence * self.page_size
        if length > limit:
            raise ValueError(
                f"the sequence would have {length} tokens, at most {limit} fit in its table: "
                "raise max_pages_per_sequence"
            )

    def _copy_page(self, source: int, fill: int, pages: array) -> None:
        try:
            self.kv_cache[pages[0], :fill] = self.kv_cache[source, :fill]
        except BaseException:
            self._allocator.release_batch(pages)
            raise

    def _copy_pages(self, sources: list[int], targets: np.ndarray, taken: array) -> None:
        try:
            index = to_device(np.array([sources, targets], dtype=np.int64), self.kv_cache.device)
            self.kv_cache.index_copy_(0, index[1], self.kv_cache.index_select(0, index[0]))
        except BaseException:
            self._allocator.release_batch(taken)
            raise
