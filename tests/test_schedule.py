"""The device-side schedule, cuda/schedule.cuh itself, run on the CPU against what a schedule must do."""

import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.compiler import CUDA_DIR
from mla_kernels.decode import _group_size, kernel_config

TILE = 64
MAX_PAGES = 64  # 4096 tokens
KEPT = 128  # lengths that a warp keeps in registers; the rest it reads again

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
    invalid: int


class Scheduler:
    """The compiled schedule, one process for all cases."""

    def __init__(self, binary: Path):
        self._process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, lengths: list[int], row_blocks: int, ctas: int) -> tuple[list[Item], int, int]:
        """(items of all CTAs, CTAs in the grid, row blocks side by side)."""
        group = _group_size(row_blocks, ctas)
        grid = ctas // group * group
        head = (len(lengths), grid, row_blocks, group, -(-row_blocks // group), MAX_PAGES, *lengths)
        print(*head, file=self._process.stdin, flush=True)
        items, ends = [], set()
        while (line := self._process.stdout.readline().strip()) != "done":
            assert line, "the schedule died"
            assert line != "lanes disagree"
            fields = line.split()
            if fields[1] == "end":
                ends.add(int(fields[0]))
            else:
                items.append(Item(*map(int, fields)))
        assert ends == set(range(grid)), "every CTA must come to its end"
        return items, grid, group

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=10)


@pytest.fixture(scope="module", params=[16, 64], ids=lambda rows: f"{rows}-rows")
def rows(request) -> int:
    """Of a CTA: of decode_swapped.cu, and of decode_rows.cu, whose queries take a place in the ring."""
    return request.param


@pytest.fixture(scope="module")
def schedule(rows, tmp_path_factory):
    binary = tmp_path_factory.mktemp("schedule") / "schedule"
    source = Path(__file__).parent / "on_host" / "schedule.cpp"
    macros = [f"-D{name}={value}" for name, value in kernel_config(torch.bfloat16, rows).defines]
    command = ["g++", "-std=c++17", "-O1", "-w", f"-I{CUDA_DIR}", *macros, source, "-o", binary]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    scheduler = Scheduler(binary)
    yield scheduler
    scheduler.close()


def check(items: list[Item], grid: int, group: int, lengths: list[int], row_blocks: int, rows: int) -> None:
    parts = defaultdict(list)
    for item in items:
        parts[item.request, item.row_block].append(item)
    assert set(parts) == {(r, block) for r in range(len(lengths)) for block in range(row_blocks)}
    for (request, _), pieces in parts.items():
        length = lengths[request]
        invalid = not 0 <= length <= MAX_PAGES * TILE
        tiles = 0 if invalid else -(-length // TILE)
        pieces.sort(key=lambda piece: piece.begin)
        assert {(p.tiles, p.kv_len, p.invalid) for p in pieces} == {(tiles, length, int(invalid))}
        # every tile once, in order, and an empty item once
        assert [p.begin for p in pieces] == [0, *(p.end for p in pieces[:-1])] and pieces[-1].end == tiles
        # what merging relies on: how many parts, and in which CTAs they lie
        assert {p.parts for p in pieces} == {len(pieces)}
        if tiles:
            assert [p.part for p in pieces] == list(range(len(pieces)))
            assert [p.cta for p in pieces] == [p.first_cta + p.part * group for p in pieces]
    by_cta = defaultdict(list)
    for item in items:
        by_cta[item.cta].append(item)
    for cta, own in by_cta.items():
        assert cta < grid
        streamed, query_tiles = 0, int(rows == TILE)
        for item in own:
            if item.tiles:  # the loader's and the consumers' place in the ring
                assert item.ordinal == streamed + query_tiles
                streamed += query_tiles + item.end - item.begin
        # part 0 of a split item ends its CTA's share, every other part begins one: one slot each is enough
        split = [item for item in own if item.parts > 1]
        for item in split:
            assert item is (own[-1] if item.begin == 0 else own[0])
        assert len(split) <= 2


LENGTHS = st.one_of(
    st.integers(0, MAX_PAGES * TILE), st.sampled_from([0, 1, 63, 64, 65, 4096, -1, 4097, 2**31 - 1])
)


LISTS = st.lists(LENGTHS, min_size=1, max_size=80)
LONG_LISTS = st.builds(  # drawing each length would take seconds
    lambda pattern, size: (pattern * size)[:size],
    st.lists(LENGTHS, min_size=1, max_size=13),
    st.one_of(st.integers(KEPT - 2, KEPT + 40), st.integers(81, 400)),
)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.one_of(LISTS, LONG_LISTS),
    row_blocks=st.integers(1, 9),
    ctas=st.sampled_from([1, 2, 7, 20, 132]),
)
def test_every_tile_has_one_owner(schedule, rows, lengths, row_blocks, ctas):
    items, grid, group = schedule(lengths, row_blocks, ctas)
    check(items, grid, group, lengths, row_blocks, rows)


@pytest.mark.parametrize("row_blocks", [1, 2, 4])
@pytest.mark.parametrize(
    "lengths",
    [[4096] * 128, [4096, 1] * 64, [0] * 300, [4096], [64] * 1000, [1] * 128 + [4096] * 4],
    ids=lambda lengths: f"{len(lengths)}-up-to-{max(lengths)}",
)
def test_shares_are_even(schedule, rows, lengths, row_blocks):
    items, grid, group = schedule(lengths, row_blocks, 132)
    check(items, grid, group, lengths, row_blocks, rows)
    tiles = defaultdict(int)
    for item in items:
        tiles[item.cta] += item.end - item.begin
    total = sum(-(-length // TILE) for length in lengths) * row_blocks
    assert max(tiles.values(), default=0) <= total / grid + 1 + 3 * len(items) / grid
