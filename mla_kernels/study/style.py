"""One look for every figure: colours that colour-blind readers can tell apart, ceilings, a dated caption."""

from __future__ import annotations

from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
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
    "peer:flash_mla": _PALETTE[1],  # no figure has both peers and blocks
    "peer:fa3": _PALETTE[2],
    "peer:flashinfer_fa3": _PALETTE[4],
    "peer:flashinfer_fa2": _PALETTE[6],
    "peer:vllm_triton": _PALETTE[5],
    "peer:portable": _PALETTE[7],
    "peer:torch_absorbed": _PALETTE[8],
    "peer:torch_decompressed": _PALETTE[9],
    "peer:fa2_decompressed": _PALETTE[3],
    "peer:prefill_fa3": _PALETTE[2],
    "peer:prefill_cudnn": _PALETTE[1],
    "peer:prefill_fa2": _PALETTE[4],
    "peer:prefill_math": _PALETTE[7],
}
LABELS = {
    "mla_kernels": "mla_decode",
    "block:stream": "its loads alone",
    "block:skeleton": "loads + WGMMA, no softmax",
    "block:mma": "its WGMMA alone",
    "peer:flash_mla": "FlashMLA",
    "peer:fa3": "FA3 (q_v)",
    "peer:flashinfer_fa3": "FlashInfer fa3",
    "peer:flashinfer_fa2": "FlashInfer fa2",
    "peer:vllm_triton": "vLLM Triton",
    "peer:portable": "portable.py, Triton",
    "peer:torch_absorbed": "PyTorch, absorbed",
    "peer:torch_decompressed": "PyTorch, decompressed",
    "peer:fa2_decompressed": "FA2, decompressed",
    "peer:prefill_fa3": "FA3",
    "peer:prefill_cudnn": "cuDNN",
    "peer:prefill_fa2": "FA2 (torch)",
    "peer:prefill_math": "PyTorch",
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


def in_order(names: Iterable[str]) -> list[str]:
    """Implementations in the order of ``LABELS``: ours, its blocks, peers from fast to slow."""
    known = list(LABELS)
    return sorted(names, key=lambda name: known.index(name) if name in LABELS else len(known))


def new_figure(columns: int = 1, *, width: float = 8.0, height: float = 4.4, **options) -> tuple:
    """(figure, axes) in the shared style; ``columns`` panels side by side. Sizes in inches."""
    sns.set_theme(style="whitegrid", palette="colorblind", rc=_SETTINGS)
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", **options)
    sns.despine(figure)
    return figure, axes


def caption(record: Record, pages: bool = True) -> str:
    """Device, date and commit of a record. ``pages`` False: not all are of 64 tokens."""
    run = record.run
    of_64 = ", pages of 64" if pages else ""
    return f"one {record.device.name}, {run.utc:%Y-%m-%d}, commit {run.commit[:10]}, bf16{of_64}"


def show(figure: Figure, record: Record | str) -> None:
    """Add the caption, of a record or in words, and hand the figure to the notebook."""
    text = record if isinstance(record, str) else caption(record)
    figure.supxlabel(text, x=0.99, ha="right", fontsize=7.5, color="#777777")
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


def ratio_ticks(axes: Axes, values: np.ndarray, *, axis: str = "x") -> None:
    """A log scale for ratios, with ticks that suit ``values`` and one."""
    low, high = min(1.0, np.nanmin(values)), max(1.0, np.nanmax(values))
    coarse = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
    fine = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4)
    steps = [step for step in (fine if high / low < 4 else coarse) if low / 1.2 <= step <= 1.2 * high]
    plain_log_ticks(axes, steps, axis=axis)
