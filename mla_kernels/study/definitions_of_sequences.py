"""Findings of varlen and paging: key, unit, target, derive, choose, as ``Definition`` has them.

Targets are the chapter's figures, and those of the paged-cache milestone.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator

from mla_kernels.measure import figures
from mla_kernels.measure.allocations import Footprint, Latency
from mla_kernels.measure.figures import DECODE, label
from mla_kernels.measure.records import ALTERNATIVE, Point, Record
from mla_kernels.measure.workloads import spread_evenly

Candidates = Iterable[tuple[float, str]]

CHAPTER_SIZES = (4, 8, 16)  # batches of its log-normal lengths
PAGE = 64


def varied(record: Record, *kinds: str) -> Iterator[Point]:
    """Our timed points whose lengths differ, or were listed."""
    for point in record.points:
        if (point.implementation, point.status) == (DECODE, "ok") and point.workload.lengths_kind in kinds:
            yield point


def speedup(record: Record, point: Point, *names: str) -> float | None:
    """Over the fastest of the alternatives ``names`` at the point; None where none was timed."""
    others = (
        other
        for other in record.points
        if other.workload == point.workload
        and other.status == "ok"
        and other.implementation in [ALTERNATIVE + name for name in names]
    )
    ratios = [figures.speed_ratio(point, other) for other in others]
    return min(ratios, default=None)


def _speedups(*names: str, kinds: tuple[str, ...]) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        for point in varied(record, *kinds):
            if (ratio := speedup(record, point, *names)) is not None:
                yield ratio, label(point)

    return derive


def _penalty(record: Record) -> Candidates:
    even = {p.workload: p for p in varied(record, "uniform")}
    for point in varied(record, "explicit", "lognormal", "normal"):
        if other := even.get(spread_evenly(point.workload)):
            yield point.per_call_us / other.per_call_us - 1, label(point)


def footprint(record: Record, layout: str, b: int, page_size: int | None = None) -> Footprint:
    """Raises LookupError where the record has none."""
    for found in record.footprints:
        if (found.layout, found.b, found.page_size) == (layout, b, page_size):
            return found
    raise LookupError(f"record {record.experiment!r} has no footprint {layout}, b {b}, pages of {page_size}")


def saving(record: Record, b: int, page_size: int = PAGE, against: str = "padded") -> float:
    """Share of the bytes of another layout that pages save, mean over the batches drawn."""
    paged, other = footprint(record, "paged", b, page_size), footprint(record, against, b)
    return statistics.fmean(1 - p / o for p, o in zip(paged.bytes, other.bytes, strict=True))


def _savings(record: Record) -> Candidates:
    for b in CHAPTER_SIZES:
        yield (
            saving(record, b),
            f"log-normal 2048±1024, b {b}, mean of {len(record.footprints[0].bytes)} draws",
        )


def latency(record: Record, allocator: str, operation: str) -> Latency:
    """Raises LookupError where the record has none."""
    for found in record.latencies:
        if (found.allocator, found.operation) == (allocator, operation):
            return found
    raise LookupError(f"record {record.experiment!r} has no latency of {allocator}, {operation}")


def _alloc(q: float) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        for found in record.latencies:
            if found.allocator == "PageAllocator" and found.operation.startswith("allocate"):
                yield found.quantile_us(q), f"{found.operation}, {found.count} times"

    return derive


def _against_cudamalloc(record: Record) -> Candidates:
    theirs = latency(record, "cudaMalloc", "allocate a sequence").quantile_us(0.5)
    ours = latency(record, "PageAllocator", "allocate 32 pages").quantile_us(0.5)
    yield theirs / ours, "medians, 32 pages against a sequence of log-normal length"


def page_ratio(record: Record, point: Point) -> float | None:
    """Speed of a point over that of pages of 64 at the same lengths."""
    same = point.workload.model_copy(update={"page_size": PAGE})
    other = next((p for p in record.points if p.workload == same and p.status == "ok"), None)
    return figures.speed_ratio(point, other) if other else None


def _page_ratios(page_size: int, h_q: int) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        for point in record.points:
            shape = (point.workload.page_size, point.workload.h_q)
            ratio = page_ratio(record, point) if point.status == "ok" and shape == (page_size, h_q) else None
            if ratio is not None:
                yield ratio, label(point)

    return derive


_CHAPTER = ("explicit", "lognormal")
VARLEN = (
    ("varlen.speedup_over_padded", "× its speed", "≥ 1.35", _speedups("padded", kinds=_CHAPTER), min),
    (
        "varlen.speedup_over_traditional",
        "× its speed",
        "≥ 1.25",
        _speedups("loop", "padded", kinds=_CHAPTER),
        min,
    ),
    (
        "varlen.speedup_over_padded_same_kernel",
        "× its speed",
        "",
        _speedups("padded_kernel", kinds=("lognormal",)),
        min,
    ),
    (
        "varlen.speedup_over_loop_same_kernel",
        "× its speed",
        "",
        _speedups("kernel_loop", kinds=("lognormal",)),
        min,
    ),
    ("varlen.penalty", "of the even time", "", _penalty, max),
)
PAGING = (
    ("paging.memory_saving", "of the padded bytes", "≥ 0.42", _savings, min),
    ("paging.alloc_p50_us", "µs", "", _alloc(0.5), max),
    ("paging.alloc_p99_us", "µs", "≤ 2.3", _alloc(0.99), max),
    ("paging.alloc_vs_cudamalloc", "× its speed", "≥ 6.8", _against_cudamalloc, min),
    ("paging.page16_bandwidth_ratio", "of pages of 64", "≥ 0.95", _page_ratios(16, 16), min),
    ("paging.page32_bandwidth_ratio", "of pages of 64", "≥ 0.95", _page_ratios(32, 16), min),
    ("paging.page1_bandwidth_ratio", "of pages of 64", "≥ 0.8", _page_ratios(1, 16), min),
    ("paging.page16_compute_ratio", "of pages of 64", "", _page_ratios(16, 128), min),
    ("paging.page32_compute_ratio", "of pages of 64", "", _page_ratios(32, 128), min),
    ("paging.page1_compute_ratio", "of pages of 64", "", _page_ratios(1, 128), min),
)
