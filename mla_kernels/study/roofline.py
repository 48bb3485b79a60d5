"""Figures and tables of the roofline notebook. Each figure returns the data it drew."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from mla_kernels.measure import figures
from mla_kernels.measure.energy import EnergyRoof
from mla_kernels.measure.figures import DECODE
from mla_kernels.measure.records import Record

from . import fits, style
from .tables import frame

PARTS = ("static", "bytes", "FLOP")


def ceilings(record: Record) -> pd.DataFrame:
    """The measured ceilings: burst, sustained, and what became of clock and power under load."""
    rows = []
    for name, title in ((figures.HBM_READ, "read-only HBM"), (figures.MATMUL, "matmul 8192³, bf16")):
        burst, held = (figures.find_ceiling(record, name, mode) for mode in ("burst", "sustained"))
        clocks = held.sustained.sm_mhz_samples
        rows.append(
            {
                "ceiling": title,
                "unit": burst.unit,
                "burst": burst.value,
                "sustained": held.value,
                "sustained / burst": held.value / burst.value,
                "W": held.sustained.mean_power_w,
                "SM MHz": float(np.median(clocks)) if clocks else None,
            }
        )
    return pd.DataFrame(rows)


def rows_sweep(record: Record) -> pd.DataFrame:
    """Decode bursts: time against query rows, ``over_floor`` the time over that of reading the KV alone."""
    table = frame(record).query(f"implementation == '{DECODE}' and mode == 'burst'")
    read = figures.find_ceiling(record, figures.HBM_READ).value
    return table.assign(over_floor=table.us / (table.kv_mb / read)).sort_values(["kv", "rows", "s_q"])


def _lengths(data: pd.DataFrame) -> pd.Series:
    """KV lengths as ordered names, so that each has a shade of its own."""
    return data.kv.astype(int).map("{:,}".format).rename("kv length")


def plot_rows(record: Record) -> pd.DataFrame:
    """Time over the time of reading the KV, against query rows: flat, then proportional."""
    data = rows_sweep(record)
    figure, axes = style.new_figure()
    drawn = data.drop_duplicates(["kv", "rows"])
    sns.lineplot(
        drawn, x="rows", y="over_floor", hue=_lengths(drawn), palette=style.SHADES, marker="o", ax=axes
    )
    rows = np.geomspace(data.rows.min(), data.rows.max(), 200)
    turn = fits.rows_of(fits.ridge(record))
    axes.plot(rows, np.maximum(1, rows / turn), color=style.CEILING, linestyle="--", label="floor")
    axes.axvline(turn, color=style.CEILING, linestyle=":", linewidth=1)
    axes.annotate(
        "predicted\nridge",
        (turn, 0.97),
        xycoords=axes.get_xaxis_transform(),
        ha="right",
        va="top",
        fontsize=8,
        color=style.CEILING,
    )
    style.plain_log_ticks(axes, sorted(data.rows.unique()))
    style.plain_log_ticks(axes, [1, 2, 4, 8], axis="y")
    axes.set(
        xlabel="query rows that share the KV (h_q · s_q)",
        ylabel="time / time to read the KV once",
        title="A decode costs its bytes until its rows fill the tensor cores",
    )
    axes.legend(title="kv length")
    style.show(figure, record)
    return data


def _roofs(axes: Axes, record: Record, mode: str, intensity: np.ndarray) -> None:
    read = figures.find_ceiling(record, figures.HBM_READ, mode).value
    matmul = figures.find_ceiling(record, figures.MATMUL, mode).value
    axes.plot(
        intensity, np.minimum(read * intensity, matmul), color=style.CEILING, linestyle="--", linewidth=1.2
    )
    # Where each roof is the lower one and no curve crosses it: beside its foot, and before its far end.
    names = (
        (f"HBM, {mode}: {read:.2f} TB/s", 1.4 * intensity[0], (8, -8)),
        (f"matmul, {mode}: {matmul:.0f} TFLOP/s", matmul / read, (0, 3)),
    )
    for text, at, offset in names:
        axes.annotate(
            text,
            (at, min(read * at, matmul)),
            xytext=offset,
            textcoords="offset points",
            fontsize=8,
            color=style.CEILING,
        )


def _log_axes(axes: Axes) -> None:
    style.plain_log_ticks(axes, [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    style.plain_log_ticks(axes, [8, 16, 32, 64, 128, 256, 512, 1024], axis="y")
    axes.set(xlabel="intensity, FLOP per byte of HBM traffic", ylabel="TFLOP/s")


def plot_roofline(record: Record) -> pd.DataFrame:
    """Decode bursts under the burst ceilings."""
    data = rows_sweep(record)
    figure, axes = style.new_figure()
    _roofs(axes, record, "burst", np.geomspace(data.intensity.min(), data.intensity.max(), 200))
    sns.scatterplot(
        data,
        x="intensity",
        y="tflops",
        hue=_lengths(data),
        palette=style.SHADES,
        style="s_q",
        s=45,
        ax=axes,
    )
    _log_axes(axes)
    axes.set(title="Each shape against the burst ceilings of the same run")
    axes.legend(loc="lower right", ncols=2, title=None)
    style.show(figure, record)
    return data


def sustained(record: Record) -> pd.DataFrame:
    """Decode in a burst and under load, one row a shape: rates, clock, power, energy."""
    table = frame(record).query(f"implementation == '{DECODE}'")
    shape = ["b", "h_q", "s_q", "rows", "kv", "intensity", "mb", "gflop"]
    burst = table[table["mode"] == "burst"].set_index(shape)[["us", "tflops", "tb_s"]]
    held = table[table["mode"] == "sustained"].set_index(shape)
    columns = [
        "us",
        "tflops",
        "tb_s",
        "bw_share",
        "mm_share",
        "power_w",
        "sm_mhz",
        "mj_per_token",
        "throttle",
    ]
    return held[columns].join(burst.add_suffix("_burst")).reset_index().sort_values("rows", ignore_index=True)


def plot_sustained(record: Record) -> pd.DataFrame:
    """The speed that is left after seconds of load, and the clock that goes with it."""
    data = sustained(record)
    figure, (speed, clock) = style.new_figure(2, width=9)
    names, x = data.rows.astype(str), np.arange(len(data))
    speed.bar(x - 0.2, data.tflops_burst, 0.38, color=style.COLOURS[DECODE], label="burst")
    speed.bar(x + 0.2, data.tflops, 0.38, color=style.COLOURS["block:stream"], label="sustained")
    for mode, line in (("burst", "--"), ("sustained", ":")):
        style.ceiling(
            speed, figures.find_ceiling(record, figures.MATMUL, mode).value, f"matmul, {mode}", style=line
        )
    speed.set_xticks(x, names)
    speed.set(xlabel="query rows", ylabel="TFLOP/s", title="Speed")
    speed.legend(loc="upper left", ncols=2)
    speed.set_ylim(0, 1.12 * speed.get_ylim()[1])
    clock.plot(x, data.sm_mhz, marker="o", color=style.COLOURS[DECODE])
    if record.device.sm_clock_max_mhz:
        style.ceiling(clock, record.device.sm_clock_max_mhz, "highest clock")
    clock.set_xticks(x, names)
    clock.set(xlabel="query rows", ylabel="median SM clock under load, MHz", title="Clock", ylim=(0, None))
    style.show(figure, record)
    return data


def power_table(record: Record, roof: EnergyRoof) -> pd.DataFrame:
    """Measured and fitted power of every sustained point; ``fitted`` says which the fit has seen."""
    fitted = {id(point) for point, _ in roof.residuals_w}
    rows = []
    for point in record.points:
        if point.sustained is None or (power := point.sustained.mean_power_w) is None:
            continue
        rates = figures.tb_s(point), figures.tflops(point)
        predicted = roof.power_w(*rates)
        rows.append(
            {
                "implementation": point.implementation,
                "rows": figures.query_rows(point.workload),
                "tb_s": rates[0],
                "tflops": rates[1],
                "power_w": power,
                "predicted_w": predicted,
                "residual": power / predicted - 1,
                "fitted": id(point) in fitted,
            }
        )
    return pd.DataFrame(rows)


def plot_power(record: Record, roof: EnergyRoof) -> pd.DataFrame:
    """Measured power against the plane fitted to the blocks alone."""
    data = power_table(record, roof)
    data = data[data.fitted | ((data.implementation == DECODE) & (data.rows % 64 == 0))]
    figure, axes = style.new_figure(height=4.6)
    for implementation, part in data.groupby("implementation", sort=False):
        axes.scatter(
            part.predicted_w,
            part.power_w,
            s=42,
            color=style.COLOURS[implementation],
            marker=style.MARKERS[implementation],
            label=style.LABELS[implementation] + ("" if part.fitted.all() else " (not fitted)"),
        )
    ends = np.array(
        [
            min(data.predicted_w.min(), data.power_w.min()) - 15,
            max(data.predicted_w.max(), data.power_w.max()) + 15,
        ]
    )
    axes.plot(ends, ends, color=style.CEILING, linewidth=1)
    axes.fill_between(ends, 0.93 * ends, 1.07 * ends, color=style.CEILING, alpha=0.08, linewidth=0)
    if record.device.power_limit_w:
        style.ceiling(axes, record.device.power_limit_w, "power limit")
    axes.set(
        xlabel="P₀ + a · TB/s + b · TFLOP/s, W",
        ylabel="measured under load, W",
        title="Power is a plane in traffic and arithmetic (band: ±7 %)",
    )
    axes.legend()
    style.show(figure, record)
    return data


def plot_three_roofs(record: Record, roof: EnergyRoof, cap_w: float) -> pd.DataFrame:
    """Sustained decode under bandwidth, matmul and the power cap."""
    data = sustained(record)
    figure, axes = style.new_figure()
    intensity = np.geomspace(data.intensity.min() / 2, 2 * data.intensity.max(), 200)
    _roofs(axes, record, "sustained", intensity)
    power = [roof.tflops_at(x, cap_w) for x in intensity]
    axes.plot(intensity, power, color=style.ALARM, label=f"power cap, {cap_w:.0f} W")
    axes.scatter(
        data.intensity,
        data.tflops,
        color=style.COLOURS[DECODE],
        s=45,
        zorder=3,
        label="mla_decode, sustained",
    )
    _log_axes(axes)
    axes.set_xlim(intensity[0], intensity[-1])
    axes.set_ylim(data.tflops.min() / 2, None)
    axes.set(title="The third roof: what the power budget allows")
    axes.legend(loc="lower right")
    style.show(figure, record)
    at_cap = [roof.tflops_at(x, cap_w) for x in data.intensity]
    return data.assign(power_roof=at_cap)


def energy_parts(record: Record, roof: EnergyRoof) -> pd.DataFrame:
    """Millijoules per token and layer: measured, and by the fit split into static, bytes and FLOP."""
    data = sustained(record).dropna(subset="mj_per_token")
    tokens = data.b * data.s_q
    parts = {
        "static": roof.static_w * data.us / 1e3,
        "bytes": roof.w_per_tb_s * data.mb / 1e3,
        "FLOP": roof.w_per_tflops * data.gflop,
    }
    return data.assign(**{name: value / tokens for name, value in parts.items()})


def plot_energy(record: Record, roof: EnergyRoof) -> pd.DataFrame:
    """Energy of one layer's attention for one token, split by the fit; the marker is the measurement."""
    data = energy_parts(record, roof)
    figure, axes = style.new_figure()
    x, base = np.arange(len(data)), np.zeros(len(data))
    colours = ("#bbbbbb", style.COLOURS["block:stream"], style.COLOURS["block:mma"])
    for part, colour in zip(PARTS, colours, strict=True):
        axes.bar(x, data[part], 0.6, bottom=base, color=colour, label=f"fitted: {part}")
        base = base + data[part].to_numpy()
    axes.scatter(x, data.mj_per_token, color="black", marker="_", s=700, zorder=3, label="measured")
    axes.set_xticks(x, [f"h_q {h}, s_q {s}" for h, s in zip(data.h_q, data.s_q, strict=True)])
    axes.set(
        ylabel="mJ per token and layer", title=f"Energy of a token over {data.kv.max():,.0f} cached tokens"
    )
    axes.legend()
    axes.grid(visible=False, axis="x")
    style.show(figure, record)
    return data
