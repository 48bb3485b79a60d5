"""Records as data frames, and data frames as text: one row a point, one unit a column."""

from __future__ import annotations

import math
import statistics

import pandas as pd

from mla_kernels.measure import figures
from mla_kernels.measure.records import Point, Record


def frame(record: Record) -> pd.DataFrame:
    """One row for each point that was timed, every figure derived by ``measure.figures``.

    Times in µs (``us``, and its 95 % interval ``us_low``, ``us_high``), rates in TB/s and TFLOP/s,
    ``intensity`` in FLOP/B, ``kv_mb`` in 10^6 bytes, power in W, clock in MHz, energy in mJ per token and
    layer. ``bw_share`` and ``mm_share`` are of the same run's read bandwidth and matmul, in the point's mode.
    """
    return pd.DataFrame([_row(record, point) for point in record.points if point.status == "ok"])


def missing(record: Record) -> pd.DataFrame:
    """One row for each point that could not be measured, with the reason."""
    columns = ["point", "status", "reason"]
    rows = [(figures.label(p), p.status, p.reason) for p in record.points if p.status != "ok"]
    return pd.DataFrame(rows, columns=columns)


def _row(record: Record, point: Point) -> dict:
    w = point.workload
    low, high = figures.interval_us(point)
    row = {
        "implementation": point.implementation,
        "mode": point.mode,
        "b": w.b,
        "h_q": w.h_q,
        "s_q": w.s_q,
        "rows": figures.query_rows(w),
        "kv": round(w.mean_len, 2),
        "lengths": w.lengths_kind,
        "kv_sets": point.kv_sets,
        "us": point.per_call_us,
        "us_low": low,
        "us_high": high,
        "kv_mb": figures.kv_bytes(w) / 1e6,
        "mb": figures.moved_bytes(w) / 1e6,
        "gflop": figures.flop(w) / 1e9,
        "intensity": figures.intensity(w),
        "tb_s": figures.tb_s(point),
        "tflops": figures.tflops(point),
        "bw_share": figures.bandwidth_share(record, point),
        "mm_share": figures.compute_share(record, point),
        "floor_us": figures.floor_us(record, w, point.mode),
    }
    if point.sustained is not None:
        energy = figures.joules_per_token(point)
        clocks = point.sustained.sm_mhz_samples
        row |= {
            "power_w": point.sustained.mean_power_w,
            "sm_mhz": statistics.median(clocks) if clocks else None,
            "mj_per_token": None if energy is None else 1e3 * energy,
            "throttle": ", ".join(point.sustained.throttle) or "none",
        }
    return row


def to_markdown(table: pd.DataFrame) -> str:
    """A GitHub table; numbers to three significant digits, right-aligned."""
    columns = list(table.columns)
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in columns]
    lines = [columns, ["---:" if is_number else "---" for is_number in numeric]]
    lines += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return significant(value) if isinstance(value, float) else str(value).replace("|", "\\|")


def significant(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, without an exponent where it can be; whole numbers stay whole."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"
