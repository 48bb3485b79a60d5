"""Which keys of ragged sequences are in memory at a time, and which queries see them then. No tensor.

Sequence i has query tokens of its own number n, the last n of its length: query r stands at position
length - n + r and sees the keys up to there. Keys come in *chunks* of a limited number of tokens. To the keys
[begin, end) of a chunk, queries before ``begin`` are blind; those between see a triangle of them (the
*diagonal*, bottom-right aligned, as in a causal call of so many queries over these keys); those from ``end``
on see them all. So a chunk takes two attention calls at most, one causal and one not.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

TILE = 128  # keys at which a long sequence is cut are a multiple of it, so that no tile of attention is cut


class Part(NamedTuple):
    """Keys ``begin`` .. ``end - 1`` of a sequence."""

    sequence: int
    begin: int
    end: int


class Call(NamedTuple):
    """An attention call over queries q_begin .. q_end - 1 and keys k_begin .. k_end - 1 of a chunk.

    ``q_starts`` and ``k_starts`` (n + 1,) cut both into those of n sequences, counted from there. All queries
    see a key.
    """

    causal: bool  # the diagonal: no later chunk has keys for these queries
    fresh: bool  # no earlier chunk had keys for any of them
    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    q_starts: list[int]
    k_starts: list[int]


class Chunk(NamedTuple):
    """Keys that are in memory together, part by part, and the calls that they take."""

    parts: list[Part]
    calls: list[Call]

    @property
    def tokens(self) -> int:
        return sum(part.end - part.begin for part in self.parts)

    @property
    def starts(self) -> list[int]:
        """Where in the chunk each part begins."""
        return list(accumulate((part.end - part.begin for part in self.parts[:-1]), initial=0))


def plan_chunks(q_starts: Sequence[int], lengths: Sequence[int], limit: int) -> list[Chunk]:
    """Chunks in which every query sees each of its keys once.

    Args:
        q_starts: (b + 1,) where the queries of each sequence begin, from 0.
        lengths: (b,) keys of each sequence, at least as many as it has queries.
        limit: tokens of a chunk, >= 1.

    Returns:
        Chunks in the order of the sequences and of their keys. A sequence is cut only if it is longer than
        ``limit``; one without queries is left out.
    """
    queries = [end - begin for begin, end in pairwise(q_starts)]
    return [
        Chunk(parts, _calls(parts, q_starts, queries, lengths)) for parts in _fill(queries, lengths, limit)
    ]


def _fill(queries: list[int], lengths: Sequence[int], limit: int) -> list[list[Part]]:
    chunks, room = [[]], limit
    for sequence, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        begin = 0 if n else length
        if room < min(length, limit) and (length <= limit or room < TILE):
            chunks.append([])
            room = limit
        while begin < length:
            end = min(length, begin + room)
            if end < length and end - begin >= TILE:
                end -= (end - begin) % TILE
            chunks[-1].append(Part(sequence, begin, end))
            begin, room = end, room - (end - begin)
            if begin < length:
                chunks.append([])
                room = limit
    return [parts for parts in chunks if parts]


def _calls(parts: list[Part], q_starts, queries, lengths) -> list[Call]:
    diagonals, keys = [], [end - begin for _, begin, end in parts]
    for sequence, begin, end in parts:
        first = lengths[sequence] - queries[sequence]  # the position of its first query
        diagonals.append([q_starts[sequence] + max(position - first, 0) for position in (begin, end)])
    calls, total = [], sum(keys)
    sequence, begin, end = parts[-1]
    if end < lengths[sequence]:  # only the last part of a chunk can have keys to follow
        rest = [diagonals[-1][1], q_starts[sequence + 1]]
        calls.append(_call(False, begin == 0, [rest], total - keys[-1], keys[-1:]))
        if diagonals[-1][0] == diagonals[-1][1]:
            del diagonals[-1], keys[-1]
    if diagonals:
        calls.append(_call(True, parts[0].begin == 0, diagonals, 0, keys))
    return calls


def _call(causal: bool, fresh: bool, queries: list[list[int]], k_begin: int, keys: list[int]) -> Call:
    """Of queries [begin, end) and numbers of keys, a sequence each, which lie end to end."""
    q_starts = list(accumulate((end - begin for begin, end in queries), initial=0))
    k_starts = list(accumulate(keys, initial=0))
    q_begin, q_end = queries[0][0], queries[-1][1]
    return Call(causal, fresh, q_begin, q_end, k_begin, k_begin + k_starts[-1], q_starts, k_starts)
