"""One look for every figure: colours that colour-blind readers can tell apart, ceilings, a dated caption."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla_kernels.measure.records import Record

from .tables import to_markdown

_PALETTE = sns.color_palette("colorblind")
COLOURS = {
    "mla_kernels": _PALETTE[0],
    "block:stream": _PALETTE[1],
    "block:skeleton": _PALETTE[2],
    "block:mma": _PALETTE[4],
}
LABELS = {
    "mla_kernels": "mla_decode",
    "block:stream": "its loads alone",
    "block:skeleton": "loads + WGMMA, no softmax",
    "block:mma": "its WGMMA alone",
}
MARKERS = {"mla_kernels": "o", "block:stream": "s", "block:skeleton": "D", "block:mma": "^"}
CEILING = "#444444"
ALARM = _PALETTE[3]
SHADES = "crest"  # an ordered quantity: light to dark

# 100 pixels an inch keep a figure under 150 KB in a committed notebook.
_SETTINGS = {
    "figure.dpi": 100,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "grid.color": "#e4e4e4",
}


def new_figure(columns: int = 1, *, width: float = 8.0, height: float = 4.4, **options) -> tuple:
    """(figure, axes) in the shared style; ``columns`` panels side by side. Sizes in inches."""
    sns.set_theme(style="whitegrid", palette="colorblind", rc=_SETTINGS)
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", **options)
    sns.despine(figure)
    return figure, axes


def caption(record: Record) -> str:
    """Device, date and commit of a record."""
    run = record.run
    return f"one {record.device.name}, {run.utc:%Y-%m-%d}, commit {run.commit[:10]}, bf16, pages of 64"


def show(figure: Figure, record: Record) -> None:
    """Add the caption and hand the figure to the notebook."""
    figure.supxlabel(caption(record), x=0.99, ha="right", fontsize=7.5, color="#777777")
    plt.show()
    plt.close(figure)


def show_table(table: pd.DataFrame) -> Markdown:
    """A table as a notebook's output."""
    return Markdown(to_markdown(table))


def say(text: str) -> None:
    """A sentence of Markdown, with its numbers from the record, as a notebook's output."""
    display(Markdown(text))


def ceiling(axes: Axes, value: float, text: str, *, style: str = "--") -> None:
    """A horizontal limit, named at its right end."""
    axes.axhline(value, color=CEILING, linestyle=style, linewidth=1.1, zorder=1)
    name(axes, value, text)


def name(axes: Axes, value: float, text: str) -> None:
    """Text just above ``value`` at the right end of the axes."""
    axes.annotate(
        text,
        (1, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color=CEILING,
    )


def plain_log_ticks(axes: Axes, values: list, *, axis: str = "x", labels: list[str] | None = None) -> None:
    """A log scale of base 2 with ticks at ``values``, written out."""
    labels = labels or [f"{value:g}" for value in values]
    if axis == "x":
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, labels)
    else:
        axes.set_yscale("log", base=2)
        axes.set_yticks(values, labels)
    axes.minorticks_off()
