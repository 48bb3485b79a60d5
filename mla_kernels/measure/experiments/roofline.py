"""Where does MLA decode turn from memory-bound to compute-bound, and what does the power cap make of it?

Query rows (h_q · s_q) set the intensity, KV length and batch the size. The building blocks run beside the
decode at every point; under sustained load they give the energy roof.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..experiment import Progress, run_steps
from ..figures import DECODE
from ..points import BLOCKS, Step
from ..records import Record
from ..workloads import uniform

HEADS = (1, 8, 16, 32, 64, 128)
BATCH_OF_LENGTH = {
    1024: 256,
    4096: 128,
    16384: 64,
    65536: 32,
}  # 0.3 to 2.1 million tokens, up to 2.4 GB of KV
LIVE_LENGTHS = (4096, 16384)
SUSTAINED_LENGTH = 16384
SUSTAINED = ((16, 1), (32, 1), (64, 1), (128, 1), (128, 2))  # (h_q, s_q): 16 to 256 rows
SUSTAINED_BLOCK_ROWS = {"full": (16, 64, 128, 256), "live": (64, 128, 256)}


def steps(scope: str) -> Iterator[Step]:
    """``scope`` "full", or "live" for a run beside a notebook."""
    lengths, tokens = (BATCH_OF_LENGTH, (1, 2, 4)) if scope == "full" else (LIVE_LENGTHS, (1, 2))
    for length in lengths:
        for s_q in tokens:
            for h_q in HEADS:
                workload = uniform(BATCH_OF_LENGTH[length], length, h_q=h_q, s_q=s_q)
                sustain = ()
                if length == SUSTAINED_LENGTH and (h_q, s_q) in SUSTAINED:
                    sustain = (DECODE, *(BLOCKS if h_q * s_q in SUSTAINED_BLOCK_ROWS[scope] else ()))
                yield Step(workload, (DECODE, *BLOCKS), sustain)


def run(scope: str = "full", progress: Progress = print, **options) -> Record:
    """Measure. ``options`` are those of run_steps, which says what it raises."""
    return run_steps("roofline", scope, list(steps(scope)), progress, **options)
