"""Faults in how a CTA's warps hand buffers to each other: the simulator of test_rings.py must see each."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mla_kernels.compiler import CUDA_DIR
from tests import simulators
from tests.rings import IN_PIECES, SHORTEST, build
from tests.simulators import DEADLOCK, HOST, TOO_MANY, play, spoiled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the warps on the CPU")

OTHERS_BOX = "a reader found another box's data"
NOT_SCORED = "a tile was multiplied before it was scored"
BAD_PAGE = "a page outside the pool was not reported in time"
WRONG_TILES = "a result is not that of its tiles"
UNWRITTEN = "a part was announced before it was written"
WRONG_PARTS = "a result is not that of its parts"
WRONG_LSE = "an LSE is not that of its parts"
COUNTERS = "counters are not as the next launch expects them"
NOT_STORED, STORED_TWICE = "a result was not stored", "a result is stored twice"
NOT_WAITED = "a copy was never waited for"
PAST_TILES = "a copy goes past the tiles"


@dataclass(frozen=True)
class Fault(simulators.Fault):
    """One that shows with some number of query rows a CTA, or with the shortest ring."""

    rows: int = 64
    shortest: bool = False


READ_AND_RELEASE = (
    "        by_warp([&] { read_operands(ordinal); });\n",
    "        smem.ring.release(ordinal, half);\n",
)
WRITE_AND_ANNOUNCE = (
    "    if (lane == 0) slot.one[warp] = power_of_two(254 - exponent);\n    __syncwarp();\n",
    "    if (lane == 0) red_add_release(&p.arrivals[2 * w.first_cta], 1);\n",
)
MERGE_MEETING = "named_barrier_sync(kBarrierMerge, kMergeThreads);"

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
    "values release a tile before they have read it": Fault(
        "".join(READ_AND_RELEASE), "".join(reversed(READ_AND_RELEASE)), (OTHERS_BOX,)
    ),
    "P is written while a warp reads the rotary box": Fault(
        "named_barrier_sync(kBarrierScore, kScoreThreads);  // all have read the rotary box\n",
        "\n",
        (OTHERS_BOX,),
    ),
    "the rotary box is not waited for": Fault(
        "if (c == kRotaryBox) mbarrier_wait(&rotary_full[rotary_slot(ordinal)], rotary_phase(ordinal));",
        "if (c == kRotaryBox) return;",
        (OTHERS_BOX,),
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
    "the loader is no reader of the queue": Fault(
        "kMergeThreads / 32 + 1 + (MLA_ROWS",
        "kMergeThreads / 32 + 0 + (MLA_ROWS",
        (NOT_STORED, STORED_TWICE, DEADLOCK),
    ),
    "what decides is read from an item that other lanes write anew": Fault(
        "if (owns && active) {",
        "if (owns && w.row_block < p_.row_blocks) {",
        (DEADLOCK, UNWRITTEN, WRONG_TILES, OTHERS_BOX),
    ),
    "queries are replaced while they are in use": Fault(
        "mbarrier_wait(&q.empty, (loaded & 1) ^ 1);", "", (OTHERS_BOX, TOO_MANY), rows=16
    ),
    "a bad page is not reported": Fault("w.invalid = true;", "w.invalid = false;", (BAD_PAGE,)),
    "rows past the sequence stay as they are": Fault(
        "if (valid < kTileTokens) zero", "if (valid < 0) zero", (OTHERS_BOX,)
    ),
    "sums are taken before they are there": Fault(
        "const float* sums = smem.sums.wait(index);",
        "const float* sums = smem.sums.n[index % ItemQueue::kSlots];",
        (WRONG_TILES, UNWRITTEN),
    ),
    "a part is announced before it is written": Fault(
        "".join(WRITE_AND_ANNOUNCE), "".join(reversed(WRITE_AND_ANNOUNCE)), (UNWRITTEN,)
    ),
    "a part is announced by the first of a warp's lanes": Fault(
        "".join(WRITE_AND_ANNOUNCE), "".join(WRITE_AND_ANNOUNCE).replace("__syncwarp();", ""), (UNWRITTEN,)
    ),
    "parts are merged before they are there": Fault(
        "if (thread == 0) spin_until(&p.arrivals[2 * w.first_cta], all_arrivals(w));",
        "",
        (WRONG_PARTS, COUNTERS),
    ),
    "a warp's arrival stands for its CTA's": Fault(
        "return w.parts * (kValueThreads / 32);", "return w.parts;", (WRONG_PARTS, COUNTERS)
    ),
    "parts are copied over tiles that are read": Fault(
        f"    {MERGE_MEETING}\n    if (smem.to_merge.request >= 0)",
        "    if (smem.to_merge.request >= 0)",
        (OTHERS_BOX, DEADLOCK, COUNTERS, PAST_TILES),
    ),
    "stats are weighed before they have landed": Fault(
        f"copy_async_wait<1>();\n                {MERGE_MEETING}", MERGE_MEETING, (WRONG_PARTS, WRONG_LSE)
    ),
    "stats are weighed before others' have landed": Fault(
        f"copy_async_wait<1>();\n                {MERGE_MEETING}",
        "copy_async_wait<1>();",
        (WRONG_PARTS, WRONG_LSE),
    ),
    "pieces are added before they have landed": Fault("copy_async_wait<0>();", "", (WRONG_PARTS, NOT_WAITED)),
    "pieces are replaced while a warp adds them": Fault(
        f"{MERGE_MEETING}  // all have read the chunk", "", (WRONG_PARTS,), shortest=True
    ),
    "sums replace pieces that a warp adds": Fault(
        f"{MERGE_MEETING}  // all have read the parts", "", (WRONG_PARTS,), rows=8
    ),
    "warps that add nothing stay away": Fault(
        "if (team < teams) v = sum(",
        "if (team == teams) break;\n                v = sum(",
        (DEADLOCK,),
        rows=8,
    ),
    "parts in fp16 are taken for what they are": Fault(
        "const float one = ones(k)[warp % kOwnWarps];", "const float one = 1.f;", (WRONG_PARTS,)
    ),
    "a warp's scale is another's": Fault(
        "ones(k)[warp % kOwnWarps]", "ones(k)[(warp + 1) % kOwnWarps]", (WRONG_PARTS,)
    ),
    "a scale is not copied": Fault(
        "if (lane < kOwnWarps / 4)", "if (lane < kOwnWarps / 4 - 1)", (WRONG_PARTS,)
    ),
    "a ring of less than two tiles waits for the last but one": Fault(
        " && kGroupSlots > 2 * kGroups", "", (DEADLOCK,), rows=8, shortest=True
    ),
    "who merges does not count those that leave": Fault(
        "w.slices * kClusterCtas - 1)) arrived[0]", "w.parts * kClusterCtas - 1)) arrived[0]", (COUNTERS,)
    ),
    "to whom the last part goes on does not matter": Fault(
        "w.part < w.slices", "w.part < w.parts", (DEADLOCK, COUNTERS, WRONG_PARTS, NOT_STORED)
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(fault: Fault, tmp_path: Path) -> None:
    headers, sources = tmp_path / "cuda", tmp_path / "on_host"
    shutil.copytree(CUDA_DIR, headers)
    shutil.copytree(HOST, sources)
    files = [
        path for path in (*headers.iterdir(), *sources.iterdir()) if "pair" not in path.name
    ]  # not run here
    [path] = [path for path in files if fault.before in path.read_text()]
    path.write_text(path.read_text().replace(fault.before, fault.after))
    ring = SHORTEST if fault.shortest else {}
    assert play(build(tmp_path, fault.rows, sources, headers, **ring), cases=1000) in fault.complaints


def test_a_warp_waits_for_every_use_of_its_slots(tmp_path: Path) -> None:
    """Once a warp loaded a group and not slots: with five slots it waited for every other use of them."""
    fault = Fault(
        "if (loader_of(slot) != warp) continue;",
        "if (g != warp) continue;",
        (TOO_MANY, OTHERS_BOX, DEADLOCK),
        rows=16,
    )
    rings = build(tmp_path, fault.rows, headers=spoiled(fault, tmp_path), **IN_PIECES[fault.rows])
    assert play(rings, cases=1000) in fault.complaints


def test_a_ring_too_short_is_seen(tmp_path: Path) -> None:
    """Scores want the second group of the next tile before values may give back either of this one."""
    assert play(build(tmp_path, 64, **SHORTEST, MLA_AHEAD_BOXES=5), cases=200) == DEADLOCK
