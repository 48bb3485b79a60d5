"""How a CTA's warps hand buffers to each other: cuda/*.cuh on the CPU, barriers and copies at their worst."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from mla_kernels import compiler, decode

HOST = Path(__file__).parent / "on_host"
LAYOUTS = {  # of the ring, by query rows a CTA
    dict(config.defines)["MLA_ROWS"]: config.defines
    for config in decode.shipped_configs()
    if dict(config.defines)["MLA_BF16"]
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the warps on the CPU")


def play(folder: Path, sources: Path, headers: Path, rows: int, cases: int, **changed: int) -> str:
    """What the simulator says of the layout of ``rows``, with some of its macros ``changed``."""
    macros = [f"-D{name}={value}" for name, value in (dict(LAYOUTS[rows]) | changed).items()]
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-w",
        f"-I{headers}",
        f"-I{sources}",
        *macros,
        "-o",
        folder / "rings",
    ]
    subprocess.run([*command, sources / "rings.cpp"], check=True, capture_output=True, timeout=120)
    played = subprocess.run([folder / "rings", "1", str(cases)], capture_output=True, text=True, timeout=240)
    return played.stdout.strip()


@pytest.mark.parametrize("rows", LAYOUTS)
def test_every_buffer_reaches_its_readers(rows: int, tmp_path: Path) -> None:
    assert play(tmp_path, HOST, compiler.CUDA_DIR, rows, cases=400) == "ok"


OTHERS_BOX = "a reader found another box's data"
DEADLOCK = "nothing moves: a deadlock"
TOO_MANY = "an arrival too many in a phase: the hardware raises an illegal instruction"


NOT_SCORED = "a tile was multiplied before it was scored"
COUNTERS = "counters are not as the next launch expects them"
WRONG_RESULT = "a result is not that of its parts"


@dataclass(frozen=True)
class Fault:
    """Text of one of the sources replaced, and what the simulator may then complain of."""

    before: str
    after: str
    complaints: tuple[str, ...]
    rows: int = 64


FAULTS = {
    "one value warpgroup's release is enough": Fault(
        "mbarrier_init(&rotary_empty[i], kValueThreads / 32)",
        "mbarrier_init(&rotary_empty[i], kWarpgroup / 32)",
        (TOO_MANY, OTHERS_BOX, DEADLOCK),
    ),
    "a group is free while a warp reads it": Fault(
        "mbarrier_init(&group_empty[i], kWarpgroup / 32)",
        "mbarrier_init(&group_empty[i], kWarpgroup / 32 - 1)",
        (TOO_MANY, OTHERS_BOX),
    ),
    "values release a tile before they have read P": Fault(
        "        read(smem.ring.box(ordinal, kRotaryBox), kBoxBytes, Scores::probabilities(ordinal));\n",
        "        each_lane([&] { smem.ring.release(ordinal, kHalf); });\n"
        "        read(smem.ring.box(ordinal, kRotaryBox), kBoxBytes, Scores::probabilities(ordinal));\n"
        "        last_tile[threadIdx.x / 32] = ordinal;\n"
        "        for (float4& v : o) v = make_float4(v.x + 1.f, v.y + 1.f, v.z + 1.f, v.w + 1.f);\n"
        "        return;\n",
        (OTHERS_BOX,),
    ),
    "P is written while a warp reads the rotary box": Fault(
        "named_barrier_sync(kBarrierScore, kScoreThreads);  // all have read the rotary box\n",
        "\n",
        (OTHERS_BOX,),
    ),
    "the rotary box is not waited for": Fault(
        "if (c == kRotaryBox) mbarrier_wait(&rotary_full[rotary_slot(ordinal)], rotary_phase(ordinal));",
        "if (c == kRotaryBox) return;",
        (OTHERS_BOX, WRONG_RESULT),
    ),
    "rotary boxes take the groups' phases": Fault(
        "return ordinal / kRotarySlots & 1;",
        "return ordinal / kGroupSlots & 1;",
        (DEADLOCK, OTHERS_BOX, NOT_SCORED),
    ),
    "queries in the ring are not published": Fault(
        "publish(ordinal);  // keeps the phases in step", "", (DEADLOCK, NOT_SCORED)
    ),
    "values do not wait for P": Fault(
        "if (kLoads) mbarrier_wait(&scored[rotary_slot(ordinal)], rotary_phase(ordinal));",
        "",
        (NOT_SCORED,),
    ),
    "the announcer is no reader of the queue": Fault(
        "(kValueThreads + kScoreThreads) / 32 + 2",
        "(kValueThreads + kScoreThreads) / 32 + 1",
        (DEADLOCK, TOO_MANY, COUNTERS),
    ),
    "queries are replaced while they are in use": Fault(
        "mbarrier_wait(&q.empty, (loaded & 1) ^ 1);", "", (OTHERS_BOX, TOO_MANY), rows=16
    ),
    "a bad page is not reported": Fault(
        "w.invalid = true;",
        "w.invalid = false;",
        ("a page outside the pool was not reported in time",),
    ),
    "sums are taken before they are there": Fault(
        "smem.sums.wait(index);\n            if",
        "smem.sums.n[index % 3];\n            if",
        (WRONG_RESULT,),
    ),
    "parts are streamed before they are there": Fault(
        "spin_until(arrived, w.parts - 1);", "", (WRONG_RESULT, COUNTERS)
    ),
    "pieces of parts are not released": Fault(
        "            ring.release_group(ordinal, g);\n", "", (DEADLOCK,)
    ),
    "a part is announced before it was written": Fault(
        "mbarrier_wait(part_written, phase);",
        "",
        ("a part was announced before it was written",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(fault: Fault, tmp_path: Path) -> None:
    headers, sources = tmp_path / "cuda", tmp_path / "on_host"
    shutil.copytree(compiler.CUDA_DIR, headers)
    shutil.copytree(HOST, sources)
    files = [*headers.iterdir(), sources / "rings.cpp"]
    [path] = [path for path in files if fault.before in path.read_text()]
    path.write_text(path.read_text().replace(fault.before, fault.after))
    assert play(tmp_path, sources, headers, fault.rows, cases=400) in fault.complaints


def test_a_ring_too_short_is_seen(tmp_path: Path) -> None:
    """The stats of all parts that a CTA absorbs lie in rotary boxes at once: here two would take the same."""
    assert play(tmp_path, HOST, compiler.CUDA_DIR, 64, cases=200, MLA_ROTARY_SLOTS=2) == DEADLOCK


@pytest.mark.xfail(reason="known races of split items, README: Limits", strict=True)
@pytest.mark.parametrize("rows", [32, 64])
def test_no_race_in_many_cases(rows: int, tmp_path: Path) -> None:
    """32 rows: a part is announced before it is written. 64: a piece is read before it has landed."""
    assert play(tmp_path, HOST, compiler.CUDA_DIR, rows, cases=3000) == "ok"
