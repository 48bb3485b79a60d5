"""Where the kernel's cycles go: what a tile needs of each unit of an SM, and the ladder from loads to decode.

Needs are computed from a variant's ``DecodeTuning``, the rest comes from a record. Figures return their data.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from mla_kernels.choice import SHIPPED
from mla_kernels.measure import figures
from mla_kernels.measure.figures import DECODE, query_rows
from mla_kernels.measure.records import Point, Record
from mla_kernels.tuning import BOX_BYTES, BOXES, PAIR_ROWS, DecodeTuning

from . import style

# One SM: dense bf16 FLOP of its tensor cores and bytes of shared memory a cycle.
TENSOR_FLOP, SHARED_BYTES = 4096, 128
TOKENS, COLUMNS, COLUMNS_V, STEP = 64, 576, 512, 16
QK_STEPS, PV_STEPS = COLUMNS // STEP, TOKENS // STEP
PV_COLUMNS = 128  # of one instruction of decode_rows.cu
TILE_BYTES = BOXES * BOX_BYTES

LADDER = ("block:stream", "block:mma", "block:skeleton", DECODE)
TENSOR, SHARED, HBM = "tensor cores", "shared memory", "HBM"


def instruction(m: int, n: int, operands_in_shared: int = 2) -> tuple[float, float]:
    """(tensor cycles, shared-memory cycles) of one m x n x 16 WGMMA; 1 operand in shared: A in registers."""
    tensor = 2 * m * n * STEP / TENSOR_FLOP
    rows = m + n if operands_in_shared == 2 else n
    return tensor, rows * STEP * 2 / SHARED_BYTES


def budget(tuning: DecodeTuning, hbm_bytes_a_cycle: float, sharing: int = 1) -> pd.DataFrame:
    """Cycles that a 64-token tile takes of each unit of an SM, if nothing else were in the way.

    Of a pair of CTAs the half that each has, with twice as many rows.
    ``hbm_bytes_a_cycle``: what the memory gives one SM. ``sharing``: CTAs that read the same tile side by
    side, so that all but the first find it in the L2.
    """
    needs = {64: _needs_of_64, PAIR_ROWS: _needs_of_pair}.get(tuning.rows, _needs_of_few_rows)
    tile_bytes = TILE_BYTES / tuning.cluster_ctas
    parts = [
        *needs(tuning),
        (SHARED, "writes by TMA", tile_bytes / SHARED_BYTES),
        (HBM, "reads", tile_bytes / sharing / hbm_bytes_a_cycle),
    ]
    return pd.DataFrame(parts, columns=["unit", "part", "cycles"])


def _needs_of_few_rows(tuning: DecodeTuning) -> list[tuple[str, str, float]]:
    product, count = instruction(TOKENS, tuning.rows), PV_STEPS * COLUMNS_V // 64
    return [
        (TENSOR, "QKᵀ", QK_STEPS * product[0]),
        (TENSOR, "PV", count * product[0]),
        (SHARED, "QKᵀ", QK_STEPS * product[1]),
        (SHARED, "PV", count * product[1]),
        _writes_of_p(tuning),
    ]


def _writes_of_p(tuning: DecodeTuning) -> tuple[str, str, float]:
    return SHARED, "writes of P", tuning.rows * TOKENS * 2 / SHARED_BYTES


def _needs_of_64(tuning: DecodeTuning) -> list[tuple[str, str, float]]:
    kept, count = tuning.register_steps, PV_STEPS * COLUMNS_V // PV_COLUMNS
    qk, pv = instruction(64, TOKENS), instruction(64, PV_COLUMNS)
    return [
        (TENSOR, "QKᵀ", QK_STEPS * qk[0]),
        (TENSOR, "PV", count * pv[0]),
        (SHARED, "QKᵀ", kept * instruction(64, TOKENS, 1)[1] + (QK_STEPS - kept) * qk[1]),
        (SHARED, "PV", count * pv[1]),
        _writes_of_p(tuning),
    ]


def _needs_of_pair(tuning: DecodeTuning) -> list[tuple[str, str, float]]:
    """Of a CTA: half of the columns for two warpgroups of 64 rows; messages are written and read."""
    kept = 2 * tuning.register_steps  # of the 36 steps that its warpgroups have together
    qk, pv = instruction(64, TOKENS), instruction(64, COLUMNS_V // 2, 1)
    messages = dict(tuning.shared_plan())["messages"]
    return [
        (TENSOR, "QKᵀ", QK_STEPS * qk[0]),
        (TENSOR, "PV", 2 * PV_STEPS * pv[0]),
        (SHARED, "QKᵀ", kept * instruction(64, TOKENS, 1)[1] + (QK_STEPS - kept) * qk[1]),
        (SHARED, "PV", 2 * PV_STEPS * pv[1]),
        (SHARED, "messages", 2 * messages / SHARED_BYTES),
    ]


def totals(data: pd.DataFrame) -> pd.Series:
    """Cycles of each unit: the largest is the least time that a tile can take."""
    return data.groupby("unit", sort=False).cycles.sum()


def clock_mhz(point: Point, record: Record) -> float:
    """SM clock while a point ran: of the samples under load, else of the snapshots around the burst."""
    if point.sustained is not None and point.sustained.sm_mhz_samples:
        return float(np.median(point.sustained.sm_mhz_samples))
    seen = [t.sm_mhz for t in (point.before, point.after) if t is not None and t.sm_mhz]
    return float(np.mean(seen)) if seen else float(record.device.sm_clock_max_mhz or 1980)


def bytes_a_cycle(record: Record, mhz: float) -> float:
    """What the measured read bandwidth is for one SM at that clock."""
    return figures.find_ceiling(record, figures.HBM_READ).value * 1e6 / record.device.sms / mhz


def cycles_a_tile(record: Record, point: Point) -> float:
    """Time of a call over the tiles that one SM multiplies in it, in cycles."""
    tuning = SHIPPED.serving_many(query_rows(point.workload))
    blocks = -(-query_rows(point.workload) // tuning.rows)
    tiles = blocks * sum(-(-length // TOKENS) for length in point.workload.lengths) * tuning.cluster_ctas
    return point.per_call_us * clock_mhz(point, record) / (tiles / record.device.sms)


def sharing_of(workload_rows: int) -> int:
    """CTAs that walk one tile side by side, as ``group_size`` of mla_kernels/choice.py groups whole ones."""
    return max(1, min(8, workload_rows // SHIPPED.serving_many(workload_rows).rows))


def budgets(record: Record) -> pd.DataFrame:
    """At long bursts of the roofline's sweep: the three units' cycles a tile, beside those measured."""
    rows = []
    for point in _long_bursts(record):
        if point.implementation != DECODE:
            continue
        mhz, many = clock_mhz(point, record), query_rows(point.workload)
        cycles = totals(budget(SHIPPED.serving_many(many), bytes_a_cycle(record, mhz), sharing_of(many)))
        measured = {
            other.implementation: cycles_a_tile(record, other)
            for other in record.points
            if other.workload == point.workload and (other.mode, other.status) == ("burst", "ok")
        }
        rows.append(
            {
                "query rows": many,
                **cycles,
                "least": cycles.max(),
                "binds": cycles.idxmax(),
                **{style.LABELS[name]: measured[name] for name in LADDER if name in measured},
            }
        )
    return pd.DataFrame(rows).sort_values("query rows", ignore_index=True)


def plot_budget(record: Record) -> pd.DataFrame:
    """Bars of cycles a tile: what each unit needs, and what the skeleton and the decode take."""
    data = budgets(record)
    figure, axes = style.new_figure(width=9)
    x = np.arange(len(data))
    colours = (style.COLOURS["block:mma"], style.COLOURS["block:skeleton"], style.COLOURS["block:stream"])
    for i, (unit, colour) in enumerate(zip((TENSOR, SHARED, HBM), colours, strict=True)):
        axes.bar(x + (i - 1) * 0.22, data[unit], 0.2, color=colour, label=f"{unit} (computed)")
    for name, marker in (("block:skeleton", "D"), (DECODE, "o")):
        if (shown := style.LABELS[name]) in data:
            axes.plot(
                x, data[shown], marker, color="black", mfc="white" if marker == "D" else "black", label=shown
            )
    axes.set_xticks(x, data["query rows"])
    axes.set(
        xlabel="query rows that share the KV",
        ylabel="SM cycles a tile of 64 tokens",
        title="What a tile needs of each unit, and what it takes",
        ylim=(0, 1.3 * data.iloc[:, 1:].max(numeric_only=True).max()),
    )
    axes.legend(ncols=2, loc="upper right")
    style.show(figure, record)
    return data


def _long_bursts(record: Record, kv: int = 16384) -> Iterable[Point]:
    """One query token, ``kv`` tokens: long enough that a call's fixed cost does not weigh."""
    for point in record.points:
        w = point.workload
        if (point.mode, point.status, w.mean_len, w.s_q, w.lengths_kind) == ("burst", "ok", kv, 1, "uniform"):
            yield point


def least_cycles(implementation: str, parts: pd.DataFrame) -> float:
    """Of what a rung does (``parts`` of ``budget``), the cycles of the unit that it needs longest."""
    missing = {
        "block:stream": ("QKᵀ", "PV", "writes of P", "messages"),
        "block:mma": ("reads", "writes by TMA", "writes of P", "messages"),
        "block:skeleton": ("writes of P", "messages"),
    }
    return totals(parts[~parts.part.isin(missing.get(implementation, ()))]).max()


def ladder(record: Record) -> pd.DataFrame:
    """Of long bursts: the share of its own limit that each rung reaches, one row a number of query rows."""
    rows: dict[int, dict] = {}
    for point in _long_bursts(record):
        if point.implementation in LADDER:
            many = query_rows(point.workload)
            hbm = bytes_a_cycle(record, clock_mhz(point, record))
            parts = budget(SHIPPED.serving_many(many), hbm, sharing_of(many))
            share = least_cycles(point.implementation, parts) / cycles_a_tile(record, point)
            rows.setdefault(many, {"query rows": many})[style.LABELS[point.implementation]] = share
    columns = ["query rows", *(style.LABELS[name] for name in LADDER)]
    return pd.DataFrame(sorted(rows.values(), key=lambda row: row["query rows"]), columns=columns)


def plot_ladder(record: Record) -> pd.DataFrame:
    """Rungs as a share of their limits."""
    data = ladder(record)
    figure, axes = style.new_figure(width=9)
    x = np.arange(len(data))
    for i, name in enumerate(LADDER):
        bars = axes.bar(
            x + (i - 1.5) * 0.2,
            100 * data[style.LABELS[name]],
            0.18,
            color=style.COLOURS[name],
            label=style.LABELS[name],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    style.ceiling(axes, 100, "the unit that the rung needs longest is busy all the time")
    axes.set_xticks(x, data["query rows"])
    axes.set(
        xlabel="query rows that share the KV",
        ylabel="% of the rung's own limit",
        title="From loads to a decode: what each step costs",
        ylim=(0, 130),
    )
    axes.legend(ncols=4, loc="upper center")
    style.show(figure, record)
    return data


def limits_in_words(data: pd.DataFrame) -> str:
    """``budgets``: what limits each number of query rows, and the time over that limit."""
    over = data[style.LABELS[DECODE]] / data.least
    words = [f"{row['query rows']} rows {row.binds} (× {over[i]:.2f})" for i, row in data.iterrows()]
    return f"What limits, and the time over that limit: {', '.join(words)}."


def steps_in_words(data: pd.DataFrame) -> str:
    """The last row of ``budgets``, rung by rung in cycles a tile."""
    row = data.iloc[-1]
    stream, mma, skeleton, decode = (row[style.LABELS[name]] for name in LADDER)
    return (
        f"With {row['query rows']} rows a tile takes {stream:,.0f} cycles to load and {mma:,.0f} to "
        f"multiply, each alone. Both together take {skeleton:,.0f}, {skeleton - max(stream, mma):,.0f} more "
        f"than the longer one. Softmax and what is exchanged add {decode - skeleton:,.0f}, which makes "
        f"{decode:,.0f}."
    )
