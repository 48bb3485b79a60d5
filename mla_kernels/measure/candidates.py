"""Variants of the decode kernel as implementations: "mla_kernels[rows=64,ahead_boxes=1]", and the best table.

A name gives the rows and what differs from the shipped variant of those rows (``mla_kernels.tuning``).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mla_kernels.choice import H200_SMS, PAGE_US, SHIPPED, Cost, Share, TuningTable
from mla_kernels.compiler import CompileError, KernelConfig, compile_kernel
from mla_kernels.tuning import PAIR_ROWS, DecodeTuning, TuningError

from .figures import DECODE, query_rows
from .records import Point, Record, Workload
from .workloads import table_width

THREADS = 16  # that compile
WORTH = 1.01  # speed over the shipped variant from which another is taken: less is noise
HBM_IDLE = 1.0  # of the time of its tiles a call may wait for HBM, and still tell what tiles cost
LEAST_POINTS = 5  # to fit a cost's three terms
FIT_ROUNDS = 10
SHIPPED_ROWS = tuple(tuning.rows for tuning in SHIPPED.variants)
# What shipped when some records were made: no pairs of CTAs.
BEFORE_PAIRS = TuningTable(tuple(entry for entry in SHIPPED.entries if entry[1].rows != PAIR_ROWS))


def is_candidate(implementation: str) -> bool:
    return implementation.startswith(f"{DECODE}[")


def name_of(*changes: str, rows: int) -> str:
    """ "mla_kernels[rows=64,ahead_boxes=1]"; without changes the shipped variant."""
    return f"{DECODE}[{','.join((f'rows={rows}', *changes))}]"


def changes_of(implementation: str) -> str:
    """What a candidate's name says of it: "rows=64,ahead_boxes=1"."""
    return implementation[len(DECODE) + 1 : -1]


def rows_of(implementation: str) -> int:
    """Query rows a CTA of a candidate, whether or not it can be built."""
    found = re.match(r"rows=(\d+)", changes_of(implementation))
    return int(found[1]) if found else 0


def tuning_of(implementation: str) -> DecodeTuning:
    """The candidate of that name. Raises TuningError where the text is none or it does not fit."""
    if not (is_candidate(implementation) and implementation.endswith("]")):
        raise TuningError(f"{implementation!r} is no candidate, must be {DECODE}[rows=...]: correct the name")
    return DecodeTuning.parse(changes_of(implementation))


def configs(names: Iterable[tuple[str, str]]) -> list[KernelConfig]:
    """The cubins of (implementation, dtype), of those that are candidates and fit."""
    found = {}
    for name, dtype in names:
        try:
            config = tuning_of(name).kernel_config(dtype)
        except TuningError:
            continue
        found[config.name] = config
    return list(found.values())


def prepare(names: Iterable[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """Compile the candidates among (implementation, dtype), several at once.

    By dtype: those that cannot be built, and why.
    """
    absent: dict[str, dict[str, str]] = defaultdict(dict)
    names = [(name, dtype) for name, dtype in dict.fromkeys(names) if is_candidate(name)]

    def build(name: str, dtype: str) -> str | None:
        try:
            compile_kernel(tuning_of(name).kernel_config(dtype))
        except TuningError as error:
            return f"does not fit: {error}"
        except CompileError as error:
            return f"does not compile: {error}"
        return None

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        reasons = threads.map(lambda item: build(*item), names)
        for (name, dtype), reason in zip(names, reasons, strict=True):
            if reason:
                absent[dtype][name] = reason
    return absent


def speeds(points: Iterable[Point]) -> dict[str, dict]:
    """By variant: speed over the shipped one that serves the workload, of the same rows, by workload.

    The shipped one is that of ``choice.SHIPPED``. Bursts alone. Variants of other rows are left out: there a
    choice inside the kernel is not what makes the difference (``fit_cost`` compares them).
    """
    timed: dict = defaultdict(dict)
    for point in points:
        if (point.status, point.mode) == ("ok", "burst") and is_candidate(point.implementation):
            timed[point.workload][point.implementation] = point.per_call_us
    found: dict[str, dict] = defaultdict(dict)
    for workload, times in timed.items():
        rows = shipped_rows(workload, SHIPPED if name_of(rows=PAIR_ROWS) in times else BEFORE_PAIRS)
        shipped = times.get(name_of(rows=rows))
        if shipped is not None:
            for name, us in times.items():
                if rows_of(name) == rows:
                    found[name][workload] = shipped / us
    return dict(found)


def shipped_rows(workload: Workload, table: TuningTable = SHIPPED) -> int:
    """Rows a CTA of the variant that serves a workload."""
    return table.serving(query_rows(workload), workload.b, table_width(workload)).rows


def gain(ratios: Mapping) -> float:
    """Geometric mean of speeds."""
    return math.exp(sum(map(math.log, ratios.values())) / len(ratios))


def best_of(points: list[Point], rows: int) -> tuple[str, float]:
    """(implementation, gain) of the variant of ``rows`` that is fastest over the workloads it would serve.

    It was timed at all of them at which there was a choice, beside the shipped one, and gains enough
    (``WORTH``); else the shipped one.
    """
    best, most = name_of(rows=rows), 1.0
    others = {name: by for name, by in speeds(points).items() if rows_of(name) == rows and name != best}
    served = {workload for by in others.values() for workload in by}
    for name, ratios in others.items():
        if ratios.keys() == served and (mean := gain(ratios)) > max(most, WORTH):
            best, most = name, mean
    return best, most


def best_table(points: list[Point]) -> TuningTable:
    """The table that ``points`` speak for: the best variant of each rows, and what the shipped ones cost."""
    return TuningTable(
        tuple((fit_cost(points, rows), tuning_of(best_of(points, rows)[0])) for rows in SHIPPED_ROWS)
    )


def fit_cost(points: Iterable[Point], rows: int) -> Cost:
    """What the shipped variant of ``rows`` costs, from bursts that HBM does not bind, at equal lengths.

    The shipped cost where they are too few, or say nothing of a term. Errors are relative ones.
    """
    [(shipped, tuning)] = [entry for entry in SHIPPED.entries if entry[1].rows == rows]
    name = name_of(rows=rows)
    calls, times = [], []
    for point in points:
        workload = point.workload
        equal = min(workload.lengths) == max(workload.lengths)
        if (point.implementation, point.status, point.mode, equal) != (name, "ok", "burst", True):
            continue
        tiles = -(-max(workload.lengths) // workload.page_size)
        share, pages = Share.of(tuning, query_rows(workload), workload.b, tiles, H200_SMS), tiles * workload.b
        if pages * PAGE_US < HBM_IDLE * share.tiles * shipped.tile_us:
            calls.append((share, pages))
            times.append(point.per_call_us)
    if len(calls) < LEAST_POINTS:
        return shipped
    cost = shipped
    for _ in range(FIT_ROUNDS):  # how much HBM adds depends on what a tile costs
        terms = np.array([_terms(cost, *call) for call in calls])
        if np.linalg.matrix_rank(terms) < terms.shape[1]:
            return shipped
        found, *_ = np.linalg.lstsq(terms / np.array(times)[:, None], np.ones(len(times)), rcond=None)
        if not (found > 0).all():
            return shipped
        cost = Cost(*map(float, found))
    return Cost(*(round(us, 3) for us in dataclasses.astuple(cost)))


def _terms(cost: Cost, share: Share, pages: int) -> tuple[float, float, float]:
    """What each microsecond of a cost adds to a call, near ``cost``."""
    split = float(share.split)
    tiles_us = cost.expected_us(share, pages) - cost.start_us - split * cost.merge_us
    return 1.0, tiles_us / cost.tile_us, split


def table_of(record: Record) -> TuningTable | None:
    """The table that a record holds."""
    if record.tuning is None:
        return None
    return TuningTable.from_json([variant.model_dump() for variant in record.tuning])


def summary(record: Record) -> list[str]:
    """Lines: each candidate's speed over the shipped variant, best first, and the table that follows."""
    all_speeds = speeds(record.points)
    lines = []
    for rows in SHIPPED_ROWS:
        own = {name: ratios for name, ratios in all_speeds.items() if rows_of(name) == rows}
        for name in sorted(own, key=lambda name: -gain(own[name])):
            ratios = own[name].values()
            lines.append(
                f"{changes_of(name):72} × {gain(own[name]):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
                f"{len(ratios)} workloads)"
            )
    for name, reason in not_built(record.points).items():
        lines.append(f"{changes_of(name):72} {reason}")
    for cost, tuning in (table_of(record) or SHIPPED).entries:
        lines.append(
            f"rows={tuning.rows} {tuning.changes() or 'as shipped'}: {cost.start_us:.1f} us, "
            f"{cost.tile_us:.2f} a tile, {cost.merge_us:.1f} to merge"
        )
    return lines


def not_built(points: Iterable[Point]) -> dict[str, str]:
    """Reason of each candidate that was not timed."""
    return {p.implementation: p.reason for p in points if p.status != "ok" and is_candidate(p.implementation)}
