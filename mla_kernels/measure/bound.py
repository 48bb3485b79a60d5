"""An implementation bound to its inputs, and what is measured of it besides its time on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .records import Host, Memory

if TYPE_CHECKING:
    import torch

    Oracle = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

HOST_BATCHES = 9
HOST_SECONDS = 0.5  # after which fewer batches will do,
HOST_BATCHES_AT_LEAST = 3
HOST_CALLS = 32  # a batch; few enough that the driver's launch queue (1024) never fills and blocks the host
PLAN_CALLS = 3


def _as_returned(result: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    return result


@dataclass(frozen=True)
class Bound:
    """One call for each KV set, and the output they all write.

    ``unpack`` makes (out (b, s_q, h_q, d), lse (b, h_q, s_q) or None) of what a call returns; not timed.
    ``plan`` is what an eager caller must do before the calls of a decode step, None where that is nothing.
    ``cache`` holds the cache of each KV set where the implementation has its own, else the pool is it.
    ``oracle``: (set, sequences) -> (out, lse) in fp64, where it is not the absorbed decode of the inputs.
    """

    calls: Sequence[Callable[[], object]]
    out: torch.Tensor | None = None
    unpack: Callable[[Any], tuple[torch.Tensor, torch.Tensor | None]] = _as_returned
    plan: Callable[[], object] | None = None
    cache: Sequence[Sequence[torch.Tensor]] = field(default=())
    oracle: Oracle | None = None


def measure_host(bound: Bound) -> Host:
    """Wall time on the host of an eager call that does not wait for the GPU, and of a plan.

    Each sample is the mean of a batch of calls; the GPU is idle when a batch begins.
    """
    import torch

    calls = [bound.calls[i % len(bound.calls)] for i in range(HOST_CALLS)]
    bound.calls[0]()
    samples = []
    enough = time.perf_counter() + HOST_SECONDS
    for _ in range(HOST_BATCHES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        if begin > enough and len(samples) >= HOST_BATCHES_AT_LEAST:
            break
        for call in calls:
            call()
        samples.append((time.perf_counter() - begin) * 1e6 / len(calls))
    plans = []
    for _ in range(PLAN_CALLS if bound.plan else 0):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        bound.plan()
        plans.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return Host(call_us=[round(us, 3) for us in samples], plan_us=[round(us, 3) for us in plans])


def measure_memory(bind: Callable[[], Bound], pool_bytes: int, out_bytes: int = 0) -> tuple[Bound, Memory]:
    """Binds, calls once, and reports what the allocator handed out for it besides queries and output.

    ``pool_bytes``: the pages of one KV set, the cache of an implementation that has none of its own.
    ``out_bytes``: of the output, which a call allocates where it was not given one. What an implementation
    allocates past torch's allocator is not seen.
    """
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    bound = bind()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    result = bound.calls[0]()
    torch.cuda.synchronize()
    call = torch.cuda.max_memory_allocated() - resting
    del result
    caches = [sum(tensor.untyped_storage().nbytes() for tensor in tensors) for tensors in bound.cache]
    out = bound.out.untyped_storage().nbytes() if bound.out is not None else out_bytes
    return bound, Memory(
        cache_bytes=caches[0] if caches else pool_bytes,
        workspace_bytes=max(0, held + call - sum(caches) - out),
    )
