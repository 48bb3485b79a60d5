"""This project's own operator in Triton, as a peer of its CUDA kernels."""

from __future__ import annotations

import functools

from mla_kernels.arguments import HEAD_DIM_V

from ..bound import Bound
from ..workloads import Inputs
from .interface import Peer, no_gpu


class Portable(Peer):
    source = "mla_kernels.portable (Triton)"

    def available(self) -> str | None:
        return no_gpu()

    def bind(self, inputs: Inputs) -> Bound:
        from mla_kernels.portable import mla_decode

        out = inputs.q.new_empty(*inputs.q.shape[:3], HEAD_DIM_V)
        return Bound(
            calls=[
                functools.partial(
                    mla_decode,
                    inputs.q,
                    inputs.kv_cache,
                    table,
                    inputs.cache_seqlens,
                    causal=inputs.workload.causal,
                    out=out,
                )
                for table in inputs.block_tables
            ],
            out=out,
        )
