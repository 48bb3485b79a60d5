"""vLLM's decode attention in Triton, in the form that its MLA backend for any GPU calls."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Iterator

import torch

from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V

from ..bound import Bound
from ..workloads import Inputs
from .interface import Peer, home, missing, require

SOURCE = "vllm/v1/attention/ops/triton_decode_attention.py"
TOKENS_PER_SPLIT = 512  # the backend's choice of splits: a power of two, about 512 tokens each,
SPLITS_PER_SM = 2  # at most two for each SM


@contextlib.contextmanager
def _stub_vllm() -> Iterator[None]:
    """Stands in for what the file imports of vllm; an installed vllm comes back afterwards."""
    import triton
    import triton.language

    stubs = {
        "vllm": types.ModuleType("vllm"),
        "vllm.platforms": types.ModuleType("vllm.platforms"),
        "vllm.triton_utils": types.ModuleType("vllm.triton_utils"),
    }
    stubs["vllm"].__path__ = []
    stubs["vllm.platforms"].current_platform = types.SimpleNamespace(is_rocm=lambda: False)
    stubs["vllm.triton_utils"].triton = triton
    stubs["vllm.triton_utils"].tl = triton.language
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@functools.cache
def _load():
    name = "mla_kernels_peer_triton_decode_attention"
    spec = importlib.util.spec_from_file_location(name, home() / SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks a kernel's module up
    with _stub_vllm():
        spec.loader.exec_module(module)
    return module


class VllmTriton(Peer):
    source = "vLLM's Triton decode, from the vllm wheel"

    def available(self) -> str | None:
        return missing(SOURCE)

    def prepare(self, dtypes: tuple[str, ...]) -> None:
        _load()

    def bind(self, inputs: Inputs) -> Bound:
        workload = inputs.workload
        require(workload.s_q == 1, f"vLLM's Triton decode takes one query token, not {workload.s_q}")
        require(min(workload.lengths) > 0, "vLLM's Triton decode divides by zero for an empty sequence")
        decode = _load().decode_attention_fwd
        b, h_q = workload.b, workload.h_q
        q = inputs.q.view(b, h_q, HEAD_DIM)
        out = q.new_empty(b, h_q, HEAD_DIM_V)
        lse = torch.empty(b, h_q, dtype=torch.float32, device=q.device)
        sms = torch.cuda.get_device_properties(q.device).multi_processor_count
        splits = 1 << (max(1, max(workload.lengths) // TOKENS_PER_SPLIT) - 1).bit_length()
        splits = min(splits, SPLITS_PER_SM * sms)
        partials = torch.empty(b, h_q, splits, HEAD_DIM_V + 1, dtype=torch.float32, device=q.device)
        one = torch.ones((), dtype=torch.float32, device=q.device)

        def call(table: torch.Tensor):
            decode(
                q,
                inputs.kv_cache,
                inputs.kv_cache[..., :HEAD_DIM_V],
                out,
                lse,
                table,
                inputs.cache_seqlens,
                partials,
                splits,
                HEAD_DIM**-0.5,
                workload.page_size,
                k_scale=one,
                v_scale=one,
                is_mla=True,
            )
            return out, lse

        return Bound(
            calls=[functools.partial(call, table) for table in inputs.block_tables],
            out=out,
            unpack=lambda result: (result[0].unsqueeze(1), result[1].unsqueeze(2)),
        )
