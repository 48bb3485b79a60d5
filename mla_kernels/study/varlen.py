"""Figures and tables of the notebook on variable lengths. Each figure returns the data it drew."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mla_kernels.measure import figures
from mla_kernels.measure.records import ALTERNATIVE, Record, Workload
from mla_kernels.measure.workloads import spread_evenly

from . import style
from .definitions_of_sequences import varied

NAMES = {
    "padded": "PyTorch, padded and masked",
    "loop": "PyTorch, one by one",
    "padded_kernel": "this kernel, padded",
    "kernel_loop": "this kernel, one by one",
}
KINDS = ("explicit", "lognormal", "normal")


def in_words(workload: Workload) -> str:
    """The batch, as an axis names it."""
    lengths = workload.lengths
    if workload.lengths_kind != "explicit":
        return f"{workload.lengths_kind}, b {workload.b}"
    if len(set(lengths)) == 1:
        return f"{workload.b} × {lengths[0]}"
    if workload.b <= 8:
        return f"{min(lengths)} … {max(lengths)}, b {workload.b}"
    return f"listed, mean {np.mean(lengths):.0f}, b {workload.b}"


def table(record: Record) -> pd.DataFrame:
    """One row a batch whose lengths differ (or that the chapter lists): µs, speed over each alternative.

    ``stretch``: longest over mean length. ``penalty``: our time over that of the same tokens evenly, less 1.
    """
    timed = {(p.workload, p.implementation): p for p in record.points if p.status == "ok"}
    even = {p.workload: p for p in varied(record, "uniform")}
    rows = []
    for point in varied(record, *KINDS):
        w = point.workload
        row = {"batch": in_words(w), "h_q": w.h_q, "b": w.b, "kind": w.lengths_kind}
        row |= {"stretch": max(w.lengths) / np.mean(w.lengths), "us": point.per_call_us}
        for name in NAMES:
            other = timed.get((w, ALTERNATIVE + name))
            row[name] = figures.speed_ratio(point, other) if other else np.nan
        evenly = even.get(spread_evenly(w))
        row["penalty"] = point.per_call_us / evenly.per_call_us - 1 if evenly else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def plot_speedups(record: Record) -> pd.DataFrame:
    """How many times as fast as each alternative, batch by batch, a panel for each number of heads."""
    data = table(record)
    heads = sorted(data.h_q.unique())
    figure, axes = style.new_figure(len(heads), width=10.5, height=5.2, sharey=True, sharex=True)
    colours = dict(zip(NAMES, style.sns.color_palette("colorblind"), strict=False))
    for panel, h_q in zip(np.atleast_1d(axes), heads, strict=True):
        part = data[data.h_q == h_q].reset_index(drop=True)
        for offset, name in enumerate(NAMES):
            places = part.index + (offset - 1.5) * 0.2
            panel.barh(places, part[name], height=0.18, color=colours[name], label=NAMES[name])
        panel.set_yticks(part.index, part.batch)
        panel.axvline(1, color=style.CEILING, linewidth=1.1)
        style.plain_log_ticks(panel, [1, 2, 4, 8, 16, 32, 64])
        panel.set(xlabel="times as fast as the alternative", title=f"{h_q} heads")
    np.atleast_1d(axes)[0].invert_yaxis()
    np.atleast_1d(axes)[-1].legend(loc="lower right", fontsize=8)
    style.show(figure, record)
    return data


def plot_padding(record: Record) -> pd.DataFrame:
    """Time that padding costs the same kernel against what it adds in tokens."""
    data = table(record)
    figure, axes = style.new_figure(width=7.0)
    for (h_q, part), marker in zip(data.groupby("h_q"), "os", strict=False):
        axes.scatter(part.stretch, part.padded_kernel, marker=marker, label=f"{h_q} heads", zorder=3)
    span = np.array([1.0, data.stretch.max() * 1.1])
    axes.plot(span, span, color=style.ALARM, linestyle="-.", linewidth=1.1, label="predicted: longest / mean")
    style.plain_log_ticks(axes, [1, 2, 4, 8, 16])
    style.plain_log_ticks(axes, [1, 2, 4, 8, 16], axis="y")
    axes.set(
        xlabel="longest over mean length",
        ylabel="padded time over unpadded",
        title="Padding costs its tokens",
    )
    axes.legend()
    style.show(figure, record)
    return data
