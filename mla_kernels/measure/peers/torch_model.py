"""MLA as model code writes it, in plain PyTorch: absorbed, and over a decompressed cache.

These are the two forms of DeepSeek-V3's published inference code ("absorb" and "naive"): contiguous caches,
einsum, softmax in fp32. Where lengths differ, the caches are padded to the longest and masked.
"""

from __future__ import annotations

import functools

import torch

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V

from ..bound import Bound
from ..workloads import Inputs
from .contiguous import NOPE_DIM, QK_DIM, Decompressed, hidden, lines, padded, sets_within_l2
from .interface import Peer, no_gpu, require

SCORES_LIMIT = 16 << 30  # bytes of fp32 scores


def _softmax(scores: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(dtype)


def _check(inputs: Inputs) -> None:
    workload = inputs.workload
    require(min(workload.lengths) > 0, "softmax over an empty sequence is NaN")
    scores = 4 * workload.b * workload.s_q * workload.h_q * max(workload.lengths)
    require(scores <= SCORES_LIMIT, f"the scores alone would take {scores / 2**30:.0f} GiB")


class TorchAbsorbed(Peer):
    source = "PyTorch, absorbed"

    def available(self) -> str | None:
        return no_gpu()

    def bind(self, inputs: Inputs) -> Bound:
        _check(inputs)
        out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)
        q_latent, q_rope = inputs.q[..., :HEAD_DIM_V], inputs.q[..., HEAD_DIM_V:]
        mask = hidden(inputs)

        def make(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            cache = padded(lines(inputs, index), inputs)
            return cache[..., :HEAD_DIM_V].contiguous(), cache[..., HEAD_DIM_V:].contiguous()

        def call(latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
            scores = torch.einsum("bshc,btc->bsht", q_latent, latent)
            scores = (scores + torch.einsum("bshr,btr->bsht", q_rope, k_rope)) * HEAD_DIM**-0.5
            return out.copy_(torch.einsum("bsht,btc->bshc", _softmax(scores, mask, out.dtype), latent))

        caches = sets_within_l2(inputs, make)
        return Bound(
            calls=[functools.partial(call, *cache) for cache in caches],
            out=out,
            unpack=lambda result: (result, None),
            cache=caches,
        )


class TorchDecompressed(Peer):
    source = "PyTorch, decompressed"

    def available(self) -> str | None:
        return no_gpu()

    def bind(self, inputs: Inputs) -> Bound:
        _check(inputs)
        problem = Decompressed.make(inputs)
        out = problem.q.new_empty(*problem.q.shape[:3], NOPE_DIM)
        mask = hidden(inputs)

        def make(index: int) -> tuple[torch.Tensor, ...]:
            return tuple(padded(tensor, inputs) for tensor in problem.cache(index))

        def call(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = torch.einsum("bshd,bthd->bsht", problem.q, k) * QK_DIM**-0.5
            return out.copy_(torch.einsum("bsht,bthd->bshd", _softmax(scores, mask, out.dtype), v))

        caches = sets_within_l2(inputs, make)
        return Bound(
            calls=[functools.partial(call, *cache) for cache in caches],
            out=out,
            unpack=lambda result: (result, None),
            cache=caches,
            oracle=problem.oracle,
        )
