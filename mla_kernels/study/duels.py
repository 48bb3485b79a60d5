"""Our kernel against the peers that were timed beside it, point by point."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mla_kernels.measure import figures
from mla_kernels.measure.figures import DECODE
from mla_kernels.measure.records import Point, Record, Workload

from . import fits

FLASH_MLA = "peer:flash_mla"


@dataclass(frozen=True)
class Duel:
    """One workload in one mode: our point, and those of the peers, fastest first (one at least)."""

    ours: Point
    peers: tuple[Point, ...]

    @property
    def best(self) -> Point:
        return self.peers[0]

    @property
    def ratio(self) -> float:
        """Our speed over that of the fastest peer."""
        return figures.speed_ratio(self.ours, self.best)

    def peer(self, implementation: str) -> Point | None:
        return next((peer for peer in self.peers if peer.implementation == implementation), None)

    def least(self, quantity: Callable[[Point], float | None]) -> tuple[float, float] | None:
        """(ours, the least of the peers'); None where ours or all of theirs are unknown."""
        ours = quantity(self.ours)
        theirs = [value for value in map(quantity, self.peers) if value is not None]
        return None if ours is None or not theirs else (ours, min(theirs))


def duels(record: Record, *modes: str) -> Iterator[Duel]:
    """In the order of the record; ``modes`` are all without any. KV that stays in the L2 is left out."""
    beside: dict[tuple, list[Point]] = defaultdict(list)
    for point in record.points:
        if point.is_peer and point.status == "ok":
            beside[point.mode, point.workload].append(point)
    for point in record.points:
        if (point.implementation, point.status) != (DECODE, "ok") or (modes and point.mode not in modes):
            continue
        peers = beside.get((point.mode, point.workload))
        if peers and fits.is_cold(record, point):
            yield Duel(point, tuple(sorted(peers, key=lambda peer: peer.per_call_us)))


def is_compute_bound(workload: Workload) -> bool:
    """128 heads, 32 sequences or more, none of fewer than 8,192 tokens."""
    return workload.h_q == 128 and workload.b >= 32 and min(workload.lengths) >= 8192


def absorbed_error(point: Point) -> float | None:
    """Error of the output; None for a peer that solves the decompressed problem, whose output is another."""
    decompressed = point.is_peer and point.implementation.endswith("decompressed")
    return None if decompressed or point.error is None else point.error.out_rel_l2


def gpu_bytes(point: Point) -> int | None:
    """Cache and workspace, where they were measured."""
    return None if point.memory is None else point.memory.cache_bytes + point.memory.workspace_bytes


def geometric_mean(values: Iterable[float]) -> float:
    """Raises LookupError where there are none."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise LookupError("no values to take a mean of")
    return math.exp(sum(logs) / len(logs))
