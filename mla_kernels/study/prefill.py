"""Figures and tables of the notebook on prefill. Each figure returns the data it drew."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import numpy as np
import pandas as pd

from mla_kernels.measure import figures
from mla_kernels.measure.calls import PrefillWorkload
from mla_kernels.measure.experiments import prefill as experiment
from mla_kernels.measure.records import Point, Record

from . import style
from .definitions_of_prefill import MATH, OURS, duels, variant_gains, whole
from .definitions_of_prefill import varlen_fraction as fractions

NAMES = {
    OURS: "mla_prefill",
    experiment.FA3: "FA3",
    experiment.CUDNN: "cuDNN",
    experiment.FA2: "FA2 (torch)",
    MATH: "PyTorch",
}
LINES = dict(zip(NAMES, ("-", "--", "--", ":", ":"), strict=True))


def dims(workload: PrefillWorkload) -> str:
    """Head dims, as tables name them: "64", "192/128"."""
    same = workload.d_qk == workload.d_v
    return f"{workload.d_qk}" if same else f"{workload.d_qk}/{workload.d_v}"


def caption(record: Record) -> str:
    """Device, date, commit."""
    return f"one {record.device.name}, {record.run.utc:%Y-%m-%d}, commit {record.run.commit[:10]}"


def table(record: Record, mode: str = "burst") -> pd.DataFrame:
    """One row a workload with peers beside ours: axes, TFLOP/s by name, the best peer, our speed over it."""
    rows = []
    for duel in duels(record, mode, lambda workload: True):
        w = duel.ours.workload
        row = {"call": figures.prefill_label(w), "b": w.b, "s": w.mean_len, "h": w.h_q, "d": dims(w)}
        row |= {"causal": w.causal, "ragged": w.ragged, "dtype": w.dtype, "whole": whole(w)}
        row |= {"us": duel.ours.per_call_us}
        for point in (duel.ours, *duel.peers):
            row[NAMES[point.implementation]] = figures.tflops(point)
        row |= {"best": NAMES[duel.best.implementation], "ratio": duel.ratio}
        rows.append(row)
    return pd.DataFrame(rows)


def summary(record: Record) -> pd.DataFrame:
    """Speed over the best peer by head dims, over whole sequences: points, least, median, greatest, ahead."""
    data = table(record)
    grouped = data[data.whole].groupby("d", sort=False).ratio
    rows = grouped.agg(points="size", worst="min", median="median", best="max").reset_index()
    rows["ahead at"] = grouped.agg(lambda ratios: int((ratios > 1).sum())).to_numpy()
    return rows


def _timed(record: Record, **axes) -> list[Point]:
    """Timed bursts at dense bf16 workloads of these axes: b, h, d, s, causal."""
    found = []
    for point in record.points:
        w = point.workload
        plain = (point.status, point.mode, w.ragged, w.dtype, whole(w)) == (
            "ok",
            "burst",
            False,
            "bf16",
            True,
        )
        have = {"b": w.b, "h": w.h_q, "d": dims(w), "s": w.mean_len, "causal": w.causal}
        if plain and all(have[axis] == value for axis, value in axes.items()):
            found.append(point)
    return found


def gigabytes(point: Point) -> float | None:
    """Queries, keys, values, output and whatever else a call needed, in 10^9 bytes."""
    if point.memory is None:
        return None
    return (figures.moved_bytes(point.workload) + point.memory.workspace_bytes) / 1e9


def against_chapter(
    record: Record, said: Mapping[tuple[int, int], tuple[float, float, float]]
) -> pd.DataFrame:
    """One row for each of the chapter's (batch, length), 32 heads of 64: what it says, what was measured.

    ``said``: its TFLOP/s, ms and GB. "its FLOP / ms": the call's FLOP over its own time.
    """
    rows = []
    for (b, s), (tflops, ms, gb) in said.items():
        points = {p.implementation: p for p in _timed(record, b=b, s=s, h=32, d="64", causal=False)}
        if OURS not in points:
            continue
        own = points[OURS]
        row = {"b": b, "s": s, "its TFLOP/s": tflops, "its FLOP / ms": figures.flop(own.workload) / ms / 1e9}
        row |= {name: figures.tflops(points[key]) for key, name in NAMES.items() if key in points}
        row |= {"its ms": ms, "ms": own.per_call_us / 1e3, "its GB": gb, "GB": gigabytes(own) or np.nan}
        rows.append(row)
    return pd.DataFrame(rows)


def bandwidths(record: Record, said: Mapping[tuple[int, int, int], float]) -> pd.DataFrame:
    """The chapter's GB/s by (batch, length, heads) of 64 columns, beside the least traffic over our time."""
    rows = []
    for (b, s, h), its in said.items():
        for point in _timed(record, b=b, s=s, h=h, d="64", causal=False):
            if point.implementation == OURS:
                w = point.workload
                row = {"b": b, "s": s, "h": h, "FLOP/B": figures.intensity(w), "its GB/s": its}
                row |= {"GB/s": 1e3 * figures.tb_s(point), "us": point.per_call_us}
                rows.append(row | {"of the matmul": figures.compute_share(record, point)})
    return pd.DataFrame(rows)


def plot_chapter(audit: pd.DataFrame, record: Record) -> pd.DataFrame:
    """TFLOP/s at the chapter's rows: what it says, ours, the peers'."""
    figure, axes = style.new_figure(width=9.5)
    bars = {"its TFLOP/s": "the chapter's FlashMLA"} | {
        name: name for name in NAMES.values() if name in audit
    }
    colours = {name: style.COLOURS[key] for key, name in NAMES.items()} | {"its TFLOP/s": "#bbbbbb"}
    for offset, (column, name) in enumerate(bars.items()):
        places = np.arange(len(audit)) + (offset - (len(bars) - 1) / 2) * 0.13
        axes.bar(places, audit[column], width=0.12, color=colours[column], label=name)
    axes.set_xticks(range(len(audit)), [f"b {row.b}, s {row.s}" for row in audit.itertuples()])
    axes.set(ylabel="TFLOP/s", title="The chapter's headline rows: 32 heads, d 64")
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside upper center", ncols=6, fontsize=8)
    style.show(figure, caption(record))
    return audit


def plot_lengths(record: Record, causal: bool) -> pd.DataFrame:
    """TFLOP/s against the length, b 1, 32 heads, a panel for each head dim."""
    figure, axes = style.new_figure(2, width=10.5, sharey=True)
    rows = []
    for panel, d in zip(axes, ("64", "128"), strict=True):
        for key, name in NAMES.items():
            points = [p for p in _timed(record, b=1, h=32, d=d, causal=causal) if p.implementation == key]
            points.sort(key=lambda point: point.workload.mean_len)
            x, y = [p.workload.mean_len for p in points], [figures.tflops(p) for p in points]
            style_of = {"color": style.COLOURS[key], "linestyle": LINES[key]}
            panel.plot(x, y, marker="o", label=name, **style_of)
            rows += [{"d": d, "s": s, "name": name, "tflops": rate} for s, rate in zip(x, y, strict=True)]
        style.plain_log_ticks(panel, sorted({row["s"] for row in rows}))
        matmul = figures.find_ceiling(record, figures.MATMUL).value
        panel.axhline(matmul, color=style.CEILING, linestyle="--", linewidth=1.1)
        panel.annotate(f"matmul {matmul:.0f}", (512, matmul), (0, 3), textcoords="offset points", fontsize=8)
        panel.set(xlabel="tokens", title=f"d {d}, {'causal' if causal else 'full'}")
    axes[0].set(ylabel="TFLOP/s", ylim=(0, None))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=5, fontsize=8)
    style.show(figure, caption(record))
    return pd.DataFrame(rows)


def plot_ratios(record: Record) -> pd.DataFrame:
    """Share of the points at which ours has at most a ratio to the best peer, by head dims."""
    data = table(record)
    data = data[data.whole]
    figure, axes = style.new_figure(width=8.5)
    palette = style.sns.color_palette("colorblind")
    for colour, (d, part) in zip(palette, data.groupby("d", sort=False), strict=False):
        ordered = np.sort(part.ratio)
        share = np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(ordered, share, where="post", color=colour, marker=".", label=f"d {d}, {len(part)} points")
    axes.axvline(1, color=style.CEILING, linewidth=1.1)
    axes.axvline(0.95, color=style.ALARM, linewidth=1.1, linestyle="-.", label="never below: 0.95")
    style.ratio_ticks(axes, data.ratio.to_numpy())
    axes.set(
        xlabel="speed over the best peer at the point",
        ylabel="share of points up to there",
        title="Right of one: faster than every peer",
    )
    axes.legend(loc="lower right")
    style.show(figure, caption(record))
    return data


def plot_varlen(record: Record) -> pd.DataFrame:
    """TFLOP/s on ragged sequences over those on as many tokens evenly, point by point."""
    rows = [{"call": where.split(", ", 1)[1], "fraction": value} for value, where in fractions(record)]
    data = pd.DataFrame(rows).sort_values("fraction").reset_index(drop=True)
    drawn = data.call.str.contains("lognormal")
    figure, axes = style.new_figure(width=9.5, height=max(2.6, 0.6 + 0.22 * len(data)))
    colours = [style.COLOURS[OURS] if varied else style.COLOURS[experiment.CUDNN] for varied in drawn]
    axes.barh(data.index, data.fraction, color=colours)
    axes.axvline(0.95, color=style.ALARM, linewidth=1.1, linestyle="-.")
    axes.set_yticks(data.index, data.call, fontsize=7.5)
    axes.set(
        xlabel="of the TFLOP/s of even sequences (line: 0.95)",
        title="Ragged batches (blue: lengths differ, orange: one sequence)",
    )
    style.show(figure, caption(record))
    return data.assign(lengths_differ=drawn)


def variants(record: Record) -> pd.DataFrame:
    """What each change of the kernel of d 64 does to its speed, by length and mask. May be empty."""
    rows = [
        {"change": change, "s": p.workload.mean_len, "causal": p.workload.causal, "speed": gain}
        for change, gain, p in variant_gains(record)
    ]
    return pd.DataFrame(rows, columns=["change", "s", "causal", "speed"])


def plot_variants(record: Record) -> pd.DataFrame:
    """Speed with a change over that of what ships, against the length: d 64, b 1, 32 heads, not causal."""
    data = variants(record)
    if data.empty:
        return data
    figure, axes = style.new_figure(width=8.5)
    palette = style.sns.color_palette("colorblind")
    for colour, (change, part) in zip(palette, data[~data.causal].groupby("change"), strict=False):
        axes.plot(part.s, part.speed, marker="o", color=colour, label=change)
    axes.axhline(1, color=style.CEILING, linewidth=1.1)
    style.plain_log_ticks(axes, sorted(data.s.unique()))
    axes.set(
        xlabel="tokens", ylabel="speed over what ships", title="One choice of the kernel changed, d 64, full"
    )
    figure.legend(loc="outside right center")
    style.show(figure, caption(record))
    return data


def sustained(record: Record) -> pd.DataFrame:
    """Under load, a row an implementation and workload: TFLOP/s in a burst and held, W, MHz, mJ per token."""
    burst = {
        (p.workload, p.implementation): p for p in record.points if (p.mode, p.status) == ("burst", "ok")
    }
    rows = []
    for point in record.points:
        if (point.mode, point.status) != ("sustained", "ok"):
            continue
        joules = figures.joules_per_token(point)
        row = {"call": figures.prefill_label(point.workload), "name": NAMES[point.implementation]}
        row |= {"burst TFLOP/s": figures.tflops(burst[point.workload, point.implementation])}
        row |= {"TFLOP/s": figures.tflops(point), "W": point.sustained.mean_power_w}
        row |= {"MHz": statistics.median(point.sustained.sm_mhz_samples or [0])}
        rows.append(row | {"mJ per token": np.nan if joules is None else 1e3 * joules})
    return pd.DataFrame(rows)


def plot_energy(record: Record) -> pd.DataFrame:
    """Energy of one layer's attention for one query token, a panel for each workload under load."""
    data = sustained(record)
    calls = list(dict.fromkeys(data.call))
    figure, axes = style.new_figure(len(calls), width=3.6 * len(calls) + 0.6, height=3.6)
    by_name = {name: style.COLOURS[key] for key, name in NAMES.items()}
    for panel, call in zip(np.atleast_1d(axes), calls, strict=True):
        part = data[data.call == call]
        bars = panel.bar(
            part.name, part["mJ per token"], color=[by_name[name] for name in part.name], width=0.6
        )
        panel.bar_label(bars, [f"{rate:.0f} TF" for rate in part["TFLOP/s"]], fontsize=8, padding=2)
        panel.grid(visible=False, axis="x")
        panel.margins(y=0.12)
        panel.set_title(call, fontsize=9)
    np.atleast_1d(axes)[0].set(ylabel="mJ per token and layer (above: TFLOP/s)")
    style.show(figure, caption(record))
    return data


def plot_memory(record: Record, said: Mapping[tuple[int, int], tuple[float, float, float]]) -> pd.DataFrame:
    """Bytes that a call needs against the length, b 1, 32 heads of 64, beside the chapter's."""
    rows = []
    for key, name in NAMES.items():
        for point in _timed(record, b=1, h=32, d="64", causal=False):
            if point.implementation == key and (gb := gigabytes(point)):
                rows.append({"s": point.workload.mean_len, "name": name, "gb": gb})
    rows += [{"s": s, "name": "the chapter's", "gb": gb} for (b, s), (_, _, gb) in said.items() if b == 1]
    data = pd.DataFrame(rows).sort_values("s").reset_index(drop=True)
    figure, axes = style.new_figure(width=8)
    colours = {name: style.COLOURS[key] for key, name in NAMES.items()} | {"the chapter's": "#222222"}
    lines = {name: LINES[key] for key, name in NAMES.items()} | {"the chapter's": "-."}
    for name, part in data.groupby("name", sort=False):
        axes.plot(part.s, part.gb, marker="o", color=colours[name], linestyle=lines[name], label=name)
    style.plain_log_ticks(axes, sorted(data.s.unique()))
    style.plain_log_ticks(axes, [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30], axis="y")
    axes.set(xlabel="tokens", ylabel="GB", title="Memory of one call: 32 heads, d 64")
    axes.legend()
    style.show(figure, caption(record))
    return data


def errors(record: Record) -> pd.DataFrame:
    """Largest relative L2 error against fp64 by head dims and type: ours, and the peers' where they ran."""
    rows = [
        {
            "d": dims(p.workload),
            "dtype": p.workload.dtype,
            "name": NAMES[p.implementation],
            "error": p.error.out_rel_l2,
        }
        for p in record.points
        if p.status == "ok" and p.mode == "burst" and p.implementation in NAMES
    ]
    by = pd.DataFrame(rows).pivot_table("error", ["d", "dtype"], "name", "max", sort=False)
    return by[[name for name in NAMES.values() if name in by]].reset_index()


def host_us(record: Record) -> dict[str, float]:
    """Host time of one eager call in µs by name: median over the points where it was measured."""
    times: dict[str, list[float]] = {}
    for point in record.points:
        us = figures.host_us(point)
        if point.mode == "burst" and us is not None and point.implementation in NAMES:
            times.setdefault(NAMES[point.implementation], []).append(us)
    return {name: statistics.median(found) for name, found in times.items()}


def worst(record: Record, count: int = 8) -> pd.DataFrame:
    """The points at which ours is least ahead, or most behind."""
    data = table(record).sort_values("ratio").head(count)
    columns = ["call", "us", *(name for name in NAMES.values() if name in data), "best", "ratio"]
    return data[columns].reset_index(drop=True)
