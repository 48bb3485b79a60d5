"""The producer warp, cuda/producer.cuh itself, run on the CPU against barriers and loads at their worst."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mla_kernels.compiler import CUDA_DIR

HOST = Path(__file__).parent / "on_host"
SLOTS = (9, 11, 12, 13)  # decode_rows.cu; decode_swapped.cu with 32, 16 and 8 rows
MACROS = ("-DMLA_BF16=1", "-DMLA_PAGE_SIZE=64", "-DMLA_ITEM_UNITS=1", "-DMLA_WORK=0")

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to run the producer on the CPU"
)


def play(folder: Path, source: Path, headers: Path, slots: int, cases: int = 200) -> str:
    binary = folder / "rings"
    includes = (f"-I{headers}", f"-I{HOST}")
    command = ["g++", "-std=c++17", "-O1", "-w", *includes, *MACROS, f"-DMLA_SLOTS={slots}", source]
    subprocess.run([*command, "-o", binary], check=True, capture_output=True, timeout=120)
    return subprocess.run(
        [binary, "1", str(cases)], capture_output=True, text=True, timeout=240
    ).stdout.strip()


@pytest.mark.parametrize("slots", SLOTS)
def test_every_box_reaches_its_consumer(slots: int, tmp_path: Path) -> None:
    assert play(tmp_path, HOST / "rings.cpp", CUDA_DIR, slots) == "ok"


def test_the_fault_of_a_shared_ring_is_seen(tmp_path: Path) -> None:
    """One ring of 22 slots for both warpgroups was an illegal instruction on the GPU: it must fail here."""
    headers = tmp_path / "cuda"
    shutil.copytree(CUDA_DIR, headers)
    source = Path(shutil.copy(HOST / "rings.cpp", tmp_path))
    for path, changes in (
        (headers / "producer.cuh", {"(ordinal >> 1) * kBoxes + c": "ordinal * kBoxes + c"}),
        (headers / "producer.cuh", {"= rings[ordinal & 1];": "= rings[0];"}),
        (source, {"= rings[ordinal & 1];": "= rings[0];"}),
    ):
        for before, after in changes.items():
            assert before in path.read_text()
            path.write_text(path.read_text().replace(before, after))
    assert play(tmp_path, source, headers, 22) == "a consumer read another box's data"
