"""Run a list of steps into a record. An experiment is such a list and a name."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from mla_kernels.compiler import KernelConfig
from mla_kernels.tuning import TILE_TOKENS

from . import candidates, ceilings, points, prefill_candidates, provenance, timing
from .calls import PrefillWorkload
from .counters import CountersUnavailable, profile
from .figures import label, tb_s, tflops
from .points import Step
from .records import PEER, Method, Point, Record, Source
from .workloads import ROTATION_OVER_L2

SEED = 20260101
KEEP_EVERY = 20  # steps
Progress = Callable[[str], None]


def run_steps(
    experiment: str,
    scope: str,
    steps: Sequence[Step],
    progress: Progress = print,
    *,
    limit_seconds: float | None = None,
    keep: Callable[[Record], None] | None = None,
    loaded_ceilings: bool = True,
) -> Record:
    """Measure the ceilings and every step; steps at one workload become one, so that a record has no twins.

    Steps with sustained load come last, so that the bursts of others do not meet a card that it has heated.
    ``limit_seconds``, from the start: steps that would begin later, or leave no time for the sustained ones,
    are left out, and the record says how many. ``keep`` gets the record so far now and then.
    ``loaded_ceilings`` False saves the 8 s of ceilings under load.

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
    absent, built = prepare_candidates(steps)
    source, device = source_of(steps, built), provenance.device_section()
    progress(f"{experiment}: {len(source.kernels)} kernels ready, {time.perf_counter() - began:.0f} s")
    for dtype, reasons in prepare_peers(steps, progress).items():
        absent[dtype] |= reasons
    limits, notes = ceilings.measure_ceilings(loaded_ceilings)
    for limit in limits:
        progress(f"{experiment}: ceiling {limit.name} {limit.mode}: {limit.value:.2f} {limit.unit}")

    measured: list[Point] = []

    def record(*more: str) -> Record:
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
                notes=[*notes, *more],
            ),
            ceilings=list(limits),
            points=list(measured),
        )

    left_out = 0

    def keep_unfinished(number: int) -> None:
        if keep:
            keep(record(f"unfinished: {number - left_out} of {len(steps)} workloads measured"))

    for number, step in enumerate(steps, 1):
        owed = 0.0 if step.sustain else loaded_seconds(steps[number:])  # they come last
        if limit_seconds is not None and time.perf_counter() - began + owed > limit_seconds:
            left_out += 1
            continue
        try:
            found = points.measure(
                step, l2_bytes=device.l2_bytes, seed=SEED, absent=absent[step.workload.dtype]
            )
        except KeyboardInterrupt:
            keep_unfinished(number - 1)
            raise
        for point in found:
            measured.append(_with_counters(point) if point.implementation in step.count else point)
            elapsed = time.perf_counter() - began
            progress(f"{experiment} {number}/{len(steps)}, {elapsed:.0f} s: {describe(measured[-1])}")
        if number % KEEP_EVERY == 0:
            keep_unfinished(number)
    if not left_out:
        return record()
    stopped = f"stopped after {limit_seconds:.0f} s: {left_out} of {len(steps)} workloads not measured"
    progress(f"{experiment}: {stopped}")
    return record(stopped)


def prepare_peers(steps: Sequence[Step], progress: Progress = print) -> dict[str, dict[str, str]]:
    """Load and compile the peers that ``steps`` name. By dtype: those that cannot be used, and why."""
    wanted: dict[str, dict[str, None]] = defaultdict(dict)
    for step in each_of(steps):
        for name in step.implementations:
            if name.startswith(PEER):
                wanted[step.workload.dtype][name.removeprefix(PEER)] = None
    absent: dict[str, dict[str, str]] = defaultdict(dict)
    for dtype, names in wanted.items():
        from . import peers

        missing = peers.prepare(
            tuple(names), (dtype,), lambda line, dtype=dtype: progress(f"{line} ({dtype})")
        )
        absent[dtype] = {PEER + name: reason for name, reason in missing.items()}
    return absent


def prepare_candidates(steps: Sequence[Step]) -> tuple[dict[str, dict[str, str]], list[KernelConfig]]:
    """Compile the variants that ``steps`` name, several at once.

    Those that cannot be built and why, by dtype; the cubins of the others.
    """
    of_prefill = [
        (name, step.workload)
        for step in each_of(steps)
        for name in step.implementations
        if isinstance(step.workload, PrefillWorkload)
    ]
    names = [
        (name, step.workload.dtype)
        for step in each_of(steps)
        for name in step.implementations
        if not isinstance(step.workload, PrefillWorkload)
    ]
    absent = candidates.prepare(names)
    for (dtype, name), reason in prefill_candidates.prepare_prefill(of_prefill).items():
        absent[dtype][name] = reason
    built = candidates.configs(item for item in names if item[0] not in absent[item[1]])
    fitting = [(name, w) for name, w in of_prefill if name not in absent[w.dtype]]
    return absent, [*built, *prefill_candidates.prefill_configs(fitting)]


def source_of(steps: Sequence[Step], built: Sequence[KernelConfig]) -> Source:
    """What ``steps`` can launch: prefill's kernels where they are all of it, else decode's."""
    if steps and all(isinstance(step.workload, PrefillWorkload) for step in steps):
        from mla_kernels.prefill_tuning import shipped_prefill_configs

        return provenance.source_section(built, shipped_prefill_configs())
    return provenance.source_section(built)


def loaded_seconds(steps: Sequence[Step]) -> float:
    """Time under sustained load that ``steps`` ask for, with its ramps."""
    return sum(len(step.sustain) for step in each_of(steps)) * (
        timing.SUSTAINED_SECONDS + timing.RAMP_SECONDS
    )


def merge(steps: Sequence[Step]) -> list[Step]:
    """One step for each workload and rotation, with all that the given ones ask of it.

    What is beside a step and a step of its own as well is measured there alone.
    """
    own = {_key(step) for step in steps}
    apart = [
        part
        for step in steps
        for part in (
            (replace(step, beside=None), step.beside) if step.beside and _key(step.beside) in own else (step,)
        )
    ]
    merged: dict[tuple, Step] = {}
    for step in apart:
        first = merged.setdefault(_key(step), step)
        wanted = {
            name: tuple(dict.fromkeys(getattr(first, name) + getattr(step, name)))
            for name in ("implementations", "sustain", "count")
        }
        rounds = max(first.rounds, step.rounds)
        host, memory = first.host or step.host, first.memory or step.memory
        wanted |= {"host": host, "memory": memory, "rounds": rounds, "beside": first.beside or step.beside}
        merged[_key(step)] = replace(first, **wanted)
    return list(merged.values())


def _key(step: Step) -> tuple:
    return step.workload, step.rotate, step.poison


def each_of(steps: Iterable[Step]) -> Iterator[Step]:
    """Steps and those beside them."""
    for step in steps:
        yield from step.together()


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
    paged = not isinstance(point.workload, PrefillWorkload) and point.workload.page_size != TILE_TOKENS
    pages = f", pages of {point.workload.page_size}" if paged else ""
    axes = f"{point.implementation} {label(point)}{pages}"
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
