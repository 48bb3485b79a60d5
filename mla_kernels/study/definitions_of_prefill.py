"""Findings of prefill: key, unit, target, derive, choose, as ``Definition`` has them.

The grid is of whole sequences: chunks of queries over longer keys have a key of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from mla_kernels.measure import figures
from mla_kernels.measure.calls import PrefillWorkload
from mla_kernels.measure.candidates import changes_of, is_candidate
from mla_kernels.measure.figures import DECODE, label
from mla_kernels.measure.prefill_inputs import evenly
from mla_kernels.measure.records import PEER, Point, Record

from .duels import Duel, geometric_mean

Candidates = Iterable[tuple[float, str]]
Where = Callable[[PrefillWorkload], bool]

OURS = DECODE
MATH = PEER + "prefill_math"
NO_POLYNOMIALS, POLYNOMIALS = (f"{DECODE}[polynomials={n}]" for n in (0, 2))  # of every eight exponentials
MLA_POINT = (1, 16384, 128)  # b, s, heads at which FA3 was best, causal


def whole(workload: PrefillWorkload) -> bool:
    """As many queries as keys."""
    return workload.lengths_q == workload.lengths_k


def of_dims(d_qk: int, d_v: int) -> Where:
    """Whole sequences of these head dims."""
    return lambda workload: whole(workload) and (workload.d_qk, workload.d_v) == (d_qk, d_v)


def ours(record: Record, mode: str = "burst", where: Where = whole) -> Iterator[Point]:
    """Our timed points."""
    for point in record.points:
        found = (point.implementation, point.status, point.mode)
        if found == (OURS, "ok", mode) and where(point.workload):
            yield point


def duels(record: Record, mode: str = "burst", where: Where = whole) -> Iterator[Duel]:
    """Our points with the peers timed beside them."""
    beside: dict[PrefillWorkload, list[Point]] = defaultdict(list)
    for point in record.points:
        if point.is_peer and (point.status, point.mode) == ("ok", mode):
            beside[point.workload].append(point)
    for point in ours(record, mode, where):
        if peers := beside.get(point.workload):
            yield Duel(point, tuple(sorted(peers, key=lambda peer: peer.per_call_us)))


def varlen_fraction(record: Record) -> Candidates:
    """Our TFLOP/s on ragged sequences over those on as many tokens in sequences of equal length."""
    even = {point.workload: point for point in ours(record)}
    for point in ours(record):
        if point.workload.ragged and (other := even.get(evenly(point.workload))):
            yield figures.tflops(point) / figures.tflops(other), label(point)


def error_ratios(record: Record) -> Candidates:
    """Our error over that of plain PyTorch on the same inputs."""
    for duel in duels(record):
        if (peer := duel.peer(MATH)) and peer.error.out_rel_l2 > 0:
            yield duel.ours.error.out_rel_l2 / peer.error.out_rel_l2, label(duel.ours)


def variant_gains(record: Record) -> Iterator[tuple[str, float, Point]]:
    """(change, speed over what ships, point) of each variant of the kernel that was timed."""
    shipped = {point.workload: point for point in ours(record)}
    for point in record.points:
        if is_candidate(point.implementation) and point.status == "ok" and point.workload in shipped:
            yield changes_of(point.implementation), figures.speed_ratio(point, shipped[point.workload]), point


def _ratios(mode: str, where: Where) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        for duel in duels(record, mode, where):
            against = duel.best.implementation.removeprefix(PEER)
            yield duel.ratio, f"{label(duel.ours)}, against {against}"

    return derive


def _geomean(where: Where) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        ratios = [duel.ratio for duel in duels(record, "burst", where)]
        yield geometric_mean(ratios), f"burst, {len(ratios)} points"

    return derive


def _polynomial_gain(record: Record) -> Candidates:
    """What ships has none, and a variant has; or it has some, and a variant none."""
    for implementation, sign in ((POLYNOMIALS, 1), (NO_POLYNOMIALS, -1)):
        gains = [
            gain**sign for _, gain, point in variant_gains(record) if point.implementation == implementation
        ]
        if gains:
            yield geometric_mean(gains), f"burst, d 64, {len(gains)} points"


def _energy(record: Record) -> Candidates:
    """Our joules over the least that a peer needs."""
    for duel in duels(record, "sustained"):
        if both := duel.least(figures.joules_per_token):
            yield both[0] / both[1], label(duel.ours)


def _peak(where: Where) -> Callable[[Record], Candidates]:
    return lambda record: [(figures.tflops(p), label(p)) for p in ours(record, "burst", where)]


def _mla_point(record: Record) -> Candidates:
    for point in ours(record, "burst", of_dims(192, 128)):
        w = point.workload
        if (w.b, w.mean_len, w.h_q) == MLA_POINT and w.causal:
            yield figures.tflops(point), label(point)


PREFILL = (
    ("prefill.d64_vs_best", "× its speed", "≥ 1.1", _ratios("burst", of_dims(64, 64)), min),
    ("prefill.d128_vs_best", "× its speed", "≥ 1", _ratios("burst", of_dims(128, 128)), min),
    ("prefill.mla_vs_best", "× its speed", "≥ 1", _ratios("burst", of_dims(192, 128)), min),
    ("prefill.d256_vs_best", "× its speed", "", _ratios("burst", of_dims(256, 256)), min),
    ("prefill.worst_ratio", "× its speed", "≥ 0.95", _ratios("burst", whole), min),
    ("prefill.d64_geomean_vs_best", "× its speed", "", _geomean(of_dims(64, 64)), min),
    ("prefill.d128_geomean_vs_best", "× its speed", "", _geomean(of_dims(128, 128)), min),
    ("prefill.mla_geomean_vs_best", "× its speed", "", _geomean(of_dims(192, 128)), min),
    ("prefill.chunk_vs_best", "× its speed", "", _ratios("burst", lambda w: not whole(w)), min),
    ("prefill.sustained_vs_best", "× its speed", "", _ratios("sustained", whole), min),
    ("prefill.energy_vs_best", "of its joules per token", "", _energy, max),
    ("prefill.mla_tflops", "TFLOP/s", "≥ 719", _mla_point, min),
    ("prefill.d64_tflops", "TFLOP/s", "", _peak(of_dims(64, 64)), max),
    ("prefill.d128_tflops", "TFLOP/s", "", _peak(of_dims(128, 128)), max),
    ("prefill.varlen_fraction", "of the even TFLOP/s", "≥ 0.95", varlen_fraction, min),
    ("prefill.error_vs_torch", "of plain PyTorch's error", "≤ 2", error_ratios, max),
    ("prefill.polynomial_gain", "× the speed without", "", _polynomial_gain, min),
)
