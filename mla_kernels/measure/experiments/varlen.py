"""What do sequences of different lengths cost, against padding them and against going one by one?

The chapter's three batches, its log-normal lengths (mean 2048, standard deviation 1024), and other spreads.
Beside the kernel at each: padded to the longest, or one sequence after the other, in PyTorch and by the
kernel; two public kernels that take lengths as they are, where ``make peers`` has fetched them; and the same
tokens spread evenly.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..alternatives import ALTERNATIVES
from ..experiment import SEED, Progress, run_steps
from ..figures import DECODE
from ..points import Step
from ..records import ALTERNATIVE, PEER, Record, Workload
from ..workloads import explicit, lognormal, normal, spread_evenly

HEADS = (16, 128)
# The chapter's batches, lines 196-198, and its log-normal lengths, lines 221-226.
CHAPTER_BATCHES = ((1024,) * 4, (512, 1024, 2048, 4096), tuple(256 << i for i in range(8)))
MEAN, SD, CHAPTER_SIZES = 2048, 1024, (4, 8, 16)
LARGER_SIZES = (64, 128)
SPREAD_SIZE, LONGEST, ZIPF_EXPONENT = 64, 8192, 1.1
ALL = tuple(ALTERNATIVE + name for name in ALTERNATIVES)
BESIDE = (PEER + "flash_mla", PEER + "fa3")


def zipf(b: int, seed: int, **axes) -> Workload:
    """Lengths of probability in proportion to length ** -1.1, up to 8,192."""
    ranks = np.arange(1, LONGEST + 1)
    weights = ranks**-ZIPF_EXPONENT
    drawn = np.random.default_rng(seed).choice(ranks, b, p=weights / weights.sum())
    return explicit([int(length) for length in drawn], **axes)


def flat(b: int, seed: int, **axes) -> Workload:
    """Every length up to 8,192 equally likely."""
    drawn = np.random.default_rng(seed).integers(1, LONGEST, b, endpoint=True)
    return explicit([int(length) for length in drawn], **axes)


def workloads(h_q: int, scope: str) -> Iterator[tuple[str, Workload]]:
    """(what it is, lengths that differ), the chapter's first."""
    for lengths in CHAPTER_BATCHES:
        yield "chapter's batch", explicit(lengths, h_q=h_q)
    for b in CHAPTER_SIZES:
        yield "chapter's log-normal", lognormal(b, MEAN, SD, seed=SEED, h_q=h_q)
    if scope == "full":
        for b in LARGER_SIZES:
            yield "log-normal", lognormal(b, MEAN, SD, seed=SEED, h_q=h_q)
        yield "normal", normal(SPREAD_SIZE, MEAN, SD, seed=SEED, h_q=h_q)
        yield "flat to 8192", flat(SPREAD_SIZE, SEED, h_q=h_q)
        yield "Zipf", zipf(SPREAD_SIZE, SEED, h_q=h_q)
    else:
        yield "log-normal", lognormal(LARGER_SIZES[0], MEAN, SD, seed=SEED, h_q=h_q)


def steps(scope: str) -> Iterator[Step]:
    """``scope`` "full", or "live" for a run beside a notebook."""
    for h_q in HEADS:
        for _, workload in workloads(h_q, scope):
            # zeros in the padding, which some alternatives and peers multiply
            differ = len(set(workload.lengths)) > 1
            even = Step(spread_evenly(workload), (DECODE,), poison=False) if differ else None
            yield Step(workload, (DECODE, *ALL, *BESIDE), poison=False, host=True, beside=even)


def run(scope: str = "full", progress: Progress = print, **options) -> Record:
    """Measure. ``options`` are those of run_steps, which says what it raises."""
    return run_steps("varlen", scope, list(steps(scope)), progress, loaded_ceilings=False, **options)
