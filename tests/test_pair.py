"""How two CTAs of decode_pair.cu attend together: its code on the CPU, messages and loads at their worst."""

import shutil
from pathlib import Path

import pytest

from mla_kernels.compiler import CUDA_DIR
from mla_kernels.tuning import PAIR_ROWS, VARIANTS
from tests import simulators
from tests.simulators import DEADLOCK, TOO_MANY, Fault, play, spoiled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run the CTAs on the CPU")


def build(folder: Path, headers: Path = CUDA_DIR) -> Path:
    """The simulator of the shipped variant in bf16, of the kernel in ``headers``."""
    return simulators.build(
        "pair", folder, VARIANTS[PAIR_ROWS].kernel_config("bf16").defines, headers=headers
    )


def test_both_attend_to_the_scores_that_they_share(tmp_path: Path) -> None:
    """Scores that move references, and large ones, for which tiles are done again, in half of the cases."""
    pair = build(tmp_path)
    assert [play(pair, cases=250, seed=seed) for seed in (1, 2, 3, 4)] == ["ok"] * 4


WRONG, WRONG_LSE = "a result is not that of its scores", "an LSE is not that of its scores"
OVERWRITTEN = "a tile was overwritten under a product"
NO_TILE = "an operand is no tile"
NOT_WAITED = "a message was never waited for"

FAULTS = {
    "scores follow on scores that are of no use": Fault(
        "                acknowledge();           // and others follow\n", "", (DEADLOCK, WRONG, WRONG_LSE)
    ),
    "scores follow on sums": Fault(
        "        acknowledge();\n        return x[0];", "        return x[0];", (DEADLOCK, WRONG, WRONG_LSE)
    ),
    "a tile is free while a warp reads it": Fault(
        "mbarrier_init(&empty[i], kMergeThreads / 32)",
        "mbarrier_init(&empty[i], kMergeThreads / 32 - 1)",
        (TOO_MANY, OVERWRITTEN, NO_TILE, WRONG, WRONG_LSE, DEADLOCK),
    ),
    "a tile is given back before it was multiplied": Fault(
        "        wgmma_wait<0>();\n        wgmma_fence_operands(o);\n        smem.ring.release(",
        "        smem.ring.release(ordinal, lane());\n        wgmma_wait<0>();\n"
        "        if (false) smem.ring.release(",
        (OVERWRITTEN, NO_TILE),
    ),
    "what the other CTA's reference did is not followed": Fault(
        "by_other |= (other[i] >> 15 & 1) << i, ", "", (WRONG,)
    ),
    "signs stay in the probabilities": Fault("other[i] &= ~kSigns;", "other[i] &= ~0u;", (WRONG,)),
    "large scores are kept from the other CTA": Fault(
        "send_p(0, 0, kFlag, 0, 0);", "send_p(0, 0, 0, 0, 0);", (DEADLOCK, WRONG, WRONG_LSE)
    ),
    "one warp alone does a tile again": Fault(
        "smem.again[warpgroup] = ordinal;", "smem.again[warpgroup] = 0;", (WRONG, WRONG_LSE)
    ),
    "a tile that is done again counts twice": Fault(
        "            if (kSoftmax && is_done_again(ordinal - 1)) return false;\n",
        "            if (kSoftmax) settle(), pending = 0;\n"
        "            if (kSoftmax && is_done_again(ordinal - 1)) return false;\n",
        (WRONG, WRONG_LSE),
    ),
    "a warp asks before all have said": Fault(
        "        sync_rows();\n        return __any_sync",
        "        return __any_sync",
        (DEADLOCK, WRONG, WRONG_LSE),
    ),
    "what comes next is not announced": Fault(
        "        expect(&smem.scores_ready[warp], kScoresBytes);\n    }\n    // Prob",
        "    }\n    // Prob",
        (DEADLOCK,),
    ),
    "a turn is taken twice": Fault("if (tile > turns)", "if (tile >= turns)", (DEADLOCK,)),
    "no turns are taken where tiles are done again": Fault(
        "if (tile > turns) wait_turn(), give_turn();", "", (DEADLOCK,)
    ),
    "the other CTA's rows are taken for one's own": Fault(
        "Fragment::row(value_thread(), 0)", "Fragment::row(value_thread(), 1)", (WRONG, WRONG_LSE)
    ),
    "tokens past the end are seen": Fault("mask(w, tile, x);", ";", (WRONG, WRONG_LSE)),
    "probabilities are read before they have come": Fault(
        "        receive<1>(&smem.p_ready[warp]);\n",
        "",
        (TOO_MANY, DEADLOCK, WRONG, NOT_WAITED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_seen(fault: Fault, tmp_path: Path) -> None:
    assert play(build(tmp_path, spoiled(fault, tmp_path)), cases=300, seed=1) in fault.complaints
