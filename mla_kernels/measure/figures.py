"""Figures derived from records: the one place where FLOP, bytes, rates, intervals and energy are defined.

Counted is an absorbed MLA decode of ``s_q`` query tokens and ``h_q`` heads over a latent cache of 576
values a token (512 latent + 64 rope), of which the first 512 are also the values; or a prefill, whose mask
does subtract: only the pairs of query and key that see each other count.
"""

from __future__ import annotations

import math
import statistics

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V

from .calls import PrefillWorkload, Workload
from .measurements import Ceiling, Measurement, Mode
from .records import Point, Record

ELEMENT_BYTES = 2  # bf16 and fp16

HBM_READ = "hbm_read"  # ceiling: read-only streaming of a buffer much larger than L2, TB/s
MATMUL = "matmul_bf16_8192"  # ceiling: torch.matmul of 8192^3 bf16 random values, TFLOP/s
DECODE = "mla_kernels"


AnyWorkload = Workload | PrefillWorkload


def flop(workload: AnyWorkload) -> int:
    """Decode: 2 · Σ(s_q · h_q · kv_len) · (576 + 512), a causal mask subtracts nothing.

    Prefill: 2 · Σ(pairs that see each other) · h_q · (d_qk + d_v).
    """
    if isinstance(workload, PrefillWorkload):
        return 2 * visible_pairs(workload) * workload.h_q * (workload.d_qk + workload.d_v)
    return 2 * workload.s_q * workload.h_q * sum(workload.lengths) * (HEAD_DIM + HEAD_DIM_V)


def visible_pairs(workload: PrefillWorkload) -> int:
    """Pairs of query and key of one head that see each other; causal: query i of s_q sees i + s_k - s_q + 1
    keys, where that is positive."""
    pairs = 0
    for s_q, s_k in zip(workload.lengths_q, workload.lengths_k, strict=True):
        blind = max(0, s_q - s_k) if workload.causal else 0  # queries at the start that see nothing
        seeing = s_q - blind
        hidden = seeing * (seeing - 1) // 2 if workload.causal else 0
        pairs += seeing * s_k - hidden
    return pairs


def kv_bytes(workload: AnyWorkload) -> int:
    """Decode: Σ kv_len · 1152, every cached token once. Prefill: its keys and values."""
    if isinstance(workload, PrefillWorkload):
        columns = workload.h_kv * (workload.d_qk + workload.d_v)
        return sum(workload.lengths_k) * columns * ELEMENT_BYTES
    return sum(workload.lengths) * HEAD_DIM * ELEMENT_BYTES


def moved_bytes(workload: AnyWorkload) -> int:
    """Least traffic with HBM: each cached token (key, value) and q read once, out written once (LSE, tables
    left out)."""
    if isinstance(workload, PrefillWorkload):
        rows, columns = sum(workload.lengths_q) * workload.h_q, workload.d_qk + workload.d_v
    else:
        rows, columns = workload.b * workload.s_q * workload.h_q, HEAD_DIM + HEAD_DIM_V
    return kv_bytes(workload) + rows * columns * ELEMENT_BYTES


def intensity(workload: AnyWorkload) -> float:
    """FLOP per byte of HBM traffic."""
    return flop(workload) / moved_bytes(workload)


def query_rows(workload: Workload) -> int:
    """Query rows that share one sequence's KV: s_q · h_q."""
    return workload.s_q * workload.h_q


def label(point: Point) -> str:
    """Mode and workload of a point in words, as findings and progress name it."""
    w = point.workload
    if isinstance(w, PrefillWorkload):
        return f"{point.mode}, {prefill_label(w)}"
    kv = f"{w.mean_len:g}" if w.lengths_kind == "uniform" else f"{w.lengths_kind} {w.mean_len:g}±{w.sd_len:g}"
    dtype = "" if w.dtype == "bf16" else f", {w.dtype}"
    return f"{point.mode}, h_q {w.h_q}, s_q {w.s_q}, b {w.b}, kv {kv}{dtype}"


def prefill_label(w: PrefillWorkload) -> str:
    """A prefill in words: batch, length (queries over keys if they differ), heads, head dims, mask, form."""
    length = (
        f"{w.mean_len:g}" if w.lengths_kind == "uniform" else f"{w.lengths_kind} {w.mean_len:g}±{w.sd_len:g}"
    )
    if w.lengths_q != w.lengths_k:
        length = f"{sum(w.lengths_q) // w.b} over {length}"
    heads = f"h {w.h_q}" if w.h_q == w.h_kv else f"h {w.h_q} over {w.h_kv}"
    dims = f"d {w.d_qk}" if w.d_qk == w.d_v else f"d {w.d_qk}/{w.d_v}"
    form = (", causal" if w.causal else "") + (", ragged" if w.ragged else "")
    return f"b {w.b}, s {length}, {heads}, {dims}{form}" + ("" if w.dtype == "bf16" else f", {w.dtype}")


def point_flop(point: Point) -> int:
    """Useful FLOP of one call; the stream block does none."""
    return 0 if point.implementation == "block:stream" else flop(point.workload)


def point_bytes(point: Point) -> int:
    """Least HBM bytes of one call: none for the mma block, the KV alone for stream and skeleton."""
    if point.implementation == "block:mma":
        return 0
    return moved_bytes(point.workload) if point.is_attention else kv_bytes(point.workload)


def interval_us(measurement: Measurement, level: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the median sample, in µs, from order statistics (no distribution assumed).

    The widest interval available (min, max) where the samples are too few for ``level``.
    """
    samples = sorted(measurement.samples_us)
    n, rank = len(samples), 0
    outside = 2 / 2**n  # P(the median lies outside samples[rank] .. samples[n - 1 - rank])
    while (wider := outside + 2 * math.comb(n, rank + 1) / 2**n) <= 1 - level:
        outside, rank = wider, rank + 1
    return samples[rank], samples[n - 1 - rank]


def tflops(point: Point) -> float:
    """Useful TFLOP/s."""
    return point_flop(point) / point.per_call_us / 1e6


def tb_s(point: Point) -> float:
    """Least HBM traffic over time, TB/s."""
    return point_bytes(point) / point.per_call_us / 1e6


def tokens(workload: AnyWorkload) -> int:
    """Query tokens of one call in one layer."""
    if isinstance(workload, PrefillWorkload):
        return sum(workload.lengths_q)
    return workload.b * workload.s_q


def host_us(point: Point) -> float | None:
    """Host time of one eager call, the median of its samples; None where it was not measured."""
    return None if point.host is None else statistics.median(point.host.call_us)


def joules_per_token(point: Point) -> float | None:
    """Energy of one layer's attention for one query token: mean power · time / tokens.

    None where the point is not sustained or no power was read.
    """
    if point.sustained is None or (power := point.sustained.mean_power_w) is None:
        return None
    return power * point.per_call_us / 1e6 / tokens(point.workload)


def find_ceiling(record: Record, name: str, mode: Mode = "burst") -> Ceiling:
    """The ceiling of that name and mode. Raises LookupError naming what the record has."""
    for ceiling in record.ceilings:
        if (ceiling.name, ceiling.mode) == (name, mode):
            return ceiling
    has = ", ".join(f"{c.name} ({c.mode})" for c in record.ceilings) or "none"
    raise LookupError(f"record {record.experiment!r} has no {mode} ceiling {name!r}; it has: {has}")


def bandwidth_share(record: Record, point: Point) -> float:
    """TB/s of a point over the same run's read-only bandwidth in the same mode."""
    return tb_s(point) / find_ceiling(record, HBM_READ, point.mode).value


def compute_share(record: Record, point: Point) -> float:
    """TFLOP/s of a point over the same run's matmul in the same mode."""
    return tflops(point) / find_ceiling(record, MATMUL, point.mode).value


def floor_us(record: Record, workload: AnyWorkload, mode: Mode = "burst") -> float:
    """Roofline: the longer of the bytes at the read ceiling and the FLOP at the matmul ceiling, in µs."""
    bytes_us = moved_bytes(workload) / find_ceiling(record, HBM_READ, mode).value / 1e6
    flop_us = flop(workload) / find_ceiling(record, MATMUL, mode).value / 1e6
    return max(bytes_us, flop_us)


def counterpart(record: Record, point: Point, implementation: str) -> Point | None:
    """Another implementation's timed point at the same workload, mode and rotation, or None."""
    for other in record.points:
        found = (other.implementation, other.status, other.mode, other.kv_sets)
        if found == (implementation, "ok", point.mode, point.kv_sets) and other.workload == point.workload:
            return other  # lengths are compared last: they are many
    return None


def speed_ratio(point: Point, other: Point) -> float:
    """``point``'s speed over ``other``'s at one workload: above 1 is faster."""
    return other.per_call_us / point.per_call_us
