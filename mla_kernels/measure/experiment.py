"""Run a list of steps into a record. An experiment is such a list and a name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from . import ceilings, points, provenance, timing
from .counters import CountersUnavailable, profile
from .figures import label, tb_s, tflops
from .points import Step
from .records import Method, Point, Record
from .workloads import ROTATION_OVER_L2

SEED = 20260101
Progress = Callable[[str], None]


def run_steps(experiment: str, scope: str, steps: Sequence[Step], progress: Progress = print) -> Record:
    """Measure the ceilings and every step; steps at one workload become one, so that a record has no twins.

    Steps with sustained load come last, so that the bursts of others do not meet a card that it has heated.
    Raises DeviceUnavailable where there is no Hopper GPU, UnknownCommit where the source has no name.
    """
    from mla_kernels.device import DeviceUnavailable, hopper_available

    if not hopper_available():
        raise DeviceUnavailable(
            f"experiment {experiment!r} measures an NVIDIA Hopper GPU (sm_90) and finds none here; "
            "the notebooks replay the records under data/ without one"
        )
    run = provenance.run_section(f"python -m mla_kernels.measure record {experiment} --scope {scope}")
    steps = sorted(merge(steps), key=lambda step: bool(step.sustain))
    began = time.perf_counter()
    source, device = provenance.source_section(), provenance.device_section()
    progress(f"{experiment}: {len(source.kernels)} kernels ready, {time.perf_counter() - began:.0f} s")
    limits, notes = ceilings.measure_ceilings()
    for limit in limits:
        progress(f"{experiment}: ceiling {limit.name} {limit.mode}: {limit.value:.2f} {limit.unit}")

    measured: list[Point] = []
    for number, step in enumerate(steps, 1):
        for point in points.measure(step, l2_bytes=device.l2_bytes, seed=SEED):
            measured.append(_with_counters(point) if point.implementation in step.count else point)
            elapsed = time.perf_counter() - began
            progress(f"{experiment} {number}/{len(steps)}, {elapsed:.0f} s: {describe(measured[-1])}")
    return Record(
        experiment=experiment,
        run=run,
        source=source,
        device=device,
        software=provenance.software_section(),
        method=Method(
            timer=timing.TIMER,
            warmup=timing.WARMUP,
            rounds=timing.ROUNDS,
            l2_rotation_bytes=ROTATION_OVER_L2 * device.l2_bytes,
            graph=True,
            seed=SEED,
            sustained_seconds=timing.SUSTAINED_SECONDS,
            notes=list(notes),
        ),
        ceilings=list(limits),
        points=measured,
    )


def merge(steps: Sequence[Step]) -> list[Step]:
    """One step for each workload and rotation, with all that the given ones ask of it."""
    merged: dict[tuple, Step] = {}
    for step in steps:
        key = (step.workload, step.rotate, step.poison)
        first = merged.setdefault(key, step)
        wanted = {
            name: tuple(dict.fromkeys(getattr(first, name) + getattr(step, name)))
            for name in ("implementations", "sustain", "count")
        }
        merged[key] = replace(first, **wanted, host=first.host or step.host)
    return list(merged.values())


def _with_counters(point: Point) -> Point:
    """The profiler flushes the L2 and runs a burst: a point that does neither, or failed, stays as it is."""
    if (point.mode, point.status) != ("burst", "ok"):
        return point
    try:
        return point.model_copy(update={"counters": profile(point.implementation, point.workload)})
    except CountersUnavailable as error:
        return point.model_copy(update={"counters_reason": str(error)})


def describe(point: Point) -> str:
    """One line: what was measured and what came of it."""
    axes = f"{point.implementation} {label(point)}"
    if point.status != "ok":
        return f"{axes}: {point.status}: {point.reason}"
    error = f", error {point.error.out_rel_l2:.1e}" if point.error else ""
    counters = (
        f", counters {point.counters or point.counters_reason}"
        if point.counters or point.counters_reason
        else ""
    )
    rates = f"{point.per_call_us:.1f} µs, {tb_s(point):.2f} TB/s, {tflops(point):.0f} TFLOP/s"
    return f"{axes}: {rates}{error}{counters}"
