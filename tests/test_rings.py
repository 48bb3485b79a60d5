"""How a CTA's warps hand buffers to each other: cuda/*.cuh on the CPU, barriers and copies at their worst."""

import shutil
from pathlib import Path

import pytest

from tests.rings import IN_PIECES, LAYOUTS, SHORTEST, build
from tests.simulators import play

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the warps on the CPU")


@pytest.mark.parametrize("rows", [rows for rows in LAYOUTS if rows < 32])
def test_every_buffer_reaches_its_readers(rows: int, tmp_path: Path) -> None:
    assert play(build(tmp_path, rows), cases=600) == "ok"


@pytest.mark.parametrize("rows", [32, 64])
def test_no_race_in_many_cases(rows: int, tmp_path: Path) -> None:
    """Races of split items were once so rare that 400 cases missed them."""
    rings = build(tmp_path, rows)
    assert [play(rings, cases=1500, seed=seed) for seed in (1, 4)] == ["ok", "ok"]


@pytest.mark.parametrize("rows", LAYOUTS)
def test_parts_in_fp32(rows: int, tmp_path: Path) -> None:
    """As they are beside fp16 elements."""
    rings = build(tmp_path, rows, MLA_BF16=0)
    assert [play(rings, cases=600, seed=seed) for seed in (1, 2)] == ["ok", "ok"]


@pytest.mark.parametrize("rows", LAYOUTS)
def test_pages_in_pieces_and_ragged_queries(rows: int, tmp_path: Path) -> None:
    rings = build(tmp_path, rows, **IN_PIECES[rows])
    assert [play(rings, cases=600, seed=seed) for seed in (1, 2)] == ["ok", "ok"]


@pytest.mark.parametrize("rows", [8, 64])
def test_the_shortest_ring_is_long_enough(rows: int, tmp_path: Path) -> None:
    assert play(build(tmp_path, rows, **SHORTEST), cases=300) == "ok"
