"""Prefill by name, bound to its inputs, and checked against the fp64 oracle before it is timed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

from .bound import Bound
from .calls import PrefillWorkload
from .candidates import is_candidate
from .figures import DECODE, ELEMENT_BYTES, kv_bytes
from .prefill_candidates import prefill_tuning_of
from .prefill_inputs import PrefillInputs, materialize_prefill, prefill_sets
from .records import PEER, Accuracy

Known = dict[int, list[tuple]]  # by set: what _oracle gives

CHECK_FLOP = 2e11  # fp64 work allowed for one check

sets = prefill_sets
materialize = materialize_prefill


def sizes(inputs: PrefillInputs) -> tuple[int, int]:
    """Bytes of keys and values of one set, and of the output."""
    return kv_bytes(inputs.workload), math.prod(inputs.out_shape) * ELEMENT_BYTES


def bind(implementation: str, inputs: PrefillInputs) -> Bound:
    """Raises ValueError for a name that is none."""
    if implementation == DECODE:
        from mla_kernels.prefill import mla_prefill

        starts = {"cu_seqlens_q": inputs.starts_q, "cu_seqlens_k": inputs.starts_k}
        call = functools.partial(mla_prefill, causal=inputs.workload.causal, return_lse=True, **starts)
        return Bound([functools.partial(call, *tensors) for tensors in inputs.sets])
    if is_candidate(implementation):
        from mla_kernels.prefill import prefill_variant

        starts = {"cu_seqlens_q": inputs.starts_q, "cu_seqlens_k": inputs.starts_k}
        tuning = prefill_tuning_of(implementation, inputs.workload)
        call = functools.partial(prefill_variant, tuning, causal=inputs.workload.causal, **starts)
        return Bound([functools.partial(call, *tensors) for tensors in inputs.sets])
    if implementation.startswith(PEER):
        from .peers import find

        return find(implementation).bind(inputs)
    raise ValueError(
        f"implementation {implementation!r} is unknown; known are {DECODE}, {PEER}NAME, {DECODE}[...]"
    )


def check(inputs: PrefillInputs, bound: Bound, seed: int, known: Known | None = None) -> Accuracy:
    """Error against the fp64 oracle on the first and the last set, over heads of sequences drawn at random
    where all would take more than ``CHECK_FLOP``; all of the output must be finite.

    Raises ArithmeticError for NaN or infinity. ``known`` keeps what the oracle gives, for the next
    implementation on the same inputs.
    """
    known = {} if known is None else known
    chosen = parts_to_check(inputs.workload, seed)
    squared_error = squared_norm = worst_lse = 0.0
    has_lse = True
    for index in sorted({0, len(bound.calls) - 1}):
        _poison(inputs, bound)
        out, lse = bound.unpack(bound.calls[index]())
        if not bool(out.isfinite().all()):
            raise ArithmeticError("result is not finite")
        if index not in known:
            known[index] = list(_oracle(inputs, index, chosen))
        has_lse = lse is not None
        for where, rows, heads, expected_out, expected_lse in known[index]:
            part = out[where][rows, heads].double()
            squared_error += (part - expected_out).square().sum().item()
            squared_norm += expected_out.square().sum().item()
            if has_lse:
                difference = (lse[where][heads, rows].double() - expected_lse).abs()
                worst_lse = max(worst_lse, difference.nan_to_num(nan=math.inf).max().item())
    if not math.isfinite(worst_lse):
        raise ArithmeticError(f"result is not finite: lse error {worst_lse}")
    parts = inputs.workload.b * inputs.workload.h_kv
    subset = "all" if len(chosen) == parts else f"{len(chosen)} of {parts}, at random"
    return Accuracy(
        out_rel_l2=math.sqrt(squared_error / squared_norm),
        lse_max_abs=worst_lse if has_lse else None,
        reference=f"fp64 oracle, key heads of sequences: {subset}",
    )


def parts_to_check(workload: PrefillWorkload, seed: int) -> list[tuple[int, int]]:
    """(sequence, key head), in order, whose fp64 reference stays within ``CHECK_FLOP`` (one at the least)."""
    pairs = list(itertools.product(range(workload.b), range(workload.h_kv)))
    order = np.random.default_rng(seed).permutation(len(pairs))
    group = 2 * (workload.h_q // workload.h_kv) * (workload.d_qk + workload.d_v)
    cost = [group * s_q * s_k for s_q, s_k in zip(workload.lengths_q, workload.lengths_k, strict=True)]
    total = np.cumsum([cost[pairs[i][0]] for i in order])
    return sorted(pairs[i] for i in order[: max(1, int((total <= CHECK_FLOP).sum()))])


def _oracle(inputs: PrefillInputs, index: int, chosen: list[tuple[int, int]]) -> Iterator[tuple]:
    """(where, rows, heads, out, lse) of each part: its result is out[where][rows, heads]."""
    from mla_kernels.prefill_reference import mla_prefill_reference

    workload = inputs.workload
    group = workload.h_q // workload.h_kv
    begins_q, begins_k = ([0, *itertools.accumulate(n)] for n in (workload.lengths_q, workload.lengths_k))
    q, k, v = inputs.sets[index]
    for i, head in chosen:
        heads, one = slice(head * group, (head + 1) * group), slice(head, head + 1)
        if workload.ragged:
            where, rows = slice(None), slice(begins_q[i], begins_q[i + 1])
            keys = slice(begins_k[i], begins_k[i + 1])
            own = q[rows, heads], k[keys, one], v[keys, one]
        else:
            where, rows = i, slice(None)
            own = q[i, :, heads], k[i, :, one], v[i, :, one]
        out, lse = mla_prefill_reference(*(t[None] for t in own), causal=workload.causal)
        yield where, rows, heads, out[0], lse[0]


def _poison(inputs: PrefillInputs, bound: Bound) -> None:
    """NaN into the output, or where the allocator will most likely put it."""
    if bound.out is not None:
        bound.out.fill_(float("nan"))
    else:
        inputs.sets[0][0].new_full(inputs.out_shape, float("nan"))
