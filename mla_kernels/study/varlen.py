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
    handles, names = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8)
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
        title="Padding costs most of its tokens",
    )
    axes.legend()
    style.show(figure, record)
    return data


def plot_batches(record: Record) -> pd.DataFrame:
    """The lengths of each batch, longest first: what is above a curve is padding."""
    figure, axes = style.new_figure(width=8.0)
    rows, seen = [], set()
    for point in varied(record, *KINDS):
        w = point.workload
        if (name := in_words(w)) in seen:
            continue
        seen.add(name)
        ordered = np.sort(w.lengths)[::-1] / max(w.lengths)
        axes.step(np.linspace(0, 1, w.b, endpoint=False), ordered, where="post", label=name, linewidth=1.3)
        rows.append({"batch": name, "b": w.b, "mean": np.mean(w.lengths), "filled": ordered.mean()})
    axes.set(
        xlabel="share of the batch, longest first",
        ylabel="length over the longest",
        xlim=(0, 1),
        ylim=(0, 1.05),
        title="What padding would fill",
    )
    axes.legend(fontsize=7, ncols=2)
    style.show(figure, record)
    return pd.DataFrame(rows)


def plot_penalty(record: Record) -> pd.DataFrame:
    """Time over that of the same tokens spread evenly, less one."""
    data = table(record).dropna(subset=["penalty"]).sort_values("penalty").reset_index(drop=True)
    figure, axes = style.new_figure(width=8.0, height=5.0)
    colours = [style.COLOURS["mla_kernels"] if h == 16 else style.COLOURS["block:skeleton"] for h in data.h_q]
    axes.barh(data.index, 100 * data.penalty, color=colours)
    axes.set_yticks(data.index, data.batch + ", " + data.h_q.astype(str) + " heads", fontsize=7.5)
    axes.set(
        xlabel="time over the same tokens spread evenly, % more",
        title="What uneven lengths cost (blue: 16 heads)",
    )
    style.show(figure, record)
    return data


def host_times(record: Record) -> pd.DataFrame:
    """Host time of one eager decode of the batch in µs, by batch and way."""
    rows = []
    for point in record.points:
        us = figures.host_us(point) if point.status == "ok" else None
        if us is not None and point.mode == "burst":
            way = point.implementation.removeprefix(ALTERNATIVE)
            rows.append({"b": point.workload.b, "h_q": point.workload.h_q, "way": way, "host_us": us})
    return pd.DataFrame(rows)


def plot_host(record: Record) -> pd.DataFrame:
    """Median host time of an eager call against the batch."""
    data = host_times(record)
    figure, axes = style.new_figure(width=7.5)
    colours = dict(zip(("mla_kernels", *NAMES), style.sns.color_palette("colorblind"), strict=False))
    for way, part in data.groupby("way", sort=False):
        middle = part.groupby("b").host_us.median()
        axes.plot(middle.index, middle, marker="o", color=colours[way], label=NAMES.get(way, "this kernel"))
    style.plain_log_ticks(axes, sorted(data.b.unique()))
    style.plain_log_ticks(axes, [10, 30, 100, 300, 1000, 3000, 10000], axis="y")
    axes.set(xlabel="sequences", ylabel="host time of an eager call, µs", title="What the host spends")
    axes.legend(fontsize=8)
    style.show(figure, record)
    return data
