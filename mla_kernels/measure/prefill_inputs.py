"""Prefill workloads by name, and the tensors of one."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .calls import PrefillWorkload
from .figures import ELEMENT_BYTES, kv_bytes
from .workloads import ROTATION_OVER_L2

if TYPE_CHECKING:
    import torch


def prefill(b: int, s: int, h: int, d: tuple[int, int], *, s_q: int | None = None, **axes) -> PrefillWorkload:
    """``b`` sequences of ``s`` keys and ``s_q`` queries (as many), ``h`` heads of dims ``d`` = (d_qk, d_v).

    ``axes``: dtype, causal, ragged (equal lengths through the ragged form), h_kv (h) as wanted.
    """
    queries = s if s_q is None else s_q
    return _workload([queries] * b, [s] * b, h, d, "uniform", s, **axes)


def prefill_lognormal(
    b: int, mean: int, h: int, d: tuple[int, int], *, seed: int = 0, **axes
) -> PrefillWorkload:
    """Ragged sequences, lengths log-normal with a standard deviation of half the mean."""
    sd = mean / 2
    variance = math.log1p((sd / mean) ** 2)
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - variance / 2, math.sqrt(variance), b)
    lengths = [max(1, int(length)) for length in np.rint(drawn)]
    return _workload(lengths, lengths, h, d, "lognormal", mean, sd, ragged=True, **axes)


def evenly(workload: PrefillWorkload) -> PrefillWorkload:
    """As many sequences, all of the mean length (to one token), in the form for equal lengths."""
    length = round(sum(workload.lengths_k) / workload.b)
    axes = {"dtype": workload.dtype, "causal": workload.causal, "h_kv": workload.h_kv}
    return prefill(workload.b, length, workload.h_q, (workload.d_qk, workload.d_v), **axes)


def _workload(lengths_q, lengths_k, h, d, kind, mean, sd=0.0, *, h_kv=None, **axes) -> PrefillWorkload:
    heads = {"h_q": h, "h_kv": h_kv or h, "d_qk": d[0], "d_v": d[1]}
    lengths = {"lengths_q": lengths_q, "lengths_k": lengths_k, "lengths_kind": kind}
    return PrefillWorkload(b=len(lengths_k), **heads, **lengths, mean_len=mean, sd_len=sd, **axes)


@dataclass(frozen=True)
class PrefillInputs:
    """Tensors of a workload: q, k and v of each set, and where sequences begin if they are ragged.

    q (b, s_q, h_q, d_qk), k (b, s_k, h_kv, d_qk), v (b, s_k, h_kv, d_v); ragged (total, heads, d) with
    starts_q and starts_k (b + 1,) int32.
    """

    workload: PrefillWorkload
    sets: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]
    starts_q: torch.Tensor | None
    starts_k: torch.Tensor | None

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of the result."""
        return (*self.sets[0][0].shape[:-1], self.workload.d_v)

    @property
    def longest(self) -> tuple[int, int]:
        """Queries, and keys, of the longest sequence."""
        return max(self.workload.lengths_q), max(self.workload.lengths_k)


def starts(inputs: PrefillInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(b + 1,) int32 twice: where sequences begin when all are laid end to end, of queries and of keys."""
    workload, device = inputs.workload, inputs.sets[0][0].device
    return _starts(workload.lengths_q, device), _starts(workload.lengths_k, device)


def _starts(lengths: tuple[int, ...], device: str | torch.device) -> torch.Tensor:
    import torch

    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def prefill_sets(workload: PrefillWorkload, l2_bytes: int) -> int:
    """Sets of inputs to rotate through so that together they are more than four times the L2."""
    queries = sum(workload.lengths_q) * workload.h_q * workload.d_qk * ELEMENT_BYTES
    return int(ROTATION_OVER_L2 * l2_bytes // max(1, kv_bytes(workload) + queries)) + 1


def materialize_prefill(
    workload: PrefillWorkload,
    *,
    seed: int = 0,
    device: str | torch.device = "cuda",
    sets: int = 1,
    poison: bool = True,
) -> PrefillInputs:
    """Normal random inputs: with softmax_scale = d_qk ** -0.5 logits have standard deviation one.

    ``poison`` changes nothing: the tensors hold nothing that may not be read.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[workload.dtype]
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(lengths: tuple[int, ...], heads: int, columns: int) -> torch.Tensor:
        tokens = (sum(lengths),) if workload.ragged else (workload.b, lengths[0])
        return torch.empty(*tokens, heads, columns, dtype=dtype, device=device).normal_(generator=generator)

    w = workload
    made = tuple(
        (
            tensor(w.lengths_q, w.h_q, w.d_qk),
            tensor(w.lengths_k, w.h_kv, w.d_qk),
            tensor(w.lengths_k, w.h_kv, w.d_v),
        )
        for _ in range(sets)
    )
    bounds = (_starts(lengths, device) if w.ragged else None for lengths in (w.lengths_q, w.lengths_k))
    return PrefillInputs(workload, made, *bounds)
