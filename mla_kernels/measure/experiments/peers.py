"""At which decode calls is another public kernel faster, and by how much is each ahead or behind?

A grid over heads, batch and length, and further points over query tokens, lengths that differ, fp16 and head
counts that are no power of two. All implementations at a point take turns. The peers written for this
operation on this GPU are at every point, the slow ones where their caches fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..experiment import SEED, Progress, run_steps
from ..figures import DECODE
from ..points import Step
from ..records import PEER, Record, Workload
from ..workloads import lognormal, normal, spread_evenly, uniform

HEADS = (8, 16, 32, 64, 128)
BATCHES = (1, 4, 16, 64, 128, 256)
LENGTHS = (1024, 4096, 16384, 65536)
LONGEST, LONGEST_BATCH = 131072, 4  # as memory allows: up to 19 GB of KV at the others
BLOCKS = ("block:stream", "block:skeleton")

# (h_q, b, kv) of the grid
SLOW = ((16, 1, 4096), (16, 128, 4096), (128, 1, 4096), (128, 16, 4096))  # up to 6.4 GB decompressed
HOST = (*SLOW, (64, 64, 16384), (128, 64, 16384))  # host time and memory too
SUSTAINED = ((16, 128, 4096), (16, 64, 16384), (64, 64, 16384), (128, 64, 16384))
SUSTAINED_TOKENS = ((128, 64, 16384, 2),)  # (h_q, b, kv, s_q)

SHAPES = ((1, 16384), (16, 4096), (64, 16384), (128, 4096))  # (b, kv) of the further points
TOKENS = (2, 4)
TOKEN_HEADS = (8, 16, 64, 128)
SPREADS = ((32, 16384, 8192), (128, 4096, 2048), (256, 1024, 512))  # b, mean and standard deviation of kv
SPREAD_HEADS = (16, 64, 128)
HALF_HEADS, HALF_SHAPES = (16, 64, 128), ((1, 4096), (16, 16384), (128, 4096))
ODD_HEADS, ODD_SHAPES = (12, 20, 40, 48, 80, 96, 100), ((1, 4096), (16, 4096), (32, 16384), (128, 4096))

LIVE_GRID = (
    (16, 1, 4096),
    (16, 16, 4096),
    (16, 128, 4096),
    (16, 64, 16384),
    (64, 128, 4096),
    (128, 1, 4096),
    (128, 128, 4096),
    (128, 64, 16384),
)
LIVE_SUSTAINED = ((128, 64, 16384),)


def grid() -> Iterator[tuple[int, int, int]]:
    """(h_q, b, kv) of every point that must be led: bf16, one query token, equal lengths."""
    for length in (*LENGTHS, LONGEST):
        for h_q in HEADS:
            for b in BATCHES:
                if length != LONGEST or b <= LONGEST_BATCH:
                    yield h_q, b, length


def on_grid(workload: Workload) -> bool:
    """Whether a workload is a point of the grid."""
    even = set(workload.lengths) == {workload.mean_len} and workload.lengths_kind == "uniform"
    plain = (workload.s_q, workload.dtype) == (1, "bf16")
    return even and plain and (workload.h_q, workload.b, workload.mean_len) in set(grid())


def further() -> Iterator[Workload]:
    """The other points: tokens, lengths that differ, fp16, odd head counts."""
    for h_q in TOKEN_HEADS:
        for s_q in TOKENS:
            for b, length in SHAPES:
                yield uniform(b, length, h_q=h_q, s_q=s_q, causal=True)
    for h_q in SPREAD_HEADS:
        for b, mean, sd in SPREADS:
            for draw in (normal, lognormal):
                yield draw(b, mean, sd, seed=SEED, h_q=h_q)
    for h_q in HALF_HEADS:
        for b, length in HALF_SHAPES:
            yield uniform(b, length, h_q=h_q, dtype="fp16")
    for h_q in ODD_HEADS:
        for b, length in ODD_SHAPES:
            yield uniform(b, length, h_q=h_q)


def steps(scope: str) -> Iterator[Step]:
    """``scope`` "full", or "live" for a run beside a notebook. The grid first: the time may be limited.

    Where lengths differ, the same tokens spread evenly are beside them.
    """
    workloads = [uniform(b, length, h_q=h_q) for h_q, b, length in (grid() if scope == "full" else LIVE_GRID)]
    workloads += further() if scope == "full" else _further_live()
    for workload in workloads:
        step = _step(workload, scope == "full")
        if workload.lengths_kind != "uniform":
            step = replace(step, beside=_step(spread_evenly(workload), scope == "full"))
        yield step


def _step(workload: Workload, full: bool) -> Step:
    from .. import peers  # brings torch

    fast, slow = (tuple(PEER + name for name in names) for names in (peers.FAST, peers.SLOW))
    axes = (workload.h_q, workload.b, workload.mean_len)
    plain = on_grid(workload)
    implementations = (DECODE, *fast)
    if plain and axes in (SLOW if full else SLOW[:1]):
        implementations += slow
    if workload.h_q == 128 and workload.b >= 32 and min(workload.lengths) >= 8192:
        implementations += BLOCKS
    loaded = plain and axes in (SUSTAINED if full else LIVE_SUSTAINED)
    loaded |= full and workload.causal and (*axes, workload.s_q) in SUSTAINED_TOKENS
    return Step(
        workload,
        implementations,
        sustain=(DECODE, *fast) if loaded else (),
        poison=False,  # not every peer stands NaN where nothing should be read (ours must, in tests/gpu)
        host=plain and axes in HOST,
    )


def _further_live() -> Iterator[Workload]:
    yield uniform(64, 16384, h_q=128, s_q=2, causal=True)
    yield lognormal(128, 4096, 2048, seed=SEED, h_q=16)
    yield uniform(128, 4096, h_q=48)


def run(scope: str = "full", progress: Progress = print, **options) -> Record:
    """Measure. ``options`` are those of run_steps, which says what it raises."""
    return run_steps("peers", scope, list(steps(scope)), progress, **options)
