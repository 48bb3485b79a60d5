"""The kernel drawn: its shared memory, and an ideal schedule of ``decode_rows.cu``. No measurements.

Everything is computed from a variant's ``DecodeTuning``. Figures return their data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mla_kernels.choice import SHIPPED
from mla_kernels.measure.figures import DECODE
from mla_kernels.tuning import BOX_BYTES, BOXES, GROUP_BOXES, GROUPS, SHARED_LIMIT, DecodeTuning

from . import style
from .inside import SHARED, TENSOR, budget, totals

CAPTION = "drawn from the shipped table, not measured"


def plan_table(tunings: Iterable[DecodeTuning]) -> pd.DataFrame:
    """KB of each part of shared memory, one row a variant."""
    rows = []
    for tuning in tunings:
        rows.append({"rows": tuning.rows, **{name: size / 1024 for name, size in tuning.shared_plan()}})
    data = pd.DataFrame(rows).fillna(0.0)  # not every variant has every part
    return data.assign(all=data.drop(columns="rows").sum(axis=1))


def plot_shared_plan() -> pd.DataFrame:
    """What lies in a CTA's shared memory, by variant."""
    data = plan_table(SHIPPED.variants)
    figure, axes = style.new_figure(width=9, height=3.2)
    left = np.zeros(len(data))
    for name in data.columns[1:-1]:
        colour = _PARTS[name]
        axes.barh(range(len(data)), data[name], 0.62, left=left, color=colour, label=name)
        left = left + data[name].to_numpy()
    for y, tuning in enumerate(SHIPPED.variants):
        for slot in range(1, tuning.group_slots):  # borders of the groups
            x = slot * GROUP_BOXES * BOX_BYTES / 1024
            axes.plot([x, x], [y - 0.31, y + 0.31], color="white", linewidth=1)
    axes.axvline(SHARED_LIMIT / 1024, color=style.CEILING, linestyle="--", linewidth=1.1)
    axes.set_yticks(range(len(data)), [f"{rows} rows" for rows in data.rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="KB (dashed: all that a block may have)", title="Shared memory of a CTA")
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.24))
    style.show(figure, CAPTION)
    return data


@dataclass(frozen=True)
class Ideal:
    """A steady state of ``decode_rows.cu`` in which only tensor cores and shared memory take time, in cycles.

    Each ``period`` the tensor cores do QK^T of a tile (``qk``; ``ahead`` of it belongs to the tile after and
    runs under the softmax), then PV of the tile before. ``flight``: how long a group's load may take, given
    the ring.
    """

    period: float
    qk: float
    ahead: float
    flight: float

    @property
    def softmax(self) -> float:
        """The longest that a softmax may take without being waited for."""
        return self.period - self.qk + self.ahead

    @property
    def in_flight_bytes(self) -> float:
        """On their way at a time."""
        return GROUPS * GROUP_BOXES * BOX_BYTES * self.flight / self.period


def ideal(tuning: DecodeTuning) -> Ideal:
    """The schedule of a variant of 64 rows."""
    parts = budget(tuning, math.inf)
    cycles = totals(parts)
    period = cycles[[TENSOR, SHARED]].max()
    busy = parts[parts.unit == TENSOR].set_index("part").cycles
    qk = period * busy["QKᵀ"] / busy.sum()
    ahead = qk * tuning.ahead_boxes / BOXES
    # Group 0 is held from the time when the boxes ahead are multiplied, group 1 from the rest of QK^T, both
    # until the second period after. What is left of the slots is for loads.
    held = (3 * period - qk + ahead) + 2 * period
    return Ideal(period, qk, ahead, max(0.0, (tuning.group_slots * period - held) / GROUPS))


def roles(tuning: DecodeTuning, tiles: int = 3) -> pd.DataFrame:
    """The ideal schedule: ``lane``, ``what``, ``tile``, ``begin``, ``end`` in cycles."""
    t, rows = ideal(tuning), []
    for tile in range(tiles):
        start = tile * t.period
        early, scored = start - t.period + t.qk - t.ahead, start + t.qk - t.ahead
        rows += [
            ("loads, group 0", "in flight", tile, early - t.flight, early),
            ("loads, group 1", "in flight", tile, start - t.flight, start),
            ("scores, WGMMA", "QKᵀ ahead", tile, early, early + t.ahead),
            ("scores, WGMMA", "QKᵀ", tile, start, scored),
            ("scores, threads", "softmax, P", tile, scored, scored + t.softmax),
            ("values 0", "PV", tile, start + t.period + t.qk, start + 2 * t.period),
            ("values 1", "PV", tile, start + t.period + t.qk, start + 2 * t.period),
        ]
    return pd.DataFrame(rows, columns=["lane", "what", "tile", "begin", "end"])


def life_of_boxes(tuning: DecodeTuning) -> pd.DataFrame:
    """The life of three boxes of one tile: the first and the last of V, and the rotary one."""
    t, rows = ideal(tuning), []
    box = t.qk / BOXES
    for name, landed, multiplied in (
        ("box 0 of V", -t.period + t.qk - t.ahead, -t.period + t.qk - t.ahead),
        ("box 7 of V", 0.0, t.qk - t.ahead - 2 * box),
        ("rotary box, then P", 0.0, t.qk - t.ahead - box),
    ):
        scored = t.qk - t.ahead
        rows += [
            (name, "in flight", landed - t.flight, landed),
            (name, "waits", landed, multiplied),
            (name, "QKᵀ", multiplied, multiplied + box),
            (name, "waits", multiplied + box, scored),
            (name, "softmax, P", scored, scored + t.softmax),
            (name, "waits", scored + t.softmax, t.period + t.qk),
            (name, "PV", t.period + t.qk, 2 * t.period),
        ]
    data = pd.DataFrame(rows, columns=["lane", "what", "begin", "end"])
    return data[data.end > data.begin].reset_index(drop=True)


_PHASES = {
    "in flight": style.COLOURS["block:stream"],
    "QKᵀ ahead": "#7fb3dd",
    "QKᵀ": style.COLOURS[DECODE],
    "softmax, P": "#f0b35a",
    "PV": style.COLOURS["block:skeleton"],
    "waits": "#dddddd",
}
_PARTS = {  # of shared memory
    "values": _PHASES["QKᵀ"],
    "rotary columns, then P": _PHASES["softmax, P"],
    "rotary columns": _PHASES["QKᵀ ahead"],
    "queries": _PHASES["PV"],
    "messages": _PHASES["in flight"],
    "the rest": _PHASES["waits"],
}


def plot_roles(tuning: DecodeTuning) -> pd.DataFrame:
    """Which warpgroup does what, over three tiles of the ideal schedule."""
    return _show_lanes(roles(tuning), 3.6, "Roles over three tiles, if nothing waits (number: tile)")


def plot_life(tuning: DecodeTuning) -> pd.DataFrame:
    """From load to release: how long a box is held, and how much of that it is read."""
    title = "The life of a box: loaded, read as K, held, read as V, given back"
    return _show_lanes(life_of_boxes(tuning), 2.8, title)


def _show_lanes(data: pd.DataFrame, height: float, title: str) -> pd.DataFrame:
    figure, axes = style.new_figure(width=10, height=height)
    _lanes(axes, data)
    axes.set(xlabel="cycles", title=title)
    style.show(figure, CAPTION)
    return data


def _lanes(axes: Axes, data: pd.DataFrame) -> None:
    lanes, named = list(dict.fromkeys(data.lane)), set()
    for row in data.itertuples():
        y, width = lanes.index(row.lane), row.end - row.begin
        text = None if row.what in named else row.what
        named.add(row.what)
        colour = _PHASES[row.what]
        axes.barh(y, width, 0.66, left=row.begin, color=colour, edgecolor="white", label=text)
        if "tile" in data:
            axes.text(row.begin + width / 2, y, row.tile, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.28))
