"""Page tables and lengths, twice: a mirror on the host, where they change, and the kernels' tensors."""

from array import array

import numpy as np
import torch

from mla_kernels.paging.slots import Slots


class DeviceTables:
    """A row of page ids and a length for each of ``max_sequences`` rows.

    The mirror changes at every token; the device sees it only when asked: ``sync`` brings the two persistent
    tensors up to date (stable addresses, for a captured graph), ``gather`` makes fresh tensors of some rows.
    Copies go out of one pinned buffer on torch's current stream without a host synchronisation, unless the
    copy before has not left the buffer yet. The owner holds its lock around every call.

    Attributes:
        block_table: (max_sequences, max_pages) int32 on ``device``, as of the last ``sync``.
        cache_seqlens: (max_sequences,) int32 on ``device``, as of the last ``sync``.
        max_pages, page_size: columns of a row, tokens of a page.
        pages: array('i'), the mirror of block_table, row-major: for single reads.
        lengths: array('i'), the mirror of cache_seqlens: for single reads.
        table, seqlens: the same memory as numpy arrays, for whole rows.
    """

    def __init__(self, max_sequences: int, max_pages: int, page_size: int, device: torch.device):
        self.max_pages = max_pages
        self.page_size = page_size
        self._device = device
        self.pages = array("i", bytes(4 * max_sequences * max_pages))
        self.lengths = array("i", bytes(4 * max_sequences))
        self.table = np.frombuffer(self.pages, dtype=np.int32).reshape(max_sequences, max_pages)
        self.seqlens = np.frombuffer(self.lengths, dtype=np.int32)
        self.block_table = torch.zeros(max_sequences, max_pages, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._offsets = np.arange(page_size, dtype=np.int32)
        self._offsets.flags.writeable = False  # slots are views of it
        self._stale_rows: set[int] = set()
        self._stale_lengths = False
        self._buffer = torch.empty(0, dtype=torch.int32)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def set_length(self, row: int, length: int) -> None:
        self.lengths[row] = length
        self._stale_lengths = True

    def set_pages(self, row: int, column: int, pages: array) -> None:
        begin = row * self.max_pages + column
        if pages:  # an empty slice counts as a resize, which the numpy view forbids
            self.pages[begin : begin + len(pages)] = pages
            self._stale_rows.add(row)

    def set_lengths(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self.seqlens[rows] = lengths
        self._stale_lengths = True

    def scatter_pages(self, rows: np.ndarray, columns: np.ndarray, pages: np.ndarray) -> None:
        """pages[i] becomes the page of rows[i] in column columns[i]."""
        self.table[rows, columns] = pages
        self._stale_rows.update(rows.tolist())

    def slots(self, row: int, start: int, stop: int) -> Slots:
        """Slots of the tokens at positions start .. stop - 1 of the sequence in a row."""
        first, offset = start // self.page_size, start % self.page_size
        if stop - start == 1:  # a decode step
            page = self.pages[row * self.max_pages + first]
            return Slots(np.array((page,), dtype=np.int32), self._offsets[offset : offset + 1])
        pages = self.table[row, first : -(-stop // self.page_size)].repeat(self.page_size)
        offsets = np.arange(start, stop, dtype=np.int32) % self.page_size
        return Slots(pages[offset : offset + stop - start], offsets)

    def sync(self) -> None:
        """Two copies at most: the lengths, and the span of rows that changed; none if nothing did."""
        rows = len(self.lengths)
        low, high = (min(self._stale_rows), max(self._stale_rows) + 1) if self._stale_rows else (0, 0)
        if self._stale_lengths or high:
            buffer = self._empty_buffer(rows + (high - low) * self.max_pages)
            packed = buffer.numpy()
            packed[:rows] = self.seqlens
            packed[rows:] = self.table[low:high].reshape(-1)
            self.cache_seqlens.copy_(buffer[:rows], non_blocking=True)
            if high:
                self.block_table[low:high].view(-1).copy_(buffer[rows:], non_blocking=True)
            self._sent()
        self._stale_rows.clear()
        self._stale_lengths = False

    def gather(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(block_table (n, width), cache_seqlens (n,)) of n rows in this order: new tensors, one copy."""
        index = np.array(rows, dtype=np.intp)
        lengths = self.seqlens[index]
        columns = -(-int(lengths.max(initial=1)) // self.page_size)
        # A power of two: an operator that plans by shape meets few. Entries past a length are not read.
        width = min(self.max_pages, 1 << (columns - 1).bit_length())
        begin = -(-len(rows) // 4) * 4  # the table starts at a multiple of 16 bytes
        buffer = self._empty_buffer(begin + len(rows) * width)
        packed = buffer.numpy()
        packed[: len(rows)] = lengths
        packed[begin:] = self.table[index, :width].reshape(-1)
        sent = torch.empty(len(buffer), dtype=torch.int32, device=self._device)
        sent.copy_(buffer, non_blocking=True)
        self._sent()
        return sent[begin:].view(len(rows), width), sent[: len(rows)]

    def _empty_buffer(self, n: int) -> torch.Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._buffer) < n:
            self._buffer = torch.empty(2 * n, dtype=torch.int32, pin_memory=self._copied is not None)
        return self._buffer[:n]

    def _sent(self) -> None:
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
