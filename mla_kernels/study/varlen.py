"""Figures and tables of the notebook on variable lengths. Each figure returns the data it drew."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from mla_kernels.measure import figures
from mla_kernels.measure.experiments import varlen as experiment
from mla_kernels.measure.records import ALTERNATIVE, PEER, Record, Workload
from mla_kernels.measure.workloads import spread_evenly

from . import style
from .definitions_of_sequences import speedup, varied

NAMES = {
    "padded": "PyTorch, padded and masked",
    "loop": "PyTorch, one by one",
    "padded_kernel": "this kernel, padded",
    "kernel_loop": "this kernel, one by one",
}
TRADITIONAL = ("padded", "loop")
KINDS = ("explicit", "lognormal", "normal")
PAGE = 64


@functools.cache
def _drawn() -> dict[tuple[int, ...], str]:
    """Name of each list of lengths that the experiment draws by itself (a record calls them explicit)."""
    every = experiment.workloads(experiment.HEADS[0], "full")
    return {w.lengths: what for what, w in every if w.lengths_kind == "explicit" and w.b > 8}


def in_words(workload: Workload) -> str:
    """The batch, as an axis names it."""
    lengths = workload.lengths
    if workload.lengths_kind != "explicit":
        return f"{workload.lengths_kind}, b {workload.b}"
    if len(set(lengths)) == 1:
        return f"{workload.b} × {lengths[0]}"
    if workload.b <= 8:
        return f"{min(lengths)} … {max(lengths)}, b {workload.b}"
    return f"{_drawn().get(lengths, 'listed')}, mean {np.mean(lengths):.0f}, b {workload.b}"


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


def against_chapter(record: Record, said: Mapping[str, tuple[float, float, float]]) -> pd.DataFrame:
    """One row for each of the chapter's batches and number of heads: what it says, and what was measured.

    ``said``: by batch as ``in_words`` has it, its time in ms, its speed over "traditional" handling and its
    "memory efficiency". GB/s: the bytes of the cache over a time. "filled": tokens over what pages of 64, or
    padding to the longest, hold.
    """
    rows = []
    for point in varied(record, "explicit"):
        w = point.workload
        if (name := in_words(w)) not in said:
            continue
        ms, ratio, memory = said[name]
        tokens, pages = sum(w.lengths), sum(-(-length // PAGE) for length in w.lengths)
        rows.append(
            {
                "batch": name,
                "h_q": w.h_q,
                "its ms": ms,
                "ms": point.per_call_us / 1e3,
                "its GB/s": figures.kv_bytes(w) / ms / 1e6,
                "GB/s": figures.kv_bytes(w) / point.per_call_us / 1e3,
                "its speed-up": ratio,
                "speed-up": speedup(record, point, *TRADITIONAL),
                "its memory": memory,
                "filled, pages": tokens / (pages * PAGE),
                "filled, padded": tokens / (w.b * max(w.lengths)),
            }
        )
    return pd.DataFrame(rows)


def against_peers(record: Record) -> pd.DataFrame:
    """One row for each batch and peer timed beside ours: µs, and our speed over the peer's. May be empty."""
    rows = []
    for point in varied(record, *KINDS):
        for name in experiment.BESIDE:
            if other := figures.counterpart(record, point, name):
                row = {"batch": in_words(point.workload), "h_q": point.workload.h_q, "us": point.per_call_us}
                row |= {"peer": style.LABELS[name], "its us": other.per_call_us}
                rows.append(row | {"ratio": figures.speed_ratio(point, other)})
    return pd.DataFrame(rows, columns=["batch", "h_q", "us", "peer", "its us", "ratio"])


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
        title="Padding costs at most the tokens that it adds",
    )
    axes.legend()
    style.show(figure, record)
    return data


def plot_batches(record: Record) -> pd.DataFrame:
    """The lengths of each batch, longest first: what is above a curve is padding."""
    figure, axes = style.new_figure(width=9.5)
    rows, seen = [], set()
    palette, dashes = style.sns.color_palette("colorblind", 6), ("-", "--")
    for point in varied(record, *KINDS):
        w = point.workload
        if (name := in_words(w)) in seen:
            continue
        look = {"color": palette[len(seen) % 6], "linestyle": dashes[len(seen) // 6 % 2], "linewidth": 1.3}
        seen.add(name)
        ordered = np.sort(w.lengths)[::-1] / max(w.lengths)
        axes.stairs(ordered, np.linspace(0, 1, w.b + 1), baseline=None, label=name, **look)
        rows.append({"batch": name, "b": w.b, "mean": np.mean(w.lengths), "filled": ordered.mean()})
    axes.set(
        xlabel="share of the batch, longest first",
        ylabel="length over the longest",
        xlim=(0, 1),
        ylim=(0, 1.05),
        title="What padding would fill",
    )
    figure.legend(fontsize=8, loc="outside right center")
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
    """Host time of one eager decode of the batch in µs, by batch and way. Peers are left to their study."""
    rows = []
    for point in record.points:
        if point.status != "ok" or point.implementation.startswith(PEER):
            continue
        us = figures.host_us(point)
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
