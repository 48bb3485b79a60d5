"""Caches that are not paged, made from the paged latent cache: lines end to end, padded, or decompressed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V
from mla_kernels.reference import mla_decode_reference

from ..workloads import ROTATION_OVER_L2, Inputs

NOPE_DIM = 128  # of a head of DeepSeek-V2 and V3, next to 64 rotary columns; also the columns of a value
ROPE_DIM = HEAD_DIM - HEAD_DIM_V
QK_DIM = NOPE_DIM + ROPE_DIM


def lines(inputs: Inputs, index: int) -> torch.Tensor:
    """(Σ lengths, 576): the cached lines of KV set ``index``, sequence after sequence."""
    size = inputs.workload.page_size
    pool = inputs.kv_cache.view(-1, HEAD_DIM)
    parts = []
    for table, length in zip(inputs.block_tables[index], inputs.workload.lengths, strict=True):
        slots = torch.arange(length, device=pool.device)
        parts.append(pool[table[slots // size].long() * size + slots % size])
    return torch.cat(parts)


def padded(rows: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """(Σ lengths, ...) -> (b, longest, ...), zero past each sequence's end."""
    lengths = inputs.workload.lengths
    if len(set(lengths)) == 1:
        return rows.view(len(lengths), lengths[0], *rows.shape[1:])
    out = rows.new_zeros(len(lengths), max(lengths), *rows.shape[1:])
    for i, part in enumerate(rows.split(list(lengths))):
        out[i, : len(part)] = part
    return out


def hidden(inputs: Inputs) -> torch.Tensor | None:
    """(b, s_q, 1, longest) bool: what a query token must not see; None where it sees all."""
    workload = inputs.workload
    causal = workload.causal and workload.s_q > 1
    if len(set(workload.lengths)) == 1 and not causal:
        return None
    device = inputs.q.device
    sees = inputs.cache_seqlens[:, None].expand(-1, workload.s_q)
    if causal:
        sees = sees - workload.s_q + 1 + torch.arange(workload.s_q, device=device)
    return (torch.arange(max(workload.lengths), device=device) >= sees[..., None])[:, :, None]


def sets_within_l2(inputs: Inputs, make: Callable[[int], tuple[torch.Tensor, ...]]) -> list:
    """``make(set)`` for as many KV sets as total over four times the L2, at most all of them."""
    l2 = torch.cuda.get_device_properties(inputs.q.device).L2_cache_size if inputs.q.is_cuda else 0
    caches, total = [], 0
    for index in range(len(inputs.block_tables)):
        caches.append(make(index))
        total += sum(tensor.nbytes for tensor in caches[-1])
        if total > ROTATION_OVER_L2 * l2:
            break
    return caches


@dataclass(frozen=True)
class Decompressed:
    """A model's own problem before absorption, with the latent lines of ``inputs``.

    w_uk, w_uv (h_q, 128, 512) fp32 · q (b, s_q, h_q, 192): 128 columns against decompressed keys, 64 rotary.
    ``inputs.q`` plays no part: most absorbed queries (512 columns) come from none of 128.
    """

    inputs: Inputs
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    q: torch.Tensor

    @classmethod
    def make(cls, inputs: Inputs, seed: int = 0) -> Decompressed:
        workload, device = inputs.workload, inputs.q.device
        generator = torch.Generator(device).manual_seed(seed)

        def weight() -> torch.Tensor:  # keys and values as large as latents
            shape = (workload.h_q, NOPE_DIM, HEAD_DIM_V)
            return torch.randn(shape, generator=generator, device=device) * HEAD_DIM_V**-0.5

        shape = (workload.b, workload.s_q, workload.h_q, QK_DIM)
        q = torch.randn(shape, generator=generator, device=device).to(inputs.q.dtype)
        return cls(inputs, weight(), weight(), q)

    def cache(self, index: int, value_dim: int = NOPE_DIM) -> tuple[torch.Tensor, torch.Tensor]:
        """k (Σ lengths, h_q, 192) and v (Σ lengths, h_q, value_dim), zero past 128 columns, of a KV set."""
        rows = lines(self.inputs, index)
        k = rows.new_empty(len(rows), self.inputs.workload.h_q, QK_DIM)
        v = rows.new_zeros(len(rows), self.inputs.workload.h_q, value_dim)
        step = 1 << 14  # tokens at a time: fp32 of all would be twice the cache
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            latent = rows[part, :HEAD_DIM_V].float()
            k[part, :, :NOPE_DIM] = torch.einsum("tc,hdc->thd", latent, self.w_uk)
            v[part, :, :NOPE_DIM] = torch.einsum("tc,hdc->thd", latent, self.w_uv)
            k[part, :, NOPE_DIM:] = rows[part, None, HEAD_DIM_V:]
        return k, v

    def oracle(self, index: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the absorbed oracle gives for these queries, taken through W_UV: (n, s_q, h_q, 128), lse.

        So it says whether decompressing changed the answer, and not only whether attention over the
        decompressed cache is right.
        """
        inputs, q = self.inputs, self.q[rows].double()
        absorbed = torch.einsum("bshd,hdc->bshc", q[..., :NOPE_DIM], self.w_uk.double())
        out, lse = mla_decode_reference(
            torch.cat([absorbed, q[..., NOPE_DIM:]], dim=-1),
            inputs.kv_cache,
            inputs.block_tables[index][rows],
            inputs.cache_seqlens[rows],
            softmax_scale=QK_DIM**-0.5,
            causal=inputs.workload.causal,
        )
        return torch.einsum("bshc,hdc->bshd", out, self.w_uv.double()), lse


def line_starts(inputs: Inputs) -> torch.Tensor:
    """(b + 1,) int32: where each sequence's lines start in ``lines``."""
    starts = list(itertools.accumulate(inputs.workload.lengths, initial=0))
    return torch.tensor(starts, dtype=torch.int32, device=inputs.q.device)
