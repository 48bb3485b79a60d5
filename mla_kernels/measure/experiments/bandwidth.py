"""How much of the HBM bandwidth does decode reach, and what keeps it from the rest?

Sweeps of batch, length, heads and length distribution; the same point with a KV that stays in the L2; call
time against bytes down to almost none (its intercept is the fixed cost); bytes counted by the hardware
where ncu is there.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..experiment import SEED, Progress, run_steps
from ..figures import DECODE
from ..points import Step
from ..records import Record
from ..workloads import lognormal, normal, spread_evenly, uniform

BATCHES = {"full": (1, 2, 4, 8, 16, 32, 64, 128, 256), "live": (1, 4, 16, 64, 256)}
LENGTHS = {"full": [1 << i for i in range(8, 18)], "live": [256, 1024, 4096, 16384, 65536]}
HEADS = {"full": (1, 2, 4, 8, 16, 24, 32, 48, 64), "live": (1, 8, 16, 32, 64)}
L2_BATCHES = (1, 2, 4, 8, 16, 32)  # 4.7 to 151 MB of KV: from well inside the L2 to well outside
FIXED_COST_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
COUNTED = (  # (b, kv, h_q, s_q)
    (128, 4096, 16, 1),
    (128, 4096, 128, 1),
    (1, 131072, 16, 1),
    (64, 16384, 128, 2),
)
STREAMED = (DECODE, "block:stream")


def steps(scope: str) -> Iterator[Step]:
    """``scope`` "full", or "live" for a run beside a notebook."""
    for b in BATCHES[scope]:
        yield Step(uniform(b, 4096, h_q=16), STREAMED)
    for b in (16, 1):
        for length in LENGTHS[scope]:
            yield Step(uniform(b, length, h_q=16), STREAMED)
    yield Step(uniform(1, 4096, h_q=128), STREAMED)  # one sequence, all heads: latency
    for h_q in HEADS[scope]:
        yield Step(uniform(128, 4096, h_q=h_q), STREAMED)
    for b in L2_BATCHES:
        yield Step(uniform(b, 4096, h_q=16), STREAMED)
        yield Step(uniform(b, 4096, h_q=16), STREAMED, rotate=False)
    for length in FIXED_COST_LENGTHS:
        yield Step(uniform(128, length, h_q=16), STREAMED)
    for h_q in (16, 128):
        for draw in (normal, lognormal):
            varied = draw(128, 4096, 2048, seed=SEED, h_q=h_q)
            yield Step(varied, beside=Step(spread_evenly(varied)))
    for b, length, h_q, s_q in COUNTED if scope == "full" else COUNTED[:2]:
        yield Step(uniform(b, length, h_q=h_q, s_q=s_q), count=(DECODE,))


def run(scope: str = "full", progress: Progress = print, **options) -> Record:
    """Measure. ``options`` are those of run_steps, which says what it raises."""
    return run_steps("bandwidth", scope, list(steps(scope)), progress, **options)
