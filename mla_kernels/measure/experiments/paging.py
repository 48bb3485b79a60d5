"""What do pages cost and save: bandwidth by page size, time of an allocation, bytes of a batch, a long churn?

Decode at page sizes from 1 to 256, in turns. Allocations timed on the host, each by itself: pages, torch's
allocator, cudaMalloc. Bytes of the chapter's log-normal batches by layout, and what a churn leaves behind.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import allocators
from ..experiment import SEED, Progress, run_steps
from ..points import Step
from ..records import Record, Workload
from ..workloads import lognormal, uniform

BATCHES = (4, 8, 16, 64)


def workloads(scope: str) -> list[Workload]:
    """With pages of 64."""
    chosen = [uniform(128, 4096, h_q=16)]
    if scope == "full":
        chosen += [
            uniform(16, 16384, h_q=16),
            lognormal(64, 4096, 2048, seed=SEED, h_q=16),
            uniform(128, 4096, h_q=128),
        ]
    return chosen


def steps(scope: str) -> Iterator[Step]:
    """Decode at every page size; those of a workload take turns."""
    for workload in workloads(scope):
        step = None
        for size in reversed(allocators.PAGE_SIZES):
            step = Step(workload.model_copy(update={"page_size": size}), beside=step)
        yield step


def run(scope: str = "full", progress: Progress = print, **options) -> Record:
    """Measure. ``options`` are those of run_steps, which says what it raises."""
    full = scope == "full"
    record = run_steps("paging", scope, list(steps(scope)), progress, loaded_ceilings=False, **options)
    clock_ns = allocators.timer_ns()
    latencies = []
    for found in (allocators.page_latencies, allocators.sequence_latencies):
        operations = 200_000 if full and found is allocators.page_latencies else 20_000
        for latency in found(operations, clock_ns):
            latencies.append(latency)
            p50, p99 = latency.quantile_us(0.5), latency.quantile_us(0.99)
            what = f"{latency.allocator}, {latency.operation}"
            progress(f"paging: {what}: p50 {p50:.2f}, p99 {p99:.2f} µs of {latency.count}")
    progress("paging: bytes of batches, and a churn")
    events = 100_000 if full else 10_000
    update = {
        "latencies": latencies,
        "footprints": list(allocators.footprints(BATCHES, draws=64 if full else 8)),
        "churns": [
            allocators.churn_of_pages(events, SEED),
            allocators.churn_of_tensors(events, SEED),
        ],
    }
    return record.model_copy(update=update)
