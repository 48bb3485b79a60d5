"""Which sequence has which row of the tables, by ids that are never given again. No page, no tensor."""

from collections.abc import Sequence


class OutOfSequences(RuntimeError):
    """Every row of the tables holds a sequence. Nothing was allocated."""


class SequenceRows:
    """Rows 0 .. max_sequences - 1 and the sequences in them. The owner holds its lock around every call.

    An id is its row plus a growing multiple of max_sequences, so that of a freed sequence stays dead.

    Attributes:
        alive: sequences that have a row.
    """

    def __init__(self, max_sequences: int):
        self._max = max_sequences
        self._free = list(range(max_sequences - 1, -1, -1))
        self._next_id = list(range(max_sequences))
        self._id_of: list[int | None] = [None] * max_sequences

    @property
    def alive(self) -> int:
        return self._max - len(self._free)

    def check_free(self) -> None:
        """Raises OutOfSequences if no row is free."""
        if not self._free:
            raise OutOfSequences(
                f"one more sequence asked for, {self._max} are alive and max_sequences is as many: "
                "free one, or make the tables larger"
            )

    def occupy(self) -> int:
        """The id of a new sequence, in a row that must be free (``check_free``)."""
        row = self._free.pop()
        seq = self._id_of[row] = self._next_id[row]
        self._next_id[row] += self._max
        return seq

    def vacate(self, row: int) -> None:
        """Ends the sequence in this row."""
        self._id_of[row] = None
        self._free.append(row)

    def row(self, seq: int) -> int:
        """The row of a live sequence. Raises ValueError for any other."""
        row = seq % self._max
        if self._id_of[row] != seq:
            raise ValueError(
                f"sequence {seq} is not alive: pass what allocate() or fork() gave, before free()"
            )
        return row

    def rows(self, seqs: Sequence[int]) -> list[int]:
        """The rows of live sequences, in this order. Raises ValueError if one is not alive."""
        rows = [seq % self._max for seq in seqs]
        if [self._id_of[row] for row in rows] != list(seqs):  # one comparison for all of them
            for seq in seqs:
                self.row(seq)
        return rows

    def distinct_rows(self, seqs: Sequence[int]) -> list[int]:
        """The same of sequences of which none may be listed twice: ValueError too if one is."""
        rows = self.rows(seqs)
        if len(set(rows)) < len(rows):
            twice = next(seq for seq in seqs if seqs.count(seq) > 1)
            raise ValueError(f"sequence {twice} is listed twice: list it once, with its count of tokens")
        return rows
