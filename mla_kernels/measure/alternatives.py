"""What one does about lengths that differ without a kernel that takes them: pad, or go one by one.

Behind the same interface as everything that is timed, by name: "alternative:padded" is
``ALTERNATIVES["padded"]``. Each gives the result of the unpadded sequences, except ``padded_kernel``, which
attends to the padding too, as a kernel must that knows one length only: its oracle does the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V
from mla_kernels.decode import mla_decode
from mla_kernels.reference import mla_decode_reference

from .bound import Bound
from .peers.contiguous import lines, padded, sets_within_l2
from .peers.torch_model import TorchAbsorbed
from .records import ALTERNATIVE
from .workloads import Inputs

PAGE = 64


def _padded(inputs: Inputs) -> Bound:
    """PyTorch over a contiguous cache padded to the longest sequence, masked (absorbed form)."""
    return TorchAbsorbed().bind(inputs)


def _padded_kernel(inputs: Inputs) -> Bound:
    """mla_decode over the same padded cache: every sequence as long as the longest."""
    workload = inputs.workload
    pages = -(-max(workload.lengths) // PAGE)
    b, device = workload.b, inputs.q.device
    table = torch.arange(b * pages, dtype=torch.int32, device=device).view(b, pages)
    lengths = torch.full((b,), max(workload.lengths), dtype=torch.int32, device=device)
    out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)

    def make(index: int) -> tuple[torch.Tensor]:
        pool = inputs.kv_cache.new_zeros(b, pages * PAGE, HEAD_DIM)
        pool[:, : max(workload.lengths)] = padded(lines(inputs, index), inputs)
        return (pool.view(b * pages, PAGE, HEAD_DIM),)

    caches = sets_within_l2(inputs, make)
    decode = functools.partial(mla_decode, causal=workload.causal, out=out)

    def oracle(index: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pool = caches[index][0]
        return mla_decode_reference(inputs.q[rows], pool, table[rows], lengths[rows], causal=workload.causal)

    calls = [functools.partial(decode, inputs.q, pool, table, lengths) for (pool,) in caches]
    return Bound(calls=calls, out=out, cache=caches, oracle=oracle)


def _loop(inputs: Inputs) -> Bound:
    """PyTorch, one sequence after the other, each over its own contiguous cache (absorbed form)."""
    workload = inputs.workload
    if workload.causal and workload.s_q > 1:
        raise NotImplementedError("the loop in PyTorch has no causal mask")
    if min(workload.lengths) == 0:
        raise NotImplementedError("softmax over an empty sequence is NaN")
    out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)
    queries = inputs.q.flatten(1, 2)  # (b, s_q * h_q, 576)
    rows = out.flatten(1, 2)

    def make(index: int) -> tuple[torch.Tensor, ...]:
        return tuple(part.clone() for part in lines(inputs, index).split(list(workload.lengths)))

    def call(caches: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for q, cache, result in zip(queries, caches, rows, strict=True):
            p = ((q @ cache.T).float() * HEAD_DIM**-0.5).softmax(-1).to(q.dtype)
            torch.mm(p, cache[:, :HEAD_DIM_V], out=result)
        return out

    caches = sets_within_l2(inputs, make)
    calls = [functools.partial(call, own) for own in caches]
    return Bound(calls=calls, out=out, unpack=lambda result: (result, None), cache=caches)


def _kernel_loop(inputs: Inputs) -> Bound:
    """mla_decode, one call a sequence, over the same pages."""
    workload = inputs.workload
    out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)
    lse = inputs.q.new_empty(workload.b, workload.h_q, workload.s_q, dtype=torch.float32)

    def call(table: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for i in range(workload.b):
            own = slice(i, i + 1)
            tensors = inputs.q[own], inputs.kv_cache, table[own], inputs.cache_seqlens[own]
            results.append(mla_decode(*tensors, causal=workload.causal, out=out[own])[1])
        return results

    def unpack(results: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return out, torch.cat(results, out=lse)

    return Bound([functools.partial(call, table) for table in inputs.block_tables], out, unpack)


ALTERNATIVES: dict[str, Callable[[Inputs], Bound]] = {
    "padded": _padded,
    "padded_kernel": _padded_kernel,
    "loop": _loop,
    "kernel_loop": _kernel_loop,
}


def find(implementation: str) -> Callable[[Inputs], Bound]:
    """What binds the alternative of a name with its prefix. Raises ValueError for one that is none."""
    name = implementation.removeprefix(ALTERNATIVE)
    if name not in ALTERNATIVES:
        raise ValueError(f"alternative {name!r} is unknown; known are {', '.join(ALTERNATIVES)}")
    return ALTERNATIVES[name]
