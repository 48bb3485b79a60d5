"""FlashMLA (DeepSeek): the dense decode of its sm90 kernels, as vLLM's wheel builds it."""

from __future__ import annotations

import functools

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V

from ..bound import Bound
from ..workloads import Inputs
from .interface import Peer, load_operators, missing, require

LIBRARY = "vllm/_flashmla_C.abi3.so"


class FlashMLA(Peer):
    source = "FlashMLA, from the vllm wheel"

    def available(self) -> str | None:
        return missing(LIBRARY)

    def prepare(self, dtypes: tuple[str, ...]) -> None:
        load_operators(LIBRARY, "_flashmla_C")

    def bind(self, inputs: Inputs) -> Bound:
        workload = inputs.workload
        require(workload.page_size == 64, f"FlashMLA needs pages of 64 tokens, not {workload.page_size}")
        decode = load_operators(LIBRARY, "_flashmla_C").dense_decode_fwd
        out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)
        rows = out.view(
            workload.b, 1, -1, HEAD_DIM_V
        )  # (b, KV heads, query rows of each, 512): what it wants

        def call(table, schedule):
            # q, k_cache, head_dim_v, lengths, table, scale, causal, schedule (2 tensors or None), out
            return decode(
                inputs.q,
                inputs.kv_cache,
                HEAD_DIM_V,
                inputs.cache_seqlens,
                table,
                HEAD_DIM**-0.5,
                workload.causal,
                *schedule,
                rows,
            )

        # The first call of a step makes the schedule, which depends on lengths alone; the others reuse it.
        schedule = call(inputs.block_tables[0], (None, None))[2:]
        return Bound(
            calls=[functools.partial(call, table, schedule) for table in inputs.block_tables],
            out=out,
            unpack=lambda result: (result[0], result[1]),
            plan=functools.partial(call, inputs.block_tables[0], (None, None)),
        )
