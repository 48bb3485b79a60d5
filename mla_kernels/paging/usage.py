"""What a cache holds at one moment."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact counts: used + cached + free = total.

    Attributes:
        total: pages of the pool.
        free: pages that hold nothing.
        used: pages that belong to one sequence or more.
        shared: used pages that belong to two sequences or more.
        cached: pages of no sequence that the prefix cache can still find; they give way when none is free.
        waste_tokens: slots of used pages that no token fills; a shared page counts once.
        sequences: live sequences.
        tokens: tokens of all live sequences, those in shared pages once for each.
        hit_tokens: tokens allocated by id so far that the prefix cache had.
        miss_tokens: tokens allocated by id so far that it had not.
        evicted_pages: cached pages that gave way so far.
    """

    total: int
    free: int
    used: int
    shared: int
    cached: int
    waste_tokens: int
    sequences: int
    tokens: int
    hit_tokens: int = 0
    miss_tokens: int = 0
    evicted_pages: int = 0


def count_waste(lengths: np.ndarray, table: np.ndarray, owners: np.ndarray, page_size: int) -> int:
    """Slots that no token fills, in pages that have an owner. O(rows).

    Args:
        lengths: (rows,) tokens of each sequence, 0 in a row without one.
        table: (rows, max_pages) page ids; entries past a length are not read.
        owners: (num_pages,) sequences that hold each page.
        page_size: tokens a page.
    """
    rows = (lengths % page_size).nonzero()[0]
    last = table[rows, lengths[rows] // page_size]
    pages, which, holders = np.unique(last, return_inverse=True, return_counts=True)
    filled = np.zeros(len(pages), dtype=np.int64)
    np.maximum.at(filled, which, lengths[rows] % page_size)
    # More owners than sequences that end in the page: to one of them it is full.
    return int((page_size - filled)[owners[pages] == holders].sum())
