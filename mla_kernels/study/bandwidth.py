"""Figures and tables of the bandwidth notebook. Each figure returns the data it drew."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mla_kernels.measure import figures
from mla_kernels.measure.figures import DECODE, label
from mla_kernels.measure.records import Record

from . import fits, style
from .tables import frame

STREAM = "block:stream"


def cold(record: Record) -> pd.DataFrame:
    """Bursts whose KV was outside the L2, of equal lengths and one query token."""
    keep = [fits.is_cold(record, point) for point in record.points if point.status == "ok"]
    return frame(record)[keep].query("mode == 'burst' and lengths == 'uniform' and s_q == 1")


def plot_fixed_cost(record: Record) -> pd.DataFrame:
    """Time against bytes for decode and its loads alone, with the fitted lines."""
    figure, axes = style.new_figure()
    parts = []
    for implementation in (DECODE, STREAM):
        fit, points = (
            fits.fit_fixed_cost(record, implementation),
            fits.fixed_cost_points(record, implementation),
        )
        part = pd.DataFrame(
            {
                "implementation": implementation,
                "kv": [p.workload.mean_len for p in points],
                "mb": [figures.point_bytes(p) / 1e6 for p in points],
                "us": [p.per_call_us for p in points],
            }
        )
        parts.append(part.assign(fitted_us=[fit.us(mb) for mb in part.mb]))
        colour = style.COLOURS[implementation]
        text = f"{style.LABELS[implementation]}: {fit.fixed_us:.1f} µs + bytes / {fit.tb_s:.2f} TB/s"
        axes.scatter(
            part.mb, part.us, color=colour, marker=style.MARKERS[implementation], label=text, zorder=3
        )
        span = np.geomspace(part.mb.min() / 2, part.mb.max() * 1.2, 100)
        axes.plot(span, fit.us(span), color=colour, linewidth=1)
    read = figures.find_ceiling(record, figures.HBM_READ).value
    axes.plot(
        span,
        span / read,
        color=style.CEILING,
        linestyle="--",
        linewidth=1.1,
        label=f"bytes / {read:.2f} TB/s (ceiling)",
    )
    style.plain_log_ticks(axes, [5, 10, 20, 50, 100, 200, 500])
    style.plain_log_ticks(axes, [1, 2, 5, 10, 20, 50, 100, 200], axis="y")
    axes.set(
        xlabel="bytes moved, MB",
        ylabel="time of a call, µs",
        title="A call costs a constant and its bytes",
    )
    axes.legend()
    style.show(figure, record)
    return pd.concat(parts, ignore_index=True)


def _draw_sweep(axes: Axes, record: Record, data: pd.DataFrame, x: str, fit: fits.FixedCost) -> None:
    for implementation, part in data.groupby("implementation", sort=False):
        axes.plot(
            part[x],
            part.tb_s,
            color=style.COLOURS[implementation],
            marker=style.MARKERS[implementation],
            label=style.LABELS[implementation],
        )
    decode = data[data.implementation == DECODE]
    axes.plot(
        decode[x],
        [fit.rate(mb) for mb in decode.mb],
        color=style.ALARM,
        linestyle="-.",
        linewidth=1.1,
        label="predicted by the fit",
    )
    style.ceiling(axes, figures.find_ceiling(record, figures.HBM_READ).value, "read-only HBM, measured")
    style.plain_log_ticks(
        axes, sorted(decode[x].unique()), labels=[_short(v) for v in sorted(decode[x].unique())]
    )
    axes.set(ylim=(0, 5.2), ylabel="TB/s")


def _short(value: float) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def sweep(record: Record, x: str, **fixed: int) -> pd.DataFrame:
    """Cold decode and stream points along ``x`` ("b", "kv" or "h_q") at the ``fixed`` other axes.

    ``predicted`` is the TB/s that the fitted fixed cost leaves.
    """
    data = cold(record)
    for axis, value in fixed.items():
        data = data[data[axis] == value]
    fit = fits.fit_fixed_cost(record)
    return data.assign(predicted=[fit.rate(mb) for mb in data.mb]).sort_values(
        ["implementation", x], ascending=[False, True]
    )


def plot_batch(record: Record) -> pd.DataFrame:
    """TB/s against batch at 4,096 tokens and 16 heads."""
    data = sweep(record, "b", kv=4096, h_q=16)
    figure, axes = style.new_figure()
    _draw_sweep(axes, record, data, "b", fits.fit_fixed_cost(record))
    axes.set(
        xlabel="sequences in the batch (4,096 tokens each)",
        title="Bandwidth grows with the batch, later than a fixed cost predicts",
    )
    axes.legend(loc="lower right")
    style.show(figure, record)
    return data


def plot_length(record: Record) -> pd.DataFrame:
    """TB/s against length for sixteen sequences and for one."""
    figure, panels = style.new_figure(2, width=10, sharey=True)
    parts = []
    for axes, b in zip(panels, (16, 1), strict=True):
        data = sweep(record, "kv", b=b, h_q=16)
        _draw_sweep(axes, record, data, "kv", fits.fit_fixed_cost(record))
        axes.set(xlabel="cached tokens a sequence", title=f"{b} sequence{'s' if b > 1 else ''}")
        axes.tick_params(axis="x", labelsize=8)
        parts.append(data)
    panels[0].legend(loc="upper left", bbox_to_anchor=(0, 0.88))
    style.show(figure, record)
    return pd.concat(parts)


def plot_heads(record: Record) -> pd.DataFrame:
    """TB/s against heads at one batch and length: the same KV, more arithmetic."""
    data = sweep(record, "h_q", b=128, kv=4096)
    data = data[data.h_q <= 64]
    figure, axes = style.new_figure()
    for implementation, part in data.groupby("implementation", sort=False):
        axes.plot(
            part.h_q,
            part.tb_s,
            color=style.COLOURS[implementation],
            marker=style.MARKERS[implementation],
            label=style.LABELS[implementation],
        )
    style.ceiling(axes, figures.find_ceiling(record, figures.HBM_READ).value, "read-only HBM, measured")
    style.plain_log_ticks(axes, sorted(data.h_q.unique()))
    axes.set(
        ylim=(0, 5.2), ylabel="TB/s", xlabel="query heads", title="How much bandwidth the arithmetic costs"
    )
    axes.legend(loc="lower left")
    style.show(figure, record)
    return data


def l2_effect(record: Record) -> pd.DataFrame:
    """Decode with the same KV again and again, beside KV that comes from HBM: TB/s of both."""
    data = frame(record).query(f"implementation == '{DECODE}' and mode == 'burst' and lengths == 'uniform'")
    data = data.query("kv == 4096 and h_q == 16 and s_q == 1")
    again = data[data.kv_sets == 1].set_index("b")
    fresh = data[data.kv_sets > 1].set_index("b")
    joined = fresh[["kv_mb", "us", "tb_s"]].join(again[["us", "tb_s"]].add_suffix("_same"), how="inner")
    return joined.assign(speedup=joined.us / joined.us_same).reset_index().sort_values("b")


def plot_l2(record: Record) -> pd.DataFrame:
    """Apparent TB/s with KV from HBM and with the same KV every call."""
    data = l2_effect(record)
    figure, axes = style.new_figure()
    axes.plot(
        data.kv_mb, data.tb_s_same, color=style.COLOURS[STREAM], marker="s", label="the same KV every call"
    )
    axes.plot(data.kv_mb, data.tb_s, color=style.COLOURS[DECODE], marker="o", label="another KV every call")
    l2 = record.device.l2_bytes / 1e6
    axes.axvline(l2, color=style.CEILING, linestyle=":", linewidth=1.1)
    axes.annotate(
        f"L2: {l2:.0f} MB",
        (l2, 0.03),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color=style.CEILING,
    )
    style.ceiling(axes, figures.find_ceiling(record, figures.HBM_READ).value, "read-only HBM, measured")
    style.plain_log_ticks(axes, list(data.kv_mb), labels=[f"{mb:.0f}" for mb in data.kv_mb])
    axes.set(
        ylim=(0, None),
        xlabel="KV of the call, MB",
        ylabel="KV bytes / time, TB/s",
        title="A benchmark that rereads one KV measures the L2",
    )
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
    style.show(figure, record)
    return data


def uneven(record: Record) -> pd.DataFrame:
    """Varying lengths against the same tokens spread evenly: ``penalty`` is the extra time."""
    data = frame(record).query(f"implementation == '{DECODE}' and mode == 'burst'")
    drawn = data[data.lengths != "uniform"]
    rows = []
    for point in drawn.itertuples():
        even = data[
            (data.lengths == "uniform") & (data.h_q == point.h_q) & np.isclose(data.kv_mb, point.kv_mb)
        ]
        if len(even):
            us = even.us.iloc[0]
            rows.append(
                {
                    "lengths": point.lengths,
                    "h_q": point.h_q,
                    "µs": point.us,
                    "µs, spread evenly": us,
                    "penalty": point.us / us - 1,
                }
            )
    return pd.DataFrame(rows)


def counters(record: Record) -> pd.DataFrame:
    """Bytes counted by the definition and read by the hardware, one row a profiled call; may be empty."""
    rows = []
    for point in record.points:
        if point.counters:
            least, read = figures.moved_bytes(point.workload), point.counters
            rows.append(
                {
                    "call": label(point).removeprefix("burst, "),
                    "counted, MB": least / 1e6,
                    "read from HBM, MB": read.get("dram_read_bytes", np.nan) / 1e6,
                    "read / counted": read.get("dram_read_bytes", np.nan) / least,
                    "L2 to SMs / KV": read.get("l2_to_sm_bytes", np.nan) / figures.kv_bytes(point.workload),
                    "tensor pipe active, %": read.get("tensor_pipe_active_pct", np.nan),
                }
            )
    return pd.DataFrame(rows)


def counters_missing(record: Record) -> list[str]:
    """Why calls that were to be profiled have no counters, each reason once."""
    return sorted({point.counters_reason for point in record.points if point.counters_reason})
