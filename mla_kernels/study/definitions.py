"""What each finding means: its key, unit, target, and how a record gives it.

Targets are those of the decode milestone; a fraction or penalty is the worst over its points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mla_kernels.measure import candidates, figures
from mla_kernels.measure.energy import fit_energy_roof
from mla_kernels.measure.figures import DECODE, label
from mla_kernels.measure.records import LSE_MAX_ABS_LIMIT, OUT_REL_L2_LIMIT, PEER, Point, Record, Workload
from mla_kernels.measure.workloads import spread_evenly
from mla_kernels.tuning import ROWS

from . import fits
from .definitions_of_prefill import PREFILL
from .definitions_of_sequences import PAGING, VARLEN
from .duels import FLASH_MLA, absorbed_error, duels, geometric_mean, gpu_bytes, is_compute_bound

MANY_TOKENS = 1 << 20  # b · kv from which a memory-bound call must reach the bandwidth
FEW_ROWS = 32  # query rows (h_q · s_q) up to which a call is memory-bound without doubt


Candidates = Iterable[tuple[float, str]]


@dataclass(frozen=True)
class Definition:
    """``derive`` gives (value, where) for each place in a record; ``choose`` takes one value of all records.

    ``experiment``: of that experiment's record alone, where several could tell.

    A LookupError of ``derive`` says that the record holds nothing to derive it from.
    """

    key: str
    unit: str
    target: str
    derive: Callable[[Record], Candidates]
    choose: Callable[..., tuple[float, ...]]
    experiment: str = ""

    def reads(self, record: Record) -> bool:
        """Whether a record can tell: of the experiment named, or of one without definitions of its own."""
        if self.experiment:
            return record.experiment == self.experiment
        return record.experiment not in ("varlen", "paging", "prefill")


def _decode(record: Record, *modes: str) -> Iterator[Point]:
    """Timed decode points; of one workload not the one that reads the same KV again from L2."""
    for point in record.points:
        if (point.implementation, point.status) != (DECODE, "ok") or point.mode not in (modes or ("burst",)):
            continue
        if fits.is_cold(record, point):
            yield point


def _at(record: Record, b: int, h_q: int, kv: int, mode: str = "burst") -> Iterator[Point]:
    for point in _decode(record, mode):
        w = point.workload
        if (w.b, w.h_q, w.s_q, w.mean_len, w.lengths_kind, w.dtype) == (b, h_q, 1, kv, "uniform", "bf16"):
            yield point


def _bandwidth_fraction(where: Callable[[Workload], bool]) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        for point in _decode(record, "burst", "sustained"):
            if sum(point.workload.lengths) >= MANY_TOKENS and where(point.workload):
                yield figures.bandwidth_share(record, point), label(point)

    return derive


def _has_few_rows(workload: Workload) -> bool:
    return figures.query_rows(workload) <= FEW_ROWS


def _has_64_heads(workload: Workload) -> bool:
    return (workload.h_q, workload.s_q) == (64, 1)


def _skeleton_fraction(record: Record) -> Candidates:
    for point in _decode(record, "burst", "sustained"):
        if not is_compute_bound(point.workload):
            continue
        if skeleton := figures.counterpart(record, point, "block:skeleton"):
            yield figures.speed_ratio(point, skeleton), label(point)


def _ratios(
    *modes: str, where: Callable[[Workload], bool] = lambda w: True
) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        for duel in duels(record, *modes):
            if where(duel.ours.workload):
                against = duel.best.implementation.removeprefix(PEER)
                yield duel.ratio, f"{label(duel.ours)}, against {against}"

    return derive


def _geomean(peer: str | None = None) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        pairs = [(duel.ours, duel.peer(peer) if peer else duel.best) for duel in duels(record, "burst")]
        ratios = [figures.speed_ratio(ours, other) for ours, other in pairs if other]
        yield geometric_mean(ratios), f"burst, {len(ratios)} points"

    return derive


def _over_least(quantity: Callable[[Point], float | None], *modes: str) -> Callable[[Record], Candidates]:
    """Ours over the least that a peer has at the same point."""

    def derive(record: Record) -> Candidates:
        for duel in duels(record, *modes):
            if (both := duel.least(quantity)) and both[1] > 0:
                yield both[0] / both[1], label(duel.ours)

    return derive


def _decompressed_memory(record: Record) -> Candidates:
    for duel in duels(record, "burst"):
        other, ours = duel.peer("peer:torch_decompressed"), gpu_bytes(duel.ours)
        if other and ours and (theirs := gpu_bytes(other)):
            yield theirs / ours, label(duel.ours)


def _host_us(record: Record) -> Candidates:
    return [(us, label(p)) for p in _decode(record) if (us := figures.host_us(p)) is not None]


def _varlen_penalty(record: Record) -> Candidates:
    even = {p.workload: p for p in _decode(record) if p.workload.lengths_kind == "uniform"}
    for point in _decode(record):
        other = even.get(spread_evenly(point.workload))
        if point.workload.lengths_kind in ("normal", "lognormal") and other:
            yield point.per_call_us / other.per_call_us - 1, label(point)


def _time_at(b: int, h_q: int, kv: int) -> Callable[[Record], Candidates]:
    return lambda record: [(p.per_call_us, label(p)) for p in _at(record, b, h_q, kv)]


def _tflops_at(b: int, h_q: int, kv: int, mode: str) -> Callable[[Record], Candidates]:
    return lambda record: [(figures.tflops(p), label(p)) for p in _at(record, b, h_q, kv, mode)]


def _share_at(b: int, h_q: int, kv: int) -> Callable[[Record], Candidates]:
    return lambda record: [(figures.bandwidth_share(record, p), label(p)) for p in _at(record, b, h_q, kv)]


def _energy_at(b: int, h_q: int, kv: int) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        for point in _at(record, b, h_q, kv, "sustained"):
            if (joules := figures.joules_per_token(point)) is not None:
                yield 1e3 * joules, label(point)

    return derive


def _ceiling(name: str, mode: str) -> Callable[[Record], Candidates]:
    return lambda record: [(figures.find_ceiling(record, name, mode).value, f"{name}, {mode}")]


def _l2_speedup(record: Record) -> Candidates:
    for point in _decode(record):
        for again in record.points:
            same = (again.workload, again.implementation, again.mode) == (point.workload, DECODE, "burst")
            if same and again.status == "ok" and again.kv_sets == 1 and point.kv_sets > 1:
                yield figures.speed_ratio(again, point), label(point)


def _bytes_read(record: Record) -> Candidates:
    for point in _decode(record):
        if point.counters and "dram_read_bytes" in point.counters:
            counted = figures.moved_bytes(point.workload)
            yield point.counters["dram_read_bytes"] / counted, label(point)


def _verified(name: str) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        if record.verification is not None:
            total = sum(getattr(suite, name) for suite in record.verification.suites.values())
            yield float(total), "tests/gpu"

    return derive


def _worst_error(name: str) -> Callable[[Record], Candidates]:
    def derive(record: Record) -> Candidates:
        if record.verification is not None and name in record.verification.worst:
            yield record.verification.worst[name], "tests/gpu"

    return derive


def _peak(record: Record) -> Candidates:
    return [(figures.tflops(point), label(point)) for point in _decode(record)]


def _worst_lse(record: Record) -> Candidates:
    worst = record.verification.worst if record.verification else {}
    return [(value, f"tests/gpu, {name}") for name, value in worst.items() if name.startswith("lse_max_abs/")]


def _energy(coefficient: str) -> Callable[[Record], Candidates]:
    return lambda record: [(getattr(fit_energy_roof(record), coefficient), "fit to the building blocks")]


def _fixed_cost(coefficient: str) -> Callable[[Record], Candidates]:
    where = f"fit over kv, b {fits.FIXED_COST_BATCH}, h_q {fits.FIXED_COST_HEADS}"
    return lambda record: [(getattr(fits.fit_fixed_cost(record), coefficient), where)]


def _best_variants(record: Record) -> Candidates:
    for rows in ROWS if record.tuning else ():
        name, gain = candidates.best_of(record.points, rows)
        yield gain, candidates.changes_of(name)


def _variants(record: Record) -> Candidates:
    for name, ratios in candidates.speeds(record.points).items():
        yield candidates.gain(ratios), f"{candidates.changes_of(name)}, {len(ratios)} workloads"


def _ridge(record: Record) -> Candidates:
    return [(fits.ridge(record), "ceilings, burst")]


def _knee(record: Record) -> Candidates:
    return [(fits.fit_knee(record).flop_per_byte, f"sweep of query rows, kv {fits.KNEE_LENGTH}")]


_DECODE = (
    ("worst_ratio_vs_best_peer", "× its speed", "≥ 1", _ratios(), min),
    ("geomean_vs_flashmla", "× its speed", "≥ 1.25", _geomean(FLASH_MLA), min),
    ("geomean_vs_best_peer", "× its speed", "≥ 1.15", _geomean(), min),
    ("compute_vs_best_peer_burst", "× its speed", "≥ 1.05", _ratios("burst", where=is_compute_bound), min),
    (
        "compute_vs_best_peer_sustained",
        "× its speed",
        "≥ 1.08",
        _ratios("sustained", where=is_compute_bound),
        min,
    ),
    ("energy_vs_best_peer", "of its joules per token", "", _over_least(figures.joules_per_token), max),
    ("error_vs_best_peer", "of its error", "≤ 1", _over_least(absorbed_error, "burst"), max),
    ("memory_vs_best_peer", "of its bytes", "", _over_least(gpu_bytes, "burst"), max),
    ("decompressed_memory", "× our bytes", "", _decompressed_memory, max),
    ("host_us", "µs", "≤ 12", _host_us, max),
    ("bandwidth_fraction", "of HBM read rate", "≥ 0.94", _bandwidth_fraction(_has_few_rows), min),
    ("h64_bandwidth_fraction", "of HBM read rate", "≥ 0.9", _bandwidth_fraction(_has_64_heads), min),
    ("b128_h16_kv4096_bandwidth_fraction", "of HBM read rate", "≥ 0.91", _share_at(128, 16, 4096), min),
    ("b128_h64_kv4096_bandwidth_fraction", "of HBM read rate", "≥ 0.88", _share_at(128, 64, 4096), min),
    ("peak_tflops", "TFLOP/s", "≥ 700", _peak, max),
    ("b64_h128_kv16384_tflops", "TFLOP/s", "≥ 660", _tflops_at(64, 128, 16384, "burst"), min),
    ("b64_h128_kv16384_tflops_sustained", "TFLOP/s", "", _tflops_at(64, 128, 16384, "sustained"), min),
    ("skeleton_fraction", "of the no-softmax skeleton", "≥ 0.95", _skeleton_fraction, min),
    ("varlen_penalty", "of the even time", "≤ 0.05", _varlen_penalty, max),
    ("b1_h16_kv4096_us", "µs", "≤ 8", _time_at(1, 16, 4096), max),
    ("b1_h16_kv131072_us", "µs", "≤ 40", _time_at(1, 16, 131072), max),
    ("b1_h128_kv4096_us", "µs", "≤ 10", _time_at(1, 128, 4096), max),
)
_ROOFLINE = (
    ("roofline.hbm_read", "TB/s", "", _ceiling(figures.HBM_READ, "burst"), max),
    ("roofline.matmul", "TFLOP/s", "", _ceiling(figures.MATMUL, "burst"), max),
    ("roofline.matmul_sustained", "TFLOP/s", "", _ceiling(figures.MATMUL, "sustained"), max),
    ("roofline.ridge", "FLOP/B", "", _ridge, max),
    ("roofline.knee", "FLOP/B", "", _knee, max),
    ("energy.static_w", "W", "", _energy("static_w"), max),
    ("energy.pj_per_byte", "pJ/B", "", _energy("w_per_tb_s"), max),
    ("energy.pj_per_flop", "pJ/FLOP", "", _energy("w_per_tflops"), max),
    ("energy.h16_mj_per_token", "mJ per token and layer", "", _energy_at(64, 16, 16384), max),
    ("energy.h128_mj_per_token", "mJ per token and layer", "", _energy_at(64, 128, 16384), max),
)
_BANDWIDTH = (
    ("bandwidth.fixed_cost_us", "µs", "", _fixed_cost("fixed_us"), max),
    ("bandwidth.slope", "TB/s", "", _fixed_cost("tb_s"), min),
    ("bandwidth.l2_speedup", "×", "", _l2_speedup, max),
    ("bandwidth.bytes_read", "of the bytes counted", "", _bytes_read, max),
)
_VERIFICATION = (
    ("verification.passed", "GPU tests", "", _verified("passed"), min),
    ("verification.failed", "GPU tests", "≤ 0", _verified("failed"), max),
    *(
        (
            f"verification.out_rel_l2_{dtype}",
            "relative L2",
            f"≤ {limit:g}",
            _worst_error(f"out_rel_l2/{dtype}"),
            max,
        )
        for dtype, limit in OUT_REL_L2_LIMIT.items()
    ),
    ("verification.lse_max_abs", "absolute", f"≤ {LSE_MAX_ABS_LIMIT:g}", _worst_lse, max),
)

_TUNING = (
    ("tuning.best_gain", "× the shipped speed", "", _best_variants, max),
    ("tuning.worst_candidate", "× the shipped speed", "", _variants, min),
)

DEFINITIONS = (
    *(Definition(f"decode.{key}", *rest) for key, *rest in _DECODE),
    *(Definition(*fields, "roofline") for fields in _ROOFLINE),
    *(Definition(*fields, "bandwidth") for fields in _BANDWIDTH),
    *(Definition(*fields, "verification") for fields in _VERIFICATION),
    *(Definition(*fields, "tuning") for fields in _TUNING),
    *(Definition(*fields, "varlen") for fields in VARLEN),
    *(Definition(*fields, "paging") for fields in PAGING),
    *(Definition(*fields, "prefill") for fields in PREFILL),
)
