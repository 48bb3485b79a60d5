"""FlashAttention 2 on a cache of decompressed keys and values: each head has its own, nothing is absorbed."""

from __future__ import annotations

import functools

import torch

from ..bound import Bound
from ..workloads import Inputs, materialize, uniform
from .contiguous import NOPE_DIM, QK_DIM, Decompressed, line_starts, sets_within_l2
from .interface import Peer, load_operators, missing, per_sequence, starts

LIBRARY = "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so"


class FA2Decompressed(Peer):
    source = "FlashAttention 2, from the vllm wheel"

    def available(self) -> str | None:
        return missing(LIBRARY)

    def prepare(self, dtypes: tuple[str, ...]) -> None:
        """The wheel has no sm_90 binary of it: the driver compiles its PTX at the first call (seconds)."""
        for dtype in dtypes:
            self.bind(materialize(uniform(1, 64, h_q=1, dtype=dtype), poison=False)).calls[0]()
        torch.cuda.synchronize()

    def bind(self, inputs: Inputs) -> Bound:
        workload = inputs.workload
        attend = load_operators(LIBRARY, "_vllm_fa2_C").varlen_fwd
        b, s_q, h_q, longest = workload.b, workload.s_q, workload.h_q, max(workload.lengths)
        problem = Decompressed.make(inputs)
        q = problem.q.view(b * s_q, h_q, QK_DIM)
        # One head size for q, k and v is all that it takes: values are padded from 128 to 192 columns.
        caches = sets_within_l2(inputs, functools.partial(problem.cache, value_dim=QK_DIM))
        out = torch.empty_like(q)
        q_starts, kv_starts = starts(inputs), line_starts(inputs)

        def call(k: torch.Tensor, v: torch.Tensor):
            return attend(
                q,
                k,
                v,
                out,
                q_starts,
                kv_starts,
                None,  # seqused_k
                None,  # leftpad_k
                None,  # block_table
                None,  # alibi_slopes
                s_q,
                longest,
                0.0,  # p_dropout
                QK_DIM**-0.5,
                False,  # zero_tensors
                workload.causal and s_q > 1,
                -1,  # window_size_left
                -1,  # window_size_right
                0.0,  # softcap
                False,  # return_softmax
                0,  # num_splits: its heuristic
                None,  # gen
            )

        return Bound(
            calls=[functools.partial(call, k, v) for k, v in caches],
            out=out,
            unpack=lambda result: (
                out.view(b, s_q, h_q, QK_DIM)[..., :NOPE_DIM],
                per_sequence(result[1], inputs),
            ),
            cache=caches,
            oracle=problem.oracle,
        )
