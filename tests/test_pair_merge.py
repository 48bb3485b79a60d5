"""How pairs of CTAs leave the parts of a split item and merge them: parts.cuh and merge.cuh on the CPU."""

import shutil
from pathlib import Path

import pytest

from mla_kernels.compiler import CUDA_DIR
from mla_kernels.tuning import PAIR_ROWS, VARIANTS
from tests import simulators
from tests.simulators import Fault, play, spoiled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the CTAs on the CPU")


def build(folder: Path, element: str, headers: Path = CUDA_DIR) -> Path:
    """The simulator of the end of a split item, whose parts are fp16 beside bf16 elements."""
    defines = VARIANTS[PAIR_ROWS].kernel_config(element).defines
    return simulators.build("merge_pair", folder, defines, headers=headers)


@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_parts_of_pairs_are_merged(element: str, tmp_path: Path) -> None:
    merge = build(tmp_path, element)
    assert [play(merge, cases=60, seed=seed) for seed in (1, 2)] == ["ok", "ok"]


WRONG_PARTS = "a result is not that of its parts"
FAULTS = {
    "both CTAs take the first one's half": Fault(
        "return kClusterCtas == 2 ? cluster_rank() : run;",
        "return kClusterCtas == 2 ? 0 : run;",
        ("a result was not stored", "a result is stored twice", WRONG_PARTS),
    ),
    "scales are those of the other half": Fault(
        "(kClusterCtas == 2 ? half_of(0) * kOwnWarps : 0)", "0", (WRONG_PARTS,)
    ),
    "a warp's scale is that of all": Fault(
        "slot.one[warp] = power_of_two(254 - exponent);",
        "slot.one[warp] = power_of_two(127);",
        (WRONG_PARTS,),
    ),
    "one CTA counts for both that leave": Fault(
        "w.slices * kClusterCtas - 1)) arrived[0]",
        "w.slices - 1)) arrived[0]",
        ("counters are not as the next launch expects them", "nothing moves: a deadlock", WRONG_PARTS),
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(fault: Fault, tmp_path: Path) -> None:
    assert play(build(tmp_path, "bf16", spoiled(fault, tmp_path)), cases=30) in fault.complaints
