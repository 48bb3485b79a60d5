"""FlashAttention 3 on the latent cache: its rope part as k, its latent as v and, by ``q_v``, as k too."""

from __future__ import annotations

import functools

import torch

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V

from ..bound import Bound
from ..workloads import Inputs
from .interface import Peer, load_operators, missing, per_sequence, require, starts

LIBRARY = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"


class FA3(Peer):
    source = "FlashAttention 3, from the vllm wheel"

    def available(self) -> str | None:
        return missing(LIBRARY)

    def prepare(self, dtypes: tuple[str, ...]) -> None:
        load_operators(LIBRARY, "_vllm_fa3_C")

    def bind(self, inputs: Inputs) -> Bound:
        workload = inputs.workload
        operators = load_operators(LIBRARY, "_vllm_fa3_C")
        require(min(workload.lengths) > 0, "FA3 is not asked for empty sequences")
        b, s_q, h_q, longest = workload.b, workload.s_q, workload.h_q, max(workload.lengths)
        q = inputs.q.view(b * s_q, h_q, HEAD_DIM)
        q_latent, q_rope = q[..., :HEAD_DIM_V], q[..., HEAD_DIM_V:]
        k_rope, latent = inputs.kv_cache[..., HEAD_DIM_V:], inputs.kv_cache[..., :HEAD_DIM_V]
        out = inputs.q.new_empty(b * s_q, h_q, HEAD_DIM_V)
        q_starts = starts(inputs)
        causal = workload.causal and s_q > 1  # what the mask does; the kernel takes another path for it

        def plan() -> torch.Tensor:
            return operators.get_scheduler_metadata(
                b,
                s_q,
                longest,
                h_q,
                1,  # num_heads_k
                HEAD_DIM - HEAD_DIM_V,
                HEAD_DIM_V,
                q.dtype,
                inputs.cache_seqlens,
                q_starts,
                None,  # cu_seqlens_k
                None,  # cu_seqlens_k_new
                None,  # seqused_q
                None,  # leftpad_k
                workload.page_size,
                0,  # max_seqlen_k_new
                causal,
                -1,  # window_size_left
                -1,  # window_size_right
                False,  # has_softcap
                0,  # num_splits: its heuristic
                None,  # pack_gqa
                0,  # sm_margin
            )

        def call(table: torch.Tensor, schedule: torch.Tensor):
            return operators.fwd(
                q_rope,
                k_rope,
                latent,
                None,  # k_new
                None,  # v_new
                q_latent,
                out,
                q_starts,
                None,  # cu_seqlens_k
                None,  # cu_seqlens_k_new
                None,  # seqused_q
                inputs.cache_seqlens,
                s_q,
                longest,
                table,
                None,  # kv_batch_idx
                None,  # leftpad_k
                None,  # rotary_cos
                None,  # rotary_sin
                None,  # seqlens_rotary
                None,  # q_descale
                None,  # k_descale
                None,  # v_descale
                HEAD_DIM**-0.5,
                causal,
                -1,  # window_size_left
                -1,  # window_size_right
                0.0,  # softcap
                True,  # is_rotary_interleaved
                schedule,
                0,  # num_splits
                None,  # pack_gqa
                0,  # sm_margin
                None,  # s_aux
                1,  # cp_world_size
                0,  # cp_rank
                None,  # cp_tot_seqused_k
            )

        schedule = plan()
        return Bound(
            calls=[functools.partial(call, table, schedule) for table in inputs.block_tables],
            out=out,
            unpack=lambda result: (result[0].view(b, s_q, h_q, -1), per_sequence(result[1], inputs)),
            plan=plan,
        )
