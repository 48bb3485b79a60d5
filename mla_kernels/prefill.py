"""The prefill operator: check, plan, launch (``cuda/prefill.cu``; oracle: ``prefill_reference.py``)."""

from __future__ import annotations

import torch

from .arguments import check_softmax_scale, checked_mode
from .device import HOPPER, STILL_WORKS, DeviceUnavailable, capability
from .prefill_arguments import (
    check_prefill_alignment,
    check_prefill_arguments,
    check_prefill_starts,
)
from .prefill_plan import PrefillPlan
from .prefill_tuning import PrefillTuning


def mla_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Attention over whole sequences, as for prompts: MLA's with keys and values decompressed, or any other.

    Runs on torch's current stream without a host synchronisation, so a CUDA graph that captured it may be
    replayed after the tensors changed in place, lengths included.

    Args:
        q: (b, s_q, h_q, d_qk) bf16 or fp16. q, k and v need contiguous head dims, and other strides that are
            multiples of 16 bytes.
        k: (b, s_k, h_kv, d_qk) of q's dtype. h_q is a multiple of h_kv: head i sees key head
            i // (h_q / h_kv).
        v: (b, s_k, h_kv, d_v). (d_qk, d_v) is (64, 64), (128, 128), (192, 128) or (256, 256).
        causal: row i of s_q sees keys j <= i + s_k - s_q (the last row sees everything); otherwise all.
        softmax_scale: factor on q.k, > 0; d_qk ** -0.5 if None.
        cu_seqlens_q, cu_seqlens_k: (b + 1,) int32, ascending from 0 to total_q (total_k): sequences have
            tokens of their own number; those of sequence i are q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]] of a q
            (total_q, h_q, d_qk), likewise k (total_k, h_kv, d_qk) and v (total_k, h_kv, d_v).
        return_lse: also return lse.

    Returns:
        out (b, s_q, h_q, d_v) of q's dtype, 0 in rows that see nothing; with return_lse also lse
        (b, h_q, s_q) fp32, natural log, -inf there, with which ``merge_partials`` joins parts. With
        cu_seqlens out (total_q, h_q, d_v) and lse (h_q, total_q). Where cu_seqlens are out of order nothing
        outside the tensors is read or written, and the results have no meaning.

    Raises:
        TypeError, ValueError: an argument of another type, shape, stride or device; with
            MLA_KERNELS_CHECK=1 also cu_seqlens out of order (this synchronises).
        DeviceUnavailable: the tensors are not on a Hopper GPU.
    """
    if torch.compiler.is_compiling():
        check_prefill_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k)
        scale = check_softmax_scale(softmax_scale, q.shape[-1])
        out, lse = torch.ops.mla_kernels.prefill(q, k, v, causal, scale, cu_seqlens_q, cu_seqlens_k)
    else:
        out, lse = _prefill(q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k)
    return (out, lse) if return_lse else out


def prefill_variant(
    tuning: PrefillTuning,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mla_prefill`` by a named variant of the kernel, for the tuner and the study: (out, lse)."""
    return _prefill(q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k, tuning)


_plans: dict[tuple, PrefillPlan | None] = {}
_PLANS_KEPT = 1024


def _prefill(q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k, tuning=None):
    starts = (cu_seqlens_q, cu_seqlens_k)
    try:
        key = (causal, softmax_scale, tuning, *(_signature(t) for t in (q, k, v, *starts)))
        plan = _plans.get(key)
    except (AttributeError, TypeError):  # no tensors: the check says which
        plan = key = None
    if plan is None:
        plan = _make_plan(q, k, v, causal, softmax_scale, *starts, tuning)
        if len(_plans) >= _PLANS_KEPT:
            _plans.clear()
        _plans[key] = plan
    if checked_mode() and cu_seqlens_q is not None:
        check_prefill_starts("cu_seqlens_q", cu_seqlens_q, len(q))
        check_prefill_starts("cu_seqlens_k", cu_seqlens_k, len(k))
    check_prefill_alignment(q, k, v)
    out, lse = _empty_results(q, v)
    if plan is NOTHING_TO_SEE:
        out.zero_(), lse.fill_(float("-inf"))
    else:
        plan.run(q, k, v, out, lse, *starts)
    return out, lse


def _signature(tensor: torch.Tensor | None) -> tuple | None:
    """All that the checks look at, and a plan depends on: what was right once is so again."""
    return None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


NOTHING_TO_SEE = object()  # instead of a plan, where there are no rows, or no keys


def _make_plan(q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k, tuning):
    check_prefill_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k)
    scale = check_softmax_scale(softmax_scale, q.shape[-1])
    if not q.is_cuda:
        raise DeviceUnavailable(f"q is on {q.device}: mla_prefill needs a CUDA device; {STILL_WORKS}")
    if capability(q.device.index) != HOPPER:
        name = torch.cuda.get_device_name(q.device)
        raise DeviceUnavailable(
            f"{name} is not a Hopper GPU (sm_90), which mla_prefill needs: use "
            "torch.nn.functional.scaled_dot_product_attention there"
        )
    if tuning is not None and (tuning.head_dim, tuning.head_dim_v) != (q.shape[-1], v.shape[-1]):
        raise ValueError(
            f"tuning is of head dims {tuning.head_dim} and {tuning.head_dim_v}: take the tensors'"
        )
    if q.numel() == 0 or k.numel() == 0:
        return NOTHING_TO_SEE
    sequences = None if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    if sequences == 0:
        return NOTHING_TO_SEE
    check_prefill_alignment(q, k, v)
    return PrefillPlan(q, k, v, sequences, scale, causal, tuning)


def _empty_results(q, v) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, s_q, h_q, _ = q.shape
    lse = torch.empty((*batch, h_q, s_q), dtype=torch.float32, device=q.device)
    return q.new_empty((*batch, s_q, h_q, v.shape[-1])), lse


@torch.library.custom_op("mla_kernels::prefill", mutates_args=())
def _prefill_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _prefill(q, k, v, causal, softmax_scale, cu_seqlens_q, cu_seqlens_k)


@_prefill_op.register_fake
def _prefill_fake(q, k, v, causal, softmax_scale=None, cu_seqlens_q=None, cu_seqlens_k=None):
    return _empty_results(q, v)
