"""The decode operator: check, choose a kernel, launch (kernels: ``cuda/``; the truth: ``reference.py``)."""

import ctypes
import functools
import math
import os
import warnings

import torch

from mla_kernels import launch
from mla_kernels.arguments import HEAD_DIM, HEAD_DIM_V, check_decode_arguments
from mla_kernels.compiler import KernelConfig
from mla_kernels.device import HOPPER, STILL_WORKS, DeviceUnavailable, capability
from mla_kernels.tuning import DecodeTuning, active_table

PAGE_SIZES = (64,)
BLOCKS = ("stream", "mma", "skeleton")

# Tensor cores truncate: a score summed in chains of 8 or 9 steps (bf16) comes out 8.5e-8 of itself too
# small on average, in chains of 4 or 5 (fp16) 4.2e-8 (LSE of 45, H200). A little more than that makes the
# worst row best (cuda/softmax.cuh, tests/test_truncation.py).
_TRUNCATION = {torch.bfloat16: 1.1e-7, torch.float16: 7e-8}


# What a launch looks up by what it has at hand; the answers come from tuning.active_table().
@functools.cache
def _config(dtype: torch.dtype, rows: int, work: str) -> KernelConfig:
    return active_table().of_rows(rows).kernel_config(_element(dtype), work)


@functools.cache
def _rows_for(query_rows: int) -> int:
    return active_table().serving(query_rows).rows


def _element(dtype: torch.dtype) -> str:
    return "bf16" if dtype == torch.bfloat16 else "fp16"


def kernel_config(dtype: torch.dtype, query_rows: int, work: str = "decode") -> KernelConfig:
    """The cubin that serves ``query_rows`` = s_q * h_q rows a sequence.

    ``work`` "stream", "mma" or "skeleton" is the building block of that kernel instead.
    """
    return _config(dtype, _rows_for(query_rows), work)


def shipped_configs() -> list[KernelConfig]:
    """Every instance that the operators can launch."""
    variants = [tuning for _, tuning in active_table().entries]
    return [tuning.kernel_config(element) for element in ("bf16", "fp16") for tuning in variants]


@functools.cache
def _group_size(row_blocks: int, sms: int) -> int:
    """Row blocks that walk the same KV side by side: as many as keep every SM busy: L2 serves them."""

    def busy(group: int) -> float:
        return row_blocks / (math.ceil(row_blocks / group) * group) * (sms // group * group / sms)

    return max(range(1, min(row_blocks, 8) + 1), key=lambda group: (round(busy(group), 3), group))


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
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Multi-head latent attention over a paged latent cache, absorbed form, ``s_q`` new tokens a sequence.

    Runs on torch's current stream without a host synchronisation or a plan step, so a CUDA graph that
    captured it may be replayed after ``cache_seqlens``, ``block_table``, ``q`` or the cache changed in place.

    Known defect: races where a sequence is split between CTAs can make a result wrong without an error
    (README, Limits; tests/test_rings.py).

    Args:
        q: (b, s_q, h_q, 576) bf16 or fp16, contiguous: 512 absorbed + 64 rotary columns.
        kv_cache: (num_pages, 64, 1, 576) or (num_pages, 64, 576), of q's dtype: the page pool.
        block_table: (b, max_pages) int32: pages of each sequence; entries past its length are not read.
        cache_seqlens: (b,) int32: tokens of each sequence, the new ones included.
        head_dim_v: 512, the columns of the cache that are averaged.
        softmax_scale: factor on q.k, > 0; 576 ** -0.5 if None.
        causal: row s sees positions < length - s_q + 1 + s; otherwise all.
        out: (b, s_q, h_q, 512), written if given.
        return_lse: False returns ``out`` alone.

    Returns:
        out (b, s_q, h_q, 512) of q's dtype and lse (b, h_q, s_q) fp32, natural log; 0 and -inf where a row
        sees nothing. A sequence with a length outside [0, max_pages * 64] or a page id outside the pool: NaN.

    Raises:
        TypeError, ValueError: an argument of another type, shape, stride or device; with
            MLA_KERNELS_CHECK=1 also lengths and page ids out of range (this synchronises).
        DeviceUnavailable: the tensors are not on a CUDA device.
    """
    check_decode_arguments(q, kv_cache, block_table, cache_seqlens, head_dim_v=head_dim_v, out=out)
    scale = check_softmax_scale(softmax_scale)
    if torch.compiler.is_compiling():
        result, lse = torch.ops.mla_kernels.decode(q, kv_cache, block_table, cache_seqlens, scale, causal)
        result = result if out is None else out.copy_(result)
        return (result, lse) if return_lse else result
    _check_cuda(q)
    if os.environ.get("MLA_KERNELS_CHECK") == "1":
        check_device_values(kv_cache, block_table, cache_seqlens)
    if capability(q.device.index) != HOPPER:
        return _decode_portable(q, kv_cache, block_table, cache_seqlens, scale, causal, out, return_lse)
    _check_native(q, kv_cache, out)
    b, s_q, h_q, _ = q.shape
    if out is None:
        out = torch.empty((b, s_q, h_q, HEAD_DIM_V), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h_q, s_q), dtype=torch.float32, device=q.device)
    if b:
        config = kernel_config(q.dtype, s_q * h_q)
        _launch(config, q, kv_cache, block_table, cache_seqlens, scale, causal, out, lse)
    return (out, lse) if return_lse else out


def decode_tuned(
    tuning: DecodeTuning,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    causal: bool = False,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mla_decode`` by the kernel that ``tuning`` says, whatever the table would choose: for the tuner."""
    check_decode_arguments(q, kv_cache, block_table, cache_seqlens, out=out)
    _check_cuda(q)
    _check_native(q, kv_cache, out)
    b, s_q, h_q, _ = q.shape
    lse = torch.empty((b, h_q, s_q), dtype=torch.float32, device=q.device)
    config = tuning.kernel_config(_element(q.dtype))
    _launch(config, q, kv_cache, block_table, cache_seqlens, HEAD_DIM**-0.5, causal, out, lse)
    return out, lse


def decode_block(
    work: str,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
) -> None:
    """Runs one building block of the kernel that would serve these tensors; what it computes has no meaning.

    ``work``: "stream", the paged loads without arithmetic; "mma", the WGMMA sequence without loads;
    "skeleton", both without softmax and the exchange of P. Grid, schedule and epilogue are the kernel's own.
    """
    if work not in BLOCKS:
        raise ValueError(f"work is {work!r}, must be one of {', '.join(BLOCKS)}")
    check_decode_arguments(q, kv_cache, block_table, cache_seqlens)
    _check_cuda(q)
    _check_native(q, kv_cache, None)
    b, s_q, h_q, _ = q.shape
    out = torch.empty((b, s_q, h_q, HEAD_DIM_V), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h_q, s_q), dtype=torch.float32, device=q.device)
    config = kernel_config(q.dtype, s_q * h_q, work)
    _launch(config, q, kv_cache, block_table, cache_seqlens, HEAD_DIM**-0.5, False, out, lse)


def _launch(config, q, kv_cache, block_table, cache_seqlens, scale, causal, out, lse) -> None:
    device = q.device.index
    b, s_q, h_q, _ = q.shape
    kernel = launch.load(config, "mla_decode", device, persistent=True)
    rows = dict(config.defines)["MLA_ROWS"]
    row_blocks = -(-s_q * h_q // rows)
    sms = launch.sm_count(device)
    group = _group_size(row_blocks, sms)
    grid = sms // group * group
    with torch.cuda.device(device):
        launch.bind(device)
        stream = launch.current_stream(device)
        partials = torch.empty(2 * sms * rows * (HEAD_DIM_V + 4), dtype=torch.float32, device=q.device)
        params = launch.DecodeParams(
            kv_map=launch.kv_tensor_map(kv_cache),
            q_map=launch.query_tensor_map(q, rows),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            block_table=block_table.data_ptr(),
            cache_seqlens=cache_seqlens.data_ptr(),
            partials=partials.data_ptr(),
            arrivals=launch.arrivals(device).address(stream),
            softmax_scale_log2=scale * math.log2(math.e) * (1 + _TRUNCATION[q.dtype]),
            b=b,
            s_q=s_q,
            h_q=h_q,
            num_pages=kv_cache.shape[0],
            max_pages=block_table.shape[1],
            table_stride=block_table.stride(0),
            row_blocks=row_blocks,
            group=group,
            row_groups=-(-row_blocks // group),
            causal=bool(causal),
        )
        kernel.launch(grid, stream, (ctypes.c_void_p * 1)(ctypes.addressof(params)))


def check_softmax_scale(softmax_scale: float | None) -> float:
    """The scale to use. Raises ValueError unless it is finite and positive."""
    if softmax_scale is None:
        return HEAD_DIM**-0.5
    if not isinstance(softmax_scale, int | float):
        raise TypeError(f"softmax_scale is a {type(softmax_scale).__name__}, must be a number or None")
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ValueError(f"softmax_scale is {softmax_scale}, must be finite and > 0: fold a sign into q")
    return float(softmax_scale)


def _check_cuda(q: torch.Tensor) -> None:
    if not q.is_cuda:
        raise DeviceUnavailable(f"q is on {q.device}: mla_decode needs a CUDA device; {STILL_WORKS}")


def _check_native(q: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor | None) -> None:
    if kv_cache.shape[1] not in PAGE_SIZES:
        known = " or ".join(map(str, PAGE_SIZES))
        raise ValueError(
            f"kv_cache has pages of {kv_cache.shape[1]} tokens, must be {known}: lay the cache out with "
            "that page size, or call mla_kernels.portable.mla_decode"
        )
    if kv_cache.shape[0] == 0:
        raise ValueError("kv_cache has no pages, must have at least 1: allocate the pool before decoding")
    for name, tensor in (("q", q), ("kv_cache", kv_cache), ("out", out)):
        if tensor is not None and tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} starts at {tensor.data_ptr():#x}, must be aligned to 16 bytes: use .clone()"
            )
    for dim in (0, 1):
        if kv_cache.stride(dim) % 8:
            raise ValueError(
                f"kv_cache has strides {kv_cache.stride()}, those of pages and tokens must be multiples of 8 "
                "elements (16 bytes): pad the pool"
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


@functools.cache
def _warn_portable(device: int) -> None:
    warnings.warn(
        f"{torch.cuda.get_device_name(device)} is not a Hopper GPU (sm_90): mla_decode runs the portable "
        "Triton kernel, correct but not what this project measures",
        stacklevel=4,
    )


def _decode_portable(q, kv_cache, block_table, cache_seqlens, scale, causal, out, return_lse):
    from mla_kernels import portable

    _warn_portable(q.device.index)
    return portable.mla_decode(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        softmax_scale=scale,
        causal=causal,
        out=out,
        return_lse=return_lse,
    )


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
) -> tuple[torch.Tensor, torch.Tensor]:
    return mla_decode(q, kv_cache, block_table, cache_seqlens, softmax_scale=softmax_scale, causal=causal)


@_decode_op.register_fake
def _decode_fake(q, kv_cache, block_table, cache_seqlens, softmax_scale, causal):
    b, s_q, h_q, _ = q.shape
    return q.new_empty((b, s_q, h_q, HEAD_DIM_V)), q.new_empty((b, h_q, s_q), dtype=torch.float32)
