"""What a batched append will change, worked out for all its sequences at once, before anything changes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mla_kernels.paging.prefix import count_tokens
from mla_kernels.paging.slots import Slots
from mla_kernels.paging.tables import DeviceTables


class Growth(NamedTuple):
    """n sequences grow in this order, as if each were appended to by itself.

    A sequence whose last page is not full goes on in it, if it is its only owner by then. Else it takes one
    page more, for a copy of that page.
    """

    rows: np.ndarray  # (n,) intp
    starts: np.ndarray  # (n,) int64, lengths before
    ends: np.ndarray  # (n,) int64, lengths after
    columns: np.ndarray  # (n,) int64, of the first page that each takes
    takes: np.ndarray  # (n,) int64, pages that each takes
    copied: np.ndarray  # (n,) bool, whether the first of them is a copy
    sources: list[int]  # the pages to copy, in order
    continued: np.ndarray  # int32, the pages that are written on in place

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) in the tables of each of the ``takes.sum()`` pages taken."""
        return self.rows.repeat(self.takes), spread(self.columns, self.takes)

    def targets(self, pages: np.ndarray) -> np.ndarray:
        """Which of the pages taken are the copies of ``sources``."""
        return pages[(self.takes.cumsum() - self.takes)[self.copied]]

    def slots(self, tables: DeviceTables) -> Slots:
        """The slots of the new tokens, sequence by sequence, of tables that have the pages already."""
        rows, positions = self.rows, self.starts
        counts = self.ends - self.starts
        if (counts != 1).any():
            rows, positions = rows.repeat(counts), spread(positions, counts)
        columns, offsets = np.divmod(positions, tables.page_size)
        return Slots(tables.table[rows, columns], offsets.astype(np.int32))


def count_each(counts: Sequence[int] | np.ndarray | None, n: int) -> np.ndarray:
    """Tokens of each of n sequences as (n,) int64: one each if ``counts`` is None.

    Raises:
        TypeError, ValueError: not n integers >= 0.
    """
    if counts is None:
        return np.ones(n, dtype=np.int64)
    each = np.asarray(counts)
    if each.shape != (n,):
        raise ValueError(f"counts have shape {each.shape}, must be ({n},): one for each sequence")
    if n and each.dtype.kind not in "iu":
        raise TypeError(f"counts are {each.dtype}, must be integers: tokens of each sequence")
    each = each.astype(np.int64)
    if n and each.min() < 0:
        raise ValueError(f"a count is {each.min()}, must be >= 0: truncate() takes away")
    return each


def ids_of_each(ids: Sequence[int] | np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Token ids, end to end, as those of each sequence.

    Raises:
        TypeError, ValueError: not ``counts.sum()`` integers.
    """
    flat, total = count_tokens(ids)[1], sum(counts.tolist())
    if flat is None or len(flat) != total:
        given = "a count" if flat is None else f"{len(flat)} ids"
        raise ValueError(f"ids are {given}, must be the ids of the {total} new tokens: pass one for each")
    return np.split(flat, counts.cumsum()[:-1]) if len(counts) else []


def plan_growth(tables: DeviceTables, owners: np.ndarray, rows: list[int], counts: np.ndarray) -> Growth:
    """How the sequences in these rows grow by ``counts`` (n,) int64 >= 0 tokens; reads, changes nothing.

    Args:
        tables: where they are.
        owners: (num_pages,) int32, owners of each page.
        rows: of n sequences, none twice.
        counts: tokens of each, so few that no length overflows.
    """
    size = tables.page_size
    index = np.array(rows, dtype=np.intp)
    starts = tables.seqlens[index].astype(np.int64)
    ends = starts + counts
    columns = -(-starts // size)
    takes = -(-ends // size) - columns
    copied = np.zeros(len(rows), dtype=bool)
    going_on = ((starts % size > 0) & (counts > 0)).nonzero()[0]
    last = tables.table[index[going_on], columns[going_on] - 1]
    continued, sources = last, []
    shared = owners[last] > 1
    if shared.any():
        alone = ~shared
        left: dict[int, int] = {}  # owners of a shared page once those before have copied it
        for i in shared.nonzero()[0].tolist():
            page = int(last[i])
            count = left.get(page, int(owners[page]))
            left[page] = count - 1
            if count > 1:
                copied[going_on[i]] = True
                sources.append(page)
            else:
                alone[i] = True
        continued = last[alone]
    return Growth(index, starts, ends, columns - copied, takes + copied, copied, sources, continued)


def spread(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begin, begin + 1, ... of counts[i] numbers for each i, end to end."""
    before = counts.cumsum() - counts
    return (begins - before).repeat(counts) + np.arange(counts.sum())
