"""What a call costs besides time, beside other kernels: load, energy, error, host time, memory.

Each figure returns the data it drew.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mla_kernels.measure import figures
from mla_kernels.measure.figures import DECODE, label
from mla_kernels.measure.records import Point, Record

from . import style
from .duels import absorbed_error, duels, gpu_bytes
from .style import COLOURS, LABELS


def under_load(record: Record) -> pd.DataFrame:
    """Ours and the peers at the workloads that were held for seconds, in both modes.

    ``share``: the floor of the mode (the slower of bytes and FLOP at the ceilings) over the time.
    """
    held = {
        w: f"h_q {w.h_q}, s_q {w.s_q}\nb {w.b}, kv {w.mean_len:g}"
        for w in (p.workload for p in record.points if (p.mode, p.status) == ("sustained", "ok"))
    }
    rows = []
    for point in record.points:
        if (
            point.workload in held
            and point.status == "ok"
            and point.is_attention
            and point.implementation in LABELS
        ):
            joules = figures.joules_per_token(point)
            rows.append(
                {
                    "workload": held[point.workload],
                    "implementation": point.implementation,
                    "mode": point.mode,
                    "us": point.per_call_us,
                    "share": figures.floor_us(record, point.workload, point.mode) / point.per_call_us,
                    "power_w": point.sustained.mean_power_w if point.sustained else None,
                    "mj_per_token": None if joules is None else 1e3 * joules,
                }
            )
    table = pd.DataFrame(rows).astype({"power_w": float, "mj_per_token": float})
    loaded = set(table[table["mode"] == "sustained"].implementation)
    return table[table.implementation.isin(loaded)]


def _bars(axes: Axes, data: pd.DataFrame, value: str) -> None:
    """Groups of bars: a group a workload, a bar an implementation."""
    names = [name for name in LABELS if (data.implementation == name).any()]
    workloads = list(dict.fromkeys(data.workload))
    cells = data.pivot(index="workload", columns="implementation", values=value).reindex(workloads)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        x = np.arange(len(workloads)) + (i - (len(names) - 1) / 2) * width
        axes.bar(x, cells[name], width, color=COLOURS[name], label=LABELS[name])
    axes.set_xticks(range(len(workloads)), workloads, fontsize=8)
    axes.grid(visible=False, axis="x")


def plot_under_load(record: Record) -> pd.DataFrame:
    """Share of the floor, in a burst and sustained."""
    data = under_load(record)
    figure, panels = style.new_figure(2, width=12, height=4.2, sharey=True)
    for axes, mode in zip(panels, ("burst", "sustained"), strict=True):
        _bars(axes, data[data["mode"] == mode], "share")
        axes.axhline(1, color=style.CEILING, linestyle="--", linewidth=1.1)
        axes.set(title=mode, ylim=(0, 1.25))
    panels[0].set_ylabel("floor / time, of the same mode")
    panels[0].legend(ncols=3, loc="upper left")
    style.show(figure, record)
    return data


def plot_energy(record: Record) -> pd.DataFrame:
    """Energy of one layer's attention for one token, under load."""
    data = under_load(record).query("mode == 'sustained'").dropna(subset="mj_per_token")
    figure, axes = style.new_figure(width=9)
    _bars(axes, data, "mj_per_token")
    axes.set(ylabel="mJ per token and layer", title="Energy of a token, by the card's own counter")
    axes.legend(ncols=2)
    style.show(figure, record)
    return data


def energy(data: pd.DataFrame) -> pd.DataFrame:
    """Of ``plot_energy``'s data: ours beside the thriftiest peer, one row a workload."""
    rows = []
    for workload, part in data.groupby("workload", sort=False):
        ours = part[part.implementation == DECODE]
        theirs = part[part.implementation != DECODE].sort_values("mj_per_token")
        if len(ours) and len(theirs):
            least = theirs.iloc[0]
            rows.append(
                {
                    "workload": workload.replace("\n", ", "),
                    "ours, mJ": ours.mj_per_token.iloc[0],
                    "least of the peers, mJ": least.mj_per_token,
                    "whose": LABELS[least.implementation],
                    "ours / theirs": ours.mj_per_token.iloc[0] / least.mj_per_token,
                    "ours, W": ours.power_w.iloc[0],
                    "theirs, W": least.power_w,
                }
            )
    return pd.DataFrame(rows)


def accuracy(record: Record) -> pd.DataFrame:
    """Relative L2 error of the output against fp64: ours and the least of the peers, one row a workload."""
    rows = []
    for duel in duels(record, "burst"):
        if both := duel.least(absorbed_error):
            w = duel.ours.workload
            rows.append(
                {
                    "point": label(duel.ours),
                    "kv": w.mean_len,
                    "dtype": w.dtype,
                    "ours": both[0],
                    "least": both[1],
                }
            )
    return pd.DataFrame(rows).assign(ratio=lambda table: table.ours / table.least)


def plot_accuracy(record: Record) -> pd.DataFrame:
    """Our error over the least error of a peer, against length."""
    data = accuracy(record)
    figure, axes = style.new_figure()
    for (dtype, part), colour, marker in zip(
        data.groupby("dtype"), ("mla_kernels", "block:stream"), "os", strict=False
    ):
        axes.scatter(part.kv, part.ratio, s=16, alpha=0.6, color=COLOURS[colour], marker=marker, label=dtype)
    axes.axhline(1, color=style.CEILING, linestyle="--", linewidth=1.1)
    lengths = [1024 << i for i in range(8) if data.kv.min() / 2 <= 1024 << i <= 2 * data.kv.max()]
    style.plain_log_ticks(axes, lengths, labels=[f"{kv / 1024:g}k" for kv in lengths])
    margin = max(0.02, 1.1 * (data.ratio - 1).abs().max())
    axes.set(
        xlabel="cached tokens a sequence",
        ylabel="our error / least error of a peer",
        ylim=(1 - margin, 1 + margin),
        title="Error against fp64, on the inputs that were timed",
    )
    axes.legend()
    style.show(figure, record)
    return data


def host(record: Record) -> pd.DataFrame:
    """Host time of an eager call and of a plan, µs: the median over the points that measured it."""
    calls: dict[str, list[float]] = defaultdict(list)
    plans: dict[str, list[float]] = defaultdict(list)
    for point in _with_host(record):
        calls[point.implementation].append(figures.host_us(point))
        plans[point.implementation] += point.host.plan_us
    rows = [
        {
            "implementation": name,
            "call": float(np.median(calls[name])),
            "worst": max(calls[name]),
            "plan": float(np.median(plans[name])) if plans[name] else 0.0,
        }
        for name in style.in_order(calls)
    ]
    return pd.DataFrame(rows)


def plot_host(record: Record) -> pd.DataFrame:
    """Host time of an eager call, and of the plan that some need before the calls of a step."""
    data = host(record)
    figure, axes = style.new_figure(height=1.2 + 0.34 * len(data))
    y = np.arange(len(data))
    axes.barh(y - 0.2, data.call, 0.38, color=COLOURS[DECODE], label="a call")
    axes.barh(y + 0.2, data.plan, 0.38, color=COLOURS["block:stream"], label="a plan, once a step")
    axes.set_yticks(y, data.implementation.map(LABELS))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    ticks = [
        tick
        for tick in (2, 5, 10, 20, 50, 100, 200, 500, 1000)
        if tick < 2 * data[["call", "plan"]].max(axis=None)
    ]
    style.plain_log_ticks(axes, ticks)
    axes.set(xlabel="time on the host, µs", title="What a call costs before the GPU has it")
    axes.legend()
    style.show(figure, record)
    return data


def memory(record: Record) -> pd.DataFrame:
    """MB of cache and workspace, a row a workload, a column an implementation (NaN: not timed there)."""
    cells: dict[str, dict[str, float]] = defaultdict(dict)
    for point in _with_host(record):
        w = point.workload
        cells[f"h_q {w.h_q}, b {w.b}, kv {w.mean_len:g}"][point.implementation] = gpu_bytes(point) / 1e6
    table = pd.DataFrame.from_dict(cells, orient="index")
    return table[style.in_order(table.columns)]


def plot_memory(record: Record) -> pd.DataFrame:
    """Cache and workspace of every implementation, over ours."""
    data = memory(record)
    over = data.div(data[DECODE], axis=0).drop(columns=DECODE)
    figure, axes = style.new_figure(height=1.2 + 0.34 * over.shape[1])
    for row, name in enumerate(over):
        axes.scatter(over[name], [row] * len(over), s=36, color=COLOURS[name], zorder=3)
    axes.axvline(1, color=style.CEILING, linestyle="--", linewidth=1.1)
    axes.set_yticks(range(over.shape[1]), [LABELS.get(name, name) for name in over])
    axes.invert_yaxis()
    style.ratio_ticks(axes, over.to_numpy())
    axes.set(xlabel="bytes of cache and workspace / ours", title="Memory on the GPU, one dot a workload")
    style.show(figure, record)
    return data


def _with_host(record: Record) -> list[Point]:
    return [p for p in record.points if p.host and p.memory and (p.mode, p.status) == ("burst", "ok")]
