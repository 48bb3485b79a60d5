"""The decode operator: check, choose a kernel, launch (kernels: ``cuda/``; the truth: ``reference.py``)."""

import functools
import math
import warnings
from typing import Literal

import torch

from mla_kernels.arguments import HEAD_DIM_V, check_decode_arguments, check_softmax_scale, checked_mode
from mla_kernels.choice import active_table
from mla_kernels.compiler import KernelConfig
from mla_kernels.device import HOPPER, STILL_WORKS, DeviceUnavailable, capability
from mla_kernels.plan import DecodePlan, result_shapes
from mla_kernels.tuning import PAGE_SIZES, PAGES, DecodeTuning

BLOCKS = ("stream", "mma", "skeleton")


def shipped_configs() -> list[KernelConfig]:
    """Every instance that the operators can launch."""
    variants = active_table().variants
    return [
        tuning.kernel_config(element, pages=pages)
        for pages in PAGES
        for element in ("bf16", "fp16")
        for tuning in variants
        if tuning.serves(pages)
    ]


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    head_dim_v: int = HEAD_DIM_V,
    softmax_scale: float | None = None,
    causal: bool = False,
    out: torch.Tensor | None = None,
    return_lse: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Multi-head latent attention over a paged latent cache, absorbed form, ``s_q`` new tokens a sequence.

    Runs on torch's current stream without a host synchronisation or a plan step, so a CUDA graph that
    captured it may be replayed after ``cache_seqlens``, ``block_table``, ``cu_seqlens_q``, ``q`` or the cache
    changed in place.

    Args:
        q: (b, s_q, h_q, 576) bf16 or fp16, contiguous: 512 absorbed + 64 rotary columns.
        kv_cache: (num_pages, page_size, 1, 576) or (num_pages, page_size, 576), of q's dtype: the page pool.
            page_size is a power of two up to 256; 64 is the fastest, less than 8 costs most.
        block_table: (b, max_pages) int32: pages of each sequence; entries past its length are not read.
        cache_seqlens: (b,) int32: tokens of each sequence, the new ones included.
        head_dim_v: 512, the columns of the cache that are averaged.
        softmax_scale: factor on q.k, > 0; 576 ** -0.5 if None.
        causal: row s sees positions < length - s_q + 1 + s; otherwise all.
        out: (b, s_q, h_q, 512), written if given.
        return_lse: False returns ``out`` alone.
        cu_seqlens_q: (b + 1,) int32, ascending from 0 to total_q: sequences have query tokens of their own
            number, those of sequence i are q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]] of a q (total_q, h_q, 576).
            In ``causal`` that number stands for s_q.

    Returns:
        out (b, s_q, h_q, 512) of q's dtype and lse (b, h_q, s_q) fp32, natural log; 0 and -inf where a row
        sees nothing. With cu_seqlens_q out (total_q, h_q, 512) and lse (h_q, total_q). NaN in a sequence of
        a length outside [0, max_pages * page_size] or with a page id outside the pool.

    Raises:
        TypeError, ValueError: an argument of another type, shape, stride or device; with
            MLA_KERNELS_CHECK=1 also lengths and page ids out of range (this synchronises).
        DeviceUnavailable: the tensors are not on a CUDA device.
    """
    if torch.compiler.is_compiling():
        own = {"out": out, "cu_seqlens_q": cu_seqlens_q}
        check_decode_arguments(q, kv_cache, block_table, cache_seqlens, head_dim_v=head_dim_v, **own)
        scale = check_softmax_scale(softmax_scale)
        result, lse = torch.ops.mla_kernels.decode(
            q, kv_cache, block_table, cache_seqlens, scale, causal, cu_seqlens_q
        )
        result = result if out is None else out.copy_(result)
        return (result, lse) if return_lse else result
    tensors = (q, kv_cache, block_table, cache_seqlens)
    out, lse = _decode(tensors, out, head_dim_v, softmax_scale, causal, cu_seqlens_q=cu_seqlens_q)
    return (out, lse) if return_lse else out


def decode_variant(
    variant: DecodeTuning | Literal["stream", "mma", "skeleton"],
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    causal: bool = False,
    out: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mla_decode`` by a named kernel, whatever the table would choose: for the tuner and the study.

    ``variant``: a tuning, or a building block of the kernel that would serve these tensors, whose results
    have no meaning: "stream", the paged loads without arithmetic; "mma", the WGMMA sequence without loads;
    "skeleton", both without softmax and the exchange of P. Grid, schedule and epilogue are the kernel's own.
    """
    if isinstance(variant, str) and variant not in BLOCKS:
        raise ValueError(f"variant is {variant!r}, must be a DecodeTuning or one of {', '.join(BLOCKS)}")
    tensors = (q, kv_cache, block_table, cache_seqlens)
    return _decode(tensors, out, HEAD_DIM_V, None, causal, variant, cu_seqlens_q)


_plans: dict[tuple, DecodePlan | None] = {}
_PLANS_KEPT = 4096


def _decode(tensors, out, head_dim_v, softmax_scale, causal, variant=None, cu_seqlens_q=None):
    q, kv_cache, block_table, cache_seqlens = tensors
    try:
        key = _key(q, kv_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, variant)
        if out is not None:
            key += (out.shape, out.stride(), out.dtype, out.device)
        if cu_seqlens_q is not None:
            starts = cu_seqlens_q
            key += ("ragged", starts.shape, starts.stride(), starts.dtype, starts.device)
        plan = _plans.get(key)
    except (AttributeError, TypeError):  # no tensors: the check says which
        plan = key = None
    if plan is None:
        plan = _make_plan(tensors, out, head_dim_v, softmax_scale, causal, variant, cu_seqlens_q)
        if isinstance(plan, DecodePlan):
            if len(_plans) >= _PLANS_KEPT:
                _plans.clear()
            _plans[key] = plan
    if checked_mode():
        check_device_values(kv_cache, block_table, cache_seqlens)
        if cu_seqlens_q is not None:
            check_query_starts(cu_seqlens_q, len(q))
    if plan is PORTABLE:
        return _decode_portable(*tensors, check_softmax_scale(softmax_scale), causal, out, cu_seqlens_q)
    out_shape, lse_shape = result_shapes(q) if plan is None else plan.result_shapes
    if out is None:
        out = q.new_empty(out_shape)
    lse = q.new_empty(lse_shape, dtype=torch.float32)
    if plan is not None:
        _check_alignment(q, kv_cache, out)
        plan.run(q, kv_cache, block_table, cache_seqlens, out, lse, cu_seqlens_q)
    return out, lse


def _key(q, kv_cache, block_table, cache_seqlens, *options) -> tuple:
    """All that the checks look at, and a plan depends on: what was right once is so again."""
    return (
        q.shape,
        kv_cache.shape,
        block_table.shape,
        cache_seqlens.shape,
        q.stride(),
        kv_cache.stride(),
        block_table.stride(),
        cache_seqlens.stride(),
        q.dtype,
        kv_cache.dtype,
        block_table.dtype,
        cache_seqlens.dtype,
        q.device,
        kv_cache.device,
        block_table.device,
        cache_seqlens.device,
        *options,
    )


PORTABLE = object()  # instead of a plan, on a GPU that is not Hopper


def _make_plan(tensors, out, head_dim_v, softmax_scale, causal, variant, cu_seqlens_q):
    q, kv_cache, block_table, _ = tensors
    check_decode_arguments(*tensors, head_dim_v=head_dim_v, out=out, cu_seqlens_q=cu_seqlens_q)
    scale = check_softmax_scale(softmax_scale)
    if not q.is_cuda:
        raise DeviceUnavailable(f"q is on {q.device}: mla_decode needs a CUDA device; {STILL_WORKS}")
    if capability(q.device.index) != HOPPER:
        return PORTABLE
    _check_cache(kv_cache)
    _check_alignment(q, kv_cache, out)
    if not len(q) or not len(block_table):
        return None
    return DecodePlan(q, kv_cache, block_table, scale, causal, variant, ragged=cu_seqlens_q is not None)


def _check_cache(kv_cache: torch.Tensor) -> None:
    if kv_cache.shape[1] not in PAGE_SIZES:
        known = ", ".join(map(str, PAGE_SIZES))
        raise ValueError(
            f"kv_cache has pages of {kv_cache.shape[1]} tokens, must be of one of {known}: lay "
            "the cache out with such a page size, or call mla_kernels.portable.mla_decode"
        )
    if kv_cache.shape[0] == 0:
        raise ValueError("kv_cache has no pages, must have at least 1: allocate the pool before decoding")
    for dim in (0, 1):
        if kv_cache.stride(dim) % 8:
            raise ValueError(
                f"kv_cache has strides {kv_cache.stride()}, those of pages and tokens must be multiples of 8 "
                "elements (16 bytes): pad the pool"
            )


def _check_alignment(q: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None) -> None:
    if not (q.data_ptr() | kv_cache.data_ptr() | (0 if out is None else out.data_ptr())) % 16:
        return
    for name, tensor in (("q", q), ("kv_cache", kv_cache), ("out", out)):
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} starts at {tensor.data_ptr():#x}, must be aligned to 16 bytes: use .clone()"
            )


def check_device_values(
    kv_cache: torch.Tensor, block_table: torch.Tensor, cache_seqlens: torch.Tensor
) -> None:
    """Reads lengths and page ids back; ValueError for the first that is out of range. Synchronises."""
    page_size, limit = kv_cache.shape[1], block_table.shape[1] * kv_cache.shape[1]
    lengths = cache_seqlens.tolist()
    for i, length in enumerate(lengths):
        if not 0 <= length <= limit:
            raise ValueError(
                f"cache_seqlens[{i}] is {length}, must be in [0, {limit}] (max_pages * page_size): "
                "widen block_table or correct the length"
            )
    pages = -(-cache_seqlens // page_size)
    used = torch.arange(block_table.shape[1], device=block_table.device) < pages[:, None]
    bad = used & ((block_table < 0) | (block_table >= kv_cache.shape[0]))
    if bad.any():
        i, j = bad.nonzero()[0].tolist()
        raise ValueError(
            f"block_table[{i}, {j}] is {block_table[i, j].item()}, must be in [0, {kv_cache.shape[0] - 1}] "
            "(pages of kv_cache): correct the page table"
        )


def check_query_starts(cu_seqlens_q: torch.Tensor, total_q: int) -> None:
    """Reads where query tokens begin back; ValueError for the first that is out of order. Synchronises."""
    starts = cu_seqlens_q.tolist()
    for i, (start, least) in enumerate(zip(starts, [0, *starts], strict=False)):
        if not least <= start <= total_q or (i == 0 and start != 0):
            most = 0 if i == 0 else total_q
            raise ValueError(
                f"cu_seqlens_q[{i}] is {start}, must be in [{least}, {most}]: begin at 0, ascend, and end at "
                f"the {total_q} tokens of q"
            )
    if starts[-1] != total_q:
        raise ValueError(
            f"cu_seqlens_q ends at {starts[-1]}, must be the {total_q} tokens of q: cut q to them"
        )


@functools.cache
def _warn_portable(device: int) -> None:
    warnings.warn(
        f"{torch.cuda.get_device_name(device)} is not a Hopper GPU (sm_90): mla_decode runs the portable "
        "Triton kernel, correct but not what this project measures",
        stacklevel=4,
    )


def _decode_portable(q, kv_cache, block_table, cache_seqlens, scale, causal, out, cu_seqlens_q):
    from mla_kernels import portable

    _warn_portable(q.device.index)
    options = {"softmax_scale": scale, "causal": causal, "out": out, "cu_seqlens_q": cu_seqlens_q}
    return portable.mla_decode(q, kv_cache, block_table, cache_seqlens, **options)


def merge_partials(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Joins attention over disjoint parts of the same keys.

    Args:
        outs: (n, b, s_q, h_q, 512), each part's normalised result.
        lses: (n, b, h_q, s_q) fp32, natural log; -inf where a part saw nothing.

    Returns:
        out (b, s_q, h_q, 512) of outs' dtype and lse (b, h_q, s_q) fp32 of the whole.
    """
    if outs.dim() != 5 or lses.dim() != 4 or lses.shape != (*outs.shape[:2], outs.shape[3], outs.shape[2]):
        raise ValueError(
            f"outs {tuple(outs.shape)} and lses {tuple(lses.shape)} must be (n, b, s_q, h_q, d) and "
            "(n, b, h_q, s_q): stack the parts along a new first dimension"
        )
    lse = torch.logsumexp(lses.float(), dim=0)
    weights = torch.exp(lses.float() - torch.where(lse == -math.inf, 0.0, lse))
    weighted = outs.float() * weights.transpose(2, 3).unsqueeze(-1)
    return weighted.sum(0).to(outs.dtype), lse


@torch.library.custom_op("mla_kernels::decode", mutates_args=())
def _decode_op(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    cu_seqlens_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"softmax_scale": softmax_scale, "causal": causal, "cu_seqlens_q": cu_seqlens_q}
    return mla_decode(q, kv_cache, block_table, cache_seqlens, **options)


@_decode_op.register_fake
def _decode_fake(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal, cu_seqlens_q=None):
    out_shape, lse_shape = result_shapes(q)
    return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=torch.float32)
