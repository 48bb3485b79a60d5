"""Which variant of the decode kernels serves which call: the one that a model of their costs expects to win.

``SHIPPED`` is the table for an H200 or H100, its costs from the latter. ``MLA_KERNELS_TUNING`` names a
record of the tuner (a JSON file that ``python -m mla_kernels.measure tune`` wrote on the GPU at hand) whose
table is used instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass

from .tuning import PAGES, VARIANTS, DecodeTuning, Pages, TuningError, require

VARIABLE = "MLA_KERNELS_TUNING"
H200_SMS = 132
REMEDY = f"tune again with `python -m mla_kernels.measure tune`, or unset {VARIABLE}"


@functools.cache
def group_size(row_blocks: int, ctas: int) -> int:
    """Row blocks that walk the same KV side by side: as many as keep every SM busy: L2 serves them."""

    def busy(group: int) -> float:
        return row_blocks / (-(-row_blocks // group) * group) * (ctas // group * group / ctas)

    return max(range(1, min(row_blocks, 8) + 1), key=lambda group: (round(busy(group), 3), group))


@dataclass(frozen=True)
class Grid:
    """The CTAs of a launch, and the items that they share: row groups of all sequences."""

    group: int  # CTAs side by side, a row block each
    groups: int
    row_blocks: int  # of a sequence
    row_groups: int
    items: int

    @classmethod
    def of(cls, rows: int, query_rows: int, b: int, ctas: int) -> Grid:
        """Of ``b`` sequences of ``query_rows``, ``rows`` of them a CTA, by at most ``ctas`` CTAs."""
        blocks = -(-query_rows // rows)
        group = group_size(blocks, ctas)
        row_groups = -(-blocks // group)
        return cls(group, ctas // group, blocks, row_groups, b * row_groups)

    @property
    def items_each(self) -> int:
        """Items for each group, or 0 if there are fewer items than groups."""
        return -(-self.items // self.groups) if self.items >= self.groups else 0

    @property
    def item_parts(self) -> int:
        """Groups for each item, or 0 if there are no fewer items than groups."""
        return self.groups // self.items if self.items < self.groups else 0


# What every call takes for a page of 64 tokens, whoever reads it: 64 * 1,152 bytes at an H100's 3.05 TB/s.
PAGE_US = 0.0242


@dataclass(frozen=True)
class Cost:
    """What a call takes by a variant, in microseconds: the model that chooses between them.

    Args:
        start_us: whatever it has to do.
        tile_us: for each tile of the CTA that has most, where HBM does not bind.
        merge_us: where items are split between CTAs.
    """

    start_us: float
    tile_us: float
    merge_us: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            fits = type(value) in (int, float) and 0 < value < 1e6
            require(fits, field.name, value, "a positive number of microseconds", "measure again")

    def expected_us(self, share: Share, pages: int) -> float:
        """Of a call whose sequences have ``pages`` pages together."""
        merge = self.merge_us if share.split else 0.0
        # the larger of the two, and somewhat more where both press
        return self.start_us + merge + ((share.tiles * self.tile_us) ** 4 + (pages * PAGE_US) ** 4) ** 0.25


@dataclass(frozen=True)
class Share:
    """What a CTA has to do when all sequences are equally long (``WorkRange`` of cuda/schedule.cuh)."""

    tiles: int
    split: bool  # items between CTAs

    @classmethod
    def of(cls, tuning: DecodeTuning, query_rows: int, b: int, tiles: int, ctas: int) -> Share:
        """Of ``b`` sequences of ``tiles`` pages, by ``ctas`` CTAs."""
        grid = Grid.of(tuning.rows, query_rows, b, ctas // tuning.cluster_ctas)
        fair = max(-(-grid.items * (tiles + tuning.item_units) // grid.groups), tuning.min_tiles)
        if grid.items_each:
            whole = grid.items_each * (tiles + tuning.item_units)
            if whole * 100 <= (fair + 1) * (100 + tuning.align_percent):
                return cls(whole - tuning.item_units, False)
        else:
            parts = max(min(grid.item_parts, tiles // tuning.min_tiles), 1)
            part = -(-tiles // parts)
            if part * 100 <= (fair + 1) * (100 + tuning.align_percent):
                return cls(part, parts > 1)
        return cls(fair, True)


@dataclass(frozen=True)
class TuningTable:
    """The variants to choose from, with what each costs, rows ascending."""

    entries: tuple[tuple[Cost, DecodeTuning], ...]

    def __post_init__(self) -> None:
        rows = [tuning.rows for tuning in self.variants]
        if not rows or rows != sorted(set(rows)):
            raise TuningError(f"rows of a table are {rows}, must ascend: give each variant once")
        if not all(any(tuning.serves(pages) for tuning in self.variants) for pages in PAGES):
            raise TuningError(
                f"rows of a table are {rows}, must be 64 or less in one: others do not take small pages"
            )

    @property
    def variants(self) -> tuple[DecodeTuning, ...]:
        return tuple(tuning for _, tuning in self.entries)

    def of_rows(self, rows: int) -> DecodeTuning:
        """The variant with so many rows a CTA. Raises KeyError where the table has none."""
        return {tuning.rows: tuning for tuning in self.variants}[rows]

    def serving(
        self, query_rows: int, b: int, pages: int, ctas: int = H200_SMS, come: Pages = "tiles"
    ) -> DecodeTuning:
        """The variant that is expected to be fastest.

        With few pages there are more SMs than work: then blocks of few rows, side by side, spread it better,
        though each reads all of KV again. With many pages a block should hold as many of the rows as it can.

        Args:
            query_rows: s_q * h_q of a sequence.
            b: sequences.
            pages: of 64 tokens, of each sequence, or what the page table has room for.
            ctas: of a launch.
            come: how the pages come into tiles.
        """

        def expected(entry: tuple[Cost, DecodeTuning]) -> float:
            cost, tuning = entry
            return cost.expected_us(Share.of(tuning, query_rows, b, pages, ctas), b * pages)

        def fits(tuning: DecodeTuning) -> bool:
            return tuning.serves(come) and tuning.cluster_ctas <= ctas

        return min((entry for entry in self.entries if fits(entry[1])), key=expected)[1]

    def serving_many(self, query_rows: int) -> DecodeTuning:
        """The variant for so many query rows where there is work in plenty."""
        return self.serving(query_rows, b=1024, pages=1024)

    def to_json(self) -> list[dict]:
        """As a record keeps it."""
        return [{**dataclasses.asdict(cost), **dataclasses.asdict(tuning)} for cost, tuning in self.entries]

    @classmethod
    def from_json(cls, entries: list[dict]) -> TuningTable:
        """Raises TuningError for what is no table."""
        costs = [field.name for field in dataclasses.fields(Cost)]
        try:
            return cls(
                tuple(
                    (
                        Cost(**{name: entry[name] for name in costs}),
                        DecodeTuning(**{name: v for name, v in entry.items() if name not in costs}),
                    )
                    for entry in entries
                )
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise TuningError(
                f"entry of a table: {type(error).__name__}: {error}: name every field"
            ) from None


# Costs on an H100, fitted at 80 calls by all rows that might serve them: what is chosen there is at most 8 %
# from the best, 0.2 % in the mean (tests/test_choice.py). (The tuner fits them anew, from its own calls.)
SHIPPED = TuningTable(
    (
        (Cost(5.4, 0.98, 2.5), VARIANTS[8]),
        (Cost(7.15, 1.12, 1.86), VARIANTS[16]),
        (Cost(8.9, 1.42, 2.5), VARIANTS[32]),
        (Cost(10.5, 1.91, 4.1), VARIANTS[64]),
        (Cost(12.85, 1.69, 3.3), VARIANTS[128]),
    )
)


def load_table(path: str | os.PathLike) -> TuningTable:
    """The table of a tuner's record. Raises TuningError, naming file and remedy, where it has none."""
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        entries = record["tuning"] if isinstance(record, dict) else None
    except (OSError, ValueError, KeyError) as error:
        raise TuningError(f"{path}: {type(error).__name__}: {error}; {REMEDY}") from None
    if not isinstance(entries, list):
        raise TuningError(f"{path}: tuning: holds no table; {REMEDY}")
    try:
        return TuningTable.from_json(entries)
    except TuningError as error:
        raise TuningError(f"{path}: tuning: {error}; {REMEDY}") from None


@functools.cache
def active_table() -> TuningTable:
    """The table in use, read once a process: the record's that ``MLA_KERNELS_TUNING`` names, or ``SHIPPED``.

    Raises TuningError for a record without one.
    """
    path = os.environ.get(VARIABLE)
    return load_table(path) if path else SHIPPED
