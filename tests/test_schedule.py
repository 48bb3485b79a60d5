"""The device-side schedule, cuda/schedule.cuh itself, run on the CPU against what a schedule must do."""

import dataclasses
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.choice import group_size
from mla_kernels.tuning import VARIANTS, DecodeTuning
from tests import simulators

TILE = 64
MAX_PAGES = 64  # 4096 tokens

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to run the schedule on the CPU"
)


@dataclass(frozen=True)
class Item:
    cta: int
    request: int
    kv_len: int
    tiles: int
    row_block: int
    begin: int
    end: int
    ordinal: int
    first_cta: int
    part: int
    parts: int
    slices: int
    invalid: int


@dataclass(frozen=True)
class Batch:
    lengths: list[int]
    row_blocks: int
    ctas: int  # that there is room for
    side_by_side: int = 0  # row blocks; 0: as a launch chooses, so that none is past the last

    @property
    def tiles(self) -> list[int]:
        return [-(-n // TILE) if 0 <= n <= MAX_PAGES * TILE else 0 for n in self.lengths]

    @property
    def group(self) -> int:
        return min(self.side_by_side, self.ctas) or group_size(self.row_blocks, self.ctas)

    @property
    def groups(self) -> int:
        return self.ctas // self.group

    @property
    def row_groups(self) -> int:
        return -(-self.row_blocks // self.group)

    @property
    def items(self) -> int:
        return len(self.lengths) * self.row_groups

    @property
    def items_each(self) -> int:
        return -(-self.items // self.groups) if self.items >= self.groups else 0

    @property
    def item_parts(self) -> int:
        return self.groups // self.items if self.items < self.groups else 0


class Scheduler:
    """The compiled schedule, one process for all cases."""

    def __init__(self, binary: Path, tuning: DecodeTuning):
        self.binary, self.tuning = binary, tuning
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [self.binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, batch: Batch) -> list[Item]:
        """Items of all CTAs."""
        head = (len(batch.lengths), batch.group, batch.groups, batch.row_blocks, batch.row_groups)
        head += (MAX_PAGES, batch.items_each, batch.item_parts)
        print(*head, *batch.lengths, file=self._process.stdin, flush=True)
        items, ends = [], []
        while (line := self._process.stdout.readline().strip()) != "done":
            if not line or line == "lanes disagree":
                self._process.wait(timeout=10)
                self._start()  # for the cases that remain
                pytest.fail(line or "the schedule died")
            fields = line.split()
            if fields[1] == "end":
                ends.append(int(fields[0]))
            else:
                items.append(Item(*map(int, fields)))
        assert ends == list(range(batch.group * batch.groups)), "every CTA must come to its end"
        return items

    def share(self, batch: Batch) -> int:
        """Units of a CTA before they are aligned."""
        units = batch.row_groups * sum(tiles + self.tuning.item_units for tiles in batch.tiles)
        return max(-(-units // batch.groups), self.tuning.min_tiles)

    def most(self, batch: Batch) -> float:
        """Units that a share may have when it is aligned."""
        return (self.share(batch) + 1) * (100 + self.tuning.align_percent) / 100

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=10)


@pytest.fixture(
    scope="module",
    params=[(16, {}), (64, {}), (128, {}), (16, {"min_tiles": 6, "align_percent": 30, "item_units": 2})],
    ids=["16-rows", "64-rows", "pairs", "16-rows-changed"],
)
def schedule(request, tmp_path_factory):
    """Of decode_swapped.cu, of decode_rows.cu, whose queries take a place in the ring, and of decode_pair.cu,
    whose queries take two, and of which two CTAs have one share."""
    rows, changes = request.param
    tuning = dataclasses.replace(VARIANTS[rows], **changes)
    folder = tmp_path_factory.mktemp("schedule")
    binary = simulators.build("schedule", folder, tuning.kernel_config("bf16").defines)
    scheduler = Scheduler(binary, tuning)
    yield scheduler
    scheduler.close()


def check(schedule: Scheduler, batch: Batch) -> list[Item]:
    items = schedule(batch)
    pieces_of = defaultdict(list)
    own = defaultdict(list)
    for item in items:
        pieces_of[item.request, item.row_block].append(item)
        own[item.cta].append(item)
    # every request and row block, the empty and invalid ones too
    assert set(pieces_of) == {(r, k) for r in range(len(batch.lengths)) for k in range(batch.row_blocks)}
    for (request, row_block), pieces in pieces_of.items():
        pieces.sort(key=lambda piece: piece.begin)
        check_item(batch, request, row_block, pieces)
        assert all(piece is own[piece.cta][-1] for piece in pieces if is_merged_by(piece))
    for pieces in own.values():
        check_cta(pieces, query_tiles=schedule.tuning.rows // TILE)
        assert sum(p.end - p.begin for p in pieces) <= schedule.most(batch)
    if len(set(batch.tiles)) > 1:  # nothing is aligned
        for pieces in own.values():
            assert sum(p.end - p.begin for p in pieces) <= schedule.share(batch)
    return items


def is_merged_by(piece: Item) -> bool:
    """As ``merges`` of cuda/merge.cuh."""
    return piece.parts > 1 and piece.part < piece.slices


def check_item(batch: Batch, request: int, row_block: int, pieces: list[Item]) -> None:
    length, tiles = batch.lengths[request], batch.tiles[request]
    invalid = int(not 0 <= length <= MAX_PAGES * TILE)
    assert {(p.tiles, p.kv_len, p.invalid) for p in pieces} == {(tiles, length, invalid)}
    # every tile once, in order, and an empty item once
    assert [p.begin for p in pieces] == [0, *(p.end for p in pieces[:-1])] and pieces[-1].end == tiles
    assert {p.cta % batch.group for p in pieces} == {row_block % batch.group}
    # what merging relies on: how many parts, in which CTAs they lie, and who merges
    assert {p.parts for p in pieces} == {len(pieces)}
    if tiles:
        assert [p.part for p in pieces] == list(range(len(pieces)))
        assert [p.cta for p in pieces] == [p.first_cta + p.part * batch.group for p in pieces]
    if len(pieces) > 1:
        [slices] = {p.slices for p in pieces}
        assert slices in (len(pieces) - 1, len(pieces))


def check_cta(pieces: list[Item], query_tiles: int) -> None:
    streamed = 0
    for item in pieces:
        if item.tiles:  # the loader's and the consumers' place in the ring
            assert item.ordinal == streamed + query_tiles
            streamed += query_tiles + item.end - item.begin
    # part 0 of a split item ends its CTA's share, every other part begins one: one slot each is enough
    split = [item for item in pieces if item.parts > 1]
    for item in split:
        assert item is (pieces[-1] if item.begin == 0 else pieces[0])
    assert len(split) <= 2


LENGTHS = st.one_of(
    st.integers(0, MAX_PAGES * TILE), st.sampled_from([0, 1, 63, 64, 65, 4096, -1, 4097, 2**31 - 1])
)
LISTS = st.lists(LENGTHS, min_size=1, max_size=80)
LONG_LISTS = st.builds(  # drawing each length would take seconds
    lambda pattern, size: (pattern * size)[:size],
    st.lists(LENGTHS, min_size=1, max_size=13),
    st.integers(81, 400),
)
ROW_BLOCKS = st.integers(1, 9)
CTAS = st.sampled_from([1, 2, 7, 20, 132])
SIDE_BY_SIDE = st.sampled_from([0, 0, 0, 2, 3, 4])


@settings(max_examples=100, deadline=None)
@given(lengths=st.one_of(LISTS, LONG_LISTS), row_blocks=ROW_BLOCKS, ctas=CTAS, side_by_side=SIDE_BY_SIDE)
def test_every_tile_has_one_owner(schedule, lengths, row_blocks, ctas, side_by_side):
    check(schedule, Batch(lengths, row_blocks, ctas, side_by_side))


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, MAX_PAGES * TILE),
    spread=st.integers(0, TILE - 1),
    requests=st.integers(1, 300),
    row_blocks=ROW_BLOCKS,
    ctas=CTAS,
    side_by_side=SIDE_BY_SIDE,
)
def test_shares_of_equal_lengths_are_aligned(
    schedule, length, spread, requests, row_blocks, ctas, side_by_side
):
    """Items of equally many tiles are cut evenly, or not at all, where that costs no share too much."""
    tiles = -(-length // TILE)
    shorter = max(length - spread, tiles * TILE - TILE + 1)
    batch = Batch(([length, shorter] * requests)[:requests], row_blocks, ctas, side_by_side)
    items = check(schedule, batch)
    tuning = schedule.tuning
    largest, ctas_items = defaultdict(int), defaultdict(int)
    for item in items:
        ctas_items[item.cta] += 1
    if batch.items_each:
        if batch.items_each * (tiles + tuning.item_units) <= schedule.most(batch):
            assert {item.parts for item in items} == {1}
            assert max(ctas_items.values()) <= batch.items_each
        return
    part = -(-tiles // max(min(batch.item_parts, tiles // tuning.min_tiles), 1))
    if part > schedule.most(batch):
        return
    assert max(ctas_items.values()) == 1
    for item in items:
        largest[item.request, item.row_block] = max(
            largest[item.request, item.row_block], item.end - item.begin
        )
        assert item.parts == -(-tiles // part) <= max(batch.item_parts, 1)
        assert item.parts == 1 or item.slices == item.parts
        assert item.end - item.begin == part or item.part == 0
    assert set(largest.values()) == {part}


@pytest.mark.parametrize("row_blocks", [1, 2, 4])
@pytest.mark.parametrize(
    "lengths",
    [[4096] * 128, [4096, 1] * 64, [0] * 300, [4096], [64] * 1000, [1] * 128 + [4096] * 4],
    ids=lambda lengths: f"{len(lengths)}-up-to-{max(lengths)}",
)
def test_shares_are_even(schedule, lengths, row_blocks):
    batch = Batch(lengths, row_blocks, 132)
    items = check(schedule, batch)
    tiles = defaultdict(int)
    for item in items:
        tiles[item.cta] += item.end - item.begin
    tuning = schedule.tuning
    even = sum(batch.tiles) * row_blocks / (batch.group * batch.groups)
    units = max(even + 1 + tuning.item_units * len(items) / (batch.group * batch.groups), tuning.min_tiles)
    assert max(tiles.values(), default=0) <= units * (1 + tuning.align_percent / 100) + 1


@pytest.mark.parametrize(
    ("requests", "parts"), [(132, 1), (131, 1), (66, 2), (64, 2), (33, 4), (32, 4), (8, 16), (1, 64)]
)
def test_equal_requests_are_cut_into_equal_parts(schedule, requests, parts):
    items = check(schedule, Batch([4096] * requests, 1, 132))
    if schedule.tuning.min_tiles > 1:
        parts = min(parts, 10)  # of 7 tiles
    assert {item.parts for item in items} == {parts}
    assert len({item.cta for item in items}) == len(items)


def test_divide_is_exact_whatever_the_hardware_rounds(schedule):
    tried = subprocess.run([schedule.binary, "divide"], capture_output=True, text=True, timeout=60)
    assert tried.stdout.strip() == "ok"
