"""FlashInfer's BatchMLAPagedAttentionWrapper, whose kernels nvcc compiles at the first use."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types

import torch

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V

from ..bound import Bound
from ..workloads import Inputs
from .interface import Peer, home, missing, require, starts

SITE = "site"
WORKSPACE_BYTES = 128 << 20  # what its documentation recommends
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def _import():
    """``flashinfer.mla``, without running the package's own ``__init__``.

    That imports all of FlashInfer, and with it a dozen packages (CUTLASS DSL, cuDNN front end ...) that MLA
    does not use. So the parent package is an empty module with the right path.
    """
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(home() / "flashinfer"))
    site = home() / SITE
    if str(site) not in sys.path:
        sys.path.append(str(site))  # at the end: what is installed goes first
    if "flashinfer" not in sys.modules:
        package = types.ModuleType("flashinfer")
        package.__path__ = [str(site / "flashinfer")]
        sys.modules["flashinfer"] = package
    return importlib.import_module("flashinfer.mla")


class FlashInfer(Peer):
    def __init__(self, backend: str):
        self.backend = backend
        self.source = f"FlashInfer, backend {backend}"

    def available(self) -> str | None:
        return missing(
            f"{SITE}/flashinfer/mla/_core.py",
            f"{SITE}/tvm_ffi/__init__.py",
            f"{SITE}/apache_tvm_ffi-*.dist-info/METADATA",  # where tvm_ffi looks up its version
        )

    def prepare(self, dtypes: tuple[str, ...]) -> None:
        """Compiles where the cache has none yet: a minute or two for each dtype."""
        module = _import()._core
        for dtype in (_DTYPES[name] for name in dtypes):
            module.get_batch_mla_module(
                self.backend, dtype, dtype, dtype, torch.int32, HEAD_DIM_V, HEAD_DIM - HEAD_DIM_V, False
            )

    def bind(self, inputs: Inputs) -> Bound:
        workload = inputs.workload
        require(min(workload.lengths) > 0, "FlashInfer is not asked for empty sequences")
        b, s_q, h_q, page_size = workload.b, workload.s_q, workload.h_q, workload.page_size
        q = inputs.q.view(b * s_q, h_q, HEAD_DIM)
        q_latent, q_rope = q[..., :HEAD_DIM_V], q[..., HEAD_DIM_V:]
        pool = inputs.kv_cache.view(-1, page_size, HEAD_DIM)
        latent, k_rope = pool[..., :HEAD_DIM_V], pool[..., HEAD_DIM_V:]
        out = inputs.q.new_empty(b * s_q, h_q, HEAD_DIM_V)
        lse = torch.empty(b * s_q, h_q, dtype=torch.float32, device=q.device)

        pages = (inputs.cache_seqlens + page_size - 1) // page_size
        page_starts = torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int()
        in_use = torch.arange(inputs.block_tables.shape[2], device=q.device) < pages[:, None]
        indices = [table[in_use].contiguous() for table in inputs.block_tables]

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = _import().BatchMLAPagedAttentionWrapper(workspace, backend=self.backend)
        plan = functools.partial(
            wrapper.plan,
            starts(inputs),
            page_starts,
            indices[0],
            inputs.cache_seqlens,
            h_q,
            HEAD_DIM_V,
            HEAD_DIM - HEAD_DIM_V,
            page_size,
            workload.causal and s_q > 1,
            HEAD_DIM**-0.5,
            q.dtype,
            q.dtype,
        )
        plan()

        def call(page_ids: torch.Tensor):
            # A plan depends on lengths alone. The page ids it was given are an attribute, read by run: a
            # wrapper for each KV set would each pin 8 MB.
            wrapper._kv_indices_buf = page_ids
            return wrapper.run(
                q_latent, q_rope, latent, k_rope, out=out, lse=lse, return_lse=True, return_lse_base_on_e=True
            )

        return Bound(
            calls=[functools.partial(call, page_ids) for page_ids in indices],
            out=out,
            unpack=lambda result: (
                result[0].view(b, s_q, h_q, -1),
                result[1].view(b, s_q, h_q).transpose(1, 2),
            ),
            plan=plan,
        )
