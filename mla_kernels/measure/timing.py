"""Timing on the GPU: CUDA-graph replays between events, in bursts and under sustained load.

A sample is one replay of a graph that holds many calls (about 2 ms of them, and always whole rounds of the
KV sets), divided by their number, so that the resolution of events (0.5 µs) and the gap between two graphs
(1-2 µs) vanish.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .measurements import Measurement, Sustained
from .power import Sampler, counted_power_w, decode_throttle, meter

if TYPE_CHECKING:
    import torch

ROUNDS = 15
WARMUP_REPLAYS = 4
SAMPLE_US = 2000.0
HOST_BOUND_US = 500.0  # an eager call that seems shorter may be host time: a short graph tells
PROBE_CALLS = 8  # in that graph
SUSTAINED_SECONDS = 3.0
RAMP_SECONDS = 1.0  # until the card has met its power cap; not in the window
CHUNK_US = 50_000.0
CHUNKS_IN_FLIGHT = 3

TIMER = "CUDA graph replays between CUDA events, implementations interleaved round-robin"
WARMUP = f"2 eager calls, then {WARMUP_REPLAYS} graph replays (about 2 ms each) of every implementation"


@dataclass(frozen=True)
class Loop:
    """A captured graph of ``calls`` calls. It holds what it captured, so that their tensors stay alive."""

    name: str
    graph: torch.cuda.CUDAGraph
    calls: int
    captured: Sequence[Callable[[], object]]


def capture(name: str, rotation: Sequence[Callable[[], object]], sample_us: float = SAMPLE_US) -> Loop:
    """Capture ``rotation`` (one call for each KV set) as often as makes a sample of about ``sample_us``.

    Whatever a call raises on the host passes through, and leaves no capture open.
    """
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture needs a side stream, and what is warmed up there
        for _ in range(2):
            rotation[0]()
        call_us = _time_us(rotation[:4])
        if call_us < HOST_BOUND_US:
            probe = _graph_of(rotation[:PROBE_CALLS])
            probe.replay()
            call_us = _time_us([probe.replay]) / len(rotation[:PROBE_CALLS])
        repeats = max(1, math.ceil(calls_per_sample(call_us, sample_us) / len(rotation)))
        graph = _graph_of([*rotation] * repeats)
    torch.cuda.current_stream().wait_stream(stream)
    return Loop(name, graph, repeats * len(rotation), rotation)


def _graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """``calls`` in a row, captured on the current stream."""
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for call in calls:
            call()
    except BaseException:
        with contextlib.suppress(Exception):  # the capture is void; what matters is why
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Mean time of ``calls`` on the current stream, one after another, at least 1 µs."""
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) * 1e3 / len(calls), 1.0)


def calls_per_sample(call_us: float, sample_us: float = SAMPLE_US) -> int:
    """Calls of ``call_us`` that make a sample of about ``sample_us``."""
    return max(1, math.ceil(sample_us / max(call_us, 1.0)))


def burst(loops: Sequence[Loop], rounds: int = ROUNDS) -> dict[str, Measurement]:
    """``rounds`` samples of every loop, interleaved: each round times every loop once.

    Everything is queued at once, so that a start event is never recorded on an idle GPU. The snapshots
    before and after are taken while untimed replays run.
    """
    import torch

    for _ in range(WARMUP_REPLAYS):
        for loop in loops:
            loop.graph.replay()
    before = meter().snapshot()
    loops[0].graph.replay()  # the snapshot took milliseconds: fill the queue again
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {loop.name: [] for loop in loops}
    for _ in range(rounds):
        for loop in loops:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            loop.graph.replay()
            end.record()
            events[loop.name].append((begin, end))
    for loop in loops:
        loop.graph.replay()
    events[loops[-1].name][-1][1].synchronize()
    after = meter().snapshot()
    torch.cuda.synchronize()
    return {
        loop.name: Measurement(
            mode="burst",
            samples_us=[_per_call_us(begin, end, loop.calls) for begin, end in events[loop.name]],
            calls_per_sample=loop.calls,
            before=before,
            after=after,
        )
        for loop in loops
    }


def sustained(
    loop: Loop, seconds: float = SUSTAINED_SECONDS, ramp_seconds: float = RAMP_SECONDS
) -> Measurement:
    """Uninterrupted replays: ``ramp_seconds`` that do not count, then a window of at least ``seconds``.

    The window is timed by events on the GPU; its samples are chunks of about 50 ms. Power is read by a
    thread while the host keeps up to three chunks queued.
    """
    import torch

    loop.graph.replay()
    replay_us = _time_us([loop.graph.replay])
    replays = max(1, round(CHUNK_US / replay_us))
    marks: list[torch.cuda.Event] = []  # one after each chunk

    def run_until(deadline: float) -> None:
        while time.perf_counter() < deadline:
            for _ in range(replays):
                loop.graph.replay()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
            if len(marks) > CHUNKS_IN_FLIGHT:
                marks[-1 - CHUNKS_IN_FLIGHT].synchronize()

    with Sampler(meter()) as sampler:
        run_until(time.perf_counter() + ramp_seconds)
        before, opening = meter().snapshot(), len(marks) - 1
        begin = time.perf_counter()
        run_until(begin + seconds + 2 * CHUNK_US / 1e6)  # host and GPU windows may differ by a chunk
        end = time.perf_counter()
        after = meter().snapshot()  # the last chunks are still running
        torch.cuda.synchronize()

    window = marks[opening:]
    window_seconds = window[0].elapsed_time(window[-1]) / 1e3
    readings = sampler.between(begin, end)
    power = counted_power_w(readings)
    throttle = 0
    for reading in readings:
        throttle |= reading.throttle or 0
    calls = replays * loop.calls
    return Measurement(
        mode="sustained",
        samples_us=[_per_call_us(a, b, calls) for a, b in itertools.pairwise(window)],
        calls_per_sample=calls,
        before=before,
        after=after,
        sustained=Sustained(
            seconds=window_seconds,
            calls=calls * (len(window) - 1),
            ramp_seconds=ramp_seconds,
            energy_j=None if power is None else round(power * window_seconds, 2),
            power_samples_w=[round(r.power_w, 1) for r in readings if r.power_w is not None],
            sm_mhz_samples=[r.sm_mhz for r in readings if r.sm_mhz is not None],
            throttle=decode_throttle(throttle),
        ),
    )


def _per_call_us(begin: torch.cuda.Event, end: torch.cuda.Event, calls: int) -> float:
    return round(begin.elapsed_time(end) * 1e3 / calls, 4)
