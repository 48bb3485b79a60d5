"""Variants of the decode kernel as implementations: "mla_kernels[rows=64,ahead_boxes=1]", and the best table.

A name gives the rows and what differs from the shipped variant of those rows (``mla_kernels.tuning``).
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from mla_kernels.compiler import CompileError, KernelConfig, compile_kernel
from mla_kernels.tuning import ROWS, SHIPPED, DecodeTuning, TuningError, TuningTable

from .figures import DECODE, query_rows
from .records import Point, Record

THREADS = 16  # that compile
WORTH = 1.01  # speed over the shipped variant from which another is taken: less is noise


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
    """By implementation: speed over the shipped variant of the same range of query rows, by workload.

    The shipped one is that of ``tuning.SHIPPED``. Bursts alone.
    """
    timed: dict = defaultdict(dict)
    for point in points:
        if (point.status, point.mode) == ("ok", "burst") and is_candidate(point.implementation):
            timed[point.workload][point.implementation] = point.per_call_us
    found: dict[str, dict] = defaultdict(dict)
    for workload, times in timed.items():
        shipped = times.get(name_of(rows=shipped_rows(query_rows(workload))))
        if shipped is not None:
            for name, us in times.items():
                found[name][workload] = shipped / us
    return dict(found)


def shipped_rows(rows: int) -> int:
    """Rows a CTA of the shipped variant that serves so many query rows."""
    return SHIPPED.serving(rows).rows


def gain(ratios: Mapping) -> float:
    """Geometric mean of speeds."""
    return math.exp(sum(map(math.log, ratios.values())) / len(ratios))


def best_of(points: list[Point], rows: int) -> tuple[str, float]:
    """(implementation, gain) of the variant of ``rows`` that is fastest over the workloads it would serve.

    It was timed at all of them, beside the shipped one, and gains enough (``WORTH``); else the shipped one.
    """
    shipped = name_of(rows=rows)
    all_speeds = speeds(points)
    served = [w for w in all_speeds.get(shipped, {}) if shipped_rows(query_rows(w)) == rows]
    best, most = shipped, 1.0
    for name, ratios in all_speeds.items():
        if rows_of(name) != rows or not served or not all(w in ratios for w in served):
            continue
        mean = gain({w: ratios[w] for w in served})
        if mean > max(most, WORTH):
            best, most = name, mean
    return best, most


def best_table(points: list[Point]) -> TuningTable:
    """The table that ``points`` speak for: the best variant of each rows, and thresholds where they pay."""
    chosen = {rows: best_of(points, rows)[0] for rows in ROWS}
    limits: dict[int, int | None] = {}  # by rows: query rows up to which that variant serves
    least = 0
    for limit in ROWS:
        least = max(least, _rows_for(points, limit, chosen))
        limits[least] = limit
    limits[ROWS[-1]] = None
    return TuningTable(tuple((limits[rows], tuning_of(chosen[rows])) for rows in sorted(limits)))


def _rows_for(points: list[Point], limit: int, chosen: dict[int, str]) -> int:
    """Rows a CTA that serve ``limit`` query rows fastest: their own, unless others gain enough."""
    all_speeds = speeds(points)
    served = [w for w in all_speeds.get(chosen[limit], {}) if query_rows(w) == limit]
    best, most = limit, WORTH
    for other in ROWS:
        here = all_speeds.get(name_of(rows=other), {})
        if other != limit and served and all(w in here for w in served):
            mean = gain({w: here[w] / all_speeds[chosen[limit]][w] for w in served})
            if mean > most:
                best, most = other, mean
    return best


def table_of(record: Record) -> TuningTable | None:
    """The table that a record holds."""
    if record.tuning is None:
        return None
    return TuningTable.from_json([variant.model_dump() for variant in record.tuning])


def summary(record: Record) -> list[str]:
    """Lines: each candidate's speed over the shipped variant, best first, and the table that follows."""
    all_speeds = speeds(record.points)
    lines = []
    for rows in ROWS:
        own = {name: ratios for name, ratios in all_speeds.items() if rows_of(name) == rows}
        for name in sorted(own, key=lambda name: -gain(own[name])):
            ratios = own[name].values()
            lines.append(
                f"{changes_of(name):72} × {gain(own[name]):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, "
                f"{len(ratios)} workloads)"
            )
    for name, reason in not_built(record.points).items():
        lines.append(f"{changes_of(name):72} {reason}")
    for limit, tuning in (table_of(record) or SHIPPED).entries:
        serves = "any number of" if limit is None else f"up to {limit}"
        lines.append(f"{serves} query rows: rows={tuning.rows} {tuning.changes() or 'as shipped'}")
    return lines


def not_built(points: Iterable[Point]) -> dict[str, str]:
    """Reason of each candidate that was not timed."""
    return {p.implementation: p.reason for p in points if p.status != "ok" and is_candidate(p.implementation)}
