"""What the notebooks fit to records: the measured knee of the roofline, and the fixed cost of a call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V
from mla_kernels.measure import figures
from mla_kernels.measure.figures import DECODE
from mla_kernels.measure.records import Point, Record
from mla_kernels.measure.workloads import ROTATION_OVER_L2

KNEE_LENGTH = 16384  # long enough that neither the call's fixed cost nor q and out weigh
FIXED_COST_BATCH, FIXED_COST_HEADS = 128, 16


@dataclass(frozen=True)
class Knee:
    """Where a call stops costing the same for more query rows.

    ``flat_us``: time at the fewest rows. ``us_per_row``: time at the most rows, over their number.
    """

    flat_us: float
    us_per_row: float
    kv: float

    @property
    def rows(self) -> float:
        """Query rows at which the two asymptotes cross."""
        return self.flat_us / self.us_per_row

    @property
    def flop_per_byte(self) -> float:
        return intensity_of(self.rows, self.kv)


@dataclass(frozen=True)
class FixedCost:
    """time = ``fixed_us`` + bytes / ``tb_s``; ``worst``: largest relative deviation of a point from it."""

    fixed_us: float
    tb_s: float
    worst: float

    def us(self, megabytes: float) -> float:
        return self.fixed_us + megabytes / self.tb_s

    def rate(self, megabytes: float) -> float:
        """TB/s that this cost leaves to a call of so many bytes."""
        return megabytes / self.us(megabytes)


def intensity_of(rows: float, kv: float) -> float:
    """FLOP per byte of ``rows`` query rows over ``kv`` cached tokens."""
    flop = 2 * rows * kv * (HEAD_DIM + HEAD_DIM_V)
    return flop / (2 * (kv * HEAD_DIM + rows * (HEAD_DIM + HEAD_DIM_V)))


def rows_of(flop_per_byte: float, kv: float = float("inf")) -> float:
    """Query rows whose decode over ``kv`` cached tokens has that intensity."""
    both = HEAD_DIM + HEAD_DIM_V
    return flop_per_byte * HEAD_DIM / (both * (1 - flop_per_byte / kv))


def ridge(record: Record, mode: str = "burst") -> float:
    """FLOP per byte at which the measured ceilings meet. Raises LookupError where one is missing."""
    compute = figures.find_ceiling(record, figures.MATMUL, mode).value
    return compute / figures.find_ceiling(record, figures.HBM_READ, mode).value


def fit_knee(record: Record, kv: int = KNEE_LENGTH, mode: str = "burst") -> Knee:
    """From the decode points of one KV length. Raises LookupError with fewer than two row counts."""
    points = [p for p in _timed(record, DECODE, mode) if _is_plain(p) and p.workload.mean_len == kv]
    points.sort(key=lambda p: figures.query_rows(p.workload))
    if not points or figures.query_rows(points[0].workload) == figures.query_rows(points[-1].workload):
        raise LookupError(f"record {record.experiment!r} has no sweep of query rows at kv {kv}")
    first, last = points[0], points[-1]
    return Knee(first.per_call_us, last.per_call_us / figures.query_rows(last.workload), kv)


def fixed_cost_points(record: Record, implementation: str = DECODE) -> list[Point]:
    """Bursts at one batch and head count, over all lengths, with a cold L2."""
    wanted = (FIXED_COST_BATCH, FIXED_COST_HEADS, 1)
    points = [p for p in _timed(record, implementation, "burst") if _is_plain(p) and is_cold(record, p)]
    points = [p for p in points if (p.workload.b, p.workload.h_q, p.workload.s_q) == wanted]
    return sorted(points, key=lambda p: p.workload.mean_len)


def fit_fixed_cost(record: Record, implementation: str = DECODE) -> FixedCost:
    """Least squares of relative errors. Raises LookupError with fewer than three lengths."""
    points = fixed_cost_points(record, implementation)
    if len(points) < 3:
        raise LookupError(f"record {record.experiment!r} has {len(points)} lengths to fit a fixed cost to")
    us = np.array([p.per_call_us for p in points])
    megabytes = np.array([figures.point_bytes(p) / 1e6 for p in points])
    terms = np.stack([np.ones_like(us), megabytes], axis=1) / us[:, None]
    (fixed, per_mb), *_ = np.linalg.lstsq(terms, np.ones_like(us), rcond=None)
    deviation = np.abs(terms @ (fixed, per_mb) - 1).max()
    return FixedCost(float(fixed), float(1 / per_mb), float(deviation))


def is_cold(record: Record, point: Point) -> bool:
    """Whether each call found its KV outside the L2."""
    return point.kv_sets > 1 or figures.kv_bytes(point.workload) > ROTATION_OVER_L2 * record.device.l2_bytes


def _timed(record: Record, implementation: str, mode: str) -> list[Point]:
    return [p for p in record.points if (p.implementation, p.mode, p.status) == (implementation, mode, "ok")]


def _is_plain(point: Point) -> bool:
    return point.workload.lengths_kind == "uniform" and not point.workload.causal
