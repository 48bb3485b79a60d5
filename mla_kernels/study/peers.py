"""Speed beside other kernels: tables and figures. Each figure returns the data it drew."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from mla_kernels.measure import figures
from mla_kernels.measure.experiments.peers import on_grid
from mla_kernels.measure.figures import DECODE, label
from mla_kernels.measure.records import PEER, Record, Workload
from mla_kernels.measure.workloads import spread_evenly

from . import style
from .duels import duels, geometric_mean, is_compute_bound
from .loading import resolve_source
from .style import COLOURS, LABELS

KINDS = ("grid", "several tokens", "lengths differ", "the same, even", "fp16", "other head counts")


def with_peers(source: str) -> str:
    """``source``, but "replay" (and a line that says so) where it means live and no peer can run here."""
    if resolve_source(source) == "live":
        from mla_kernels.measure.peers import FAST, PEERS

        if all(PEERS[name].available() for name in FAST):
            print("no peer can run here, so the recorded run is replayed; `make peers` fetches them")
            return "replay"
    return source


def kind_of(workload: Workload) -> str:
    """Which part of the comparison a workload belongs to, of ``KINDS``."""
    if on_grid(workload):
        return "grid"
    if workload.dtype != "bf16":
        return "fp16"
    if workload.lengths_kind != "uniform":
        return "lengths differ"
    if workload.s_q > 1:
        return "several tokens"
    return "other head counts" if len(set(workload.lengths)) == 1 else "the same, even"


def roster(record: Record) -> pd.DataFrame:
    """One row an implementation: workloads timed, and of those that were not, each reason with its number."""
    timed: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for point in record.points:
        if point.status == "ok":
            timed[point.implementation] += point.mode == "burst"
        else:
            reasons[point.implementation][f"{point.status}: {point.reason}"] += 1
    rows = [
        {
            "implementation": LABELS.get(name, name),
            "workloads": timed[name],
            "not timed": "; ".join(f"{n} × {reason}" for reason, n in reasons[name].items()),
        }
        for name in style.in_order({*timed, *reasons})
    ]
    return pd.DataFrame(rows)


def compared(record: Record) -> pd.DataFrame:
    """One row a workload and mode at which peers were timed beside ours.

    ``ratio``: our speed over the fastest peer's (``best``); a column a peer with the ratio to it (NaN: not
    timed). ``headroom``: what the ratio would be at the floor, that is best_us / floor_us.
    """
    rows = []
    for duel in duels(record):
        w, ours = duel.ours.workload, duel.ours
        floor = figures.floor_us(record, w, ours.mode)
        row = {
            "kind": kind_of(w),
            "mode": ours.mode,
            "h_q": w.h_q,
            "s_q": w.s_q,
            "b": w.b,
            "kv": round(w.mean_len),
            "lengths": w.lengths_kind,
            "dtype": w.dtype,
            "point": label(ours),
            "us": ours.per_call_us,
            "best": LABELS.get(duel.best.implementation, duel.best.implementation),
            "best_us": duel.best.per_call_us,
            "ratio": duel.ratio,
            "floor_us": floor,
            "headroom": duel.best.per_call_us / floor,
        }
        row |= {peer.implementation: figures.speed_ratio(ours, peer) for peer in duel.peers}
        rows.append(row)
    return pd.DataFrame(rows)


def in_words(row: pd.Series) -> str:
    """A row of ``compared``: where, our time and the fastest peer's."""
    where = row.point.removeprefix("burst, ")
    return f"{where}: {row.us:.1f} µs, {row.best} {row.best_us:.1f} µs"


def grid(data: pd.DataFrame) -> pd.DataFrame:
    """Bursts on the grid."""
    return data.query("kind == 'grid' and mode == 'burst'")


def summary(data: pd.DataFrame, by: str) -> pd.DataFrame:
    """For each ``by``: points, those where ours is at least as fast, least, mean and greatest ratio."""
    rows = [
        {
            by: name,
            "points": len(part),
            "at least as fast": int((part.ratio >= 1).sum()),
            "worst": part.ratio.min(),
            "geometric mean": geometric_mean(part.ratio),
            "best": part.ratio.max(),
        }
        for name, part in data.groupby(by, sort=False)
    ]
    return pd.DataFrame(rows)


def by_peer(data: pd.DataFrame) -> pd.DataFrame:
    """``summary`` of the bursts against each peer rather than the fastest."""
    bursts = data[data["mode"] == "burst"]
    peers = [name for name in LABELS if name in bursts and name.startswith(PEER)]
    each = [pd.DataFrame({"peer": LABELS[name], "ratio": bursts[name].dropna()}) for name in peers]
    return summary(pd.concat(each), "peer")


def plot_headroom(record: Record) -> pd.DataFrame:
    """The grid: how much faster than its fastest peer a kernel at the floor would be."""
    data = grid(compared(record))
    _plot_grid(
        record, data, "headroom", style.SHADES, LogNorm(1, 4), "What the fastest peer leaves to be gained"
    )
    return data


def plot_grid(record: Record) -> pd.DataFrame:
    """The grid: our speed over that of the fastest peer."""
    data = grid(compared(record))
    span = max(1.5, data.ratio.max(), 1 / data.ratio.min())
    title = "Our speed over that of the fastest peer"
    _plot_grid(record, data, "ratio", "PuOr", LogNorm(1 / span, span), title)
    return data


def _plot_grid(
    record: Record, data: pd.DataFrame, value: str, colours: str, norm: LogNorm, title: str
) -> None:
    heads = sorted(data.h_q.unique())
    figure, panels = style.new_figure(len(heads), width=12, height=3.6, sharey=True, squeeze=False)
    lengths, batches = sorted(data.kv.unique()), sorted(data.b.unique())
    for axes, h_q in zip(panels[0], heads, strict=True):
        cells = data[data.h_q == h_q].pivot(index="kv", columns="b", values=value)
        cells = cells.reindex(index=lengths, columns=batches)
        axes.imshow(cells, cmap=colours, norm=norm, aspect="auto", origin="lower")
        for (row, column), number in np.ndenumerate(cells.to_numpy()):
            if np.isfinite(number):
                _write(axes, column, row, number, norm)
        axes.set_xticks(range(len(batches)), batches, fontsize=8)
        axes.set_yticks(range(len(lengths)), [f"{kv / 1024:g}k" for kv in lengths], fontsize=8)
        axes.set(title=f"{h_q} heads", xlabel="sequences")
        axes.grid(visible=False)
    panels[0][0].set_ylabel("cached tokens a sequence")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    style.show(figure, record)


def _write(axes: Axes, x: int, y: int, number: float, norm: LogNorm) -> None:
    light = 0.2 < norm(number) < 0.8 if norm.vmin < 1 else norm(number) < 0.5
    text = f"{number:.2f}" if number < 9.95 else f"{number:.0f}"
    axes.text(x, y, text, ha="center", va="center", fontsize=7, color="black" if light else "white")


def plot_by_peer(record: Record) -> pd.DataFrame:
    """Against each fast peer: the share of all burst points at which ours is ahead by less than x."""
    data = compared(record).query("mode == 'burst'")
    figure, axes = style.new_figure()
    for peer in _fast(record):
        ratios = np.sort(data[peer].dropna())
        axes.step(
            ratios,
            np.arange(1, len(ratios) + 1) / len(ratios),
            where="post",
            color=COLOURS[peer],
            label=LABELS[peer],
        )
    axes.step(
        np.sort(data.ratio),
        np.arange(1, len(data) + 1) / len(data),
        where="post",
        color="black",
        label="the fastest",
    )
    axes.axvline(1, color=style.CEILING, linestyle="--", linewidth=1.1)
    style.ratio_ticks(axes, data[[*_fast(record), "ratio"]].to_numpy())
    axes.set(
        xlabel="our speed / the peer's",
        ylabel="share of the points",
        title="Left of the line a peer is faster",
    )
    axes.legend()
    style.show(figure, record)
    return data


def plot_further(record: Record) -> pd.DataFrame:
    """Against the fastest peer, in each part of the comparison; one dot a workload."""
    data = compared(record).query("mode == 'burst'")
    present = [kind for kind in KINDS if (data.kind == kind).any()]
    figure, axes = style.new_figure()
    for row, kind in enumerate(present):
        part = data[data.kind == kind]
        jitter = np.linspace(-0.28, 0.28, len(part)) if len(part) > 1 else [0.0]
        axes.scatter(part.ratio, row + np.array(jitter), s=14, alpha=0.6, color=COLOURS[DECODE])
        mean = geometric_mean(part.ratio)
        axes.plot([mean, mean], [row - 0.36, row + 0.36], color="black", linewidth=2)
    axes.axvline(1, color=style.CEILING, linestyle="--", linewidth=1.1)
    style.ratio_ticks(axes, data.ratio.to_numpy())
    axes.set_yticks(range(len(present)), present)
    axes.invert_yaxis()
    axes.set(
        xlabel="our speed / the fastest peer's (bar: geometric mean)",
        title="On the grid and off it, against the fastest peer",
    )
    style.show(figure, record)
    return data


def uneven(record: Record) -> pd.DataFrame:
    """Time over that of the same tokens in equal lengths, less one, for each implementation."""
    bursts = {
        (p.implementation, p.workload): p for p in record.points if (p.mode, p.status) == ("burst", "ok")
    }
    penalties: dict[str, list[float]] = defaultdict(list)
    for (name, workload), point in bursts.items():
        even = bursts.get((name, spread_evenly(workload)))
        if workload.lengths_kind in ("normal", "lognormal") and even:
            penalties[name].append(point.per_call_us / even.per_call_us - 1)
    rows = [
        {
            "implementation": LABELS.get(name, name),
            "workloads": len(penalties[name]),
            "median": float(np.median(penalties[name])),
            "worst": max(penalties[name]),
        }
        for name in style.in_order(penalties)
        if not name.startswith("block:")
    ]
    return pd.DataFrame(rows)


def compute_bound(record: Record) -> pd.DataFrame:
    """TFLOP/s of ours, the fastest peer and our skeleton, at the compute-bound points."""
    rows = []
    for duel in duels(record):
        ours = duel.ours
        if not is_compute_bound(ours.workload):
            continue
        skeleton = figures.counterpart(record, ours, "block:skeleton")
        rows.append(
            {
                "point": label(ours),
                "ours": figures.tflops(ours),
                "best peer": figures.tflops(duel.best),
                "skeleton": figures.tflops(skeleton) if skeleton else None,
                "ours / best peer": duel.ratio,
                "ours / skeleton": figures.speed_ratio(ours, skeleton) if skeleton else None,
            }
        )
    return pd.DataFrame(rows).astype({"skeleton": float, "ours / skeleton": float})


def _fast(record: Record) -> list[str]:
    """The peers that were timed at most of the points."""
    timed = Counter(
        p.implementation for p in record.points if p.is_peer and (p.mode, p.status) == ("burst", "ok")
    )
    most = max(timed.values(), default=0)
    return [name for name in LABELS if timed[name] > most / 2]
